package hrl

import (
	"errors"
	"sync"
	"testing"
	"time"
)

// faultFS is the host's file system with faults a real one cannot produce on
// demand: the kth operation fails, writes are short, or hang until let go.
type faultFS struct {
	FS
	mu       sync.Mutex
	failAt   int // fail the operation with this number, from 1; 0: none
	sticky   bool
	ops      int
	fired    bool
	err      error
	short    bool          // a failing write first writes half
	hang     chan struct{} // appends wait until it is closed
	hanging  int           // appends that wait
	noAppend bool          // appends fail
	reading  func() error  // is called before each reading, if set, and its error is that one's
	// before, if set, is called before files are made and allocated, and its
	// error is theirs. It may wait.
	before func(op string) error
}

var errInjected = errors.New("injected failure")

func newFaultFS() *faultFS { return &faultFS{FS: OS, err: errInjected} }

func (f *faultFS) op() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ops++
	if f.failAt != 0 && (f.ops == f.failAt || f.sticky && f.ops > f.failAt) {
		f.fired = true
		return f.err
	}
	return nil
}

func (f *faultFS) call(op string) error {
	f.mu.Lock()
	before := f.before
	f.mu.Unlock()
	if before == nil {
		return nil
	}
	return before(op)
}

// waitHanging waits until an append hangs.
func (f *faultFS) waitHanging(t testing.TB) {
	t.Helper()
	eventually(t, "an append hangs", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.hanging > 0
	})
}

// eventually waits until ok is true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func (f *faultFS) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *faultFS) MkdirAll(dir string) error {
	if err := f.op(); err != nil {
		return err
	}
	return f.FS.MkdirAll(dir)
}

func (f *faultFS) ReadDir(dir string) ([]string, error) {
	if err := f.op(); err != nil {
		return nil, err
	}
	return f.FS.ReadDir(dir)
}

func (f *faultFS) file(g File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	if err := f.op(); err != nil {
		g.Close()
		return nil, err
	}
	return &faultFile{g, f}, nil
}

func (f *faultFS) Open(path string) (File, error) { return f.file(f.FS.Open(path)) }
func (f *faultFS) Create(path string) (File, error) {
	if err := f.call("create"); err != nil {
		return nil, err
	}
	return f.file(f.FS.Create(path))
}
func (f *faultFS) Edit(path string) (File, error) { return f.file(f.FS.Edit(path)) }

func (f *faultFS) Rename(from, to string) error {
	if err := f.op(); err != nil {
		return err
	}
	return f.FS.Rename(from, to)
}

func (f *faultFS) SyncDir(dir string) error {
	if err := f.op(); err != nil {
		return err
	}
	return f.FS.SyncDir(dir)
}

type faultFile struct {
	File
	f *faultFS
}

func (f *faultFile) ReadAt(p []byte, off int64) (int, error) {
	f.f.mu.Lock()
	reading := f.f.reading
	f.f.mu.Unlock()
	if reading != nil {
		if err := reading(); err != nil {
			return 0, err
		}
	}
	if err := f.f.op(); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

func (f *faultFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.f.op(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f *faultFile) WritevAt(bufs [][]byte, off int64) (int64, error) {
	f.f.mu.Lock()
	hang, short, fail := f.f.hang, f.f.short, f.f.noAppend
	if hang != nil {
		f.f.hanging++
	}
	f.f.mu.Unlock()
	if hang != nil {
		<-hang
		f.f.set(func() { f.f.hanging-- })
	}
	if fail {
		return 0, f.f.err
	}
	if err := f.f.op(); err != nil {
		if short && len(bufs) > 1 {
			n, _ := f.File.WritevAt(bufs[:len(bufs)/2], off)
			return n, err
		}
		return 0, err
	}
	return f.File.WritevAt(bufs, off)
}

func (f *faultFile) Sync() error {
	if err := f.f.op(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *faultFile) Allocate(size int64) error {
	if err := f.f.call("allocate"); err != nil {
		return err
	}
	if err := f.f.op(); err != nil {
		return err
	}
	return f.File.Allocate(size)
}
