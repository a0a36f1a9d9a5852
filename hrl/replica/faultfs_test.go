package replica

import (
	"sync"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// faultFS is the host's file system, and the bases on it, where the operation
// with one number fails, and with sticky all later ones too.
type faultFS struct {
	hrl.FS
	mu     sync.Mutex
	failAt int // from 1; 0: none
	sticky bool
	err    error
	ops    int
	fired  bool
}

func newFaultFS(failAt int, sticky bool, err error) *faultFS {
	return &faultFS{FS: hrl.OS, failAt: failAt, sticky: sticky, err: err}
}

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

// calm ends the faults, and reports whether there were any.
func (f *faultFS) calm() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failAt = 0
	return f.fired
}

func (f *faultFS) struck() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
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

func (f *faultFS) file(open func(string) (hrl.File, error), path string) (hrl.File, error) {
	if err := f.op(); err != nil {
		return nil, err
	}
	g, err := open(path)
	if err != nil {
		return nil, err
	}
	return &faultFile{g, f}, nil
}

func (f *faultFS) Open(path string) (hrl.File, error)   { return f.file(f.FS.Open, path) }
func (f *faultFS) Create(path string) (hrl.File, error) { return f.file(f.FS.Create, path) }
func (f *faultFS) Edit(path string) (hrl.File, error)   { return f.file(f.FS.Edit, path) }

func (f *faultFS) Rename(from, to string) error {
	if err := f.op(); err != nil {
		return err
	}
	return f.FS.Rename(from, to)
}

func (f *faultFS) Remove(path string) error {
	if err := f.op(); err != nil {
		return err
	}
	return f.FS.Remove(path)
}

func (f *faultFS) SyncDir(dir string) error {
	if err := f.op(); err != nil {
		return err
	}
	return f.FS.SyncDir(dir)
}

func (f *faultFS) device(path string) (blockdev.Device, error) {
	if err := f.op(); err != nil {
		return nil, err
	}
	d, err := openRaw(path)
	if err != nil {
		return nil, err
	}
	return &faultDevice{d, f}, nil
}

type faultFile struct {
	hrl.File
	f *faultFS
}

func (f *faultFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.f.op(); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

// WriteAt writes half of it before it fails.
func (f *faultFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.f.op(); err != nil {
		n, _ := f.File.WriteAt(p[:len(p)/2], off)
		return n, err
	}
	return f.File.WriteAt(p, off)
}

func (f *faultFile) Sync() error {
	if err := f.f.op(); err != nil {
		return err
	}
	return f.File.Sync()
}

type faultDevice struct {
	blockdev.Device
	f *faultFS
}

func (d *faultDevice) Do(reqs []*blockdev.Request) {
	for _, r := range reqs {
		if r.Err = d.f.op(); r.Err != nil {
			continue
		}
		d.Device.Do([]*blockdev.Request{r})
	}
}

func (d *faultDevice) Resize(size int64) error {
	if err := d.f.op(); err != nil {
		return err
	}
	return d.Device.Resize(size)
}

// TestFaultFS: it fails what it is to fail, no more.
func TestFaultFS(t *testing.T) {
	f := newFaultFS(2, false, syscall.EIO)
	for k, want := range []error{nil, syscall.EIO, nil} {
		if _, err := f.ReadDir(tempDir(t)); err != want {
			t.Fatalf("operation %d: %v", k+1, err)
		}
	}
}
