package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// A voidError says why what was measured does not count: the server did not do
// all of its work.
type voidError struct{ why string }

func (e *voidError) Error() string { return e.why }

// statsLimit is how long a server may take to print its statistics.
const statsLimit = 10 * time.Second

// checkGaps asks a running server of ours whether any block became a gap.
func checkGaps(ctx context.Context, p *process) error {
	if err := p.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		return fmt.Errorf("%s: ask for its statistics: %w", p.name, err)
	}
	deadline := time.Now().Add(statsLimit)
	for {
		if gaps, ok := gapBytes(p.stderr.bytes()); ok {
			if gaps != 0 {
				return &voidError{fmt.Sprintf("%d bytes became gaps", gaps)}
			}
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%s ended before it was told to%s", p.name, quoted(p.stderr.bytes()))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollEvery):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s prints no statistics on SIGUSR1", p.name)
		}
	}
}

// gapBytes finds the statistics, a line of JSON, in what a server has printed.
func gapBytes(stderr []byte) (int64, bool) {
	for line := range bytes.Lines(stderr) {
		var s struct {
			Filter *struct {
				GapBytes *int64 `json:"gap_bytes"`
			} `json:"filter"`
		}
		if !bytes.HasSuffix(line, []byte("\n")) || json.Unmarshal(line, &s) != nil {
			continue
		}
		if s.Filter != nil && s.Filter.GapBytes != nil {
			return *s.Filter.GapBytes, true
		}
	}
	return 0, false
}

// checkLog replays the log onto start, the image as it was before, and compares
// that with the image as it is. It gives a *voidError where the log is not the
// whole truth.
func checkLog(ctx context.Context, binary, log, start, image string) error {
	if err := ours(ctx, binary, "log", "replay", log, "--onto", start); err != nil {
		return err
	}
	return ours(ctx, binary, "disk", "compare", start, image)
}

// exitDamaged is our exit status for data that is damaged, missing or different.
const exitDamaged = 6

func ours(ctx context.Context, binary string, args ...string) error {
	cmd := exec.CommandContext(ctx, binary, args...)
	own(cmd)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit) && exit.ExitCode() == exitDamaged:
		return &voidError{fmt.Sprintf("%s %s%s", args[0], args[1], quoted(out))}
	}
	return fmt.Errorf("%s %s: %w%s", args[0], args[1], err, quoted(out))
}

// copyFile makes to the same as from.
func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
