package simfs

import (
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// FS is what a host stores, and its page cache. Processes use it; it outlives them.
type FS struct {
	mu    sync.Mutex
	rng   *rand.Rand
	clock uint64            // of writes and syncs
	dirs  map[string]bool   // durable at once
	names map[string]*inode // that processes see, by path
	safe  map[string]*inode // that are durable
	moves []move            // that are not, in order
	// mirror is a directory whose directories are made on the real host, too, for
	// files that are opened there (the tops of failovers).
	mirror string
}

// A move gives the file the name to, and takes the name from from it. Either may
// be empty. A power cut keeps it or not, by itself.
type move struct {
	n        *inode
	from, to string
}

func (o *move) in(dir string) bool {
	return o.from != "" && filepath.Dir(o.from) == dir || o.to != "" && filepath.Dir(o.to) == dir
}

func (o *move) apply(m map[string]*inode) {
	if o.from != "" && m[o.from] == o.n {
		delete(m, o.from)
	}
	if o.to != "" {
		m[o.to] = o.n
	}
}

// New returns an empty file system. The seed decides what its power cuts leave.
func New(seed uint64) *FS {
	return &FS{
		rng: rand.New(rand.NewPCG(seed, 0xf5)), dirs: map[string]bool{"/": true},
		names: map[string]*inode{}, safe: map[string]*inode{},
	}
}

// Mirror has directories below dir made on the real host, too.
func (f *FS) Mirror(dir string) { f.mirror = dir }

func (f *FS) moveLocked(o move) {
	o.apply(f.names)
	f.moves = append(f.moves, o)
}

func (f *FS) mkdirLocked(dir string) {
	for dir = filepath.Clean(dir); !f.dirs[dir]; dir = filepath.Dir(dir) {
		f.dirs[dir] = true
	}
}

// renameDirLocked moves a directory, durably at once.
func (f *FS) renameDirLocked(from, to string) {
	under := func(path string) (string, bool) {
		rest, ok := strings.CutPrefix(path, from)
		return to + rest, ok && (rest == "" || rest[0] == '/')
	}
	for _, m := range []map[string]*inode{f.names, f.safe} {
		for _, path := range slices.Collect(maps.Keys(m)) {
			if p, ok := under(path); ok {
				m[p] = m[path]
				delete(m, path)
			}
		}
	}
	for _, path := range slices.Collect(maps.Keys(f.dirs)) {
		if p, ok := under(path); ok {
			f.dirs[p] = true
			delete(f.dirs, path)
		}
	}
	for i := range f.moves {
		o := &f.moves[i]
		if p, ok := under(o.from); ok && o.from != "" {
			o.from = p
		}
		if p, ok := under(o.to); ok && o.to != "" {
			o.to = p
		}
	}
}

// RemoveAll removes a directory and all in it, durably.
func (f *FS) RemoveAll(dir string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	in := func(path string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }
	for _, m := range []map[string]*inode{f.names, f.safe} {
		maps.DeleteFunc(m, func(path string, _ *inode) bool { return in(path) })
	}
	maps.DeleteFunc(f.dirs, func(path string, _ bool) bool { return in(path) })
	f.moves = slices.DeleteFunc(f.moves, func(o move) bool { return in(o.from) || in(o.to) })
}

// Kill is what the end of a process leaves: all that it wrote. Where a sync has
// failed, pages that could not be written may have gone since.
func (f *FS) Kill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, path := range slices.Sorted(maps.Keys(f.names)) {
		n := f.names[path]
		n.user = nil
		n.evict(f.rng)
	}
}

// PowerCut leaves what is durable and, of everything else, an arbitrary part.
func (f *FS) PowerCut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	left := maps.Clone(f.safe)
	for _, o := range f.moves {
		if f.rng.IntN(2) == 0 {
			o.apply(left)
		}
	}
	f.names, f.safe, f.moves = left, maps.Clone(left), nil
	seen := map[*inode]bool{}
	for _, path := range slices.Sorted(maps.Keys(left)) {
		if n := left[path]; !seen[n] {
			seen[n] = true
			n.powerCut(f.rng)
		}
	}
}

// Clone is a copy of all that processes see below a directory, durable.
func (f *FS) Clone(dir string) *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := New(f.rng.Uint64())
	for d := range f.dirs {
		c.dirs[d] = true
	}
	for path, n := range f.names {
		if strings.HasPrefix(path, dir+"/") {
			m := n.clone()
			m.durable = m.size
			c.names[path], c.safe[path] = m, m
		}
	}
	return c
}

// Restore puts below a directory what a Clone has.
func (f *FS) Restore(dir string, from *FS) {
	f.RemoveAll(dir)
	c := from.Clone(dir)
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.Copy(f.dirs, c.dirs)
	maps.Copy(f.names, c.names)
	maps.Copy(f.safe, c.safe)
}

// Paths are the files that match, sorted.
func (f *FS) Paths(match func(path string) bool) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for path := range f.names {
		if match(path) {
			out = append(out, path)
		}
	}
	slices.Sort(out)
	return out
}

// Flip changes a bit of a file, on the platter and in the cache; false: there is
// nothing at off but a hole.
func (f *FS) Flip(path string, off int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.names[path]
	if n == nil || off >= n.size || n.pages[off/pageBytes] == nil {
		return false
	}
	n.pages[off/pageBytes][off%pageBytes] ^= 0x10
	return true
}

// Size is the size of a file, -1 if it is not there.
func (f *FS) Size(path string) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.names[path]; n != nil {
		return n.size
	}
	return -1
}

// Read is the content of a file as processes see it.
func (f *FS) Read(path string) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.names[path]
	if n == nil {
		return nil
	}
	p := make([]byte, n.size)
	n.read(p, 0)
	return p
}

// Write makes a file with this content, durably.
func (f *FS) Write(path string, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := newInode()
	n.store(p, 0, int64(len(p)))
	n.size, n.durable = int64(len(p)), int64(len(p))
	f.mkdirLocked(filepath.Dir(path))
	f.names[path], f.safe[path] = n, n
}

// Make makes an empty file of that size, durably.
func (f *FS) Make(path string, size int64) {
	f.Write(path, nil)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.names[path].resize(size)
}
