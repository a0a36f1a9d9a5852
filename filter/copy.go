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
}

// ErrNoTee says that a gap cannot be copied while nothing is logged.
var ErrNoTee = errors.New("the disk is not being logged")

// ErrLogFails says that the log does not take what has to be noted.
var ErrLogFails = errors.New("the log takes no entries")

const (
	// zeroCopyMax is the most that is copied as zeroes at once, in bytes: the
	// range is locked while the disk is asked whether it still reads as zero.
	zeroCopyMax = 16 << 20
	// copyTries is how often a block is read without its range locked before
	// it is read with it (RULES G8).
	copyTries = 3
)

// CopyGap copies the first open gap that reaches behind byte off, at most one
// block of 64 KiB or a longer run of zeroes; ok is false if there is none. buf
// has room for a block. The gap stays one, in the state copied, until
// AckGaps. A guest's write waits for it no longer than for an append, unless
// writes into the same block follow each other so closely that none of
// copyTries reads was undisturbed.
func (f *Filter) CopyGap(off int64, buf []byte) (c Copied, ok bool, err error) {
	f.copying.Lock()
	defer f.copying.Unlock()
	for {
		start, length, ok := f.gaps.next(off)
		if !ok {
			return Copied{}, false, nil
		}
		size := f.Size()
		if start >= size {
			f.gaps.forget(start, length)
			off = start + length
			continue
		}
		length = min(length, size-start)
		n, err := f.zeroRun(start, length)
		if err != nil {
			return Copied{}, false, err
		}
		if n > 0 {
			if done, err := f.copyZeroes(start, n); done || err != nil {
				return Copied{Extent: blockdev.Extent{Off: start, Len: n}, Zero: true}, err == nil, err
			}
		}
		c, err := f.copyBlock(start, buf[:min(length, hrl.BlockBytes)])
		return c, err == nil, err
	}
}

// zeroRun is how much of the range, from its start on and in whole blocks, is
// known to read as zero.
func (f *Filter) zeroRun(off, length int64) (n int64, err error) {
	length = min(length, zeroCopyMax)
	err = f.dev.Extents(off, length, func(r blockdev.Run) bool {
		if r.Zero {
			n += r.Len
		}
		return r.Zero
	})
	if n < length {
		n &^= hrl.BlockBytes - 1
	}
	return n, err
}

// copyZeroes logs that the range reads as zero, if it still does.
func (f *Filter) copyZeroes(off, length int64) (done bool, err error) {
	l := lock{off: off, end: off + length}
	t := f.locks.take(&l)
	defer f.locks.releaseOne(&l)
	if n, err := f.zeroRun(off, length); n < length || err != nil {
		return false, err
	}
	return true, f.sequence(t, hrl.Entry{Kind: hrl.KindZero, Off: off, Len: length})
}

// copyBlock copies one block or, at the disk's end, a part of one.
func (f *Filter) copyBlock(off int64, buf []byte) (Copied, error) {
	c := Copied{Extent: blockdev.Extent{Off: off, Len: int64(len(buf))}, Data: buf}
	l := lock{off: off, end: c.End()}
	for try := 1; ; try++ {
		w := watch{lock: &l}
		f.locks.watch(&w)
		err := c.read(f)
		t := f.locks.takeWatched(&w)
		if w.touched && try < copyTries && err == nil {
			f.locks.releaseOne(&l)
			continue
		}
		if w.touched && err == nil {
			err = c.read(f)
		}
		if err == nil {
			err = f.sequence(t, c.entry())
		}
		f.locks.releaseOne(&l)
		return c, err
	}
}

func (c *Copied) read(f *Filter) error {
	if err := blockdev.ReadAt(f.dev, c.Data, c.Off); err != nil {
		return fmt.Errorf("copy %v: %w", c.Extent, err)
	}
	c.Digest = sha256.Sum256(c.Data)
	c.Zero = allZero(c.Data)
	return nil
}

func (c *Copied) entry() hrl.Entry {
	if c.Zero {
		return hrl.Entry{Kind: hrl.KindZero, Off: c.Off, Len: c.Len}
	}
	d := c.Digest
	return hrl.Entry{Kind: hrl.KindCopy, Off: c.Off, Len: c.Len, Data: d[:]}
}

// sequence appends the entry of a copied range, which the caller has locked.
func (f *Filter) sequence(t *tee, e hrl.Entry) error {
	if t == nil {
		return ErrNoTee
	}
	e.Disk = t.disk
	g := t.note(e)
	if g == nil {
		return ErrLogFails
	}
	t.log.Finished(g)
	f.gaps.copy(e.Off, e.Len)
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
func (f *Filter) AckGaps() { f.gaps.acknowledge() }

// ReopenGaps says that what was copied did not get to the replica, or that the
// replica has dropped it: it has to be copied again.
func (f *Filter) ReopenGaps() { f.gaps.reopen() }

// GapAll makes a gap of the whole disk: nothing is known of what the replica has
// of it. False: the log took no note of that.
func (f *Filter) GapAll() bool { return f.gap(f.locks.teeNow(), 0, f.Size()) }
