package filter

import (
	"math/bits"
	"sync/atomic"

	"afterimage/filter/hot"
)

// A Histogram counts durations by powers of two.
type Histogram struct {
	counts [40]atomic.Int64 // counts[i]: below 2^i nanoseconds
	sum    atomic.Int64
}

func (h *Histogram) record(ns int64) {
	h.counts[min(bits.Len64(uint64(max(ns, 0))), len(h.counts)-1)].Add(1)
	h.sum.Add(ns)
}

// A StageStats sums a Histogram up. Quantiles are the upper ends of powers of two.
type StageStats struct {
	Count      int64   `json:"count"`
	MeanMicros float64 `json:"mean_us"`
	P50Micros  float64 `json:"p50_us"`
	P99Micros  float64 `json:"p99_us"`
	P999Micros float64 `json:"p999_us"`
}

// Stats sums the histogram up.
func (h *Histogram) Stats() StageStats {
	var counts [len(h.counts)]int64
	var s StageStats
	for i := range counts {
		counts[i] = h.counts[i].Load()
		s.Count += counts[i]
	}
	if s.Count == 0 {
		return s
	}
	s.MeanMicros = float64(h.sum.Load()) / float64(s.Count) / 1e3
	quantile := func(q float64) float64 {
		need, seen := int64(q*float64(s.Count)), int64(0)
		for i, c := range counts {
			if seen += c; seen > need {
				return float64(int64(1)<<i) / 1e3
			}
		}
		return float64(int64(1)<<(len(counts)-1)) / 1e3
	}
	s.P50Micros, s.P99Micros, s.P999Micros = quantile(0.5), quantile(0.99), quantile(0.999)
	return s
}

// counters are what a Filter counts. The stages are those of a batch of writes
// on the fast path, of one request on a worker.
type counters struct {
	Reads, Writes, Zeroes, Trims, Flushes atomic.Int64
	ReadBytes, WrittenBytes               atomic.Int64
	Batches                               atomic.Int64 // groups of writes on the fast path
	Waited                                atomic.Int64 // requests that went to a worker
	Conflicts                             atomic.Int64 // of those, because their range was locked
	Dropped                               atomic.Int64 // never begun: their client had gone
	Cold                                  atomic.Int64 // of those, because an extent was not marked
	Errors                                atomic.Int64 // of the disk

	Lock, Mark, Append, Disk, Read, Flush Histogram
}

// Stats are a Filter's counts since it was made.
type Stats struct {
	Reads        int64 `json:"reads"`
	Writes       int64 `json:"writes"`
	WriteZeroes  int64 `json:"write_zeroes"`
	Trims        int64 `json:"trims"`
	Flushes      int64 `json:"flushes"`
	ReadBytes    int64 `json:"read_bytes"`
	WrittenBytes int64 `json:"written_bytes"`
	Batches      int64 `json:"write_batches"`
	Waited       int64 `json:"requests_by_workers"`
	Conflicts    int64 `json:"conflicts"`
	Cold         int64 `json:"cold_writes"`
	Dropped      int64 `json:"dropped_requests"`
	DiskErrors   int64 `json:"disk_errors"`
	GapBytes     int64 `json:"gap_bytes"`

	// Hot is nil without a map of hot extents.
	Hot *hot.Stats `json:"hot,omitempty"`

	Stages map[string]StageStats `json:"stages"`
}

// Stats returns the counts so far. The stages are "lock" (waiting for a
// range), "mark" (of cold extents), "append" (to the log), "disk" (writes), "read" and "flush".
func (f *Filter) Stats() Stats {
	c := &f.stats
	gap, _ := f.gaps.bytes()
	out := Stats{
		Reads: c.Reads.Load(), Writes: c.Writes.Load(), WriteZeroes: c.Zeroes.Load(),
		Trims: c.Trims.Load(), Flushes: c.Flushes.Load(),
		ReadBytes: c.ReadBytes.Load(), WrittenBytes: c.WrittenBytes.Load(),
		Batches: c.Batches.Load(), Waited: c.Waited.Load(), Conflicts: c.Conflicts.Load(), Cold: c.Cold.Load(),
		Dropped: c.Dropped.Load(), DiskErrors: c.Errors.Load(), GapBytes: gap,
		Stages: map[string]StageStats{
			"lock": c.Lock.Stats(), "mark": c.Mark.Stats(), "append": c.Append.Stats(), "disk": c.Disk.Stats(),
			"read": c.Read.Stats(), "flush": c.Flush.Stats(),
		},
	}
	if h := f.track.Load().Hot; h != nil {
		s := h.Stats()
		out.Hot = &s
	}
	return out
}
