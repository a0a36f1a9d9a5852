package filter

import (
	"crypto/sha256"
	"errors"
	"syscall"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// A disk that cannot give some of its blocks does not stop the replication (RULES G5):
// what of a gap cannot be read, piece by piece and after several tries, is an entry of
// its own in the log. It says that nobody knows what stands there, the replica keeps
// what it has and names the range, and a guest's write over it is logged as any other.

const (
	// readTries is how often a piece is read before it is called unreadable.
	readTries = 3
	// readPiece is the least that is called unreadable, in bytes, unless the disk's
	// blocks are larger.
	readPiece = 4096
)

// isUnreadable reports whether a disk says that it cannot give what is on it, rather than
// that it cannot be asked.
func isUnreadable(err error) bool {
	for _, e := range []error{syscall.EIO, syscall.ENODATA, syscall.EILSEQ, syscall.EBADMSG} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// read reads the block, but for what cannot be read of it.
func (c *Copied) read(f *Filter) error {
	c.Unreadable = nil
	err := f.copyRead(c.Off, c.Data)
	if isUnreadable(err) {
		err = c.readPieces(f)
	}
	if err == nil {
		c.digest()
	}
	return err
}

func (c *Copied) readPieces(f *Filter) error {
	piece := max(readPiece, f.align)
	for off := c.Off; off < c.End(); off += piece {
		p := c.Data[off-c.Off : min(off+piece, c.End())-c.Off]
		var err error
		for range readTries {
			if err = f.copyRead(off, p); !isUnreadable(err) {
				break
			}
		}
		switch n := len(c.Unreadable); {
		case err == nil:
		case !isUnreadable(err):
			return err
		case n > 0 && c.Unreadable[n-1].End() == off:
			c.Unreadable[n-1].Len += int64(len(p))
		default:
			c.Unreadable = append(c.Unreadable, blockdev.Extent{Off: off, Len: int64(len(p))})
		}
	}
	return nil
}

// Parts calls visit for what was read, in order, until it fails. Zeroes were not.
func (c *Copied) Parts(visit func(off int64, p []byte) error) error {
	return c.split(visit, func(blockdev.Extent) error { return nil })
}

// split calls read and lost for what was and was not read, in order.
func (c *Copied) split(read func(off int64, p []byte) error, lost func(blockdev.Extent) error) error {
	off := c.Off
	for _, e := range append(c.Unreadable[:len(c.Unreadable):len(c.Unreadable)], blockdev.Extent{Off: c.End()}) {
		if e.Off > off {
			if err := read(off, c.Data[off-c.Off:e.Off-c.Off]); err != nil {
				return err
			}
		}
		if e.Len > 0 {
			if err := lost(e); err != nil {
				return err
			}
		}
		off = e.End()
	}
	return nil
}

// piecesEntries are the entries of a block that was read in part: hrl.GroupMax at the
// most, for it has as many pieces.
func (c *Copied) piecesEntries() (out []hrl.Entry) {
	_ = c.split(func(off int64, p []byte) error {
		d := sha256.Sum256(p)
		out = append(out, hrl.Entry{Kind: hrl.KindCopy, Off: off, Len: int64(len(p)), Data: d[:]})
		return nil
	}, func(e blockdev.Extent) error {
		out = append(out, hrl.UnreadableEntry(0, e.Off, e.Len))
		return nil
	})
	return out
}

// retryMax is how many pieces RetryUnreadable finds to be unreadable still before it
// leaves the rest as it is: a disk may think for half a minute about each.
const retryMax = 16

// RetryUnreadable makes gaps again of what can be read of the extent, which could not be:
// it will be copied.
func (f *Filter) RetryUnreadable(e blockdev.Extent) {
	piece := max(readPiece, f.align)
	buf := blockdev.AlignedBuf(int(piece))
	bad := 0
	for off := e.Off &^ (piece - 1); bad < retryMax; off += piece {
		end := min(off+piece, f.Size())
		if off >= min(e.End(), end) {
			return
		}
		if f.copyRead(off, buf[:end-off]) != nil {
			bad++
			continue
		}
		f.AddGap(off, end-off)
	}
}
