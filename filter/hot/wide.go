package hot

import "slices"

// A wide is a durable range entry: extents that are marked together, for
// commands over more than 64 of them. Entries are disjoint and in order, and
// every transaction has them all, so there are at most 32. Instead of a 33rd,
// two neighbours become one with what lies between them: too much is marked
// then, never too little.
type wide struct {
	run
	writers int
	asked   uint64 // marked when Map.wideDurable has reached it
	entered bool   // since the last Cooling
	found   bool   // by Open
}

// enterWide counts a writer into the range entry that holds s, and makes one if
// there is none.
func (m *Map) enterWide(s run) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	w := m.wideOfLocked(s)
	if w == nil {
		w = m.addWideLocked(&wide{run: s})
	}
	w.writers++
	w.entered = true
	return w.asked <= m.wideDurable && s.end() <= m.extents
}

func (m *Map) leaveWide(s run) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wideOfLocked(s).writers--
}

func (m *Map) wideMarkedLocked(s run) bool {
	w := m.wideOfLocked(s)
	return w != nil && w.asked <= m.wideDurable
}

// wideOfLocked is the entry that holds s. A writer's own entry is there until
// the writer leaves, however often it was joined with others.
func (m *Map) wideOfLocked(s run) *wide {
	for _, w := range m.wides {
		if w.first <= s.first && s.end() <= w.end() {
			return w
		}
	}
	return nil
}

// addWideLocked adds an entry, joined with those it touches, which are no more:
// a round that has one of them as its candidate looks for it in vain.
func (m *Map) addWideLocked(w *wide) *wide {
	rest := m.wides[:0]
	for _, o := range m.wides {
		if o.first <= w.end() && w.first <= o.end() {
			w.join(o)
		} else {
			rest = append(rest, o)
		}
	}
	clear(m.wides[len(rest):])
	at, _ := slices.BinarySearchFunc(rest, w.first, func(o *wide, first int64) int { return int(o.first - first) })
	m.wides = slices.Insert(rest, at, w)
	m.wideAsked++
	w.asked = m.wideAsked
	if len(m.wides) > rangesMax {
		w = m.joinNearestLocked(at)
	}
	return w
}

// joinNearestLocked joins the entry with its nearer neighbour.
func (m *Map) joinNearestLocked(at int) *wide {
	w, other := m.wides[at], at-1
	if at == 0 || at+1 < len(m.wides) && m.wides[at+1].first-w.end() < w.first-m.wides[at-1].end() {
		other = at + 1
	}
	w.join(m.wides[other])
	m.wides = slices.Delete(m.wides, other, other+1)
	return w
}

func (w *wide) join(o *wide) {
	end := max(w.end(), o.end())
	w.first = min(w.first, o.first)
	w.n = end - w.first
	w.writers += o.writers
	w.entered = w.entered || o.entered
	w.found = w.found || o.found
}

// wideRunsLocked is what a transaction says of the ranges, in a ring of so many
// extents. What lies beyond belongs to who entered before Grow returned, and was
// not admitted; a reader would take it for damage. Grow writes it.
func (m *Map) wideRunsLocked(extents int64) []run {
	rs := make([]run, 0, len(m.wides))
	for _, w := range m.wides {
		if n := min(w.end(), extents) - w.first; n > 0 {
			rs = append(rs, run{w.first, n})
		}
	}
	return rs
}
