package hrl

import (
	"fmt"
	"hash/crc32"
	"io"
)

const (
	// scanChunk is how much is read at once.
	scanChunk = 1 << 20
)

// window is a piece of a segment in memory. It moves up or down as frames are
// asked for, so memory is a constant whatever the segment's size.
type window struct {
	r      *Segments
	s      *Segment
	off, n int64       // what r.buf holds
	h      frameHeader // of the last frame read; here so that it need not be allocated
}

// load sees to it that [off, off+n) is in memory and returns it. With down set
// what lies before is read ahead, else what lies behind.
func (w *window) load(off, n int64, down bool) ([]byte, error) {
	if off < w.off || off+n > w.off+w.n {
		lo, hi := off, min(w.s.limit, max(off+scanChunk, off+n))
		if down {
			lo, hi = max(w.s.from, min(off, off+n-scanChunk)), off+n
		}
		if int64(len(w.r.buf)) < hi-lo {
			w.r.buf = make([]byte, max(hi-lo, scanChunk))
		}
		w.n = 0
		got, err := w.s.f.ReadAt(w.r.buf[:hi-lo], lo)
		w.off, w.n = lo, int64(got)
		if off+n > lo+int64(got) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	at := off - w.off
	return w.r.buf[at : at+n : at+n], nil
}

// frame reads and checks the frame at off; the payload only if want is nil or
// says so for the header.
func (w *window) frame(off, limit int64, down bool, want func(*frameHeader) bool) (*frameHeader, []byte, error) {
	h := &w.h
	if off+frameBytes > limit {
		return h, nil, io.ErrUnexpectedEOF
	}
	b, err := w.load(off, frameBytes, down)
	if err != nil {
		return h, nil, err
	}
	if err := h.decode(b, w.s.seed); err != nil {
		return h, nil, err
	}
	if h.span() > limit-off {
		return h, nil, fmt.Errorf("frame header: a %s frame of %d bytes does not fit", h.kind, h.span())
	}
	if want != nil && !want(h) {
		return h, nil, nil
	}
	b, err = w.load(off, h.span(), down)
	if err != nil {
		return h, nil, err
	}
	p := b[frameBytes : frameBytes+h.payload : frameBytes+h.payload]
	if crc32.Checksum(p, castagnoli) != h.sum {
		return h, nil, fmt.Errorf("payload of %s frame %d: %w", h.kind, h.seq, errChecksum)
	}
	return h, p, nil
}
