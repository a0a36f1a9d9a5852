package hot

import "sync/atomic"

// counters are guarded by Map.mu, but for waits.
type counters struct {
	waits                                         atomic.Int64
	marks, ahead, commits, cleared, clearedRanges int64
}

// Stats is what a map has done since Open.
type Stats struct {
	HotExtents int64 `json:"hot_extents"` // marked, ranges not counted
	HotBytes   int64 `json:"hot_bytes"`   // at most this much is to be compared after a crash
	Ranges     int64 `json:"ranges"`      // range entries

	Waits         int64 `json:"waits"`          // calls of Mark
	Marks         int64 `json:"marks"`          // extents marked
	Ahead         int64 `json:"marks_ahead"`    // of those, before anybody asked
	Commits       int64 `json:"commits"`        // transactions
	Cleared       int64 `json:"cleared"`        // extents that became cold again
	ClearedRanges int64 `json:"cleared_ranges"` // range entries that are no more

	Frozen bool `json:"frozen"`
	Broken bool `json:"broken"`
}

// Stats returns what the map has done since Open.
func (m *Map) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Stats{
		HotExtents: m.hot, HotBytes: min(m.hotLocked(), m.extents) << m.shift, Ranges: int64(len(m.wides)),
		Waits: m.stats.waits.Load(), Marks: m.stats.marks, Ahead: m.stats.ahead, Commits: m.stats.commits,
		Cleared: m.stats.cleared, ClearedRanges: m.stats.clearedRanges,
		Frozen: m.frozen, Broken: m.broken != nil,
	}
}

// hotLocked is how many extents are hot; one that a range has too counts twice.
func (m *Map) hotLocked() int64 {
	n := m.hot
	for _, w := range m.wides {
		n += w.n
	}
	return n
}
