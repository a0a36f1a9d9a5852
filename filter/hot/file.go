package hot

import (
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"

	"afterimage/hrl"
)

// readHeaders reads the present header. If either is damaged, it may have been
// the present one.
func readHeaders(f hrl.File) (header, error) {
	var b [headersEnd]byte
	if n, err := f.ReadAt(b[:], 0); n < len(b) {
		return header{}, fmt.Errorf("read the headers: %w", err)
	}
	var h [2]header
	if err := errors.Join(h[0].decode(b[:]), h[1].decode(b[pageBytes:])); err != nil {
		return header{}, fmt.Errorf("header: %w", err)
	}
	if h[0].count > h[1].count {
		return h[0], nil
	}
	return h[1], nil
}

// load reads a map's file. With an error nothing it says can be relied on.
func load(f hrl.File) (h header, c contents, err error) {
	if h, err = readHeaders(f); err != nil {
		return h, c, err
	}
	if h.state == fileBroken {
		return h, c, errors.New("a commit failed in the last session")
	}
	size, err := f.Size()
	if err != nil {
		return h, c, err
	}
	bytes := h.slots * txBytes
	if h.off+bytes > size {
		return h, c, fmt.Errorf("the ring ends at byte %d of %d", h.off+bytes, size)
	}
	b := make([]byte, bytes)
	if n, err := f.ReadAt(b, h.off); n < len(b) {
		return h, c, fmt.Errorf("read the ring: %w", err)
	}
	return h, readRing(b, &h.salt, h.extents), nil
}

// newRing writes a ring with the contents where the present one does not lie,
// and returns the header that names it. A crash
//
//  1. before the ring is synced leaves the present one, which nothing has touched
//  2. before the header is stored leaves it too
//  3. after that (storeHeader) leaves the new one
//
// The new salt makes whatever lay there before no part of it.
func (m *Map) newRing(c *contents, extents int64) (header, error) {
	h := m.head
	h.state, h.extents, h.slots = fileOpen, extents, slotsFor(extents)
	_, _ = rand.Read(h.salt[:]) // never fails
	bytes := h.slots * txBytes
	if h.off = headersEnd; m.head.slots > 0 && h.off+bytes > m.head.off {
		h.off = m.head.off + m.head.slots*txBytes
	}
	end := h.off + bytes
	if h.off-headersEnd < bytes {
		end += bytes // the next ring has no room before this one: a full disk shall not prevent it
	}
	if err := m.file.Allocate(end); err != nil {
		return h, err
	}
	const step = 256 // slots, 1 MiB
	b := make([]byte, min(h.slots, step)*txBytes)
	for slot := int64(0); slot < h.slots; slot += step {
		p := b[:min(step, h.slots-slot)*txBytes]
		c.fill(p, &h.salt, slot)
		if _, err := m.file.WriteAt(p, h.off+slot*txBytes); err != nil {
			return h, err
		}
	}
	return h, m.file.Sync()
}

// storeHeader makes h the present header. It is one sector, in the page of the
// one before the present, so a crash leaves this one or the present one.
func (m *Map) storeHeader(h header) error {
	h.count++
	var b [sectorBytes]byte
	h.encode(b[:])
	if _, err := m.file.WriteAt(b[:], int64(h.count%2)*pageBytes); err != nil {
		return err
	}
	if err := m.file.Sync(); err != nil {
		return err
	}
	m.head = h
	return nil
}

// create makes the file, in place of one that is not readable if there is one.
// A crash before the rename is durable leaves what there was, and perhaps a file
// with another name, which the next create removes: no map, or the one that was
// not readable. The rename is made durable here; if this process dies or fails
// before that, by the next open, which sees the new file but cannot know.
func (m *Map) create(c *contents, extents int64) error {
	dir := filepath.Dir(m.path)
	if err := m.fs.MkdirAll(dir); err != nil {
		return err
	}
	if err := m.fs.SyncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	tmp := m.path + ".new"
	_ = m.fs.Remove(tmp) // there seldom is one
	f, err := m.fs.Create(tmp)
	if err != nil {
		return err
	}
	m.file = f
	m.head = header{shift: uint32(m.shift)}
	if err = f.Lock(); err == nil {
		err = m.fillFile(c, extents)
	}
	if err == nil {
		err = m.fs.Rename(tmp, m.path)
	}
	if err != nil {
		_ = m.fs.Remove(tmp)
		return err
	}
	return m.fs.SyncDir(dir)
}

func (m *Map) fillFile(c *contents, extents int64) error {
	h, err := m.newRing(c, extents)
	if err != nil {
		return err
	}
	// Two equal pages but for the count, so that one that is missing later
	// is known to be.
	if err := m.storeHeader(h); err != nil {
		return err
	}
	return m.storeHeader(m.head)
}
