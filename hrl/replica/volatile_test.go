package replica

import (
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/hrl"
)

// volatileFS is the host's file system with a power cord. It remembers what of
// it is durable: of a file what was written before its last sync, of a directory
// what was made, renamed and removed before its own. Everything since may be there
// after a power cut or not, each sector and each name for itself; a renaming
// happens as a whole. Directories are durable at once.
type volatileFS struct {
	hrl.FS
	root string

	mu    sync.Mutex
	names map[string]*vnode // that the process sees, by path
	safe  map[string]*vnode // that are durable
	ops   []nameOp          // that are not, in order
	bases map[string]*faultdev.Volatile
	// tick, if set, is called before each operation, with mu held.
	tick func()
}

// A vnode is a file, whatever its name.
type vnode struct {
	safe []byte
	now  []byte
}

// A nameOp gives the file the name to, and takes the name from from it. Either
// may be empty.
type nameOp struct {
	n        *vnode
	from, to string
}

func (o *nameOp) in(dir string) bool {
	return o.from != "" && filepath.Dir(o.from) == dir || o.to != "" && filepath.Dir(o.to) == dir
}

func (o *nameOp) apply(m map[string]*vnode) {
	if o.from != "" && m[o.from] == o.n {
		delete(m, o.from)
	}
	if o.to != "" {
		m[o.to] = o.n
	}
}

func newVolatileFS(root string) *volatileFS {
	return &volatileFS{
		FS: hrl.OS, root: root, names: map[string]*vnode{}, safe: map[string]*vnode{}, bases: map[string]*faultdev.Volatile{},
	}
}

func (v *volatileFS) lock() func() {
	v.mu.Lock()
	if v.tick != nil {
		v.tick()
	}
	return v.mu.Unlock
}

func (v *volatileFS) nameLocked(o nameOp) {
	o.apply(v.names)
	v.ops = append(v.ops, o)
}

func (v *volatileFS) Create(path string) (hrl.File, error) {
	defer v.lock()()
	f, err := v.FS.Create(path)
	if err != nil {
		return nil, err
	}
	n := &vnode{}
	v.nameLocked(nameOp{n, "", path})
	return &volatileFile{f, v, n}, nil
}

func (v *volatileFS) Edit(path string) (hrl.File, error) {
	defer v.lock()()
	f, err := v.FS.Edit(path)
	if err != nil {
		return nil, err
	}
	n := v.names[path]
	if n == nil { // it was there before
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		n = &vnode{safe: b, now: append([]byte(nil), b...)}
		v.names[path], v.safe[path] = n, n
	}
	return &volatileFile{f, v, n}, nil
}

func (v *volatileFS) Rename(from, to string) error {
	defer v.lock()()
	if err := v.FS.Rename(from, to); err != nil {
		return err
	}
	if st, err := os.Stat(to); err == nil && st.IsDir() {
		for _, m := range []map[string]*vnode{v.names, v.safe} {
			for path, n := range m {
				if rel, err := filepath.Rel(from, path); err == nil && filepath.IsLocal(rel) {
					delete(m, path)
					m[filepath.Join(to, rel)] = n
				}
			}
		}
		return nil
	}
	if n := v.names[from]; n != nil {
		v.nameLocked(nameOp{n, from, to})
	}
	return nil
}

func (v *volatileFS) Remove(path string) error {
	defer v.lock()()
	if err := v.FS.Remove(path); err != nil {
		return err
	}
	if n := v.names[path]; n != nil {
		v.nameLocked(nameOp{n, path, ""})
	}
	return nil
}

func (v *volatileFS) SyncDir(dir string) error {
	defer v.lock()()
	var rest []nameOp
	for _, o := range v.ops {
		if o.in(dir) {
			o.apply(v.safe)
		} else {
			rest = append(rest, o)
		}
	}
	v.ops = rest
	return nil
}

// volatileFile is an open file of a volatileFS.
type volatileFile struct {
	hrl.File
	v *volatileFS
	n *vnode
}

func (f *volatileFile) WriteAt(p []byte, off int64) (int, error) {
	defer f.v.lock()()
	if grown := off + int64(len(p)) - int64(len(f.n.now)); grown > 0 {
		f.n.now = append(f.n.now, make([]byte, grown)...)
	}
	copy(f.n.now[off:], p)
	return f.File.WriteAt(p, off)
}

func (f *volatileFile) Sync() error {
	defer f.v.lock()()
	f.n.safe = append([]byte(nil), f.n.now...)
	return nil
}

// device opens a base as a disk with a cache that a power cut empties.
func (v *volatileFS) device(path string) (blockdev.Device, error) {
	f, err := openRaw(path)
	if err != nil {
		return nil, err
	}
	d, err := faultdev.NewVolatile(f)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.bases[path] = d
	return &tickingDevice{d, v}, nil
}

// tickingDevice lets the power fail before each request, too.
type tickingDevice struct {
	blockdev.Device
	v *volatileFS
}

func (d *tickingDevice) Do(reqs []*blockdev.Request) {
	d.v.lock()()
	d.Device.Do(reqs)
}

// cutLocked makes a directory of what a power cut leaves now. mu is held.
func (v *volatileFS) cutLocked(t testing.TB, seed uint64) string {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 77))
	left := map[string]*vnode{}
	for path, n := range v.safe {
		left[path] = n
	}
	for _, o := range v.ops {
		if rng.IntN(2) == 0 {
			o.apply(left)
		}
	}
	to := tempDir(t)
	must(t, filepath.WalkDir(v.root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // removed meanwhile
		}
		rel, err := filepath.Rel(v.root, path)
		must(t, err)
		if e.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		if v.names[path] == nil { // not through this file system
			if b, err := os.ReadFile(path); err == nil {
				return os.WriteFile(filepath.Join(to, rel), b, 0o600)
			}
		}
		return nil
	}))
	for path, n := range left {
		rel, err := filepath.Rel(v.root, path)
		must(t, err)
		b := n.crash(rng)
		if d := v.bases[path]; d != nil {
			b = readAll(t, d.Crash(seed))
		}
		must(t, os.WriteFile(filepath.Join(to, rel), b, 0o600))
	}
	return to
}

// crash is what a power cut leaves of a file: each sector as it was synced, or as
// it was written since.
func (n *vnode) crash(rng *rand.Rand) []byte {
	out := append([]byte(nil), n.safe...)
	if rng.IntN(3) > 0 { // its new length has reached the disk
		out = append(out, make([]byte, max(0, len(n.now)-len(out)))...)
	}
	torn := rng.IntN(2) == 0
	for off := 0; torn && off < len(out); off += 512 {
		if off < len(n.now) && rng.IntN(2) == 0 {
			copy(out[off:min(off+512, len(out))], n.now[off:])
		}
	}
	return out
}
