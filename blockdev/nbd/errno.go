package nbd

import (
	"errors"
	"fmt"
	"syscall"

	"afterimage/blockdev"
)

// Errors on the wire. They are Linux's numbers by the protocol's definition,
// whatever the system.
const (
	wireOK       = 0
	wirePERM     = 1
	wireIO       = 5
	wireNOMEM    = 12
	wireINVAL    = 22
	wireNOSPC    = 28
	wireOVERFLOW = 75
	wireNOTSUP   = 95
	wireSHUTDOWN = 108
)

// wireError is the number with which a finished request is answered.
func wireError(r *blockdev.Request) uint32 {
	err := r.Err
	if err == nil {
		return wireOK
	}
	switch {
	case errors.Is(err, blockdev.ErrReadOnly):
		return wirePERM
	case errors.Is(err, blockdev.ErrBounds):
		return boundsError(r.Op)
	case errors.Is(err, blockdev.ErrAlignment):
		return wireINVAL
	case errors.Is(err, blockdev.ErrNotSupported):
		// The protocol keeps ENOTSUP for "zeroing would not be fast".
		if r.Flags&blockdev.FlagFastZero != 0 {
			return wireNOTSUP
		}
		return wireINVAL
	case errors.Is(err, blockdev.ErrGone), errors.Is(err, blockdev.ErrClosed):
		return wireSHUTDOWN
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		switch no {
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return wireNOSPC
		case syscall.EPERM, syscall.EACCES, syscall.EROFS:
			return wirePERM
		case syscall.ENOMEM:
			return wireNOMEM
		case syscall.EINVAL:
			return wireINVAL
		case syscall.EOVERFLOW:
			return wireOVERFLOW
		case syscall.ESHUTDOWN:
			return wireSHUTDOWN
		}
	}
	return wireIO
}

// boundsError is the answer to a request beyond the end of the disk.
func boundsError(op blockdev.Op) uint32 {
	if op == blockdev.OpWrite || op == blockdev.OpWriteZeroes {
		return wireNOSPC
	}
	return wireINVAL
}

// fromWire is the error that a server's answer stands for, nil for none.
func fromWire(code uint32) error {
	switch code {
	case wireOK:
		return nil
	case wirePERM:
		return syscall.EPERM
	case wireNOMEM:
		return syscall.ENOMEM
	case wireINVAL:
		return syscall.EINVAL
	case wireNOSPC:
		return syscall.ENOSPC
	case wireOVERFLOW:
		return syscall.EOVERFLOW
	case wireNOTSUP:
		return blockdev.ErrNotSupported
	case wireSHUTDOWN:
		return syscall.ESHUTDOWN
	case wireIO:
		return syscall.EIO
	}
	// Numbers beyond the protocol's are to be taken as an I/O error.
	return fmt.Errorf("error %d: %w", code, syscall.EIO)
}
