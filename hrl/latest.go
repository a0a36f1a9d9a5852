package hrl

import (
	"fmt"
)

// A Version is the newest version of a range of a disk that a log knows.
type Version struct {
	Kind        Kind  // KindWrite, KindZero, KindCopy or KindGap
	Off, Len    int64 // bytes on the disk
	Data        []byte
	Seq         uint64
	Incarnation uint64
}

// LatestStats counts what a run of Latest did.
type LatestStats struct {
	Frames       int64 `json:"frames"`        // changes of the disk in the log
	LoggedBytes  int64 `json:"logged_bytes"`  // of the disk, by all of them
	WrittenBytes int64 `json:"written_bytes"` // of those, by writes: what a log of every write would ship
	LatestBytes  int64 `json:"latest_bytes"`  // delivered: each byte once
	LatestData   int64 `json:"latest_data_bytes"`
}

// Latest calls visit with the newest version of everything the segments say
// about the disk, each byte once. It walks them backwards, newest frame first;
// what a newer frame has given is not looked at again. Versions come in the
// order of the walk, not of the disk, window by window of the address space, so
// that memory is a constant whatever the size of the log: at most 16 MiB for the
// sectors seen and two frames. A range of KindCopy has its digest in Data, that
// of the whole frame; one of KindGap has no data: the log does not know it.
//
// A damaged segment is an error before anything is visited.
func (r *Segments) Latest(disk string, visit func(*Version) error) (LatestStats, error) {
	var stats LatestStats
	var touched regions
	known := false
	for _, s := range r.Segments {
		if s.Damage != nil {
			return stats, s.Damage
		}
		if id, ok := s.Disk(disk); ok {
			known = true
			touched.addAll(&s.regions[id])
		}
	}
	if !known {
		return stats, fmt.Errorf("%w %q", ErrNoDisk, disk)
	}
	var c coverage
	err := touched.windows(windowRegions, func(lo, hi int64) error {
		c.reset(lo, hi)
		for i := len(r.Segments) - 1; i >= 0; i-- {
			if err := r.latestOf(r.Segments[i], disk, &c, &stats, visit); err != nil {
				return err
			}
		}
		return nil
	})
	return stats, err
}

// latestOf does one segment for one window.
func (r *Segments) latestOf(s *Segment, disk string, c *coverage, stats *LatestStats, visit func(*Version) error) error {
	id, ok := s.Disk(disk)
	if !ok || !s.regions[id].any(c.lo, c.hi) {
		return nil
	}
	size := s.Disks[id].Size
	var runs []span
	v := Version{Incarnation: s.Incarnation}
	want := func(h *frameHeader) bool {
		runs = runs[:0]
		switch h.kind {
		case KindWrite, KindZero, KindCopy, KindResize:
			if h.disk != id {
				return false
			}
			if in := min(h.off+h.len, c.hi) - max(h.off, c.lo); in > 0 {
				stats.LoggedBytes += in
				if h.kind == KindWrite {
					stats.WrittenBytes += in
				}
			}
			if h.off >= c.lo && h.off < c.hi {
				stats.Frames++
			}
			runs = c.take(h.off, h.len, runs)
			return len(runs) > 0 && (h.kind == KindWrite || h.kind == KindCopy)
		case KindGap:
			return true
		}
		return false
	}
	return r.eachBack(s, want, func(f *Frame) error {
		kind := f.Kind
		switch kind {
		case KindGap:
			err := f.Gap(func(d DiskID, off, length int64) {
				if d == id {
					runs = c.take(off, min(length, max(size-off, 0)), runs)
				}
			})
			if err != nil {
				return err
			}
		case KindResize:
			kind = KindZero
		}
		for _, run := range runs {
			v.Kind, v.Off, v.Len, v.Seq, v.Data = kind, run.off, run.len, f.Seq, nil
			switch kind {
			case KindWrite:
				v.Data = f.Payload[run.off-f.Off : run.off-f.Off+run.len]
				stats.LatestData += run.len
			case KindCopy:
				v.Data = f.Payload
			}
			stats.LatestBytes += run.len
			if err := visit(&v); err != nil {
				return err
			}
		}
		return nil
	})
}

// Disks returns the disks the segments name, with the size each has at the end.
func (r *Segments) Disks() []Disk {
	var out []Disk
	at := map[string]int{}
	for _, s := range r.Segments {
		for _, d := range s.Disks {
			if i, ok := at[d.Name]; ok {
				out[i].Size = d.Size
				continue
			}
			at[d.Name] = len(out)
			out = append(out, d)
		}
	}
	return out
}
