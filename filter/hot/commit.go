package hot

import (
	"fmt"
	"path/filepath"
)

// batch is what one transaction makes true.
type batch struct {
	marks, clears []run
	wide          uint64 // Map.wideAsked when it was put together
}

// commit makes durable what is pending, as much of it as a transaction holds,
// or returns when the commit that was under way has ended and nothing is. Errors
// are in Map.broken.
func (m *Map) commit() {
	m.committer.Lock()
	defer m.committer.Unlock()
	b, ok := m.take()
	if !ok {
		return
	}
	if err := m.write(); err != nil {
		m.fail(fmt.Errorf("commit to %s: %w", m.path, err))
		return
	}
	m.done(b)
}

// take puts the next transaction together. Marks come first, for guests wait for
// them; clears take the room that is left.
func (m *Map) take() (b batch, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.unusableLocked() != nil {
		return b, false
	}
	n := min(len(m.marks), updatesMax)
	b.marks, m.marks = m.marks[:n:n], m.marks[n:]
	n = min(len(m.clears), updatesMax-n)
	b.clears, m.clears = m.clears[:n:n], m.clears[n:]
	b.wide = m.wideAsked
	if len(b.marks)+len(b.clears) == 0 && m.wideTaken == m.wideAsked {
		return b, false
	}
	m.wideTaken = m.wideAsked
	t := &m.tx
	t.updates = t.updates[:0]
	for _, r := range b.marks {
		m.table.set(r)
		t.updates = append(t.updates, update{run: r})
	}
	for _, r := range b.clears {
		m.table.unset(r)
		t.updates = append(t.updates, update{run: r, clear: true})
	}
	t.ranges = m.wideRunsLocked(m.extents)
	return b, true
}

// write writes the transaction that take put together, and makes it durable. A
// crash before it is leaves the ring as it was, for the slot that may be torn is
// the oldest, which nothing needs (see readRing). The committer is held.
func (m *Map) write() error {
	t := &m.tx
	t.number++
	c := contents{table: m.table}
	t.slice = c.slice(t.number)
	t.encode(m.buf[:], ringSeed(&m.head.salt))
	slot := int64((t.number - 1) % uint64(m.head.slots))
	if _, err := m.file.WriteAt(m.buf[:], m.head.off+slot*txBytes); err != nil {
		return err
	}
	return m.file.Sync()
}

// done admits who waited for the batch.
func (m *Map) done(b batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turnAll(b.marks, marking, hot)
	m.turnAll(b.clears, clearing, cold)
	m.wideDurable = b.wide
	m.stats.commits++
	m.stats.marks += count(b.marks)
	m.stats.cleared += count(b.clears)
	m.hot += count(b.marks) - count(b.clears)
	m.clearing -= count(b.clears)
}

func (m *Map) turnAll(rs []run, from, to uint32) {
	for _, r := range rs {
		for i := r.first; i < r.end(); i++ {
			turn(m.cell(i), from, to)
		}
	}
}

// fail ends the map's life: what has no durable mark never gets one (RULES D4).
// The committer is held.
//
// What was hot stays hot in memory, and truly so: its marks are durable, for
// they were when it became hot, and nothing is cleared any more. But the next
// Open must not believe a ring that could not be written, so the file is made to
// read as all hot, by whichever of these steps still works on a disk that fails:
//
//  1. both headers say broken, synced
//  2. the file is removed, the directory synced
//
// Should neither, then the ring reads as it was after the last commit, or with what the
// failed one said: the marks of everything that was ever admitted.
func (m *Map) fail(why error) {
	m.mu.Lock()
	if m.broken == nil {
		m.broken = why
	}
	m.mu.Unlock()
	h := m.head
	h.state = fileBroken
	h.count++
	var b [headersEnd]byte
	h.encode(b[:])
	h.encode(b[pageBytes:])
	_, err := m.file.WriteAt(b[:], 0)
	if err == nil {
		err = m.file.Sync()
	}
	if err != nil && m.fs.Remove(m.path) == nil {
		_ = m.fs.SyncDir(filepath.Dir(m.path)) // there is no third way
	}
}
