package hot

import "fmt"

// wideExtents is how many extents a request touches at most to be counted into
// each; one that touches more is counted into a range (RULES D6).
const wideExtents = 64

// span tells which extents a range of bytes touches.
func (m *Map) span(off, length int64) run {
	first := off >> m.shift
	return run{first, (off+length-1)>>m.shift - first + 1}
}

// Enter counts a writer into every extent that the range touches, which lies on
// the disk (what Grow adds does when it has returned), and reports whether all of them are hot: the disk may then be
// written. If not, Mark must have returned without error first. Either way the
// writer is counted in until Leave, which comes once for each Enter, when its
// disk write has ended or will never begin.
//
// It takes no lock and allocates nothing, unless the range touches more than 64
// extents.
func (m *Map) Enter(off, length int64) bool {
	if length <= 0 {
		return true
	}
	s := m.span(off, length)
	if s.n > wideExtents {
		return m.enterWide(s)
	}
	ok := true
	chunks := *m.chunks.Load()
	for i := s.first; i < s.end(); i++ {
		c := &chunks[i>>chunkShift][i&(chunkCells-1)]
		switch c.Add(writer) & stateMask {
		case hot:
		case idle:
			// Before this one leaves, the extent is hot again, so nobody who
			// saw it idle can clear it.
			turn(c, idle, hot)
		default:
			ok = false
		}
	}
	return ok
}

// Leave counts out a writer that Enter counted in, with the same range.
func (m *Map) Leave(off, length int64) {
	if length <= 0 {
		return
	}
	s := m.span(off, length)
	if s.n > wideExtents {
		m.leaveWide(s)
		return
	}
	chunks := *m.chunks.Load()
	for i := s.first; i < s.end(); i++ {
		chunks[i>>chunkShift][i&(chunkCells-1)].Add(^uint32(writer - 1))
	}
}

// Mark returns when every extent that the range touches is durably marked. The
// caller is counted in. It waits for at most the commit that is under way and
// the one that has its marks, as long as one transaction holds the marks of all
// who wait. An error says that the map is broken or closed: what is not marked
// then never will be, and whether to write nevertheless is the caller's policy.
// It is an error too that the range is not on the disk, or not before Grow returns.
func (m *Map) Mark(off, length int64) error {
	if length <= 0 {
		return nil
	}
	s := m.span(off, length)
	m.stats.waits.Add(1)
	for {
		marked, err := m.want(s)
		if marked || err != nil {
			return err
		}
		m.commit()
	}
}

// want asks for the marks that are missing, and reports whether none is.
func (m *Map) want(s run) (marked bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.end() > m.extents {
		return false, fmt.Errorf("%s: extents up to %d of %d", m.path, s.end(), m.extents)
	}
	if s.n > wideExtents {
		marked = m.wideMarkedLocked(s)
	} else {
		marked = true
		for i := s.first; i < s.end(); i++ {
			state := m.cell(i).Load() & stateMask
			marked = marked && (state == hot || state == idle)
		}
	}
	if marked {
		return true, nil
	}
	if err := m.unusableLocked(); err != nil {
		return false, err
	}
	if s.n <= wideExtents {
		m.markLocked(s)
	}
	return false, nil
}

// markLocked puts what is cold of the extents on the list of the next commit,
// and some behind them. What is being cleared has to be cleared first.
func (m *Map) markLocked(s run) {
	first := int64(-1)
	for i := s.first; i < s.end(); i++ {
		if turn(m.cell(i), cold, marking) {
			m.marks = appendExtent(m.marks, i)
			if first < 0 {
				first = i
			}
		}
	}
	if first < 0 {
		return
	}
	str := m.ahead.stream(first)
	end := s.end()
	for str.ahead > 0 && end < min(s.end()+str.ahead, m.extents) && turn(m.cell(end), cold, marking) {
		m.marks = appendExtent(m.marks, end)
		m.stats.ahead++
		end++
	}
	str.next = end
}

const (
	streamsMax = 8  // followed at once
	aheadMax   = 16 // extents
)

// streams are sequences of writes, each known by the extent in which it will
// next find no mark. Guarded by Map.mu.
type streams struct {
	known []*stream
	turn  int
}

type stream struct{ next, ahead int64 }

// stream is the one that goes on at the extent, now marking twice as far ahead
// as before, or a new one, which does not mark ahead.
func (s *streams) stream(at int64) *stream {
	for _, k := range s.known {
		if k.next == at {
			k.ahead = min(max(2*k.ahead, 2), aheadMax)
			return k
		}
	}
	if len(s.known) < streamsMax {
		s.known = append(s.known, &stream{})
		return s.known[len(s.known)-1]
	}
	s.turn = (s.turn + 1) % streamsMax
	*s.known[s.turn] = stream{}
	return s.known[s.turn]
}
