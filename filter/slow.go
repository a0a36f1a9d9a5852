package filter

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"afterimage/blockdev"
	"afterimage/filter/hot"
	"afterimage/hrl"
)

// work does one request that may have to wait, on a worker, and completes it.
func (f *Filter) work(r *blockdev.Request) {
	if dropped(r) {
		r.Err = blockdev.ErrGone
		f.stats.Dropped.Add(1)
		f.completeOne(r)
		return
	}
	switch r.Op {
	case blockdev.OpRead:
		f.slowRead(r)
		f.completeOne(r)
	case blockdev.OpFlush:
		r.Err = f.flusher.flush()
		f.stats.Flushes.Add(1)
		f.completeOne(r)
	default:
		c := &change{f: f, r: r}
		c.run()
	}
}

func (f *Filter) completeOne(r *blockdev.Request) {
	one := [1]*blockdev.Request{r}
	f.complete(one[:])
}

// slowRead reads what has to wait for the disk, or what the device cannot read
// as it stands. Reads take no lock: what they find is logged or a gap.
func (f *Filter) slowRead(r *blockdev.Request) {
	begin := blockdev.Monotonic()
	defer func() {
		f.stats.Read.record(blockdev.Monotonic() - begin)
		f.countRead(r)
	}()
	lo, hi := f.alignOut(r.Off, r.Len)
	if lo == r.Off && hi == r.Off+r.Len && f.fitsMemory(r.Buf) {
		one := [1]*blockdev.Request{r}
		f.dev.Do(one[:])
		return
	}
	for off := r.Off; off < r.Off+r.Len; {
		n := min(bounceBytes-(off-off&^(f.align-1)), r.Off+r.Len-off)
		lo, hi := f.alignOut(off, n)
		b := blockdev.AlignedBuf(int(hi - lo))
		if r.Err = blockdev.ReadAt(f.dev, b, lo); r.Err != nil {
			return
		}
		copy(r.Buf[off-r.Off:], b[off-lo:off-lo+n])
		off += n
	}
}

// bounceBytes is how much is copied through a buffer of our own at once.
const bounceBytes = 1 << 20

// alignOut is the range in the device's blocks that holds [off, off+length).
func (f *Filter) alignOut(off, length int64) (lo, hi int64) {
	a := f.align
	return off &^ (a - 1), (off + length + a - 1) &^ (a - 1)
}

// A change is a write, trim or zeroing done by a worker. It is locked as a
// whole, logged in frames of at most hrl.PayloadMax, each of which may be
// overtaken by a cut, then done on the disk. A guest's write up to that length
// is one frame.
type change struct {
	f    *Filter
	r    *blockdev.Request
	t    *tee
	lock lock
	hot  *hot.Map // it is counted in there; nil: nothing is marked

	// parts are what is logged and done: the request itself, or, where it is
	// not aligned, its head and tail as whole blocks and what is between.
	parts  []*blockdev.Request
	logged []*hrl.Group
	begin  int64
}

func (c *change) run() {
	f, r := c.f, c.r
	switch r.Op {
	case blockdev.OpWrite:
		f.stats.Writes.Add(1)
		f.stats.WrittenBytes.Add(r.Len)
	case blockdev.OpWriteZeroes:
		f.stats.Zeroes.Add(1)
	case blockdev.OpTrim:
		f.stats.Trims.Add(1)
		// Only whole blocks are trimmed, and nothing where the device
		// would do nothing: then the log must not say otherwise (RULES L1).
		a := f.align
		lo, hi := (r.Off+a-1)&^(a-1), (r.Off+r.Len)&^(a-1)
		if lo >= hi || !f.trims() {
			f.completeOne(r)
			return
		}
		c.parts = []*blockdev.Request{{Op: blockdev.OpTrim, Flags: r.Flags, Off: lo, Len: hi - lo}}
	}
	if r.Flags&blockdev.FlagFUA != 0 {
		if r.Err = f.latch.err(); r.Err != nil {
			f.completeOne(r)
			return
		}
	}
	c.lock.off, c.lock.end = f.alignOut(r.Off, r.Len)
	begin := blockdev.Monotonic()
	c.t = f.locks.take(&c.lock)
	f.stats.Lock.record(blockdev.Monotonic() - begin)
	if dropped(r) {
		// It waited for its range and its client died meanwhile (RULES A6).
		r.Err = blockdev.ErrGone
		f.stats.Dropped.Add(1)
		c.unlock()
		return
	}
	if !c.fast() {
		r.Err = blockdev.ErrNotSupported
		c.unlock()
		return
	}
	if c.parts == nil {
		if err := c.split(); err != nil {
			r.Err = err
			f.stats.Errors.Add(1)
			c.unlock()
			return
		}
	}
	switch {
	case c.t == nil:
		f.untracked.Store(true)
	case c.t.hot != nil:
		c.hot = c.t.hot
		if !c.hot.Enter(c.lock.off, c.lock.end-c.lock.off) {
			f.mark(c.hot, c.lock.off, c.lock.end-c.lock.off)
		}
	}
	c.begin = blockdev.Monotonic()
	c.tee(0)
}

// trims reports whether the device zeroes what it is asked to trim.
func (f *Filter) trims() bool {
	info := f.dev.Info()
	return info.CheapTrim
}

// fast says whether a fast zeroing can be done. It must be refused before
// anything is touched, and before the log says that it was done, so the device
// is not asked: what is not surely fast is not.
func (c *change) fast() bool {
	r := c.r
	if r.Flags&blockdev.FlagFastZero == 0 || r.Op != blockdev.OpWriteZeroes {
		return true
	}
	lo, hi := c.f.alignOut(r.Off, r.Len)
	info := c.f.dev.Info()
	return info.CheapZero && r.Flags&blockdev.FlagNoHole == 0 && lo == r.Off && hi == r.Off+r.Len
}

// split makes parts the device can do: aligned, in memory it can use.
func (c *change) split() error {
	f, r := c.f, c.r
	lo, hi := f.alignOut(r.Off, r.Len)
	end := r.Off + r.Len
	r.Flags &^= blockdev.FlagFastZero // fast has seen to it
	whole := lo == r.Off && hi == end
	if whole && (r.Op != blockdev.OpWrite || f.fitsMemory(r.Buf)) {
		c.parts = []*blockdev.Request{r}
		return nil
	}
	if r.Op == blockdev.OpWrite {
		return c.bounce(lo, hi)
	}
	// The first and last block are read, changed and written whole; what is
	// between is zeroed.
	flags := r.Flags & blockdev.FlagFUA
	edge := func(at int64) error {
		b := blockdev.AlignedBuf(int(f.align))
		if err := blockdev.ReadAt(f.dev, b, at); err != nil {
			return fmt.Errorf("read the rest of a block: %w", err)
		}
		from, to := max(at, r.Off), min(at+f.align, end)
		clear(b[from-at : to-at])
		c.parts = append(c.parts, &blockdev.Request{Op: blockdev.OpWrite, Flags: flags, Off: at, Len: f.align, Buf: b})
		return nil
	}
	if lo != r.Off {
		if err := edge(lo); err != nil {
			return err
		}
		lo += f.align
	}
	if hi != end && hi-f.align >= lo {
		hi -= f.align
		if err := edge(hi); err != nil {
			return err
		}
	}
	if lo < hi {
		c.parts = append(c.parts, &blockdev.Request{Op: r.Op, Flags: r.Flags, Off: lo, Len: hi - lo})
	}
	return nil
}

// bounce makes one part of the whole write, in a buffer of our own.
func (c *change) bounce(lo, hi int64) error {
	f, r := c.f, c.r
	b := blockdev.AlignedBuf(int(hi - lo))
	if lo != r.Off {
		if err := blockdev.ReadAt(f.dev, b[:f.align], lo); err != nil {
			return fmt.Errorf("read the rest of a block: %w", err)
		}
	}
	if hi != r.Off+r.Len && (hi-lo > f.align || lo == r.Off) {
		if err := blockdev.ReadAt(f.dev, b[hi-lo-f.align:], hi-f.align); err != nil {
			return fmt.Errorf("read the rest of a block: %w", err)
		}
	}
	copy(b[r.Off-lo:], r.Buf)
	c.parts = []*blockdev.Request{{Op: r.Op, Flags: r.Flags, Off: lo, Len: hi - lo, Buf: b}}
	return nil
}

// frame is the nth frame of the change; ok is false behind the last.
func (c *change) frame(n int) (e hrl.Entry, ok bool) {
	for _, p := range c.parts {
		if p.Op != blockdev.OpWrite {
			if n == 0 {
				return hrl.Entry{Kind: hrl.KindZero, Disk: c.t.disk, Off: p.Off, Len: p.Len}, true
			}
			n--
			continue
		}
		frames := int((p.Len + hrl.PayloadMax - 1) / hrl.PayloadMax)
		if n < frames {
			at := int64(n) * hrl.PayloadMax
			size := min(p.Len-at, hrl.PayloadMax)
			return hrl.Entry{Kind: hrl.KindWrite, Disk: c.t.disk, Off: p.Off + at, Len: size, Data: p.Buf[at : at+size]}, true
		}
		n -= frames
	}
	return e, false
}

// tee logs the frames from the nth on, then does the disk.
func (c *change) tee(n int) {
	for ; c.t != nil; n++ {
		e, ok := c.frame(n)
		if !ok {
			break
		}
		g, next := hrl.NewGroup(), n+1
		g.Add(e)
		g.Abandoned = func(why error) {
			c.f.logFailed(why)
			// This goroutine carries on for the one that is stuck.
			c.r.Stolen = true
			c.f.gaps.add(e.Off, e.Len)
			c.tee(next)
		}
		switch err := c.t.log.Append(g); err {
		case nil:
			c.f.logWorked()
			c.logged = append(c.logged, g)
		case hrl.ErrAbandoned:
			return
		default:
			c.f.logFailed(err)
			c.f.gaps.add(e.Off, e.Len)
		}
	}
	c.finish()
}

// finish does the change on the disk, unlocks and completes.
func (c *change) finish() {
	f, r := c.f, c.r
	begin := blockdev.Monotonic()
	f.stats.Append.record(begin - c.begin)
	fua := r.Flags&blockdev.FlagFUA != 0
	var ticket uint64
	if fua {
		ticket = f.syncs.begin()
	}
	f.dev.Do(c.parts)
	f.stats.Disk.record(blockdev.Monotonic() - begin)
	if c.t != nil && slices.ContainsFunc(c.parts, lacksRoom) {
		f.makeRoom(c.t, c.parts, c.unlog)
	}
	for _, p := range c.parts {
		if p.Op == blockdev.OpTrim && p.Err == nil {
			r.Done = p.Done
			if p.Done.Off != p.Off || p.Done.Len != p.Len {
				// The log says zero where the disk is not.
				f.gap(c.t, p.Off, p.Len)
			}
		}
		if p.Err == nil {
			continue
		}
		f.stats.Errors.Add(1)
		f.gap(c.t, p.Off, p.Len)
		if fua && isDiskError(p.Err) && !c.noRoom(p) {
			_ = f.syncFailed(p.Err) // the guest gets the error itself
		}
		r.Err = p.Err
	}
	if fua {
		f.syncs.end(ticket)
		if r.Err == nil {
			r.Err = f.latch.err() // another sync may have taken the report of ours
		}
	}
	c.unlog()
	c.unlock()
}

// unlog tells the log that it need not wait for the change.
func (c *change) unlog() {
	for _, g := range c.logged {
		c.t.log.Finished(g)
	}
	c.logged = nil
}

// noRoom reports whether a FUA request failed because there is no room for it,
// rather than because what was written could not be made durable: then the
// same request without FUA finds no room either. Nothing durable was lost by
// it, and a guest that waits for room may go on.
func (c *change) noRoom(p *blockdev.Request) bool {
	if !errors.Is(p.Err, syscall.ENOSPC) && !errors.Is(p.Err, syscall.EDQUOT) {
		return false
	}
	again := *p
	again.Flags &^= blockdev.FlagFUA
	again.Err = nil
	err := blockdev.Do1(c.f.dev, &again)
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func (c *change) unlock() {
	if c.hot != nil {
		c.hot.Leave(c.lock.off, c.lock.end-c.lock.off)
	}
	c.f.locks.releaseOne(&c.lock)
	c.f.completeOne(c.r)
}
