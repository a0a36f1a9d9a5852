package nbd

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"afterimage/blockdev"
)

func TestWireError(t *testing.T) {
	for _, c := range []struct {
		op    blockdev.Op
		flags blockdev.Flags
		err   error
		want  uint32
	}{
		{blockdev.OpRead, 0, nil, 0},
		{blockdev.OpWrite, 0, blockdev.ErrReadOnly, 1},
		{blockdev.OpWrite, 0, syscall.EROFS, 1},
		{blockdev.OpRead, 0, errors.New("something"), 5},
		{blockdev.OpRead, 0, syscall.EIO, 5},
		{blockdev.OpFlush, 0, syscall.ENXIO, 5},
		{blockdev.OpWrite, 0, syscall.ENOMEM, 12},
		{blockdev.OpRead, 0, blockdev.ErrBounds, 22},
		{blockdev.OpTrim, 0, blockdev.ErrBounds, 22},
		{blockdev.OpWrite, 0, blockdev.ErrAlignment, 22},
		{blockdev.OpWriteZeroes, 0, blockdev.ErrNotSupported, 22},
		{blockdev.OpWrite, 0, blockdev.ErrBounds, 28},
		{blockdev.OpWriteZeroes, 0, blockdev.ErrBounds, 28},
		{blockdev.OpWrite, 0, syscall.ENOSPC, 28},
		{blockdev.OpWrite, 0, syscall.EDQUOT, 28},
		{blockdev.OpWrite, 0, syscall.EFBIG, 28},
		{blockdev.OpRead, 0, syscall.EOVERFLOW, 75},
		{blockdev.OpWriteZeroes, blockdev.FlagFastZero, blockdev.ErrNotSupported, 95},
		{blockdev.OpWrite, 0, blockdev.ErrGone, 108},
		{blockdev.OpWrite, 0, blockdev.ErrClosed, 108},
	} {
		r := &blockdev.Request{Op: c.op, Flags: c.flags, Err: c.err}
		if c.err != nil {
			r.Err = fmt.Errorf("disk.raw: %w", c.err)
		}
		if got := wireError(r); got != c.want {
			t.Errorf("%s, %v: %d, want %d", c.op, c.err, got, c.want)
		}
	}
	for code := range uint32(200) {
		if err := fromWire(code); (err == nil) != (code == 0) {
			t.Errorf("%d: %v", code, err)
		}
	}
}

// partlyBroken fails what begins at an odd block of 512 bytes, and completes the
// requests of a batch together, last first.
type partlyBroken struct{ nullQueue }

func (q *partlyBroken) Submit(reqs []*blockdev.Request) {
	var turned []*blockdev.Request
	for i := len(reqs) - 1; i >= 0; i-- {
		r := reqs[i]
		for j := range r.Buf {
			r.Buf[j] = byte(r.Off / 512)
		}
		if r.Off/512%2 == 1 {
			r.Err = fmt.Errorf("the medium: %w", syscall.EIO)
		}
		turned = append(turned, r)
	}
	reqs[0].Owner.Complete(turned)
}

// TestDiskErrors: replies with and without data lie side by side.
func TestDiskErrors(t *testing.T) {
	s := quiet()
	add(t, s, Export{Queue: &partlyBroken{nullQueue{1 << 20}}})
	nc := transmission(t, serve(t, s), "")
	var say []byte
	const n = 100
	for i := range uint64(n) {
		say = append(say, command(request{cmd: cmdRead, cookie: i, off: i * 512, length: 700})...)
	}
	write(t, nc, say)
	seen := make(map[uint64]bool)
	for range n {
		cookie, code, data := reply(t, nc, 700)
		if seen[cookie] || cookie >= n {
			t.Fatalf("a strange answer to %d", cookie)
		}
		seen[cookie] = true
		switch {
		case cookie%2 == 1 && code != wireIO:
			t.Fatalf("request %d: error %d", cookie, code)
		case cookie%2 == 0 && (code != wireOK || data[0] != byte(cookie) || data[699] != byte(cookie)):
			t.Fatalf("request %d: error %d, wrong content", cookie, code)
		}
	}
	write(t, nc, command(request{cmd: cmdDisc}))
	wantEOF(t, nc)
}
