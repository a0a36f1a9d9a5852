package gap

import (
	"fmt"
	"path/filepath"
)

// Sync returns when every gap that was added before it was called is durable:
// by an fdatasync that began after the call (RULES F2). One that fails is final
// for the map, see Broken.
func (m *Map) Sync() error {
	m.mu.Lock()
	begun := m.begun
	m.mu.Unlock()
	m.io.Lock()
	defer m.io.Unlock()
	m.mu.Lock()
	err := m.usableLocked()
	// Of those who wait for a sync that is under way, the first makes the
	// next one for all.
	shared := m.done > begun
	idle := m.wrote == m.synced && m.stale == 0
	m.mu.Unlock()
	if err != nil || shared || idle {
		return err
	}
	if err := m.flush(0); err != nil {
		return err
	}
	return m.fsync()
}

// flush writes the pages whose removals nobody has waited for; when closing,
// also those of an Add that came too late to write.
func (m *Map) flush(flags int) error {
	m.mu.Lock()
	if m.stale == 0 && flags&closing == 0 {
		m.mu.Unlock()
		return nil
	}
	var due []int64
	for p := range m.pages {
		if g := &m.pages[p]; g.stale || g.written < g.changed {
			due = append(due, int64(p))
		}
	}
	m.mu.Unlock()
	for _, p := range due {
		if err := m.write(p, 0, flags|always); err != nil {
			return err
		}
	}
	return nil
}

// fsync makes durable what has been written. io is held.
func (m *Map) fsync() error {
	m.mu.Lock()
	m.begun++
	wrote := m.wrote
	m.mu.Unlock()
	if err := m.file.Sync(); err != nil {
		return m.fail(fmt.Errorf("sync %s: %w", m.path, err))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken == nil { // otherwise the sync in fail may have been told what this one was not
		m.synced, m.done = wrote, m.begun
	}
	return m.broken
}

// fail ends the life of the file, and returns why it has ended: the first
// failure. Memory goes on.
//
// The next Open must not believe what could not be written, so the file is made
// to read as all gaps, by whichever of these steps still works on a disk that
// fails:
//
//  1. both headers say broken, synced
//  2. the file is removed, the directory synced
//
// A crash amid step 1 leaves a header that says broken, and has the greater
// count or is alone valid, or both as they were; as they were is also what is
// left if neither works, and then what was synced before is still there, and
// perhaps more. That is all the same: who was told of the failure does not rely
// on the file.
//
// It is the one thing that an Add may wait for long, and only the first that fails.
func (m *Map) fail(why error) error {
	m.mu.Lock()
	first := m.broken == nil
	if first {
		m.broken = why
	}
	why = m.broken
	m.mu.Unlock()
	if first {
		m.spoil()
	}
	return why
}

func (m *Map) spoil() {
	m.headers.Lock()
	h := m.head
	h.state = fileBroken
	h.count++
	var b [headersEnd]byte
	h.encode(b[:])
	h.encode(b[pageBytes:])
	_, err := m.file.WriteAt(b[:], 0)
	m.headers.Unlock()
	if err == nil {
		err = m.file.Sync()
	}
	if err != nil && m.fs.Remove(m.path) == nil {
		_ = m.fs.SyncDir(filepath.Dir(m.path)) // there is no third way
	}
}

// storeHeader makes a header with this state and size the present one, durably.
// It is one sector, in the page of the one before the present, so a crash leaves
// this one or the present one. io is held.
func (m *Map) storeHeader(state uint32, size int64) error {
	if err := m.writeHeader(state, size); err != nil {
		return m.fail(fmt.Errorf("write the header of %s: %w", m.path, err))
	}
	return m.fsync()
}

func (m *Map) writeHeader(state uint32, size int64) error {
	m.headers.Lock()
	defer m.headers.Unlock()
	if err := m.Broken(); err != nil {
		return err // what the file says now must stay
	}
	h := m.head
	h.state, h.size = state, size
	h.count++
	m.head = h
	var b [sectorBytes]byte
	h.encode(b[:])
	_, err := m.file.WriteAt(b[:], int64(h.count%2)*pageBytes)
	return err
}
