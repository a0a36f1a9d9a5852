package filter

import (
	"crypto/sha256"
	"errors"
	"fmt"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// A Copied is a part of a gap that was copied: the log has an entry for it,
// sequenced among the guest's writes (rule R5).
type Copied struct {
	blockdev.Extent
	// Zero says that it reads as zero. The log then has a zeroing, and there
	// is nothing to be sent.
	Zero   bool
	Data   []byte // else its bytes, in the caller's buffer
	Digest [sha256.Size]byte
	// Unreadable are the parts that the disk does not give, in order (RULES G5). The log
	// says so; Data is of use but for them, and Digest is not.
	Unreadable []blockdev.Extent
}

// ErrNoTee says that a gap cannot be copied while nothing is logged.
var ErrNoTee = errors.New("the disk is not being logged")

// ErrLogFails says that the log does not take what has to be noted.
var ErrLogFails = errors.New("the log takes no entries")

const (
	// zeroCopyMax is the most that is copied as zeroes at once, in bytes: the
	// range is locked while the disk is asked whether it still reads as zero.
	zeroCopyMax = 16 << 20
	// copyReadMax is how much is read at once, and without a lock.
	copyReadMax = 1 << 20
	// dataHint is how far it is remembered that there is no hole, in bytes. Should one
	// come meanwhile it is read as zeroes.
	dataHint = 256 << 20
	// copyTries is how often a block is read without its range locked before
	// it is read with it (RULES G8).
	copyTries = 3
)

// NextGap returns the first open gap that reaches behind byte off, at most limit
// bytes of it, in whole blocks but for the disk's end.
func (f *Filter) NextGap(off, limit int64) (blockdev.Extent, bool) {
	for {
		start, length, ok := f.gaps.next(off)
		if !ok {
			return blockdev.Extent{}, false
		}
		size := f.Size()
		if start < size {
			return blockdev.Extent{Off: start, Len: min(length, limit&^(hrl.BlockBytes-1), size-start)}, true
		}
		f.gaps.forget(start, length)
		off = start + length
	}
}

// CopyGap copies an extent that NextGap has given, block by block of 64 KiB and in
// longer runs where it reads as zero, and calls visit for each. buf has room for all of
// it, and gets the bytes. The blocks stay gaps, in the state copied, until AckGaps. It
// may run for several extents at once, if they have no block in common.
//
// The disk is read without a lock, copyReadMax at a time, and a guest's write waits no
// longer than for an append, unless writes into the same block follow each other so
// closely that none of copyTries reads was undisturbed.
func (f *Filter) CopyGap(e blockdev.Extent, buf []byte, visit func(*Copied)) error {
	for off := e.Off; ; {
		end := min(e.End(), f.Size()) // it may have become smaller
		if off >= end {
			return nil
		}
		n, err := f.copySome(off, end, buf[off-e.Off:end-e.Off], visit)
		if err != nil && f.Size() >= end {
			return err
		}
		off += n
	}
}

// copySome copies the beginning of a range, and returns how much of it.
func (f *Filter) copySome(off, end int64, buf []byte, visit func(*Copied)) (int64, error) {
	n, err := f.zeroRun(off, end-off)
	if err != nil {
		return 0, err
	}
	if n > 0 {
		done, err := f.copyZeroes(off, n)
		if err != nil {
			return 0, err
		}
		if done {
			visit(&Copied{Extent: blockdev.Extent{Off: off, Len: n}, Zero: true})
			return n, nil
		}
	}
	n = min(copyReadMax-off%copyReadMax, end-off)
	return f.copyData(off, buf[:n], visit)
}

// zeroRun is how much of the range, from its start on and in whole blocks, is
// known to read as zero.
func (f *Filter) zeroRun(off, length int64) (n int64, err error) {
	if f.gaps.isData(off) {
		return 0, nil
	}
	length = min(length, zeroCopyMax)
	// Further than that: where data end is dear to find out on some file systems.
	err = f.dev.Extents(off, min(max(length, dataHint), f.Size()-off), func(r blockdev.Run) bool {
		if r.Zero {
			n += r.Len
		} else if r.Off == off {
			f.gaps.noteData(r.Off, r.End())
		}
		return r.Zero && n < length
	})
	if n = min(n, length); n < length {
		n &^= hrl.BlockBytes - 1
	}
	return n, err
}

// copyZeroes logs that the range reads as zero, if it still does.
func (f *Filter) copyZeroes(off, length int64) (done bool, err error) {
	l := lock{off: off, end: off + length, copies: true}
	t := f.locks.take(&l)
	defer f.locks.releaseOne(&l)
	if n, err := f.zeroRun(off, length); n < length || err != nil {
		return false, err
	}
	return true, f.sequence(t, hrl.Entry{Kind: hrl.KindZero, Off: off, Len: length})
}

// copyData copies blocks, with one read for all of them, and those again that were
// disturbed, or of which some cannot be read. It returns how much it has copied.
func (f *Filter) copyData(off int64, buf []byte, visit func(*Copied)) (done int64, err error) {
	w := watch{off: off, end: off + int64(len(buf))}
	f.locks.watch(&w)
	defer f.locks.unwatch(&w)
	bad := f.copyRead(off, buf)
	if bad != nil && !isUnreadable(bad) {
		return 0, bad
	}
	for len(buf) > 0 {
		n := min(len(buf), hrl.BlockBytes)
		c := Copied{Extent: blockdev.Extent{Off: off + done, Len: int64(n)}, Data: buf[:n]}
		if bad == nil {
			c.digest()
		} else if err := c.read(f); err != nil {
			return done, err
		}
		if err := f.copyBlock(&c, &w); err != nil {
			return done, err
		}
		visit(&c)
		buf, done = buf[n:], done+int64(n)
	}
	return done, nil
}

// copyBlock copies one block or, at the disk's end, a part of one. It has been read
// since the watch began.
func (f *Filter) copyBlock(c *Copied, w *watch) error {
	l := lock{off: c.Off, end: c.End(), copies: true}
	for try := 1; ; try++ {
		t := f.locks.take(&l)
		err := error(nil)
		calm := f.locks.undisturbed(w, c.Off)
		if !calm && try >= copyTries {
			err, calm = c.read(f), true
		}
		if calm && err == nil {
			err = f.sequence(t, c.entries()...)
		}
		f.locks.releaseOne(&l)
		if calm {
			return err
		}
		again := watch{off: c.Off, end: c.End()}
		f.locks.watch(&again)
		defer f.locks.unwatch(&again) // there are few tries
		w = &again
		if err := c.read(f); err != nil {
			return err
		}
	}
}

func (f *Filter) copyRead(off int64, buf []byte) error {
	if d, ok := f.dev.(blockdev.CacheDropper); ok && f.latch.err() != nil {
		// What is in memory may be newer than the disk for ever (RULES F6). Where it
		// cannot be dropped the disk is compared again when it is next opened.
		_ = d.DropCache(off, int64(len(buf)))
	}
	if err := blockdev.ReadAt(f.dev, buf, off); err != nil {
		return fmt.Errorf("copy %v: %w", blockdev.Extent{Off: off, Len: int64(len(buf))}, err)
	}
	return nil
}

func (c *Copied) digest() {
	if c.Zero = len(c.Unreadable) == 0 && allZero(c.Data); !c.Zero {
		c.Digest = sha256.Sum256(c.Data)
	}
}

// entries are what the log is to say of it.
func (c *Copied) entries() []hrl.Entry {
	if c.Zero {
		return []hrl.Entry{{Kind: hrl.KindZero, Off: c.Off, Len: c.Len}}
	}
	if len(c.Unreadable) == 0 {
		d := c.Digest
		return []hrl.Entry{{Kind: hrl.KindCopy, Off: c.Off, Len: c.Len, Data: d[:]}}
	}
	return c.piecesEntries()
}

// sequence appends the entries of a copied range, which they cover and the caller has
// locked.
func (f *Filter) sequence(t *tee, entries ...hrl.Entry) error {
	if t == nil {
		return ErrNoTee
	}
	for i := range entries {
		entries[i].Disk = t.disk
	}
	g := t.note(entries...)
	if g == nil {
		return ErrLogFails
	}
	t.log.Finished(g)
	first, last := &entries[0], &entries[len(entries)-1]
	f.gaps.copy(first.Off, last.Off+last.Len-first.Off)
	return nil
}

func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroes))
		if string(b[:n]) != string(zeroes[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// GapBytes is how much of the disk, in blocks of 64 KiB, may have changed
// without the replica having it or the log having what it takes, and how much of
// that is still to be copied.
func (f *Filter) GapBytes() (all, open int64) { return f.gaps.bytes() }

// SealGaps comes right before a cut: what has been copied belongs to it.
func (f *Filter) SealGaps() { f.gaps.seal() }

// AckGaps says that the replica has acknowledged the point of the cut before
// which SealGaps was called last (rule R3).
func (f *Filter) AckGaps() {
	f.gaps.acknowledge()
	// Else a kill brings them back: that costs a comparison of all that was healed.
	_ = f.gaps.sync()
}

// ReopenGaps says that what was copied did not get to the replica, or that the
// replica has dropped it: it has to be copied again.
func (f *Filter) ReopenGaps() { f.gaps.reopen() }

// CopiesKept reports whether what is copied is remembered over a crash.
func (f *Filter) CopiesKept() bool { return f.gaps.kept() }

// BeginCopies comes before the first copy of a session: what was delivered in an
// earlier one is forgotten, durably when it returns.
func (f *Filter) BeginCopies() error { return f.gaps.begin(f.Size()) }

// SendCopies comes before copies of blocks count at the replica: WasSent says so
// of them, durably, until the next session.
func (f *Filter) SendCopies(blocks *hrl.BlockSet) error { return f.gaps.send(blocks, f.Size()) }

// WasSent reports whether an older copy of the block may lie at the replica, which
// would hide what the newest point has there.
func (f *Filter) WasSent(off int64) bool { return f.gaps.wasSent(off) }

// CopiesDelivered says that the replica has the newest copies of these blocks,
// durably, and that it is on record what they belong to. Of copies as zeroes it is
// not said: they are in the log alone. It is remembered over a kill when a SyncGaps
// has returned; a crash before that costs copying again.
func (f *Filter) CopiesDelivered(blocks *hrl.BlockSet) { f.gaps.deliver(blocks) }

// GapAll makes a gap of the whole disk: nothing is known of what the replica has
// of it. False: the log took no note of that.
func (f *Filter) GapAll() bool { return f.gap(f.locks.teeNow(), 0, f.Size()) }
