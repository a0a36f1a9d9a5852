package hrl

import (
	"errors"
	"fmt"

	"afterimage/blockdev"
)

// An IncompleteError says that a log does not hold all that happened to a disk.
type IncompleteError struct {
	Disk string
	// Extents may differ from the log, in order. They end with the sector.
	Extents []blockdev.Extent
	Bytes   int64 // of the extents
	Copies  int64 // of those, bytes that were copied: their content lies elsewhere
}

func (e *IncompleteError) Error() string {
	return fmt.Sprintf("the log does not hold %d bytes of disk %s that changed (%d extents, the first %v)",
		e.Bytes, e.Disk, len(e.Extents), e.Extents[0])
}

// Hint says what to do.
func (e *IncompleteError) Hint() string {
	return "these extents have to be copied from the disk itself"
}

// ReplayStats counts what a replay did.
type ReplayStats struct {
	LatestStats
	ZeroedBytes int64 `json:"zeroed_bytes"`
}

// Replay applies the newest version of everything the segments hold of the disk
// to dev, each byte once, and makes it durable. The device gets the size that
// the disk had at the end. Applied to what the disk was when the log began, or to any
// state of it since, that gives the disk as it was at the end of the log.
//
// What the log does not hold is left as it is on dev, and an *IncompleteError
// names it; all else has been applied by then. Damage of a segment is an error
// before anything is written.
func (r *Segments) Replay(disk string, dev blockdev.Device, progress func(done int64)) (ReplayStats, error) {
	var stats ReplayStats
	size := int64(-1)
	for _, d := range r.Disks() {
		if d.Name == disk {
			size = d.Size
		}
	}
	if size < 0 {
		return stats, fmt.Errorf("%w %q", ErrNoDisk, disk)
	}
	for _, s := range r.Segments {
		if s.Damage != nil {
			return stats, s.Damage
		}
	}
	if have := dev.Size(); have != size {
		if err := dev.Resize(size); err != nil {
			return stats, fmt.Errorf("disk %s has %d bytes in the log, %s has %d: %w", disk, size, dev.Info().Name, have, err)
		}
	}
	missing := missingSet{disk: disk}
	var err error
	stats.LatestStats, err = r.Latest(disk, func(v *Version) error {
		n := min(v.Len, size-v.Off)
		if n <= 0 {
			return nil // was cut off by a later shrinking
		}
		if progress != nil {
			progress(n)
		}
		switch v.Kind {
		case KindWrite:
			return blockdev.WriteAt(dev, v.Data[:n], v.Off)
		case KindZero:
			stats.ZeroedBytes += n
			return blockdev.WriteZeroes(dev, blockdev.Extent{Off: v.Off, Len: n})
		}
		missing.add(v.Off, n, v.Kind == KindCopy)
		return nil
	})
	if err == nil {
		err = blockdev.Flush(dev)
	}
	if err != nil {
		return stats, err
	}
	return stats, missing.err()
}

// A missingSet gathers what a log does not hold of a disk.
type missingSet struct {
	disk   string
	spans  []span
	joinAt int // how many spans there may be before those that touch are joined
	copies int64
}

func (m *missingSet) any() bool { return len(m.spans) > 0 }

func (m *missingSet) add(off, length int64, copied bool) {
	if copied {
		m.copies += length
	}
	m.spans = append(m.spans, span{off, length})
	if len(m.spans) >= max(m.joinAt, 1<<16) {
		m.spans = sortSpans(m.spans)
		m.joinAt = 2 * len(m.spans)
	}
}

// err returns nil, or an *IncompleteError that names all.
func (m *missingSet) err() error {
	if !m.any() {
		return nil
	}
	e := &IncompleteError{Disk: m.disk, Copies: m.copies}
	for _, u := range sortSpans(m.spans) {
		e.Extents = append(e.Extents, blockdev.Extent{Off: u.off, Len: u.len})
		e.Bytes += u.len
	}
	return e
}

// ErrDamaged is what errors.Is finds in every error that says data are damaged
// or missing rather than that something could not be done.
var ErrDamaged = errors.New("damaged or incomplete data")

// Is makes errors.Is(err, ErrDamaged) true.
func (e *CorruptError) Is(target error) bool { return target == ErrDamaged }

// Is makes errors.Is(err, ErrDamaged) true.
func (e *IncompleteError) Is(target error) bool { return target == ErrDamaged }
