package filter

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"afterimage/blockdev"
	"afterimage/filter/hot"
	"afterimage/hrl"
)

// Options say how a disk is filtered. The zero value is good for use.
type Options struct {
	// Workers is how many requests may wait at once outside the goroutines
	// that submit them; 0: 64.
	Workers int
	// Warn is told when the log begins to fail, and when it works again; nil:
	// slog.Default().
	Warn *slog.Logger
	// Latch is the file that keeps the error latch over restarts; empty: it
	// is kept in memory alone.
	Latch string
	FS    hrl.FS // where Latch lies; nil: hrl.OS
}

// A Disk is a disk of a VM, by the name it has in the VM's log.
type Disk struct {
	*Filter
	Name string
}

// A Filter is the Queue over a disk. It orders overlapping writes, tees changes
// into a replica log while one is attached, knows what the log lacks, and
// remembers failed syncs. It takes requests of any alignment.
type Filter struct {
	dev   blockdev.Device
	info  blockdev.Info // of the filter, as clients see it
	align int64         // what dev and log need: at least a sector
	waits bool          // dev's reads and writes usually wait: they belong on workers
	mem   int           // alignment of dev's buffers

	locks   lockTable
	barrier sync.Mutex // held while the tee is changed
	gaps    gapMap
	// track is never nil; it is changed while nothing is logged.
	track   atomic.Pointer[Tracking]
	marking sync.Once // the map of hot extents has failed
	// untracked says that something was written while nothing was logged.
	untracked atomic.Bool
	latch     latch
	flusher   flusher
	syncs     syncOrder
	workers   blockdev.Workers
	groups    sync.Pool // *group
	stats     counters

	warn   *slog.Logger
	logBad atomic.Bool // the last append failed

	inflight atomic.Int64 // requests submitted and not completed
	drain    sync.Mutex   // guards drained
	drained  *sync.Cond   // inflight may be zero
}

// A tee is where changes are logged.
type tee struct {
	log  *hrl.Log
	disk hrl.DiskID
	hot  *hot.Map // nil: nothing is marked
}

const (
	// inlineMax is the longest write done on the goroutine that submits it:
	// beyond, copying it takes longer than handing it to a worker, and it
	// would hold up what came with it.
	inlineMax = 256 << 10
	// groupBytesMax bounds the payloads of one group on the fast path.
	groupBytesMax = 1 << 20
	// waitMax is how long a request may wait to be begun, in nanoseconds. A
	// client that is silent for that long may have sent the request again
	// over another connection (RULES A6).
	waitMax = 20e9
)

// New returns a Filter over dev. Without a log it only orders writes. It fails
// if the disk's size or block size is one the log cannot describe, or the latch
// cannot be read.
func New(dev blockdev.Device, o Options) (*Filter, error) {
	info := dev.Info()
	f := &Filter{dev: dev, info: info, waits: info.Slow, mem: info.MemAlign}
	f.align = max(info.BlockSize, blockdev.SectorSize)
	if f.align > hrl.PayloadMax || f.align&(f.align-1) != 0 {
		return nil, fmt.Errorf("%s: blocks of %d bytes are not supported", info.Name, info.BlockSize)
	}
	if dev.Size()%f.align != 0 {
		return nil, fmt.Errorf("%s: its size of %d bytes is no multiple of %d", info.Name, dev.Size(), f.align)
	}
	if o.Workers == 0 {
		o.Workers = 64
	}
	f.workers.Max = o.Workers
	f.warn = o.Warn
	if f.warn == nil {
		f.warn = slog.Default()
	}
	f.info.BlockSize, f.info.MemAlign, f.info.Slow = 1, 1, false
	f.info.Preferred = max(info.Preferred, 4096)
	f.track.Store(&Tracking{Marked: func() {}})
	f.gaps.size = dev.Size()
	f.drained = sync.NewCond(&f.drain)
	f.flusher.sync = f.syncDisk
	f.syncs.changed.L = &f.syncs.mu
	f.groups.New = func() any { return newGroup(f) }
	f.latch.fs, f.latch.path = o.FS, o.Latch
	if o.FS == nil {
		f.latch.fs = hrl.OS
	}
	if err := f.latch.load(); err != nil {
		return nil, fmt.Errorf("%s: %w", info.Name, err)
	}
	return f, nil
}

// Info implements blockdev.Queue.
func (f *Filter) Info() blockdev.Info { return f.info }

// Size implements blockdev.Queue.
func (f *Filter) Size() int64 { return f.dev.Size() }

// Extents implements blockdev.Queue.
func (f *Filter) Extents(off, length int64, visit func(blockdev.Run) bool) error {
	return f.dev.Extents(off, length, visit)
}

// Latched is the error of the latch: why the disk cannot be made durable, or nil.
func (f *Filter) Latched() error { return f.latch.err() }

// Reopen is the operator's word that the disk may be called durable again. It
// comes after Recover, which has to know that it could not be.
// What is in memory may be newer than the disk (RULES F6): it is dropped first, so that
// guest and copies see what the disk has.
func (f *Filter) Reopen() error {
	if d, ok := f.dev.(blockdev.CacheDropper); ok && f.latch.err() != nil {
		if err := d.DropCache(0, f.Size()); err != nil {
			return fmt.Errorf("%s: drop what is in memory of it: %w", f.info.Name, err)
		}
	}
	return f.latch.clear()
}

// syncFailed latches that a sync of the disk failed, and returns what is latched.
// What was written and is not durable may now vanish from the page cache,
// long after the log had it: the log can vouch for nothing (RULES F6).
func (f *Filter) syncFailed(why error) error {
	first, err := f.latch.set(f.info.Name, why)
	if h := f.track.Load().Hot; h != nil {
		h.Freeze()
	}
	if first {
		f.gap(f.locks.teeNow(), 0, f.Size())
	}
	return err
}

// AttachLog turns the tee on: when it returns, every change from then on is
// logged, and every change that is not has finished, so a copy may begin
// (RULES A7). With a nil log it turns the tee off in the same way.
func (f *Filter) AttachLog(log *hrl.Log, disk hrl.DiskID) {
	f.barrier.Lock()
	defer f.barrier.Unlock()
	var t *tee
	if log != nil {
		t = &tee{log, disk, f.track.Load().Hot}
	}
	f.locks.setTee(t)
}

// Gaps calls visit for the runs of 64 KiB blocks, in bytes, that may have
// changed without the log having it, and were not copied since.
func (f *Filter) Gaps(visit func(off, length int64)) { f.gaps.runs(visit) }

// AddGap adds a range to the gaps. A log that gives up frames says so here
// (hrl.Options.Reclaimed), before it does.
func (f *Filter) AddGap(off, length int64) { f.gaps.add(off, length) }

// Drain implements blockdev.Queue.
func (f *Filter) Drain() {
	f.drain.Lock()
	defer f.drain.Unlock()
	for f.inflight.Load() > 0 {
		f.drained.Wait()
	}
}

// complete gives finished requests, all of one owner, back to it.
func (f *Filter) complete(reqs []*blockdev.Request) {
	if len(reqs) == 0 {
		return
	}
	// Afterwards they are the owner's, who may use them again at once.
	n := int64(len(reqs))
	reqs[0].Owner.Complete(reqs)
	if f.inflight.Add(-n) == 0 {
		f.drain.Lock()
		f.drained.Broadcast()
		f.drain.Unlock()
	}
}

// Resize changes the disk's size, in bytes, while nothing else is under way:
// it locks the whole disk. The log has it before the disk (RULES L2).
func (f *Filter) Resize(size int64) error {
	if size < 0 || size%f.align != 0 {
		return fmt.Errorf("%s: a size of %d bytes is no multiple of %d", f.info.Name, size, f.align)
	}
	l := lock{off: 0, end: wholeDisk}
	t := f.locks.take(&l)
	defer f.locks.releaseOne(&l)
	old := f.dev.Size()
	if old == size {
		return f.dev.Resize(size)
	}
	if err := f.growMaps(size); err != nil {
		return fmt.Errorf("%s: %w", f.info.Name, err)
	}
	var logged *hrl.Group
	if t != nil {
		if logged = t.note(hrl.ResizeEntry(t.disk, old, size)); logged == nil {
			f.gaps.add(min(old, size), max(old, size)-min(old, size))
		}
	}
	err := f.dev.Resize(size)
	if err != nil && f.dev.Size() == size {
		// It has that size and cannot make it durable: a failed sync (rule R9).
		err = f.syncFailed(err)
	} else if err != nil && logged != nil {
		// The log says what did not happen: say how it is.
		if g := t.note(hrl.ResizeEntry(t.disk, size, f.dev.Size())); g != nil {
			t.log.Finished(g)
		}
		f.gap(t, min(old, size), max(old, size)-min(old, size))
	}
	if logged != nil {
		t.log.Finished(logged)
	}
	if err == nil {
		err = f.gaps.resize(size) // what lies behind the end is no gap any more
	}
	return err
}

// growMaps makes room for what a larger disk has more, before anybody can write there.
func (f *Filter) growMaps(size int64) error {
	if size < f.dev.Size() {
		return nil
	}
	if h := f.track.Load().Hot; h != nil {
		if err := h.Grow(size); err != nil {
			return err
		}
	}
	return f.gaps.resize(size)
}

// wholeDisk is the end of a lock on the whole disk, whatever its size.
const wholeDisk = 1 << 60

// gap stores that the log lacks a range, in memory and, where it still takes
// anything, in the log itself, and reports whether the log has it. It comes
// before the guest is answered.
func (f *Filter) gap(t *tee, off, length int64) bool {
	f.gaps.add(off, length)
	if t == nil {
		return false
	}
	g := t.note(hrl.GapEntry(t.disk, off, length))
	if g == nil {
		return false
	}
	t.log.Finished(g)
	return true
}

// note appends entries that no guest's write belongs to and that own their
// payloads: all or none. It returns nil if that failed, and after the log's limit at the latest,
// for the caller holds a range: what hangs in the append then is a goroutine of
// its own, which ends when the log's disk answers.
func (t *tee) note(entries ...hrl.Entry) *hrl.Group {
	g := hrl.NewGroup()
	for i := range entries {
		g.Add(entries[i])
	}
	outcome := make(chan error, 2) // of the append that was abandoned, too
	g.Abandoned = func(why error) { outcome <- why }
	go func() { outcome <- t.log.Append(g) }()
	if <-outcome != nil {
		return nil
	}
	return g
}

// logFailed and logWorked tell the operator, once each time.
func (f *Filter) logFailed(why error) {
	if f.logBad.CompareAndSwap(false, true) {
		f.warn.Warn("the log fails: what is written from now on becomes a gap", "disk", f.info.Name, "why", why)
	}
}

func (f *Filter) logWorked() {
	if f.logBad.Load() && f.logBad.CompareAndSwap(true, false) {
		gap, _ := f.gaps.bytes()
		f.warn.Info("the log works again", "disk", f.info.Name, "gap_bytes", gap)
	}
}

// Flush makes everything durable that had finished when it was called, as a
// guest's FLUSH does.
func (f *Filter) Flush() error { return f.flusher.flush() }

// Close makes the disk durable. The caller has drained it and submits nothing
// any more. It does not close the device.
func (f *Filter) Close() error {
	// Not the workers: one may hang in an append that was abandoned. Its
	// request is completed, and it touches nothing but the log any more.
	f.Drain()
	if f.info.ReadOnly {
		return nil
	}
	return f.flusher.flush()
}

// dropped reports whether the request must not be begun any more.
func dropped(r *blockdev.Request) bool {
	return r.Owner.Gone() || r.Arrived != 0 && blockdev.Monotonic()-r.Arrived > waitMax
}

// isDiskError reports whether an error came from the disk, rather than from a
// request it cannot be asked.
func isDiskError(err error) bool {
	return err != nil && !errors.Is(err, blockdev.ErrBounds) && !errors.Is(err, blockdev.ErrAlignment) &&
		!errors.Is(err, blockdev.ErrReadOnly) && !errors.Is(err, blockdev.ErrNotSupported) &&
		!errors.Is(err, blockdev.ErrClosed)
}
