package stamp

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// Kind is what can be said of an image.
type Kind string

// The kinds.
const (
	Same    Kind = "same"    // as we left it
	Changed Kind = "changed" // by somebody else, since
	Unknown Kind = "unknown" // nothing is known of it
)

// Verdict is what a stamp says of an image.
type Verdict struct {
	Kind Kind `json:"kind"`
	// Compare says that the whole disk has to be compared, durably noted
	// before Begin. It is set for an image that was changed, and for a file
	// nothing is known of; not for a device, which is Unknown for ever.
	Compare bool   `json:"compare"`
	Reason  string `json:"reason,omitempty"`
}

func changed(format string, args ...any) Verdict {
	return Verdict{Kind: Changed, Compare: true, Reason: fmt.Sprintf(format, args...)}
}

const (
	period = 5 * time.Second
	// slack is how much later than the last heartbeat the image may have been
	// changed by ourselves.
	slack = 10 * time.Second
	edge  = 1 << 20 // bytes at either end that are digested
)

// facts are what a stamp compares.
type facts struct {
	regular bool
	inode   uint64
	size    int64
	mtime   time.Time
}

func factsOf(f *os.File) (facts, error) {
	st, err := f.Stat()
	if err != nil {
		return facts{}, err
	}
	out := facts{regular: st.Mode().IsRegular(), size: st.Size(), mtime: st.ModTime()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		out.inode = sys.Ino
	}
	return out, nil
}

// digest reads both ends of an image.
func digest(f io.ReaderAt, size int64) (first, last [sha256.Size]byte, err error) {
	n := min(size, edge)
	if first, err = sum(f, 0, n); err == nil {
		last, err = sum(f, size-n, n)
	}
	return first, last, err
}

func sum(f io.ReaderAt, off, n int64) (d [sha256.Size]byte, err error) {
	h := sha256.New()
	if got, err := io.Copy(h, io.NewSectionReader(f, off, n)); err != nil {
		return d, err
	} else if got != n {
		return d, io.ErrUnexpectedEOF
	}
	h.Sum(d[:0])
	return d, nil
}

// judge compares an image with the record of it.
func judge(r *record, f *os.File, now facts) (Verdict, error) {
	if r.state == stateOpen {
		late := now.mtime.Sub(r.beat)
		switch {
		case now.inode != r.inode:
			return changed("it is another file than the one that was in use and not closed"), nil
		case late > slack:
			return changed("it was changed %s after we last had it in use", late.Round(time.Second)), nil
		}
		return Verdict{Kind: Same}, nil
	}
	switch {
	case now.size != r.size:
		return changed("it was closed with %d bytes and has %d", r.size, now.size), nil
	case !now.mtime.Equal(r.mtime):
		return changed("it was last changed at %s, not at %s as when it was closed",
			now.mtime.UTC().Format(time.RFC3339Nano), r.mtime.UTC().Format(time.RFC3339Nano)), nil
	}
	first, last, err := digest(f, now.size)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return changed("it has shrunk while it was read"), nil
	case err != nil:
		// A copy goes on where something cannot be read (RULES G5).
		return changed("its ends cannot be read to see whether it is what it was: %v", err), nil
	case first != r.first:
		return changed("its first MiB is not what it was when it was closed"), nil
	case last != r.last:
		return changed("its last MiB is not what it was when it was closed"), nil
	}
	return Verdict{Kind: Same}, nil
}
