package simfs

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
	"afterimage/hrl"
)

// ErrGone is what a process gets that does not exist any more.
var ErrGone = errors.New("this process is gone")

// Op is a kind of operation.
type Op string

// The kinds.
const (
	OpRead     Op = "read"
	OpWrite    Op = "write"
	OpSync     Op = "sync"
	OpSyncDir  Op = "syncdir"
	OpCreate   Op = "create" // of a name, or of space
	OpAllocate Op = "allocate"
	OpRename   Op = "rename"
	OpRemove   Op = "remove"
	OpOpen     Op = "open"
	OpSave     Op = "save" // of the primary's state; see Process.Step
)

// A Fault makes operations fail.
type Fault struct {
	Ops   []Op
	Under string // in this directory; or this file
	After int    // so many that match pass before
	Times int    // so many fail; 0: all from then on
	Err   error
}

// A Process is one that uses a host's files, until it ends: from some operation on
// nothing that it does changes anything. It is an hrl.FS and a replica.Host.
type Process struct {
	fs *FS
	// Delay says how long an operation takes: of disks opened with Slow, and of
	// appends to logs. Half of it passes before it is done. May be nil.
	Delay func(op Op, path string) time.Duration
	// died is called once, with no lock held, when the process has ended.
	died func()
	dead chan struct{} // closed then

	mu     sync.Mutex
	rng    *rand.Rand
	gone   bool
	left   int // operations until it ends by itself; 0: it does not
	ops    int
	faults []*Fault
}

// Start starts a process.
func (f *FS) Start(seed uint64, died func()) *Process {
	return &Process{fs: f, died: died, dead: make(chan struct{}), rng: rand.New(rand.NewPCG(seed, 0x9c))}
}

// DieAfter ends the process in the middle of its nth operation from now, from 1.
func (p *Process) DieAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left = n
}

// Die ends it.
func (p *Process) Die() {
	p.mu.Lock()
	was := p.gone
	p.gone = true
	p.mu.Unlock()
	if was {
		return
	}
	close(p.dead)
	if p.died != nil {
		p.died()
	}
}

// Gone reports whether it has ended.
func (p *Process) Gone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gone
}

// Ops counts its operations.
func (p *Process) Ops() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ops
}

// Inject adds a fault.
func (p *Process) Inject(f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = append(p.faults, &f)
}

// Heal ends all faults.
func (p *Process) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults, p.left = nil, 0
}

// IntN is a random number of the process.
func (p *Process) IntN(n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rng.IntN(n)
}

// Step counts an operation. part says that the process ends in the middle of it:
// a part of it may be done. Else err says why it is not done.
func (p *Process) Step(op Op, path string) (part bool, err error) {
	p.mu.Lock()
	if p.gone {
		p.mu.Unlock()
		return false, ErrGone
	}
	p.ops++
	if p.left > 0 {
		if p.left--; p.left == 0 {
			p.mu.Unlock()
			return true, ErrGone
		}
	}
	defer p.mu.Unlock()
	for _, f := range p.faults {
		if !slices.Contains(f.Ops, op) || path != f.Under && !strings.HasPrefix(path, f.Under+"/") {
			continue
		}
		if f.After--; f.After >= 0 || f.After < -f.Times && f.Times > 0 {
			continue
		}
		return false, f.Err
	}
	return false, nil
}

// do is one operation that is done as a whole or not at all.
func (p *Process) do(op Op, path string, change func() error) error {
	part, err := p.Step(op, path)
	if part {
		if p.IntN(2) == 0 {
			p.fs.mu.Lock()
			_ = change()
			p.fs.mu.Unlock()
		}
		p.Die()
	}
	if err != nil {
		return err
	}
	p.fs.mu.Lock()
	defer p.fs.mu.Unlock()
	return change()
}

func (p *Process) wait(op Op, path string) (rest func()) {
	if p.Delay == nil || p.Gone() {
		return func() {}
	}
	d := p.Delay(op, path)
	if d <= 0 {
		return func() {}
	}
	p.sleep(d / 2)
	return func() { p.sleep(d - d/2) }
}

// sleep ends with the process. The goroutines of one that is gone wait for each
// other's locks alone, and in a bubble no time passes then.
func (p *Process) sleep(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.dead:
	}
}

// MkdirAll implements hrl.FS.
func (p *Process) MkdirAll(dir string) error {
	return p.do(OpCreate, dir, func() error {
		p.fs.mkdirLocked(dir)
		if m := p.fs.mirror; m != "" && strings.HasPrefix(dir, m) {
			return os.MkdirAll(dir, 0o700)
		}
		return nil
	})
}

// ReadDir implements hrl.FS.
func (p *Process) ReadDir(dir string) ([]string, error) {
	if p.Gone() {
		return nil, ErrGone
	}
	p.fs.mu.Lock()
	defer p.fs.mu.Unlock()
	if !p.fs.dirs[dir] {
		return nil, syscall.ENOENT
	}
	var names []string
	for path := range p.fs.names {
		if filepath.Dir(path) == dir {
			names = append(names, filepath.Base(path))
		}
	}
	for path := range p.fs.dirs {
		if filepath.Dir(path) == dir && path != dir {
			names = append(names, filepath.Base(path))
		}
	}
	slices.Sort(names)
	return names, nil
}

// Open implements hrl.FS.
func (p *Process) Open(path string) (hrl.File, error) { return p.open(path) }

// Edit implements hrl.FS.
func (p *Process) Edit(path string) (hrl.File, error) { return p.open(path) }

func (p *Process) open(path string) (hrl.File, error) {
	var f *file
	err := p.do(OpOpen, path, func() error {
		n := p.fs.names[path]
		if n == nil {
			return syscall.ENOENT
		}
		f = &file{p, n, path}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Create implements hrl.FS.
func (p *Process) Create(path string) (hrl.File, error) {
	n := newInode()
	err := p.do(OpCreate, path, func() error {
		switch {
		case p.fs.names[path] != nil || p.fs.dirs[path]:
			return syscall.EEXIST
		case !p.fs.dirs[filepath.Dir(path)]:
			return syscall.ENOENT
		}
		p.fs.moveLocked(move{n, "", path})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &file{p, n, path}, nil
}

// Rename implements hrl.FS.
func (p *Process) Rename(from, to string) error {
	return p.do(OpRename, to, func() error {
		if p.fs.dirs[from] {
			p.fs.renameDirLocked(from, to)
			return nil
		}
		n := p.fs.names[from]
		if n == nil {
			return syscall.ENOENT
		}
		p.fs.moveLocked(move{n, from, to})
		return nil
	})
}

// Remove implements hrl.FS.
func (p *Process) Remove(path string) error {
	return p.do(OpRemove, path, func() error {
		n := p.fs.names[path]
		if n == nil {
			return syscall.ENOENT
		}
		p.fs.moveLocked(move{n, path, ""})
		return nil
	})
}

// SyncDir implements hrl.FS.
func (p *Process) SyncDir(dir string) error {
	return p.do(OpSyncDir, dir, func() error {
		if !p.fs.dirs[dir] {
			return syscall.ENOENT
		}
		var rest []move
		for _, o := range p.fs.moves {
			if o.in(dir) {
				o.apply(p.fs.safe)
			} else {
				rest = append(rest, o)
			}
		}
		p.fs.moves = rest
		return nil
	})
}

// RemoveAll implements replica.Host.
func (p *Process) RemoveAll(dir string) error {
	part, err := p.Step(OpRemove, dir)
	if part {
		p.Die()
	}
	if err != nil {
		return err
	}
	p.fs.RemoveAll(dir)
	if m := p.fs.mirror; m != "" && strings.HasPrefix(dir, m) {
		return os.RemoveAll(dir)
	}
	return nil
}

// Identify implements replica.Host. Nobody else looks at images here.
func (p *Process) Identify(string, owner.Identity) error { return nil }

// OpenBase implements replica.Host.
func (p *Process) OpenBase(path string) (blockdev.Device, error) {
	return p.OpenDisk(path, blockdev.Info{BlockSize: sector, CheapZero: true, CheapTrim: true}, false)
}
