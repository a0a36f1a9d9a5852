package blockdev

import (
	"errors"
	"fmt"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	punchHole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroRange = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

// zfsMagic is the file system that package unix has no name for.
const zfsMagic = 0x2fc12fc1

// punches reports whether every file of this kind of file system takes holes.
// Trying would tell of the others too, but even a hole in nothing, past the end
// of the image, changes its times, and opening must change nothing. What is not
// named here is not trimmed; zeroing tries for itself.
func punches(fsMagic uint32) bool {
	switch fsMagic {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC, zfsMagic,
		unix.OVERLAYFS_SUPER_MAGIC: // its upper layer is one of these
		return true
	}
	return false
}

func fallocate(fd int, mode uint32, off, length int64) error {
	return ignoringEINTR(func() error { return unix.Fallocate(fd, mode, off, length) })
}

// refused reports whether fallocate did nothing because it cannot do this here.
// EINVAL comes from file systems that want it aligned.
func refused(err error) bool {
	return unsupported(err) || err == unix.EINVAL || err == unix.ENODEV
}

// inner is the part of e that fallocate can zero.
func (f *File) inner(e Extent) Extent {
	first := (e.Off + f.zeroAlign - 1) / f.zeroAlign * f.zeroAlign
	end := e.End() / f.zeroAlign * f.zeroAlign
	if first >= end {
		return Extent{}
	}
	return Extent{first, end - first}
}

// trim zeroes by a hole what can be zeroed so, or changes nothing. Discarding
// (BLKDISCARD) is not used: what a discarded block reads as is up to the device.
func (f *File) trim(r *Request) error {
	e := f.inner(r.Extent())
	if e.Len == 0 || !f.info.CheapTrim || f.noPunch.Load() {
		return nil
	}
	switch err := fallocate(f.handle.fd, punchHole, e.Off, e.Len); {
	case err == nil:
	case f.block && refused(err):
		// The device has said that it zeroes and then refused, perhaps not the
		// first of several commands: what it has changed is unknown.
		f.noPunch.Store(true)
		return f.ioError(r, err)
	case refused(err):
		if unsupported(err) {
			f.noPunch.Store(true)
		}
		return nil
	default:
		return f.ioError(r, err)
	}
	if r.Flags&FlagFUA != 0 {
		if err := f.sync(); err != nil {
			return f.ioError(r, err)
		}
	}
	r.Done = e
	return nil
}

// writeZeroes zeroes by the cheapest means that the flags allow: a hole, a
// range that stays allocated, and at last by writing.
func (f *File) writeZeroes(r *Request) error {
	if r.Len == 0 {
		return nil
	}
	zeroed, err := f.zeroCheaply(r)
	if err != nil {
		return err
	}
	if zeroed.Len == 0 {
		if r.Flags&FlagFastZero != 0 {
			return fmt.Errorf("%s: fast zeroing of %d bytes at %d: %w", f.info.Name, r.Len, r.Off, ErrNotSupported)
		}
		zeroed = Extent{r.Off, 0}
	}
	// What is left lies before and after it.
	if err := f.writeZero(r.Off, zeroed.Off); err != nil {
		return f.ioError(r, err)
	}
	if err := f.writeZero(zeroed.End(), r.Off+r.Len); err != nil {
		return f.ioError(r, err)
	}
	if r.Flags&FlagFUA != 0 {
		if err := f.sync(); err != nil {
			return f.ioError(r, err)
		}
	}
	return nil
}

// zeroCheaply zeroes the part of the request that fallocate can, and returns
// it; nothing if it can not.
func (f *File) zeroCheaply(r *Request) (Extent, error) {
	e := f.inner(r.Extent())
	if e.Len == 0 {
		return Extent{}, nil
	}
	if r.Flags&FlagNoHole == 0 && !f.noPunch.Load() {
		err := fallocate(f.handle.fd, punchHole, e.Off, e.Len)
		if err == nil {
			return e, nil
		}
		if !refused(err) {
			return Extent{}, f.ioError(r, err)
		}
		if unsupported(err) {
			f.noPunch.Store(true)
		}
	}
	// A block device without a command for it gets zeroes written by the
	// kernel here: right, but not fast.
	if f.noZeroRange.Load() || r.Flags&FlagFastZero != 0 && f.block && !f.info.CheapZero {
		return Extent{}, nil
	}
	err := fallocate(f.handle.fd, zeroRange, e.Off, e.Len)
	if err == nil {
		return e, nil
	}
	if !refused(err) {
		return Extent{}, f.ioError(r, err)
	}
	if unsupported(err) {
		f.noZeroRange.Store(true)
	}
	return Extent{}, nil
}

// zeroes is what zeroing by writing writes, over and over. Nothing changes it.
var zeroes = AlignedBuf(64 << 10)

// writeZero writes zeroes to [off, end).
func (f *File) writeZero(off, end int64) error {
	if off >= end {
		return nil
	}
	v := vectors.Get().(*vector)
	defer func() {
		clear(v[:])
		vectors.Put(v)
	}()
	for off < end {
		n := 0
		for at := off; at < end && n < vectorMax; n++ {
			length := min(int64(len(zeroes)), end-at)
			v[n].Base = unsafe.SliceData(zeroes)
			v[n].SetLen(int(length))
			at += length
		}
		done, errno := f.vectored(OpWrite, 0, v[:n], off)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return errno
		case done == 0:
			return io.ErrShortWrite
		}
		off += done
	}
	return nil
}

// Extents implements Device. A hole of the file is Hole and Zero; a block
// device is data as far as anybody can tell.
//
// Each run was true at some moment during the call: a write that runs at the
// same time may put data where a hole was just seen.
func (f *File) Extents(off, length int64, visit func(Run) bool) error {
	if !f.handle.acquire() {
		return f.closedError()
	}
	defer f.handle.release()
	if err := checkRange(&f.info, off, length, f.size.Load()); err != nil {
		return err
	}
	end := off + length
	for off < end {
		data, hole, err := f.nextData(off, end)
		if err != nil {
			return fmt.Errorf("%s: look for holes at %d: %w", f.info.Name, off, err)
		}
		if data > off && !visit(Run{Extent: Extent{off, data - off}, Hole: true, Zero: true}) {
			return nil
		}
		if hole > data && !visit(Run{Extent: Extent{data, hole - data}}) {
			return nil
		}
		off = hole
	}
	return nil
}

// nextData finds the first data in [off, end): [off, data) is a hole, [data,
// hole) is data. Both are at most end, and hole is beyond off.
func (f *File) nextData(off, end int64) (data, hole int64, err error) {
	if f.block {
		return off, end, nil
	}
	fd := f.handle.fd
	data, err = unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		// No data up to the end of the file, wherever that is by now.
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return 0, 0, err
		}
		if st.Size < end {
			return 0, 0, fmt.Errorf("the file has become shorter than the disk: %w", io.ErrUnexpectedEOF)
		}
		return end, end, nil
	case unsupported(err) || err == unix.EINVAL:
		return off, end, nil // cannot tell
	case err != nil:
		return 0, 0, err
	}
	if data >= end {
		return end, end, nil
	}
	// It may have been punched since, and all beyond it with it.
	hole, err = unix.Seek(fd, data, unix.SEEK_HOLE)
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return 0, 0, err
	}
	if err != nil || hole <= data {
		hole = data + SectorSize
	}
	return data, min(hole, end), nil
}
