package hrl

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FS is the file system as this package uses it. OS is the real one; tests put
// one that fails in its place.
type FS interface {
	MkdirAll(dir string) error
	// ReadDir returns the base names of the directory's files, sorted.
	ReadDir(dir string) ([]string, error)
	Open(path string) (File, error)   // for reading
	Create(path string) (File, error) // for reading and writing; fails if it exists
	Edit(path string) (File, error)   // for reading and writing; fails if it does not exist
	Rename(from, to string) error
	Remove(path string) error
	SyncDir(dir string) error
}

// File is an open file of an FS.
type File interface {
	io.ReaderAt
	io.WriterAt
	// WritevAt writes the buffers one behind the other, from byte off on. It
	// returns how many bytes were written; fewer than all with an error.
	WritevAt(bufs [][]byte, off int64) (int64, error)
	// Sync makes the file's data and size durable.
	Sync() error
	Size() (int64, error)
	// Allocate reserves space so that the file has at least size bytes.
	Allocate(size int64) error
	// WriteBehind asks for the range to be written to the disk soon, and, if
	// drop is set, to leave the page cache once it is there. A hint.
	WriteBehind(off, n int64, drop bool)
	// Lock takes the file exclusively, or fails with ErrLocked at once.
	Lock() error
	Close() error
}

// ErrLocked says that another process has the log open.
var ErrLocked = errors.New("in use by another process")

// OS is the file system of the host.
var OS FS = osFS{}

type osFS struct{}

func (osFS) MkdirAll(dir string) error { return os.MkdirAll(dir, 0o700) }

func (osFS) ReadDir(dir string) ([]string, error) {
	es, err := os.ReadDir(dir)
	names := make([]string, 0, len(es))
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names, err
}

func (osFS) Open(path string) (File, error) { return openOS(path, os.O_RDONLY) }
func (osFS) Create(path string) (File, error) {
	return openOS(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}
func (osFS) Edit(path string) (File, error) { return openOS(path, os.O_RDWR) }

func openOS(path string, flag int) (File, error) {
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f, fd: int(f.Fd())}, nil
}

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }
func (osFS) Remove(path string) error     { return os.Remove(path) }

func (osFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

// osFile is an *os.File and its descriptor. The file stays reachable from here
// while the descriptor is used, so no finalizer closes it underneath.
type osFile struct {
	*os.File
	fd int
}

// iovPool holds []unix.Iovec of iovMax entries.
var iovPool = sync.Pool{New: func() any { return new([iovMax]unix.Iovec) }}

// iovMax is the kernel's limit of buffers in one call (UIO_MAXIOV).
const iovMax = 1024

func (f *osFile) WritevAt(bufs [][]byte, off int64) (int64, error) {
	iov := iovPool.Get().(*[iovMax]unix.Iovec)
	defer iovPool.Put(iov)
	var done int64
	for len(bufs) > 0 {
		n, want := 0, int64(0)
		for n < len(bufs) && n < iovMax {
			iov[n].Base = unsafe.SliceData(bufs[n])
			iov[n].SetLen(len(bufs[n]))
			want += int64(len(bufs[n]))
			n++
		}
		got, err := f.pwritev(iov[:n], off+done)
		clear(iov[:n])
		done += got
		if err == nil && got < want {
			// A short write of a regular file says that the rest would
			// fail: asking again would only name the reason, and the
			// segment is ended either way.
			err = io.ErrShortWrite
		}
		if err != nil {
			return done, &os.PathError{Op: "write", Path: f.Name(), Err: err}
		}
		bufs = bufs[n:]
	}
	return done, nil
}

func (f *osFile) pwritev(iov []unix.Iovec, off int64) (int64, error) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_PWRITEV, uintptr(f.fd), uintptr(unsafe.Pointer(&iov[0])),
			uintptr(len(iov)), uintptr(off), 0, 0)
		runtime.KeepAlive(f.File)
		if errno == 0 {
			return int64(n), nil
		}
		if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

func (f *osFile) Sync() error {
	err := unix.Fdatasync(f.fd)
	runtime.KeepAlive(f.File)
	if err != nil {
		return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
	}
	return nil
}

func (f *osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f *osFile) Allocate(size int64) error {
	err := unix.Fallocate(f.fd, 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = unix.Ftruncate(f.fd, size)
	}
	runtime.KeepAlive(f.File)
	if err != nil {
		return &os.PathError{Op: "allocate", Path: f.Name(), Err: err}
	}
	return nil
}

func (f *osFile) WriteBehind(off, n int64, drop bool) {
	// Both calls are hints: a file system that knows neither loses nothing.
	_ = unix.SyncFileRange(f.fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
	if drop {
		_ = unix.Fadvise(f.fd, off, n, unix.FADV_DONTNEED)
	}
	runtime.KeepAlive(f.File)
}

func (f *osFile) Lock() error {
	err := unix.Flock(f.fd, unix.LOCK_EX|unix.LOCK_NB)
	runtime.KeepAlive(f.File)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	return err
}

// writeNew makes a file that is either whole or absent: written under another
// name, synced, renamed, the directory synced. A crash before the rename is
// durable leaves path as it was and perhaps path+".new", which the next call removes.
func writeNew(fs FS, path string, data []byte) error {
	tmp := path + ".new"
	_ = fs.Remove(tmp)
	f, err := fs.Create(tmp)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fs.Rename(tmp, path)
	}
	if err != nil {
		_ = fs.Remove(tmp)
		return err
	}
	return fs.SyncDir(filepath.Dir(path))
}
