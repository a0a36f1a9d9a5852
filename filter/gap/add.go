package gap

import (
	"fmt"
	"sync"

	"afterimage/hrl"
)

// pageWriter is held across the writing of a page, and has the room for it.
type pageWriter struct {
	mu  sync.Mutex
	buf [pageBytes]byte
}

// Add makes every block that the range touches a gap. When it returns, the
// file's pages have been written, though not synced: a kill loses nothing.
// It waits for the page's other writers, never for a Sync.
//
// With an error the gaps are known in memory, but not to the next Open: see
// Broken. The first Add to fail has also tried to make the file say so. A range
// that reaches beyond the disk is an error too; the part on the disk is added.
func (m *Map) Add(off, length int64) error {
	m.mu.Lock()
	b, end, err := m.rangeLocked(off, length)
	for b < end {
		p := b / pageBits
		n := min(end, (p+1)*pageBits) - b
		g := &m.pages[p]
		if added := g.set(b%pageBits, n); added > 0 {
			m.blocks += added
			g.changed++
		}
		due := g.changed
		perr := m.usableLocked()
		if perr == nil && g.written < due {
			m.mu.Unlock()
			perr = m.write(p, due, 0)
			m.mu.Lock()
			end = min(end, blocksFor(m.size)) // should the disk have shrunk meanwhile
		}
		if perr != nil {
			err = perr // and on: all of it has to be known in memory
		}
		b += n
	}
	m.mu.Unlock()
	return err
}

// Remove makes every block that the range touches no gap. The file is told by
// the next Add there, or the next Sync: a crash before that leaves gaps that are none.
// Its error says that the file will not be told.
func (m *Map) Remove(off, length int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.removeLocked(off, length)
	return m.usableLocked()
}

// RemoveSet is Remove for the set's blocks of disk 0.
func (m *Map) RemoveSet(s *hrl.BlockSet) error {
	for off, n, ok := s.Next(0, 0); ok; off, n, ok = s.Next(0, off+n) {
		m.mu.Lock()
		m.removeLocked(off, n)
		m.mu.Unlock()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.usableLocked()
}

func (m *Map) removeLocked(off, length int64) {
	b, end, _ := m.rangeLocked(off, length)
	for b < end {
		n := min(end-b, pageBits-b%pageBits)
		m.unsetLocked(b/pageBits, b%pageBits, n)
		b += n
	}
}

func (m *Map) unsetLocked(p, i, n int64) {
	g := &m.pages[p]
	removed := g.unset(i, n)
	m.blocks -= removed
	if removed > 0 && !g.stale {
		g.stale = true
		m.stale++
	}
}

// Flags of write.
const (
	always  = 1 << iota // also if nobody waits for it
	closing             // although the map is closed
)

// write writes the page as it is in memory, unless the file has its changes up
// to number due already.
func (m *Map) write(p int64, due uint64, flags int) error {
	w := &m.writers[p%int64(len(m.writers))]
	w.mu.Lock()
	defer w.mu.Unlock()
	m.mu.Lock()
	err := m.usableLocked()
	if flags&closing != 0 {
		err = m.broken
	}
	if err != nil || p >= int64(len(m.pages)) || m.pages[p].written >= due && flags&always == 0 {
		m.mu.Unlock()
		return err
	}
	g := &m.pages[p]
	changed := g.changed
	if g.stale {
		g.stale = false
		m.stale--
	}
	putBits(w.buf[:], p, g.bits)
	m.mu.Unlock()

	putSum(w.buf[:], m.seed)
	if _, err := m.file.WriteAt(w.buf[:], pageOff(p)); err != nil {
		return m.fail(fmt.Errorf("write page %d of %s: %w", p, m.path, err))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pages[p].written = changed // still there: Resize waits for writers
	m.wrote++
	return nil
}
