package simfs

import (
	"io"
	"slices"

	"afterimage/hrl"
)

// file is an open file.
type file struct {
	p    *Process
	n    *inode
	path string
}

func (f *file) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.p.do(OpRead, f.path, func() error {
		n = int(min(int64(len(p)), max(0, f.n.size-off)))
		f.n.read(p[:n], off)
		if n < len(p) {
			return io.EOF
		}
		return nil
	})
	return n, err
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	part, err := f.p.Step(OpWrite, f.path)
	n := len(p)
	if err != nil {
		n = 0
		// A write that fails, or during which the process ends, is done in part.
		if (part || err != ErrGone) && len(p) > 0 {
			n = f.p.IntN(len(p) + 1)
		}
	}
	f.p.fs.mu.Lock()
	f.p.fs.clock++
	f.n.write(p[:n], off, int64(n), f.p.fs.clock)
	f.p.fs.mu.Unlock()
	if part {
		f.p.Die()
		n = 0
	}
	return n, err
}

func (f *file) WritevAt(bufs [][]byte, off int64) (int64, error) {
	rest := f.p.wait(OpWrite, f.path)
	n, err := f.WriteAt(slices.Concat(bufs...), off)
	rest()
	return int64(n), err
}

func (f *file) Sync() error {
	part, err := f.p.Step(OpSync, f.path)
	f.p.fs.mu.Lock()
	switch {
	case err == nil:
		f.n.settle(0, 1<<60, f.p.fs.clock)
		f.n.durable = f.n.size
	case err != ErrGone:
		f.n.lose()
	}
	f.p.fs.mu.Unlock()
	if part {
		f.p.Die()
	}
	return err
}

func (f *file) Size() (int64, error) {
	if f.p.Gone() {
		return 0, ErrGone
	}
	f.p.fs.mu.Lock()
	defer f.p.fs.mu.Unlock()
	return f.n.size, nil
}

func (f *file) Allocate(size int64) error {
	return f.p.do(OpAllocate, f.path, func() error {
		f.n.size = max(f.n.size, size)
		return nil
	})
}

func (f *file) WriteBehind(off, n int64, drop bool) {}

func (f *file) Lock() error {
	if f.p.Gone() {
		return ErrGone
	}
	f.p.fs.mu.Lock()
	defer f.p.fs.mu.Unlock()
	if f.n.user != nil {
		return hrl.ErrLocked
	}
	f.n.user = f.p
	return nil
}

func (f *file) Close() error {
	f.p.fs.mu.Lock()
	defer f.p.fs.mu.Unlock()
	if f.n.user == f.p {
		f.n.user = nil
	}
	return nil
}
