package hot

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// Kind is how the last session ended.
type Kind string

// The kinds.
const (
	New     Kind = "new"     // there was no map
	Clean   Kind = "clean"   // closed, everything durable: nothing is in doubt
	Unclean Kind = "unclean" // not closed: what was hot may differ between disk and log
)

// Found is what Open found. What is in Hot has to become gaps "to compare",
// durably, before Forget (rule R7).
type Found struct {
	Kind Kind
	All  bool              // the whole disk is hot, or it cannot be told what is
	Hot  []blockdev.Extent // apart and in order; of the disk as large as it is now
	// Why is what is damaged, if anything is, so that too much is hot.
	Why error
}

// Open opens the map of a disk of size bytes, or makes it. What it found stays
// marked, and is hot, until Forget. The caller holds the lock on the image: that of
// the map's file does not keep out who opened a file that is being replaced.
//
// A map that is missing, damaged, of another version, or could not be written
// in the last session is made anew and reads as all hot. An error says that it
// can be neither used nor made.
//
// Steps, and what a crash after each leaves:
//
//  1. the directory is synced: leaves this file. Who made it may have died between
//     the rename and the sync; before this step a power cut may bring back the
//     file that it replaced, which knows nothing of what is marked from here on.
//     That is why it comes before anything is admitted, not only in create
//  2. a ring with what was found, and what is to be warm, is written and synced
//     where the present one does not lie: leaves the map as it was
//  3. the header that names it, state open: leaves an unclean map with all of it
func Open(fsys hrl.FS, path string, size int64, o Options) (*Map, Found, error) {
	m := &Map{fs: fsys, path: path, shift: extentShift}
	found, err := m.open(size, o)
	if err != nil {
		if m.file != nil {
			m.file.Close()
		}
		return nil, Found{}, fmt.Errorf("open %s: %w", path, err)
	}
	return m, found, nil
}

func (m *Map) open(size int64, o Options) (Found, error) {
	found, c, err := m.find()
	if err != nil {
		return found, err
	}
	extents, err := extentsFor(size, m.shift)
	if err != nil {
		return found, err
	}
	m.extents = max(extents, m.head.extents)
	m.cap = capDefault >> m.shift
	if o.Cap > 0 {
		m.cap = o.Cap >> m.shift
	}
	m.cap = max(m.cap, capMinExtents)

	switch {
	case found.All:
		c = contents{ranges: []run{{0, m.extents}}}
	case found.Kind == Clean:
		c = contents{table: c.table, damage: c.damage}
		m.cool(&c, o.Warm)
	}
	c.table = c.table.grown(m.extents)
	m.table = c.table
	m.adopt(c.ranges)
	c.ranges = m.wideRunsLocked(m.extents)
	if found.Kind != Clean {
		found.Hot = m.union(extents, size)
	} else {
		m.forgotten = true // there is nothing
	}

	if m.head.slots == 0 {
		old := m.file
		err = m.create(&c, m.extents)
		if old != nil {
			old.Close() // its lock was of use until now
		}
		if err != nil {
			return found, err
		}
	} else {
		if err := m.fs.SyncDir(filepath.Dir(m.path)); err != nil {
			return found, err
		}
		h, err := m.newRing(&c, m.extents)
		if err == nil {
			err = m.storeHeader(h)
		}
		if err != nil {
			return found, err
		}
	}
	m.tx.number = uint64(m.head.slots)
	return found, nil
}

// find reads what there is. If that is nothing that can be used, head stays
// empty.
func (m *Map) find() (Found, contents, error) {
	f, err := m.fs.Edit(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return Found{Kind: New, All: true}, contents{}, nil
	}
	if err != nil {
		return Found{}, contents{}, err
	}
	m.file = f
	if err := f.Lock(); err != nil {
		return Found{}, contents{}, err
	}
	h, c, err := load(f)
	if err != nil {
		return Found{Kind: Unclean, All: true, Why: err}, contents{}, nil
	}
	m.head, m.shift = h, uint(h.shift)
	if h.state == fileClean {
		return Found{Kind: Clean}, c, nil
	}
	return Found{Kind: Unclean, All: c.all, Why: c.damage}, c, nil
}

// cool leaves of a clean map's marks what is to be warm.
func (m *Map) cool(c *contents, warm bool) {
	left := m.cap
	if !warm || c.damage != nil {
		left = 0
	}
	for _, r := range c.table.runs(m.head.extents) {
		keep := min(r.n, left)
		left -= keep
		if keep < r.n {
			c.table.unset(run{r.first + keep, r.n - keep})
		}
	}
}

// adopt makes hot what the ring will have as marked.
func (m *Map) adopt(ranges []run) {
	for _, r := range ranges {
		if r.n > 0 { // a disk may have no bytes
			m.addWideLocked(&wide{run: r, found: true})
		}
	}
	for _, w := range m.wides {
		w.asked = 0
	}
	m.wideAsked = 0
	chunks := growCells(nil, m.extents)
	m.chunks.Store(&chunks)
	for _, r := range m.table.runs(m.extents) {
		m.turnAll([]run{r}, cold, hot)
		m.hot += r.n
	}
}

// union is everything that is marked of the first extents, as bytes of a disk of
// that size.
func (m *Map) union(extents, size int64) []blockdev.Extent {
	all := append(bitmap(nil), m.table...)
	for _, w := range m.wides {
		all.set(w.run)
	}
	return m.bytes(all.runs(extents), size)
}

func (m *Map) bytes(rs []run, size int64) []blockdev.Extent {
	out := make([]blockdev.Extent, 0, len(rs))
	for _, r := range rs {
		off := r.first << m.shift
		out = append(out, blockdev.Extent{Off: off, Len: min(r.end()<<m.shift, size) - off})
	}
	return out
}

func extentsFor(size int64, shift uint) (int64, error) {
	n := size >> shift
	if n<<shift < size {
		n++
	}
	if size < 0 || n > extentsMax {
		return 0, fmt.Errorf("a disk of %d bytes is too large to be tracked", size)
	}
	return n, nil
}
