package hrl

import (
	"path/filepath"
	"slices"
)

// A Mark is a place in a log: behind the frame with this number.
type Mark struct {
	Incarnation uint64 `json:"incarnation"`
	Seq         uint64 `json:"seq"`
}

// Mark is the place behind the cut.
func (c *CutInfo) Mark() Mark { return Mark{c.Incarnation, c.Seq} }

func (m Mark) before(o Mark) bool {
	return m.Incarnation < o.Incarnation || m.Incarnation == o.Incarnation && m.Seq < o.Seq
}

// Release says that nothing will need what the log has before the mark any more:
// a point that holds it was acknowledged, and that is on record here (rule R3).
// Segments that lie wholly before that of the mark's frame become spares or are removed, oldest first,
// once their writes have ended on the disk and nobody reads them (RULES C3).
//
// A spare's old header is overwritten first. After a kill its frames therefore
// do not count; after a power cut they may, as evidence of old changes, which is
// true.
func (l *Log) Release(m Mark) {
	l.mu.Lock()
	if l.needless.before(m) {
		l.needless = m
	}
	l.mu.Unlock()
	l.keeper.kick()
}

// OpenBehind opens the segments that hold what was logged behind the mark, for
// reading while the log goes on: of this incarnation what had been appended by then is
// seen, no more, and in the mark's own segment what lies before it is not, as far as the
// log knows where to begin. So the time it takes is for what lies behind the mark.
// Until the caller closes them, no segment is given up, and none released that
// may be among them.
func (l *Log) OpenBehind(m Mark) (*Segments, error) {
	r := &Segments{fs: l.fs}
	l.mu.Lock()
	all := append([]*segment(nil), l.sealed...)
	if l.tail != nil && l.tail.pre == nil {
		all = append(all, l.tail)
	}
	var open []*Segment
	for i, s := range all {
		if !s.empty && !l.coversLocked(m, s, nextOf(all, i)) {
			open = append(open, &Segment{Path: s.path, known: l.stretchLocked(s, m)})
		}
	}
	l.readers++
	l.reading = append(l.reading, m)
	r.closed = func() {
		l.mu.Lock()
		l.readers--
		l.reading = slices.Delete(l.reading, slices.Index(l.reading, m), slices.Index(l.reading, m)+1)
		l.mu.Unlock()
		l.keeper.kick()
	}
	l.mu.Unlock()
	for _, s := range open {
		if err := r.addSegment(s, false); err != nil {
			r.Close()
			return nil, err
		}
	}
	r.sort()
	if err := r.catchUp(); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func nextOf(all []*segment, i int) *segment {
	if i+1 < len(all) {
		return all[i+1]
	}
	return nil
}

// coversLocked reports whether s, which next follows, lies wholly before the
// segment that holds the mark's own frame: that one stays, so that a reader who
// does not find it knows that something is missing. Of a segment of an earlier
// incarnation only the number that the next one begins with is known.
func (l *Log) coversLocked(m Mark, s, next *segment) bool {
	switch inc := s.head.incarnation; {
	case s.empty || inc < m.Incarnation:
		return true
	case inc > m.Incarnation:
		return false
	case inc == l.meta.incarnation:
		return s.last < m.Seq
	default:
		return next != nil && next.head.incarnation == inc && next.head.first <= m.Seq
	}
}

// release makes spares of the segments that Release has named, or removes them.
func (k *keeper) release() {
	l := k.l
	for {
		l.mu.Lock()
		if l.readers > len(l.reading) || len(l.sealed) == 0 {
			l.mu.Unlock()
			return // the recovery reads all
		}
		limit := l.needless
		for _, m := range l.reading {
			if m.before(limit) {
				limit = m
			}
		}
		s, next := l.sealed[0], l.tail
		if len(l.sealed) > 1 {
			next = l.sealed[1]
		}
		if s.f != nil || s.unfinished.Load() > 0 || s.outstanding > 0 || !l.coversLocked(limit, s, next) {
			l.mu.Unlock()
			return
		}
		n := copy(l.sealed, l.sealed[1:])
		l.sealed[n] = nil
		l.sealed = l.sealed[:n]
		l.mu.Unlock()
		if l.forgetBefore(k.oldest()) != nil {
			l.mu.Lock()
			l.sealed = slices.Insert(l.sealed, 0, s)
			l.mu.Unlock()
			return // there will be another time
		}
		l.mu.Lock()
		wanted := len(l.spares) < l.opt.Spares && s.size == l.opt.SegmentBytes
		l.stats.Released++
		l.mu.Unlock()
		if !wanted || !k.blank(s.path) {
			// One that stays is found by the next Open, and what it says is true.
			_ = l.fs.Remove(s.path)
		}
	}
}

// blank makes a spare of a segment whose frames are needed no more.
func (k *keeper) blank(path string) bool {
	l := k.l
	f, err := l.fs.Edit(path)
	if err != nil {
		return false
	}
	size, err := f.Size()
	if err == nil && size == l.opt.SegmentBytes {
		var none [headerBytes]byte
		_, err = f.WriteAt(none[:], 0)
	}
	if err != nil || size != l.opt.SegmentBytes {
		f.Close()
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spares = append(l.spares, &segment{path: filepath.Clean(path), size: size, f: f})
	l.room.Broadcast()
	return true
}
