package blockdev

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// handle is a file descriptor that counts its users. The number is given back
// to the kernel when it is closed and nobody uses it any more, so no request
// can ever reach a file that was opened later under the same number. It costs
// two atomic additions a use, and a close never waits for a hung request.
type handle struct {
	fd   int
	refs atomic.Int64 // users; plus handleClosing or handleClosed
}

const (
	handleClosing = 1 << 40 // close was called; the last user closes
	handleClosed  = 1 << 41 // the descriptor is gone
)

// acquire reports whether fd may be used; if so, until release.
func (h *handle) acquire() bool {
	if h.refs.Add(1) < handleClosing {
		return true
	}
	h.release()
	return false
}

func (h *handle) release() {
	if h.refs.Add(-1) == handleClosing {
		h.closeIfUnused()
	}
}

// closeIfUnused closes the descriptor, unless somebody uses it or it is closed.
func (h *handle) closeIfUnused() error {
	if !h.refs.CompareAndSwap(handleClosing, handleClosed) {
		return nil
	}
	return unix.Close(h.fd)
}

// close reports whether it was the first, and the error of closing if that
// happened at once.
func (h *handle) close() (first bool, err error) {
	for {
		n := h.refs.Load()
		if n >= handleClosing {
			return false, nil
		}
		if h.refs.CompareAndSwap(n, n+handleClosing) {
			return true, h.closeIfUnused()
		}
	}
}

// ignoringEINTR repeats a system call that a signal interrupted. The Go runtime
// sends signals to its own threads.
func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
