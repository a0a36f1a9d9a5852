package hot

import (
	"errors"
	"slices"

	"afterimage/blockdev"
)

// ErrRound is returned for a round that is not under way.
var ErrRound = errors.New("no such round of cooling is under way")

const (
	roundMax   = 1024    // marks that one round clears
	sweepChunk = 1 << 14 // extents looked at with the lock held
)

// A Round is what may be cleared next: candidates that had no writer counted in
// when Cooling looked at them. One is under way at a time.
type Round struct {
	m     *Map
	seq   uint64 // Map.round, until Cleared
	marks []run
	wides []*wide
	// ranges are those of wides, which may since have become part of others.
	ranges []run
}

// Extents is what the round would clear.
func (r Round) Extents() []blockdev.Extent {
	end := int64(1) << 62
	return append(r.m.bytes(r.marks, end), r.m.bytes(r.ranges, end)...)
}

// Cooling begins a round if more is hot than Options.Cap allows, or if there is a
// range that Open found and Forget has freed. It costs next to nothing if there
// is nothing to do, and is meant to be called after Mark and after Forget.
//
// The caller then syncs the disk (every leg of it) and the log, both with syncs
// that begin after Cooling has returned, and calls Cleared. No writer waits for a
// round: one that enters a candidate takes it out.
//
// Candidates are ranges first, then those marks that nobody entered since the
// hand, which goes around the disk, last passed them: about the ones longest
// unused, and it costs the hot path nothing to know.
func (m *Map) Cooling() (Round, bool) {
	r := Round{m: m}
	m.mu.Lock()
	if m.cooling || m.frozen || !m.forgotten || m.unusableLocked() != nil {
		m.mu.Unlock()
		return Round{}, false
	}
	size := m.hotLocked()
	over := size > m.cap
	for _, w := range m.wides {
		if w.writers == 0 && (over || w.found) {
			w.entered = false
			size -= w.n
			r.wides = append(r.wides, w)
			r.ranges = append(r.ranges, w.run)
		}
	}
	want := int64(0)
	if size > m.cap {
		want = min(size-(m.cap-m.cap/8), roundMax)
	}
	if want == 0 && len(r.wides) == 0 {
		m.mu.Unlock()
		return Round{}, false
	}
	m.cooling = true
	m.round++
	r.seq = m.round
	m.mu.Unlock()

	if want > 0 {
		r.marks = m.sweep(want)
	}
	if len(r.marks)+len(r.wides) == 0 {
		m.mu.Lock()
		m.cooling = false
		m.mu.Unlock()
		return Round{}, false
	}
	return r, true
}

// sweep moves the hand on until it has found so many candidates, at most once
// around the disk, or twice if it found none the first time, for what it passes
// first becomes idle.
func (m *Map) sweep(want int64) (out []run) {
	var found int64
	for range 2 {
		for left := int64(-1); left != 0 && found < want; {
			m.mu.Lock()
			if left < 0 {
				left = m.extents
			}
			if m.hand >= m.extents {
				m.hand = 0
			}
			end := min(m.hand+sweepChunk, m.hand+left, m.extents)
			at := m.hand
			for i := m.table.next(at, end); i < end && found < want; i = m.table.next(i+1, end) {
				c := m.cell(i)
				if c.Load() == idle { // and nobody is counted in
					out = appendExtent(out, i)
					found++
				} else {
					turnUnused(c, hot, idle)
				}
				m.hand = i + 1
			}
			if found < want {
				m.hand = end
			}
			left -= m.hand - at
			m.mu.Unlock()
		}
		if found > 0 {
			break
		}
	}
	return out
}

// Cleared ends a round. With ok set the caller says that since Cooling returned a
// sync of every leg of the disk, and one of the log, have begun and succeeded;
// the candidates that nobody entered since are then cleared, durably. Without it
// a sync has failed: nothing is cleared, then or ever after (see Freeze), whether
// the round is still under way or not.
//
// A failed sync of the same file by anybody else, that ended before or beside the
// round's, must have come to Freeze before: the kernel tells of a lost write
// once, and the next sync of the same open file succeeds.
func (m *Map) Cleared(r Round, ok bool) error {
	m.mu.Lock()
	m.frozen = m.frozen || !ok
	if !m.cooling || r.m != m || r.seq != m.round {
		m.mu.Unlock()
		return ErrRound
	}
	m.round++ // nobody else ends this one; cooling keeps the next from beginning
	err := m.unusableLocked()
	if m.frozen || err != nil {
		m.cooling = false
		m.mu.Unlock()
		return err
	}
	for _, c := range r.marks {
		for i := c.first; i < c.end(); i++ {
			if turnUnused(m.cell(i), idle, clearing) {
				m.clears = appendExtent(m.clears, i)
				m.clearing++
			}
		}
	}
	for _, w := range r.wides {
		if at := slices.Index(m.wides, w); at >= 0 && w.writers == 0 && !w.entered {
			m.wides = slices.Delete(m.wides, at, at+1)
			m.wideAsked++
			m.stats.clearedRanges++
		}
	}
	asked := m.wideAsked
	for err == nil && (m.clearing > 0 || m.wideDurable < asked) {
		m.mu.Unlock()
		m.commit()
		m.mu.Lock()
		err = m.unusableLocked()
	}
	m.cooling = false
	m.mu.Unlock()
	return err
}

// Freeze keeps all marks for good: a sync of the disk or of the log has failed,
// whoever asked for it (rules R4 and R9). Marks can still be set. The map cannot
// be closed as clean.
func (m *Map) Freeze() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frozen = true
}

// Frozen reports whether marks are kept for good.
func (m *Map) Frozen() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.frozen
}
