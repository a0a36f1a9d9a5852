package gap

import (
	"errors"
	"fmt"
)

// Resize makes the map one of a disk of size bytes. What both sizes have stays
// as it is; blocks that the disk gains are no gaps, and those that it loses are
// forgotten. It returns before anybody may write to what is gained, and after
// the last write to what is lost. After an error the map is as it was; but if it is
// Broken, memory has the new size all the same.
//
// Steps of growing, and what a crash after each leaves:
//
//  1. room allocated, pages of the gained blocks written where the file ends
//     for now, old bits behind the end of the last page removed, synced: leaves
//     the smaller disk, for no page beyond its last is looked at
//  2. header stored: leaves the larger one
//
// Shrinking is step 2 alone. The bits of lost blocks remain in memory until it
// is done, so that an Add meanwhile keeps them in the file too. In the file's
// last page they may remain for ever; Open does not look at them.
func (m *Map) Resize(size int64) error {
	m.io.Lock()
	defer m.io.Unlock()
	err := checkSize(size)
	m.mu.Lock()
	if err == nil && m.broken == nil {
		err = m.usableLocked()
	}
	same := size == m.size
	m.mu.Unlock()
	if err != nil || same {
		return err
	}
	return m.resize(size)
}

var errSize = errors.New("no size of a disk that can be tracked")

func checkSize(size int64) error {
	if size < 0 || size > sizeMax {
		return fmt.Errorf("%d bytes: %w", size, errSize)
	}
	return nil
}

// resize is Resize. io is held.
func (m *Map) resize(size int64) error {
	err := m.Broken()
	if err == nil {
		err = m.store(size)
	}
	if err != nil && m.Broken() == nil {
		return fmt.Errorf("resize %s: %w", m.path, err)
	}
	m.lockWriters() // for a page's number has another meaning then
	defer m.unlockWriters()
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := pagesFor(size) - int64(len(m.pages)); n > 0 {
		m.pages = append(m.pages, make([]page, n)...)
	}
	m.cutLocked(size)
	return err
}

// store is what Resize does to the file.
func (m *Map) store(size int64) error {
	if size > m.size { // only io is needed to read it
		if err := m.file.Allocate(fileBytes(size)); err != nil {
			return err
		}
		old := pagesFor(m.size)
		if err := writePages(m.file, m.seed, make([]page, pagesFor(size)-old), old); err != nil {
			return err
		}
		if err := m.flush(0); err != nil {
			return err
		}
		if err := m.fsync(); err != nil {
			return err
		}
	}
	return m.storeHeader(fileOpen, size)
}

// cutLocked ends the map at size, and forgets what lies behind.
func (m *Map) cutLocked(size int64) {
	end := blocksFor(size)
	for p := range int64(len(m.pages)) {
		if keep := min(max(end-p*pageBits, 0), pageBits); keep < pageBits {
			m.unsetLocked(p, keep, pageBits-keep)
		}
	}
	left := pagesFor(size)
	for p := left; p < int64(len(m.pages)); p++ {
		if m.pages[p].stale {
			m.stale--
		}
	}
	clear(m.pages[left:])
	m.pages = m.pages[:left]
	m.size = size
}

// writePages writes pages to the file, the first as number first.
func writePages(f interface {
	WriteAt(p []byte, off int64) (int, error)
}, seed uint32, pages []page, first int64) error {
	const step = 256 // pages, 1 MiB
	b := make([]byte, min(len(pages), step)*pageBytes)
	for at := 0; at < len(pages); at += step {
		n := min(step, len(pages)-at)
		for i := range n {
			p := b[i*pageBytes : (i+1)*pageBytes]
			putBits(p, first+int64(at+i), pages[at+i].bits)
			putSum(p, seed)
		}
		if _, err := f.WriteAt(b[:n*pageBytes], pageOff(first+int64(at))); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the map; what it holds stays, durably. Its error says that the
// next Open will find the map as it was left by a crash now, or by what made it
// Broken.
//
// Steps, and what a crash after each leaves:
//
//  1. pages written that are not as they should be, synced: leaves an unclean
//     map with every gap
//  2. header stored, state clean: leaves a clean one with every gap
//
// From the beginning on Add fails, so nothing is written behind the sync. Memory
// can still be asked.
func (m *Map) Close() error {
	m.io.Lock()
	defer m.io.Unlock()
	m.mu.Lock()
	err, closed, size := m.broken, m.closed, m.size
	m.closed = true
	m.mu.Unlock()
	if closed {
		return nil
	}
	m.lockWriters() // who wrote when it was closed has ended
	m.unlockWriters()
	if err == nil {
		err = m.flush(closing)
	}
	if err == nil {
		err = m.fsync()
	}
	if err == nil {
		err = m.storeHeader(fileClean, size)
	}
	// A write that was under way may have failed, and be about to spoil the file.
	m.lockWriters()
	defer m.unlockWriters()
	if cerr := m.file.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close %s: %w", m.path, cerr)
	}
	return err
}

func (m *Map) lockWriters() {
	for i := range m.writers {
		m.writers[i].mu.Lock()
	}
}

func (m *Map) unlockWriters() {
	for i := range m.writers {
		m.writers[i].mu.Unlock()
	}
}
