package transfer

import (
	"bytes"
	"fmt"

	"afterimage/blockdev"
)

// span is one window's worth of memory, and the requests on it.
type span struct {
	buf  []byte
	reqs []blockdev.Request
	ptrs []*blockdev.Request
}

func newSpan() *span {
	// At the worst a copy alternates between zeroes and data.
	return &span{buf: blockdev.AlignedBuf(window), reqs: make([]blockdev.Request, 0, window/zeroUnit)}
}

func (s *span) add(r blockdev.Request) { s.reqs = append(s.reqs, r) }

// do performs the requests that were added, and returns the error of the
// first that failed.
func (s *span) do(dev blockdev.Device) error {
	s.ptrs = s.ptrs[:0]
	for i := range s.reqs {
		s.ptrs = append(s.ptrs, &s.reqs[i])
	}
	dev.Do(s.ptrs)
	var err error
	for _, r := range s.ptrs {
		if r.Err != nil {
			err = fmt.Errorf("%s %s of %s: %w", r.Op, r.Extent(), dev.Info().Name, r.Err)
			break
		}
	}
	s.reqs = s.reqs[:0]
	return err
}

// read fills the span's memory with e, at most a window, and returns it.
func (s *span) read(dev blockdev.Device, e blockdev.Extent) ([]byte, error) {
	for off := int64(0); off < e.Len; off += requestMax {
		n := min(requestMax, e.Len-off)
		s.add(blockdev.Request{Op: blockdev.OpRead, Off: e.Off + off, Len: n, Buf: s.buf[off : off+n]})
	}
	return s.buf[:e.Len], s.do(dev)
}

var zeroes [zeroUnit]byte

// isZero says whether p, at most zeroUnit, is all zeroes.
func isZero(p []byte) bool { return bytes.Equal(p, zeroes[:len(p)]) }

// roundUp returns off or the next multiple of align, a power of two, that is
// not past size.
func roundUp(off, align, size int64) int64 {
	if off > size-align {
		return size
	}
	return (off + align - 1) &^ (align - 1)
}
