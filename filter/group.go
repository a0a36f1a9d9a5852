package filter

import (
	"errors"
	"slices"
	"unsafe"

	"afterimage/blockdev"
	"afterimage/filter/hot"
	"afterimage/hrl"
)

// A group is one batch on the fast path: the writes that need not wait, and
// what of the batch was finished before them, to be completed with them. It is
// used again and again and holds all memory the path needs.
type group struct {
	f *Filter
	t *tee // the one its ranges were locked under; nil: nothing is logged
	// hot has its writes counted in; nil: nothing is marked.
	hot *hot.Map

	writes []*blockdev.Request
	locks  [blockdev.BatchMax]lock
	took   [blockdev.BatchMax]bool
	reads  []*blockdev.Request // asked without waiting
	done   []*blockdev.Request // finished, to be completed
	later  []*blockdev.Request // for workers

	log       *hrl.Group
	appended  bool // log is in the log
	abandoned bool // somebody else carries on; nothing of it is used again
	begin     int64
}

func newGroup(f *Filter) *group {
	n := blockdev.BatchMax
	g := &group{
		f: f, log: hrl.NewGroup(),
		writes: make([]*blockdev.Request, 0, n), reads: make([]*blockdev.Request, 0, n),
		done: make([]*blockdev.Request, 0, 2*n), later: make([]*blockdev.Request, 0, n),
	}
	g.log.Abandoned = g.carryOn
	return g
}

func (g *group) reset() {
	clear(g.writes)
	clear(g.reads)
	clear(g.done)
	clear(g.later)
	g.writes, g.reads, g.done, g.later = g.writes[:0], g.reads[:0], g.done[:0], g.later[:0]
	g.log.Reset()
	g.t, g.hot, g.appended = nil, nil, false
}

// Submit implements blockdev.Queue.
func (f *Filter) Submit(reqs []*blockdev.Request) {
	if len(reqs) == 0 {
		return
	}
	f.inflight.Add(int64(len(reqs)))
	g := f.groups.Get().(*group)
	g.sort(reqs)
	g.read()
	g.lock()
	// Those that have to wait leave first (RULES A5).
	for _, r := range g.later {
		f.stats.Waited.Add(1)
		f.workers.Go(func() { f.work(r) })
	}
	if len(g.writes) == 0 {
		f.complete(g.done)
		f.recycle(g)
		return
	}
	g.tee()
}

func (f *Filter) recycle(g *group) {
	g.reset()
	f.groups.Put(g)
}

// sort tells the requests apart: refused, to be read or written in place, or
// to be left to a worker.
func (g *group) sort(reqs []*blockdev.Request) {
	f := g.f
	size, payload := f.dev.Size(), int64(0)
	for _, r := range reqs {
		r.Err, r.Done, r.Stolen = nil, blockdev.Extent{}, false
		if r.Err = r.Check(&f.info, size); r.Err != nil || r.Len == 0 && r.Op != blockdev.OpFlush {
			g.done = append(g.done, r)
			continue
		}
		inPlace := !f.waits && r.Off&(f.align-1) == 0 && r.Len&(f.align-1) == 0 && r.Len <= inlineMax && f.fitsMemory(r.Buf)
		switch {
		case r.Op == blockdev.OpRead && inPlace:
			g.reads = append(g.reads, r)
		case r.Op == blockdev.OpWrite && inPlace && r.Flags&blockdev.FlagFUA == 0 && payload+r.Len <= groupBytesMax:
			payload += r.Len
			g.locks[len(g.writes)].off, g.locks[len(g.writes)].end = r.Off, r.Off+r.Len
			g.writes = append(g.writes, r)
		default:
			g.later = append(g.later, r)
		}
	}
}

// fitsMemory reports whether the device takes the buffer as it lies in memory.
func (f *Filter) fitsMemory(b []byte) bool {
	return f.mem <= 1 || uintptr(unsafe.Pointer(unsafe.SliceData(b)))%uintptr(f.mem) == 0
}

// read does the reads that need not wait.
func (g *group) read() {
	if len(g.reads) == 0 {
		return
	}
	f := g.f
	begin := blockdev.Monotonic()
	for _, r := range g.reads {
		r.Flags |= blockdev.FlagNoWait
	}
	f.dev.Do(g.reads)
	for _, r := range g.reads {
		r.Flags &^= blockdev.FlagNoWait
		if errors.Is(r.Err, blockdev.ErrWouldBlock) {
			g.later = append(g.later, r)
			continue
		}
		f.countRead(r)
		g.done = append(g.done, r)
	}
	f.stats.Read.record(blockdev.Monotonic() - begin)
}

func (f *Filter) countRead(r *blockdev.Request) {
	f.stats.Reads.Add(1)
	f.stats.ReadBytes.Add(r.Len)
	if r.Err != nil {
		f.stats.Errors.Add(1)
	}
}

// lock takes the ranges of the writes; what conflicts leaves the group.
func (g *group) lock() {
	n := len(g.writes)
	if n == 0 {
		return
	}
	f := g.f
	if dropped(g.writes[0]) {
		for _, r := range g.writes {
			r.Err = blockdev.ErrGone
			g.done = append(g.done, r)
		}
		f.stats.Dropped.Add(int64(n))
		g.writes = g.writes[:0]
		return
	}
	g.t = f.locks.tryAll(g.locks[:n], g.took[:n])
	if g.t != nil {
		g.hot = g.t.hot
	} else if !f.untracked.Load() {
		f.untracked.Store(true)
	}
	keep := 0
	for i, r := range g.writes {
		if !g.took[i] {
			f.stats.Conflicts.Add(1)
			g.later = append(g.later, r)
			continue
		}
		if g.hot != nil && !g.hot.Enter(r.Off, r.Len) {
			// Its mark takes a sync: a worker waits for that (RULES A5).
			g.hot.Leave(r.Off, r.Len)
			f.locks.releaseOne(&g.locks[i])
			g.took[i] = false
			f.stats.Cold.Add(1)
			g.later = append(g.later, r)
			continue
		}
		g.writes[keep] = r
		keep++
	}
	// The locks stay where they are, for the table points to them.
	clear(g.writes[keep:])
	g.writes = g.writes[:keep]
	for i := n; i < len(g.took); i++ {
		g.took[i] = false
	}
}

// tee logs the writes and carries on.
func (g *group) tee() {
	g.begin = blockdev.Monotonic()
	if g.t == nil {
		g.finish()
		return
	}
	for _, r := range g.writes {
		g.log.Add(hrl.Entry{Kind: hrl.KindWrite, Disk: g.t.disk, Off: r.Off, Len: r.Len, Data: r.Buf})
	}
	err := g.t.log.Append(g.log)
	if err == hrl.ErrAbandoned {
		return // carryOn has it; g is no longer ours
	}
	g.appended = err == nil
	if err != nil {
		g.f.logFailed(err)
		g.gaps()
	} else {
		g.f.logWorked()
	}
	g.finish()
}

// carryOn is what goes on in the place of a goroutine that is stuck in the
// log's append (hrl.Group.Abandoned).
func (g *group) carryOn(why error) {
	g.f.logFailed(why)
	g.abandoned = true
	for _, r := range g.writes {
		r.Stolen = true // the append may still read it
	}
	g.gaps()
	g.finish()
}

// gaps stores that the log lacks the writes. The log itself knows already.
func (g *group) gaps() {
	for _, r := range g.writes {
		g.f.gaps.add(r.Off, r.Len)
	}
}

// finish writes the disk, unlocks and completes; where there is no room, a worker does
// that. g is no longer the caller's.
func (g *group) finish() {
	f := g.f
	begin := blockdev.Monotonic()
	f.stats.Append.record(begin - g.begin)
	f.dev.Do(g.writes)
	f.stats.Disk.record(blockdev.Monotonic() - begin)
	if g.t != nil && slices.ContainsFunc(g.writes, lacksRoom) {
		f.workers.Go(func() {
			f.makeRoom(g.t, g.writes, g.unlog)
			g.end()
		})
		return
	}
	g.end()
}

// unlog tells the log that it need not wait for the writes.
func (g *group) unlog() {
	if g.appended {
		g.t.log.Finished(g.log)
		g.appended = false
	}
}

// end unlocks and completes.
func (g *group) end() {
	f := g.f
	f.stats.Batches.Add(1)
	bytes := int64(0)
	for _, r := range g.writes {
		bytes += r.Len
		if r.Err != nil {
			// Old, new or a mix: before the guest hears of it (RULES L3).
			f.stats.Errors.Add(1)
			f.gap(g.t, r.Off, r.Len)
		}
	}
	f.stats.Writes.Add(int64(len(g.writes)))
	f.stats.WrittenBytes.Add(bytes)
	g.unlog()
	if g.hot != nil {
		for _, r := range g.writes {
			g.hot.Leave(r.Off, r.Len)
		}
	}
	f.locks.release(g.locks[:], g.took[:])
	g.done = append(g.done, g.writes...)
	f.complete(g.done)
	if !g.abandoned {
		f.recycle(g)
	}
}
