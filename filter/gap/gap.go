package gap

import (
	"errors"
	"fmt"
	"sync"

	"afterimage/hrl"
)

// ErrClosed is returned by a map that has been closed.
var ErrClosed = errors.New("the map of gaps is closed")

// Map is the durable set of 64 KiB blocks of one disk that are gaps. The
// package's comment has the whole story. All methods may be called at once, from
// any goroutine; Add and Remove of the same block, and Resize and either of the
// block at the disk's end, only as far as the caller does not mind which is last.
type Map struct {
	fs   hrl.FS
	path string
	file hrl.File
	seed uint32 // of the checksums of the file's pages

	// io is held across fdatasync, so that only one runs: Linux tells one
	// alone of an error. Taken first of all locks, and never by Add.
	io sync.Mutex

	// writers are held across the pwrite of a page: each has its part of the
	// pages. Taken before headers and mu.
	writers [16]pageWriter

	// headers is held across the pwrite of a header, and guards head: the
	// header as it was last written. Once the map is broken, nothing else is
	// ever written there. Taken before mu.
	headers sync.Mutex
	head    header

	// mu is held for moments, never across a system call. It guards what follows.
	mu     sync.Mutex
	size   int64 // of the disk; changed with io held too
	pages  []page
	blocks int64 // how many are gaps
	stale  int   // pages that are
	// wrote counts writes of pages that have ended; those up to synced are
	// durable.
	wrote, synced uint64
	// Syncs begin and end one behind the other: begun have begun, and those up
	// to number done have succeeded.
	begun, done uint64
	broken      error
	closed      bool
}

// Has reports whether every block that the range touches is a gap.
func (m *Map) Has(off, length int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	first, end, err := m.rangeLocked(off, length)
	return err == nil && first < end && m.scanLocked(first, end, false) == end
}

// Next returns the first run of gaps that reaches behind byte off, from off's
// block on, in bytes; false if there is none. It ends at the end of the disk
// at the latest.
func (m *Map) Next(off int64) (start, length int64, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	end := blocksFor(m.size)
	first := m.scanLocked(max(off, 0)/hrl.BlockBytes, end, true)
	if first >= end || off >= m.size { // the disk may end within its last block
		return 0, 0, false
	}
	start = first * hrl.BlockBytes
	return start, min(m.scanLocked(first, end, false)*hrl.BlockBytes, m.size) - start, true
}

// Runs calls visit for every run of adjacent gaps, in order, in bytes. No lock
// is held meanwhile: visit may change the map, and may or may not be called for
// what changes while Runs is under way.
func (m *Map) Runs(visit func(off, length int64)) {
	for off, n, ok := m.Next(0); ok; off, n, ok = m.Next(off + n) {
		visit(off, n)
	}
}

// AppendTo adds all gaps to the set, as blocks of disk 0; with changes
// meanwhile as Runs.
func (m *Map) AppendTo(s *hrl.BlockSet) {
	m.Runs(func(off, length int64) { s.Add(0, off, length) })
}

// Bytes is how much of the disk is a gap.
func (m *Map) Bytes() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.blocks * hrl.BlockBytes
	if end := blocksFor(m.size); end > 0 && m.scanLocked(end-1, end, true) < end {
		n -= end*hrl.BlockBytes - m.size
	}
	return n
}

// Dirty reports whether gaps were added that are not durable yet. An Add that
// has not returned need not be counted.
func (m *Map) Dirty() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wrote > m.synced || m.broken != nil
}

// Broken is why the map's file could not be written or synced, or nil. A map
// that is broken once stays so: what is added is known in memory only, and
// nothing of what was not synced before can be relied on after a crash. Its user
// has to see to it that the whole disk will be compared, durably.
func (m *Map) Broken() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.broken
}

func (m *Map) usableLocked() error {
	if m.broken == nil && m.closed {
		return ErrClosed
	}
	return m.broken
}

// rangeLocked is the blocks that the range touches, as far as the disk has
// them. It says so if it has not all.
func (m *Map) rangeLocked(off, length int64) (first, end int64, err error) {
	if length <= 0 {
		return 0, 0, nil
	}
	if off < 0 || off >= m.size || length > m.size-off {
		err = fmt.Errorf("gap of %d bytes at byte %d of a disk of %d", length, off, m.size)
	}
	if off >= m.size {
		return 0, 0, err
	}
	stop := off + min(length, m.size-off)
	return max(off, 0) / hrl.BlockBytes, blocksFor(stop), err
}

// scanLocked returns the first block of [b, end) that is a gap, or that is
// none; end if there is none such.
func (m *Map) scanLocked(b, end int64, set bool) int64 {
	for b < end {
		i := b % pageBits
		n := min(pageBits, end-b+i)
		if at := m.pages[b/pageBits].scan(i, n, set); at < n {
			return b - i + at
		}
		b += n - i
	}
	return end
}
