package gap

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"afterimage/hrl"
)

// Kind is how the last session ended.
type Kind string

// The kinds.
const (
	New     Kind = "new"     // there was no map
	Clean   Kind = "clean"   // closed
	Unclean Kind = "unclean" // not closed, or nobody knows
)

// Found is what Open found.
type Found struct {
	Kind Kind
	All  bool // nothing could be relied on: every block is a gap
	// Why is what is damaged or unknown, if anything is, so that blocks are
	// gaps that need not be any. With a page that a power cut tore that is 2 GiB.
	Why error
}

// Open opens the map of a disk of size bytes, or makes it. All that it found is
// a gap, and durable, when it returns.
//
// A map that is missing is made, with no gaps if fresh says that nothing was tracked
// before, else with all blocks as gaps. One that has no two good headers, is
// of another version, or became Broken in the last session, is made anew, with
// all blocks as gaps. A page that is damaged, torn or missing reads as all gaps.
// If the disk had another size, Open resizes the map as Resize does. An error says
// that the map can be neither used nor made.
//
// Steps with a map that can be read, and what a crash after each leaves:
//
//  1. its name made durable, and room allocated that should be there already: leaves
//     the map as it was
//  2. damaged pages written, and after an unclean end all others with gaps, for
//     they may be in no more than the page cache, and not even dirty: leaves the map as it was
//  3. all synced, and the header stored, state open: leaves an unclean map with
//     all of it
//  4. the map resized: see Resize
//
// If step 2 or 3 fails, the disk may have lost what the page cache still shows
// (RULES F6): nothing that was read is believed, and the map is made anew.
func Open(fsys hrl.FS, path string, size int64, fresh bool) (*Map, Found, error) {
	m := &Map{fs: fsys, path: path, size: size}
	found, err := m.open(fresh)
	if err != nil {
		if m.file != nil {
			m.file.Close()
		}
		return nil, Found{}, fmt.Errorf("open %s: %w", path, err)
	}
	return m, found, nil
}

func (m *Map) open(fresh bool) (Found, error) {
	size := m.size
	if err := checkSize(size); err != nil {
		return Found{}, err
	}
	m.io.Lock()
	defer m.io.Unlock()
	f, err := m.fs.Edit(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return Found{Kind: New, All: !fresh}, m.create(!fresh)
	}
	if err != nil {
		return Found{}, err
	}
	m.file = f
	if err := f.Lock(); err != nil {
		return Found{}, err
	}
	// Whoever made it may have been killed before its name was durable.
	if err := m.fs.SyncDir(filepath.Dir(m.path)); err != nil {
		return Found{}, err
	}
	found, err := m.load(size)
	if err != nil {
		return Found{Kind: Unclean, All: true, Why: err}, m.anew(size)
	}
	err = m.resume(size)
	if err != nil && m.broken != nil {
		return Found{Kind: Unclean, All: true, Why: err}, m.anew(size)
	}
	return found, err
}

// anew makes the map anew, and with nothing but gaps. The old file keeps its lock until then.
func (m *Map) anew(size int64) error {
	old := m.file
	m.size, m.broken, m.wrote, m.synced = size, nil, 0, 0
	err := m.create(true)
	old.Close()
	return err
}

// resume makes the loaded map one that is in use, of a disk of size bytes.
func (m *Map) resume(size int64) error {
	if err := m.file.Allocate(fileBytes(m.size)); err != nil {
		return err
	}
	if err := m.flush(0); err != nil {
		return err
	}
	err := m.fsync()
	if err == nil && m.head.state != fileOpen {
		err = m.storeHeader(fileOpen, m.size)
	}
	if err == nil && size != m.size {
		err = m.resize(size)
	}
	return err
}

// load reads the map, for a disk of size bytes. With an error nothing the file
// says can be relied on.
func (m *Map) load(size int64) (Found, error) {
	h, err := readHeaders(m.file)
	if err != nil {
		return Found{}, err
	}
	if h.state == fileBroken {
		return Found{}, errors.New("a write or sync failed in the last session")
	}
	// What a header asks for is in the file, or no more than the disk needs.
	end, err := m.file.Size()
	if err != nil {
		return Found{}, err
	}
	if end < fileBytes(h.size) && h.size > size {
		return Found{}, fmt.Errorf("a disk of %d bytes has a map of %d", h.size, end)
	}
	m.head, m.size, m.seed = h, h.size, saltSeed(h.salt)
	m.pages = make([]page, pagesFor(h.size))
	found := Found{Kind: Unclean}
	if h.state == fileClean {
		found.Kind = Clean
	}
	var first error
	damaged := 0
	eachPage(m.file, int64(len(m.pages)), func(p int64, b []byte, err error) {
		g, n := &m.pages[p], min(blocksFor(h.size)-p*pageBits, pageBits)
		var bits *words
		beyond := false
		if err == nil {
			bits, beyond, err = getPage(b, m.seed, p, n)
		}
		if g.adopt(bits); err != nil {
			g.set(0, n)
			if damaged++; first == nil {
				first = fmt.Errorf("page %d: %w", p, err)
			}
		}
		m.blocks += g.n
		if g.stale = err != nil || beyond || found.Kind == Unclean && g.n > 0; g.stale {
			m.stale++
		}
	})
	if damaged > 0 {
		found.Why = fmt.Errorf("%d of %d pages cannot be read, the first: %w", damaged, len(m.pages), first)
		found.All = damaged == len(m.pages)
	}
	return found, nil
}

// readHeaders reads the present header. If either is damaged, it may have been
// the present one.
func readHeaders(f hrl.File) (header, error) {
	var b [headersEnd]byte
	if n, err := f.ReadAt(b[:], 0); n < len(b) {
		return header{}, fmt.Errorf("%w: read: %w", errHeader, err)
	}
	var h [2]header
	if err := errors.Join(h[0].decode(b[:]), h[1].decode(b[pageBytes:])); err != nil {
		return header{}, fmt.Errorf("%w: %w", errHeader, err)
	}
	if h[0].salt != h[1].salt || h[0].count%2 != 0 && h[0].state != fileBroken {
		return header{}, fmt.Errorf("%w: of another file", errHeader)
	}
	if h[0].count > h[1].count {
		return h[0], nil
	}
	return h[1], nil
}

// eachPage reads n pages; err is why one could not be read.
func eachPage(f hrl.File, n int64, visit func(p int64, b []byte, err error)) {
	const step = 256 // 1 MiB
	buf := make([]byte, min(n, step)*pageBytes)
	for first := int64(0); first < n; first += step {
		b := buf[:min(step, n-first)*pageBytes]
		got, err := f.ReadAt(b, pageOff(first))
		if got == len(b) {
			err = nil
		}
		for i := int64(0); i*pageBytes < int64(len(b)); i++ {
			page, perr := b[i*pageBytes:(i+1)*pageBytes], error(nil)
			if err != nil && (i+1)*pageBytes > int64(got) {
				// An unreadable sector shall cost no more than its page.
				var k int
				if k, perr = f.ReadAt(page, pageOff(first+i)); k == len(page) {
					perr = nil
				}
			}
			visit(first+i, page, perr)
		}
	}
}

// create makes the file, in place of one that cannot be relied on if there is
// one, with no block as a gap or with all.
//
// It is made under another name, synced, and renamed; a crash before the rename
// is durable leaves what there was, which reads as no map or as all gaps, and
// perhaps the other name, which the next create removes.
func (m *Map) create(all bool) error {
	m.pages = make([]page, pagesFor(m.size))
	m.blocks, m.stale = 0, 0
	if all {
		for p := range m.pages {
			m.pages[p].set(0, min(blocksFor(m.size)-int64(p)*pageBits, pageBits))
		}
		m.blocks = blocksFor(m.size)
	}
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
	if err = f.Lock(); err == nil {
		err = m.fill(f)
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

// fill writes the whole file. That it fails says nothing about the map at path.
func (m *Map) fill(f hrl.File) error {
	h := header{state: fileOpen, count: 1, size: m.size}
	_, _ = rand.Read(h.salt[:]) // never fails
	m.seed = saltSeed(h.salt)
	if err := f.Allocate(fileBytes(m.size)); err != nil {
		return err
	}
	if err := writePages(f, m.seed, m.pages, 0); err != nil {
		return err
	}
	var b [headersEnd]byte
	h.encode(b[pageBytes:])
	h.count++
	h.encode(b[:])
	if _, err := f.WriteAt(b[:], 0); err != nil {
		return err
	}
	m.head = h
	return f.Sync()
}
