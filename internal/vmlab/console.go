package vmlab

import (
	"bytes"
	"regexp"
	"slices"
	"sync"
)

// A console keeps what the guest's kernel says, and looks for what no kernel
// says that is well.
type console struct {
	// mu guards the rest.
	mu      sync.Mutex
	text    []byte // the last consoleKeep bytes or more
	line    []byte // the one that has not ended
	trouble []string
}

const (
	consoleKeep = 256 << 10 // bytes
	troubleKeep = 20        // lines
)

// A kernel on a processor that stands still for seconds, as one of QEMU's may
// where others want this host's too, thinks that it hangs. That is no trouble.
var (
	troubleLine = regexp.MustCompile(`Kernel panic - |BUG: |Oops: |Oops\[|general protection fault|kernel BUG at |Unable to handle kernel|Unable to mount root`)
	slowLine    = regexp.MustCompile(`BUG: (soft lockup|workqueue lockup)`)
)

// Write takes the output of the guest's serial port.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, p...)
	if len(c.text) > 2*consoleKeep {
		c.text = slices.Delete(c.text, 0, len(c.text)-consoleKeep)
	}
	for rest := p; len(rest) > 0; {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			c.line = append(c.line, rest...)
			if len(c.line) > consoleKeep {
				c.endLineLocked()
			}
			break
		}
		c.line = append(c.line, rest[:i]...)
		c.endLineLocked()
		rest = rest[i+1:]
	}
	return len(p), nil
}

func (c *console) endLineLocked() {
	if troubleLine.Match(c.line) && !slowLine.Match(c.line) && len(c.trouble) < troubleKeep {
		c.trouble = append(c.trouble, string(bytes.TrimRight(c.line, "\r")))
	}
	c.line = c.line[:0]
}

// troubles are the lines by which the kernel has reported that it is broken.
func (c *console) troubles() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.trouble)
}

// String is what was said, without the beginning if it was much.
func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(bytes.ReplaceAll(c.text, []byte("\r\n"), []byte("\n")))
}
