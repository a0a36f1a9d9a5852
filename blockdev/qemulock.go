package blockdev

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// QEMU keeps two of its processes from spoiling one image by locks on single
// bytes of it, far inside the file but without touching its content
// (block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes). Taking
// the same locks keeps QEMU, qemu-img and qemu-nbd off what is served here, and
// this program off what a VM uses.
//
// Each permission of QEMU's block layer has one byte for "I use it" and one for
// "I do not let others use it":
//
//	bit  permission       uses it   does not share it
//	  0  consistent read  byte 100  byte 200
//	  1  write            byte 101  byte 201
//	  2  write unchanged  byte 102  byte 202
//	  3  resize           byte 103  byte 203
//	  4  change the graph byte 104  byte 204   (QEMU before 7.2)
//
// All are read locks, so any number of processes may hold the same byte. Having
// taken them, one asks whether somebody else has locked the opposite byte (with
// a write lock in mind, which any lock is in the way of): 200+i for what one
// uses, 100+i for what one does not share. Of two that come at the same moment
// both may be refused, never neither.
//
// They are OFD locks: they belong to the open file, so they work between two
// opens in one process, and closing another descriptor of the same file does
// not drop them.
const (
	lockPermBase    = 100
	lockUnshareBase = 200

	permConsistentRead = 1 << 0
	permWrite          = 1 << 1
	permResize         = 1 << 3
	permBits           = 5
)

// lockImage takes QEMU's locks for an open with these options, or fails with
// ErrInUse. Closing the descriptor lets go of them.
//
// A writer uses read, write and resize and shares neither write nor resize. A
// reader does not share them either: it is refused while anybody writes, and
// keeps writers away, because a copy of a disk that changes meanwhile is no
// copy. With Share it only reads, and shares all. QEMU's own readers of raw
// images (qemu-img without -U too) share writing, so they are not kept out.
func lockImage(fd int, o FileOptions) error {
	uses, unshared := permConsistentRead, permWrite|permResize
	switch {
	case o.Share:
		unshared = 0
	case !o.ReadOnly:
		uses |= permWrite | permResize
	}
	for i := range permBits {
		if uses&(1<<i) != 0 {
			if err := lockByte(fd, lockPermBase+int64(i)); err != nil {
				return err
			}
		}
		if unshared&(1<<i) != 0 {
			if err := lockByte(fd, lockUnshareBase+int64(i)); err != nil {
				return err
			}
		}
	}
	for i := range permBits {
		if uses&(1<<i) != 0 {
			if err := testByte(fd, lockUnshareBase+int64(i)); err != nil {
				return err
			}
		}
		if unshared&(1<<i) != 0 {
			if err := testByte(fd, lockPermBase+int64(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

// lockByte takes a read lock on one byte.
func lockByte(fd int, off int64) error {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Whence: 0, Start: off, Len: 1}
	err := ignoringEINTR(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
	switch err {
	case nil:
		return nil
	case unix.EAGAIN, unix.EACCES:
		return ErrInUse
	}
	return &lockError{err}
}

// testByte fails with ErrInUse if somebody else has locked the byte.
func testByte(fd int, off int64) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: off, Len: 1}
	err := ignoringEINTR(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk) })
	if err != nil {
		return &lockError{err}
	}
	if lk.Type != unix.F_UNLCK {
		return ErrInUse
	}
	return nil
}

// lockError is a file system (or kernel) that cannot lock.
type lockError struct{ err error }

func (e *lockError) Error() string {
	return fmt.Sprintf("its file system cannot lock it against other processes: %v", e.err)
}

func (e *lockError) Unwrap() error { return e.err }

func (e *lockError) Hint() string {
	return "move the image to a file system with OFD locks (for NFS: one mounted without nolock whose server runs lockd)"
}
