package hrl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// A Position names a cut of a VM's log. The cut ended the epoch; positions of
// one log have an order, and none is given twice (rule R8).
type Position struct {
	Incarnation uint64
	Epoch       uint64 // that the cut ended
}

// Before reports whether the position comes before o.
func (p Position) Before(o Position) bool {
	if p.Incarnation != o.Incarnation {
		return p.Incarnation < o.Incarnation
	}
	return p.Epoch < o.Epoch
}

func (p Position) String() string { return fmt.Sprintf("%d.%d", p.Incarnation, p.Epoch) }

// A Span is what was logged behind the cut P, up to the cut Q.
type Span struct {
	P, Q Position
	// From is a cut behind P from which on the log is read, zero: P itself.
	// Whoever gives it vouches that all that changed between the two has been
	// copied behind it.
	From Position
	// After is the sequence number of the cut P, or From, 0 if it is not known.
	// With it the segment that holds this cut may be gone: what is left of the
	// cut's incarnation must then begin right behind it, and whoever gives it
	// vouches that what is gone of that incarnation had come before the cut (a log
	// releases nothing else).
	After uint64
}

// ErrNoCut says that segments do not hold a cut.
var ErrNoCut = errors.New("the log has no cut")

// ErrTooOld says, beside ErrNoCut, that it is the cut at which a span begins.
var ErrTooOld = errors.New("the log does not reach back so far")

// A piece is the part of a segment that lies in a span.
type piece struct {
	s         *Segment
	from, end int64   // bytes into the segment; both are between frames
	last      int64   // bytes of the frame that ends at end
	sizes     []int64 // of each disk at end
}

// whole is all that counts of a segment.
func whole(s *Segment) piece {
	p := piece{s: s, from: s.from, end: s.End, last: int64(s.prev), sizes: make([]int64, len(s.Disks))}
	for i, d := range s.Disks {
		p.sizes[i] = d.Size
	}
	return p
}

// A foundCut is a cut frame and where it lies.
type foundCut struct {
	index int // of its segment
	piece     // from where the segment is read to the cut's end
	epoch uint64
	time  time.Time
	kind  CutKind
}

// note takes down a cut whose frame of span bytes ends at end.
func (c *foundCut) note(p *cutPayload, end, span int64) {
	c.end, c.last = end, span
	c.epoch, c.time, c.kind = p.epoch, time.Unix(0, p.time), p.kind
}

// findCut looks for the cut at a position.
func (r *Segments) findCut(at Position) (*foundCut, error) {
	for i, s := range r.Segments {
		if s.Incarnation != at.Incarnation || at.Epoch < s.firstCut || at.Epoch > s.lastCut {
			continue
		}
		if s.newest.epoch == at.Epoch {
			c := s.newest // the usual one
			c.index, c.s, c.from = i, s, s.from
			return &c, nil
		}
		c := foundCut{index: i, piece: piece{s: s, from: s.from, sizes: s.startSizes()}}
		want := func(h *frameHeader) bool {
			return h.kind == KindCut || h.kind == KindDisk || h.kind == KindResize
		}
		w := window{r: r, s: s}
		for off := s.from; off < s.End; {
			h, p, err := w.frame(off, s.End, false, want)
			if err != nil {
				return nil, &CorruptError{s.Path, off, err}
			}
			off += h.span()
			switch h.kind {
			case KindDisk:
				c.sizes = append(c.sizes, h.len)
			case KindResize:
				c.sizes[h.disk] = int64(binary.LittleEndian.Uint64(p))
			case KindCut:
				var cut cutPayload
				if err := cut.decode(p); err != nil {
					return nil, &CorruptError{s.Path, off - h.span(), err}
				}
				if cut.epoch == at.Epoch {
					c.note(&cut, off, h.span())
					return &c, nil
				}
			}
		}
	}
	return nil, fmt.Errorf("%w %v", ErrNoCut, at)
}

// pieces returns what lies in the span, oldest first, and the cuts that bound
// it; p, which is that of From if that is given, is nil where its segment is gone,
// or P is zero. Anything missing or
// damaged between the two is an error.
func (r *Segments) pieces(span Span) (out []piece, p, q *foundCut, err error) {
	begin := span.P
	if span.From != (Position{}) {
		begin = span.From
	}
	if !begin.Before(span.Q) {
		return nil, nil, nil, fmt.Errorf("no span: cut %v does not come before cut %v", begin, span.Q)
	}
	for _, s := range r.Segments {
		if s.Damage != nil && s.head.state != segmentInUse {
			return nil, nil, nil, s.Damage // its place is not known: it may lie in the span
		}
	}
	if q, err = r.findCut(span.Q); err != nil {
		return nil, nil, nil, errors.Join(err, r.damage())
	}
	first := 0
	if begin != (Position{}) {
		p, err = r.findCut(begin)
		switch {
		case err == nil:
			first = p.index
		case !errors.Is(err, ErrNoCut):
			return nil, nil, nil, err
		default:
			if first = r.behind(begin, span.After); first < 0 {
				return nil, nil, nil, errors.Join(ErrTooOld, err, r.damage())
			}
		}
	}
	// What follows q in its segment does not matter, damage included.
	tail := *q.s
	tail.Damage = nil
	run := append([]*Segment(nil), r.Segments[first:q.index+1]...)
	run[len(run)-1] = &tail
	for _, s := range run {
		if s.Damage != nil {
			return nil, nil, nil, s.Damage
		}
	}
	for i, s := range run {
		if s.from != headerBytes && (i > 0 || p == nil) {
			return nil, nil, nil, fmt.Errorf("%w %v, behind which the segments were opened", ErrNoCut, begin)
		}
	}
	if f := (&Segments{Segments: run}).Verify(); len(f) > 0 {
		return nil, nil, nil, &CorruptError{f[0].Segment, f[0].Off, errors.New(f[0].Problem)}
	}
	for _, s := range r.Segments[first:q.index] {
		out = append(out, whole(s))
	}
	out = append(out, q.piece)
	if p != nil {
		out[0].from = p.end
	}
	return out, p, q, nil
}

// damage returns the first damage of any segment: where a cut is not found, that
// is the likely reason.
func (r *Segments) damage() error {
	for _, s := range r.Segments {
		if s.Damage != nil {
			return s.Damage
		}
	}
	return nil
}

// behind returns the index of the segment that begins right behind the cut at p
// with the sequence number after, whose own segment is gone, or -1.
func (r *Segments) behind(p Position, after uint64) int {
	if after == 0 {
		return -1
	}
	of := false // there are segments of P's incarnation
	for i, s := range r.Segments {
		switch {
		case s.Incarnation == p.Incarnation:
			if s.First == after+1 {
				return i
			}
			of = true
		case s.Incarnation > p.Incarnation:
			if of {
				return -1
			}
			return i
		}
	}
	return -1
}

// LatestIn is Latest for what lies in the span alone.
func (r *Segments) LatestIn(span Span, disk string, visit func(*Version) error) (LatestStats, error) {
	pieces, _, _, err := r.pieces(span)
	if err != nil {
		return LatestStats{}, err
	}
	return r.latest(pieces, disk, visit)
}

// disk returns the number by which the piece's frames know a disk.
func (p *piece) disk(name string) (DiskID, bool) {
	id, ok := p.s.Disk(name)
	return id, ok && int(id) < len(p.sizes)
}
