package blockdev

import (
	"fmt"
	"io"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// IOError is a request that the system failed.
type IOError struct {
	Name   string
	Op     Op
	Extent Extent // empty for a flush
	Err    error  // usually a syscall.Errno
}

func (e *IOError) Error() string {
	if e.Op == OpFlush {
		return fmt.Sprintf("%s: flush: %v", e.Name, e.Err)
	}
	return fmt.Sprintf("%s: %s of %d bytes at %d: %v", e.Name, e.Op, e.Extent.Len, e.Extent.Off, e.Err)
}

func (e *IOError) Unwrap() error { return e.Err }

func (f *File) ioError(r *Request, err error) error {
	e := &IOError{Name: f.info.Name, Op: r.Op, Err: err}
	if r.Op != OpFlush {
		e.Extent = r.Extent()
	}
	return e
}

// Do implements Device. Adjacent requests of a batch, in the order in which
// they stand there, become one system call.
func (f *File) Do(reqs []*Request) {
	if !f.handle.acquire() {
		err := f.closedError()
		for _, r := range reqs {
			r.Done, r.Err = Extent{}, err
		}
		return
	}
	defer f.handle.release()
	size := f.size.Load()
	for len(reqs) > 0 {
		r := reqs[0]
		n := 1
		r.Done = Extent{}
		if r.Err = f.check(r, size); r.Err == nil {
			switch r.Op {
			case OpRead, OpWrite:
				for n < len(reqs) && n < vectorMax && adjacent(reqs[n-1], reqs[n]) && f.check(reqs[n], size) == nil {
					reqs[n].Done = Extent{}
					n++
				}
				f.transfer(reqs[:n])
			case OpFlush:
				r.Err = f.flush(r)
			case OpTrim:
				r.Err = f.trim(r)
			case OpWriteZeroes:
				r.Err = f.writeZeroes(r)
			}
		}
		reqs = reqs[n:]
	}
}

func (f *File) check(r *Request, size int64) error {
	if err := r.Check(&f.info, size); err != nil {
		return fmt.Errorf("%s: %w", f.info.Name, err)
	}
	if f.info.MemAlign > 1 && r.Buf != nil && !aligned(r.Buf, f.info.MemAlign) {
		return fmt.Errorf("%s: the buffer of a %s is not aligned to %d bytes: %w", f.info.Name, r.Op, f.info.MemAlign, ErrAlignment)
	}
	return nil
}

// adjacent reports whether b may travel with a, which has passed its check.
func adjacent(a, b *Request) bool {
	return a.Op == b.Op && a.Flags == b.Flags && a.Len > 0 && b.Len > 0 && a.Off+a.Len == b.Off
}

// flush makes finished writes durable. A failed fdatasync is never tried again:
// the kernel has marked the pages clean and the next one would succeed.
func (f *File) flush(r *Request) error {
	if f.info.ReadOnly {
		return nil // nothing was written here
	}
	if err := f.sync(); err != nil {
		return f.ioError(r, err)
	}
	return nil
}

func (f *File) sync() error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_FDATASYNC, uintptr(f.handle.fd), 0, 0)
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// vectorMax is the most requests that one system call performs.
const vectorMax = 64

// vector is what readv and writev take. It is pooled because memory whose
// address goes to the kernel must not be on a stack that could move.
type vector [vectorMax]unix.Iovec

var vectors = sync.Pool{New: func() any { return new(vector) }}

// transfer performs a run of adjacent reads or writes. Each gets its own
// outcome: after an error the next request of the run is tried for itself.
func (f *File) transfer(run []*Request) {
	var flags uintptr
	syncAfter := false
	switch {
	case run[0].Op == OpWrite && run[0].Flags&FlagFUA != 0:
		if syncAfter = f.noDSync.Load(); !syncAfter {
			flags = unix.RWF_DSYNC
		}
	case run[0].Op == OpRead && run[0].Flags&FlagNoWait != 0 && !f.volatile:
		if f.direct || f.noNoWait.Load() {
			for _, r := range run {
				r.Err = ErrWouldBlock
			}
			return
		}
		flags = unix.RWF_NOWAIT
	}
	v := vectors.Get().(*vector)
	for i, r := range run {
		v[i].Base = unsafe.SliceData(r.Buf)
		v[i].SetLen(len(r.Buf))
		r.Err = nil
	}
	iov, off, rest := v[:len(run)], run[0].Off, run
	for len(rest) > 0 {
		r := rest[0]
		if r.Len == 0 {
			iov, rest = iov[1:], rest[1:]
			continue
		}
		n, errno := f.vectored(r.Op, flags, iov, off)
		switch {
		case errno == unix.EINTR:
			continue
		case flags == unix.RWF_DSYNC && unsupported(errno):
			f.noDSync.Store(true)
			flags, syncAfter = 0, true
			continue
		case flags == unix.RWF_NOWAIT && errno != 0:
			// EAGAIN is the ordinary case. Whatever else stands in the way of a
			// read that does not wait, one that waits will tell.
			if unsupported(errno) {
				f.noNoWait.Store(true)
			}
			r.Err = ErrWouldBlock
		case errno != 0:
			r.Err = f.ioError(r, errno)
		case n == 0 && r.Op == OpRead:
			// Somebody cut the file short. Zeroes would look like data to the
			// guest; an error is what a broken disk gives.
			r.Err = f.ioError(r, fmt.Errorf("the file has become shorter than the disk: %w", io.ErrUnexpectedEOF))
		case n == 0:
			r.Err = f.ioError(r, io.ErrShortWrite)
		}
		if r.Err != nil {
			iov, rest, off = iov[1:], rest[1:], r.Off+r.Len
			continue
		}
		off += n
		for len(rest) > 0 && off >= rest[0].Off+rest[0].Len {
			iov, rest = iov[1:], rest[1:]
		}
		if len(rest) > 0 { // the rest of it, if it was done in part
			done := off - rest[0].Off
			iov[0].Base = unsafe.SliceData(rest[0].Buf[done:])
			iov[0].SetLen(int(rest[0].Len - done))
		}
	}
	clear(v[:len(run)])
	vectors.Put(v)
	if syncAfter {
		if err := f.sync(); err != nil {
			for _, r := range run {
				if r.Err == nil {
					r.Err = f.ioError(r, err)
				}
			}
		}
	}
}

// vectored is preadv2 or pwritev2: x/sys has them for slices of slices, which
// it copies to a vector of its own, allocated for each call.
func (f *File) vectored(op Op, flags uintptr, iov []unix.Iovec, off int64) (int64, unix.Errno) {
	trap := uintptr(unix.SYS_PREADV2)
	if op == OpWrite {
		trap = unix.SYS_PWRITEV2
	}
	lo, hi := offsetHalves(off)
	n, _, errno := unix.Syscall6(trap, uintptr(f.handle.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)), lo, hi, flags)
	if errno != 0 {
		return 0, errno
	}
	return int64(n), 0
}

// offsetHalves splits an offset as preadv2 takes it: the low machine word, and
// the high one, which is zero where a word has 64 bits.
func offsetHalves(off int64) (lo, hi uintptr) {
	const wordBits = unix.SizeofLong * 8
	return uintptr(off), uintptr(uint64(off) >> (wordBits - 1) >> 1)
}

// unsupported reports whether the error says that the kernel, the file system
// or a seccomp filter does not know the call, so that nothing was done.
func unsupported(errno error) bool {
	return errno == unix.EOPNOTSUPP || errno == unix.ENOSYS
}
