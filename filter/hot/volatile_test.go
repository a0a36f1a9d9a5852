package hot

import (
	"errors"
	"io"
	iofs "io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"afterimage/hrl"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errInjected = errors.New("injected failure")

// volatileFS is a file system in memory, of which a power cut keeps what was
// synced, and of everything else an arbitrary part: of each sector of 512 bytes
// any version since the last sync, of a directory any state since its last one.
type volatileFS struct {
	mu sync.Mutex
	// dirs are the states that a power cut may leave, oldest first; the last
	// one is what processes see.
	dirs []map[string]*inode

	ops    int
	failAt int  // fail the operation with this number, from 1; 0: none
	sticky bool // and all behind it
	fired  bool
	// before is called before each operation, with mu not held.
	before func(op string, f *volatileFile, p []byte, off int64)
	after  func(op string, f *volatileFile)
}

type inode struct {
	data    []byte
	pending map[int64]*versions // by sector
	size    int64               // that is durable
	locked  bool
}

type versions struct {
	durable []byte
	since   [][]byte
	lost    bool // a sync failed: no later one makes since durable
}

func newVolatileFS() *volatileFS { return &volatileFS{dirs: []map[string]*inode{{}}} }

// crash is the file system after a power cut now.
func (v *volatileFS) crash(rng *rand.Rand) *volatileFS {
	v.mu.Lock()
	defer v.mu.Unlock()
	left := newVolatileFS()
	dir := v.dirs[rng.IntN(len(v.dirs))]
	for _, name := range slices.Sorted(maps.Keys(dir)) {
		n := dir[name]
		c := &inode{data: slices.Clone(n.data), pending: map[int64]*versions{}}
		// All or nothing is as likely as anything between.
		style := rng.IntN(4)
		for _, s := range slices.Sorted(maps.Keys(n.pending)) {
			p := n.pending[s]
			keep := rng.IntN(len(p.since) + 1)
			switch style {
			case 0:
				keep = 0
			case 1:
				keep = len(p.since)
			}
			b := p.durable
			if keep > 0 {
				b = p.since[keep-1]
			}
			copy(c.data[s*sectorBytes:], b)
		}
		if rng.IntN(2) == 0 && n.size < int64(len(c.data)) {
			c.data = c.data[:n.size]
		}
		c.size = int64(len(c.data))
		left.dirs[0][name] = c
	}
	return left
}

// kill is the file system as the next process finds it.
func (v *volatileFS) kill() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, n := range v.now() {
		n.locked = false
	}
	v.before, v.after, v.failAt = nil, nil, 0
}

func (v *volatileFS) now() map[string]*inode { return v.dirs[len(v.dirs)-1] }

func (v *volatileFS) op(op string, f *volatileFile, p []byte, off int64) error {
	v.mu.Lock()
	before := v.before
	v.ops++
	fail := v.failAt != 0 && (v.ops == v.failAt || v.sticky && v.ops > v.failAt)
	v.fired = v.fired || fail
	v.mu.Unlock()
	if before != nil {
		before(op, f, p, off)
	}
	if fail {
		return errInjected
	}
	return nil
}

func (v *volatileFS) change(op string, f func(dir map[string]*inode) error) error {
	if err := v.op(op, nil, nil, 0); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	dir := maps.Clone(v.now())
	if err := f(dir); err != nil {
		return err
	}
	v.dirs = append(v.dirs, dir)
	return nil
}

func (v *volatileFS) MkdirAll(string) error { return v.op("mkdir", nil, nil, 0) }
func (v *volatileFS) ReadDir(string) ([]string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Sorted(maps.Keys(v.now())), nil
}

func (v *volatileFS) Open(path string) (hrl.File, error) { return v.Edit(path) }

func (v *volatileFS) Create(path string) (hrl.File, error) {
	n := &inode{pending: map[int64]*versions{}}
	err := v.change("create", func(dir map[string]*inode) error {
		if dir[path] != nil {
			return iofs.ErrExist
		}
		dir[path] = n
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &volatileFile{fs: v, n: n}, nil
}

func (v *volatileFS) Edit(path string) (hrl.File, error) {
	if err := v.op("edit", nil, nil, 0); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	n := v.now()[path]
	if n == nil {
		return nil, iofs.ErrNotExist
	}
	return &volatileFile{fs: v, n: n}, nil
}

func (v *volatileFS) Rename(from, to string) error {
	return v.change("rename", func(dir map[string]*inode) error {
		if dir[from] == nil {
			return iofs.ErrNotExist
		}
		dir[to] = dir[from]
		delete(dir, from)
		return nil
	})
}

func (v *volatileFS) Remove(path string) error {
	return v.change("remove", func(dir map[string]*inode) error {
		if dir[path] == nil {
			return iofs.ErrNotExist
		}
		delete(dir, path)
		return nil
	})
}

// SyncDir makes all names durable. One that fails loses none for a later one, unlike
// a file's Sync: names are in the file system's journal, which after an error
// takes nothing more, so that no later sync succeeds without them.
func (v *volatileFS) SyncDir(string) error {
	if err := v.op("syncdir", nil, nil, 0); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dirs = v.dirs[len(v.dirs)-1:]
	return nil
}

type volatileFile struct {
	fs *volatileFS
	n  *inode
	// owns says that the lock of the inode is this file's.
	owns bool
}

func (f *volatileFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.fs.op("read", f, p, off); err != nil {
		return 0, err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if off >= int64(len(f.n.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.n.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *volatileFile) WriteAt(p []byte, off int64) (int, error) {
	if off%sectorBytes != 0 || len(p)%sectorBytes != 0 {
		panic("the map writes whole sectors")
	}
	err := f.fs.op("write", f, p, off)
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err != nil {
		p = p[:len(p)/2/sectorBytes*sectorBytes] // what fails is half done
	}
	f.growLocked(off + int64(len(p)))
	for at := int64(0); at < int64(len(p)); at += sectorBytes {
		s := (off + at) / sectorBytes
		v := f.n.pending[s]
		if v == nil {
			v = &versions{durable: slices.Clone(f.n.data[s*sectorBytes : (s+1)*sectorBytes])}
			f.n.pending[s] = v
		}
		v.since = append(v.since, slices.Clone(p[at:at+sectorBytes]))
		v.lost = false
	}
	copy(f.n.data[off:], p)
	return len(p), err
}

func (f *volatileFile) growLocked(size int64) {
	if n := size - int64(len(f.n.data)); n > 0 {
		f.n.data = append(f.n.data, make([]byte, n)...)
	}
}

func (f *volatileFile) WritevAt(bufs [][]byte, off int64) (int64, error) {
	n, err := f.WriteAt(slices.Concat(bufs...), off)
	return int64(n), err
}

func (f *volatileFile) Sync() error {
	err := f.fs.op("sync", f, nil, 0)
	f.fs.mu.Lock()
	for s, v := range f.n.pending {
		switch {
		case err != nil:
			v.lost = true // as on Linux, the next sync succeeds without it
		case !v.lost:
			delete(f.n.pending, s)
		}
	}
	if err == nil {
		f.n.size = int64(len(f.n.data))
	}
	after := f.fs.after
	f.fs.mu.Unlock()
	if err == nil && after != nil {
		after("sync", f)
	}
	return err
}

func (f *volatileFile) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return int64(len(f.n.data)), nil
}

func (f *volatileFile) Allocate(size int64) error {
	if err := f.fs.op("allocate", f, nil, 0); err != nil {
		return err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.growLocked(size)
	return nil
}

func (f *volatileFile) WriteBehind(off, n int64, drop bool) {}

func (f *volatileFile) Lock() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.n.locked {
		return hrl.ErrLocked
	}
	f.n.locked, f.owns = true, true
	return nil
}

func (f *volatileFile) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.owns {
		f.n.locked, f.owns = false, false
	}
	return nil
}
