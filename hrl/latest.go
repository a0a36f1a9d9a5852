package hrl

import (
	"bytes"
	"errors"
	"fmt"
)

// A Version is the newest version of a range of a disk that a log knows.
type Version struct {
	Kind        Kind  // KindWrite, KindZero, KindCopy or KindGap
	Off, Len    int64 // bytes on the disk
	Data        []byte
	Seq         uint64
	Incarnation uint64

	s  *Segment
	at int64 // of KindWrite and KindCopy: bytes into the segment where Data begins
	of span  // of KindCopy: the whole frame's range
}

// Unreadable reports whether the range could not be read when it was to be copied:
// nobody knows what it holds.
func (v *Version) Unreadable() bool {
	return v.Kind == KindCopy && bytes.Equal(v.Data, unreadableDigest[:])
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
	var pieces []piece
	for _, s := range r.Segments {
		if s.Damage != nil {
			return LatestStats{}, s.Damage
		}
		pieces = append(pieces, whole(s))
	}
	return r.latest(pieces, disk, visit)
}

// LatestUnhealed is Latest without the gaps and copies that lie before the mark: a
// point has been acknowledged there, so what they stood for is on the replica.
// Versions that they would hide are visited instead.
func (r *Segments) LatestUnhealed(disk string, acked Mark, visit func(*Version) error) (LatestStats, error) {
	r.healed = acked
	defer func() { r.healed = Mark{} }()
	return r.Latest(disk, visit)
}

func (r *Segments) latest(pieces []piece, disk string, visit func(*Version) error) (LatestStats, error) {
	var stats LatestStats
	touched, err := touchedBy(pieces, disk)
	if err != nil {
		return stats, err
	}
	var c coverage
	err = touched.windows(windowRegions, func(lo, hi int64) error {
		return r.latestWindow(pieces, disk, lo, hi, &c, &stats, visit)
	})
	return stats, err
}

// touchedBy returns the regions that the pieces' segments touch of the disk.
func touchedBy(pieces []piece, disk string) (touched regions, err error) {
	known := false
	for i := range pieces {
		if id, ok := pieces[i].disk(disk); ok {
			known = true
			touched.addAll(&pieces[i].s.regions[id])
		}
	}
	if !known {
		err = fmt.Errorf("%w %q", ErrNoDisk, disk)
	}
	return touched, err
}

// latestWindow does one window of the address space.
func (r *Segments) latestWindow(pieces []piece, disk string, lo, hi int64, c *coverage, stats *LatestStats, visit func(*Version) error) error {
	c.reset(lo, hi)
	for i := len(pieces) - 1; i >= 0; i-- {
		if err := r.latestOf(&pieces[i], disk, c, stats, visit); err != nil {
			return err
		}
	}
	return nil
}

// latestOf does one piece for one window.
func (r *Segments) latestOf(p *piece, disk string, c *coverage, stats *LatestStats, visit func(*Version) error) error {
	s := p.s
	id, ok := p.disk(disk)
	if !ok || !s.regions[id].any(c.lo, c.hi) {
		return nil
	}
	size := p.sizes[id]
	var runs []span
	v := Version{Incarnation: s.Incarnation, s: s}
	want := func(h *frameHeader) bool {
		runs = runs[:0]
		if (h.kind == KindCopy || h.kind == KindGap) && (Mark{s.Incarnation, h.seq}).before(r.healed) {
			return false
		}
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
	return r.eachBack(p, want, func(f *Frame) error {
		kind := f.Kind
		switch kind {
		case KindGap:
			if f.Payload == nil {
				return nil // healed
			}
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
				v.at = f.At + frameBytes + run.off - f.Off
				stats.LatestData += run.len
			case KindCopy:
				v.Data = f.Payload
				v.at, v.of = f.At+frameBytes, span{f.Off, f.Len}
			}
			stats.LatestBytes += run.len
			if err := visit(&v); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachBack calls visit for the piece's frames, the last one first. Payloads
// are read only of frames that want says yes to; want may be nil. It may be
// used only on what scan has proven whole.
func (r *Segments) eachBack(p *piece, want func(*frameHeader) bool, visit func(*Frame) error) error {
	s := p.s
	w := window{r: r, s: s}
	end, span := p.end, p.last
	var f Frame
	for end > p.from {
		off := end - span
		if span < frameBytes || off < p.from {
			return &CorruptError{s.Path, off, errors.New("no frame begins where the next one says")}
		}
		if _, err := w.load(off, span, true); err != nil {
			return &CorruptError{s.Path, off, err}
		}
		h, payload, err := w.frame(off, end, true, want)
		if err == nil && h.span() != span {
			err = errors.New("no frame begins where the next one says")
		}
		if err != nil {
			return &CorruptError{s.Path, off, err}
		}
		f = Frame{h.kind, h.disk, h.seq, h.off, h.len, payload, off, s}
		if err := visit(&f); err != nil {
			return err
		}
		end, span = off, int64(h.prev)
	}
	return nil
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
