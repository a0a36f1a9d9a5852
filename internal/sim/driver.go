package sim

import (
	"context"
	"time"

	"afterimage/blockdev"
)

// A step is one thing that the driver may do next.
type step struct {
	name   string
	weight int
	do     func()
}

// play does n random steps.
func (w *world) play(n int) {
	steps := w.steps()
	total := 0
	for _, s := range steps {
		total += s.weight
	}
	for range n {
		if w.failed() {
			return
		}
		w.revive()
		k := w.rng.IntN(total)
		for _, s := range steps {
			if k -= s.weight; k < 0 {
				w.note("%s", s.name)
				s.do()
				break
			}
		}
		w.count(func(s *Stats) { s.Steps++ })
		w.rest()
		w.checkSynced()
		if w.rng.IntN(4) == 0 {
			w.checkPoints(false)
		}
	}
}

func (w *world) count(f func(*Stats)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.stats)
}

// rest lets a little time pass, or none.
func (w *world) rest() {
	switch w.rng.IntN(4) {
	case 0:
		time.Sleep(time.Duration(1+w.rng.IntN(200)) * time.Microsecond)
	case 1:
		time.Sleep(time.Duration(1+w.rng.IntN(20000)) * time.Microsecond)
	}
}

// revive starts what is gone: at once, or some time later.
func (w *world) revive() {
	if w.sec != nil && w.sec.proc.Gone() {
		w.count(func(s *Stats) { s.MidOp++ })
		w.crashReplica(w.rng.IntN(2) == 0)
	}
	if w.pri != nil && w.pri.proc.Gone() {
		w.count(func(s *Stats) { s.MidOp++ })
		w.crashPrimary(w.rng.IntN(2) == 0)
	}
	if w.sec == nil && w.rng.IntN(3) > 0 {
		w.startReplica(w.dying(200))
	}
	for w.pri == nil && !w.failed() {
		if w.startPrimary(w.dying(60)); w.pri.proc.Gone() {
			w.count(func(s *Stats) { s.MidOp++ })
			w.crashPrimary(w.rng.IntN(2) == 0)
		}
	}
}

// dying is after how many operations a new process ends by itself: mostly never.
func (w *world) dying(within int) int {
	if w.rng.IntN(5) > 0 {
		return 0
	}
	return 1 + w.rng.IntN(within)
}

func (w *world) steps() []step {
	return append([]step{
		{"requests", 60, w.someRequests},
		{"many requests", 2, w.manyRequests},
		{"wait", 20, func() { time.Sleep(time.Duration(1+w.rng.IntN(100000)) * time.Microsecond) }},
		{"wait long", 4, func() { time.Sleep(time.Duration(1+w.rng.IntN(60)) * time.Second) }},
		{"look", 4, func() { w.look() }},
		{"sync", 8, w.syncBehind},
		{"sync and wait", 6, w.syncNow},
		{"settle the replica", 2, w.settleReplica},
	}, w.troubles()...)
}

// someRequests submits one to four batches, each on a goroutine of its own.
func (w *world) someRequests() {
	if w.pri == nil {
		return
	}
	for range 1 + w.rng.IntN(3) {
		var reqs []*blockdev.Request
		disk := w.rng.IntN(len(w.specs))
		near := w.rng.Int64N(w.specs[disk].size/sector) * sector
		for range 1 + w.rng.IntN(4) {
			reqs = append(reqs, w.request(disk, near))
		}
		w.goAsk(disk, reqs...)
	}
}

// manyRequests fills more than a segment of the log.
func (w *world) manyRequests() {
	if w.pri == nil {
		return
	}
	const n = 128 << 10
	for range 34 {
		disk := w.rng.IntN(len(w.specs))
		off := w.rng.Int64N((w.specs[disk].size-n)/4096) * 4096
		w.goAsk(disk, &blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: n, Buf: make([]byte, n)})
	}
}

// request is a random request, often where others are.
func (w *world) request(disk int, near int64) *blockdev.Request {
	size := w.specs[disk].size
	n := int64(1 + w.rng.IntN(32))
	switch w.rng.IntN(6) {
	case 0:
		n = 1
	case 1:
		n = int64(1 + w.rng.IntN(256))
	}
	n *= sector
	off := w.rng.Int64N((size-n)/sector+1) * sector
	if w.rng.IntN(2) == 0 {
		off = min(near+w.rng.Int64N(16)*sector, size-n)
	}
	if extents := size >> 20; extents > 3 { // the beginning of any extent
		off = min(off%(64<<10)+w.rng.Int64N(extents)<<20, size-n)
	} else if w.rng.IntN(3) == 0 { // a small region, so that much is written again and again
		off %= 64 << 10
		off = min(off/sector*sector, size-n)
	}
	r := &blockdev.Request{Off: off, Len: n}
	switch k := w.rng.IntN(100); {
	case k < 55:
		r.Op, r.Buf = blockdev.OpWrite, make([]byte, n)
	case k < 62:
		r.Op, r.Buf, r.Flags = blockdev.OpWrite, make([]byte, n), blockdev.FlagFUA
	case k < 75:
		r.Op, r.Buf = blockdev.OpRead, make([]byte, n)
	case k < 85:
		r.Op, r.Off, r.Len = blockdev.OpFlush, 0, 0
	default:
		r.Op = blockdev.OpWriteZeroes
		if w.rng.IntN(2) == 0 {
			r.Op = blockdev.OpTrim
		}
		if w.rng.IntN(3) == 0 { // whole blocks, so that there are holes
			r.Len = int64(1+w.rng.IntN(3)) * (64 << 10)
			r.Off = min(r.Off, size-r.Len) &^ (64<<10 - 1)
		}
		if w.rng.IntN(4) == 0 {
			r.Flags = blockdev.FlagFUA
		}
	}
	return r
}

// syncBehind asks for a point while other things happen.
func (w *world) syncBehind() {
	if w.pri == nil || w.pending > 2 {
		return
	}
	w.mu.Lock()
	w.pending++
	w.mu.Unlock()
	w.guests.Go(func() {
		_, _ = w.sync(20 * time.Second)
		w.mu.Lock()
		w.pending--
		w.mu.Unlock()
	})
}

// syncNow asks for a point and waits for it, often with nothing under way.
func (w *world) syncNow() {
	if w.pri == nil {
		return
	}
	var found [][]uint32
	if w.rng.IntN(3) > 0 {
		found = w.look()
	}
	id, err := w.sync(40 * time.Second)
	if err != nil || found == nil {
		return
	}
	w.checkSynced()
	w.same(id, found)
}

// same compares a point with what the disks were when it was asked for, with
// nothing under way since.
func (w *world) same(id any, found [][]uint32) {
	for pid, k := range w.known {
		if any(pid) != id {
			continue
		}
		for i := range found {
			for s, v := range found[i] {
				if k.disks[i][s] != v {
					w.wrong("point %v is not what the disks are: disk %d, sector %d has #%d, the disk #%d", id, i, s, k.disks[i][s], v)
					return
				}
			}
		}
	}
}

func (w *world) settleReplica() {
	if v := w.replicaVM(); v != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := v.Settle(ctx); err != nil {
			w.note("settle: %v", err)
		}
		w.checkPoints(true)
	}
}

// finish ends all faults, and looks whether everything comes to rest, primary and
// replica equal.
func (w *world) finish() {
	w.note("the faults stop")
	w.line.heal()
	w.slow.Store(false)
	w.setCutAt(cutNowhere)
	for range 20 {
		time.Sleep(2 * time.Second) // a log that has failed is refused for a moment
		if w.sec != nil {
			w.sec.proc.Heal()
		}
		if w.pri != nil {
			w.pri.proc.Heal()
		}
		if w.sec != nil && w.sec.proc.Gone() {
			w.crashReplica(false)
		}
		if w.pri != nil && w.pri.proc.Gone() {
			w.crashPrimary(false)
		}
		if w.sec == nil {
			w.startReplica(0)
		}
		if w.pri == nil {
			w.startPrimary(0)
		}
		if w.failed() {
			return
		}
		w.endFailover()
		w.settled()
		w.checkSynced()
		found := w.look()
		id, err := w.sync(10 * time.Minute)
		if err != nil || w.failed() || found == nil {
			continue
		}
		w.checkSynced()
		w.same(id, found)
		w.settleReplica()
		w.checkPoints(true)
		return
	}
	if !w.failed() {
		w.wrong("the faults have stopped, and no sync succeeds")
	}
}

// close ends both hosts, whatever has happened.
func (w *world) close() {
	w.line.heal()
	if w.pri != nil {
		w.pri.proc.Heal()
		w.settled()
		if !w.failed() {
			w.stopPrimary()
		} else {
			w.pri.proc.Die()
			w.settled()
			w.end(w.pri, false)
		}
	}
	w.settled()
	if w.sec != nil {
		w.sec.proc.Heal()
		w.endReplica()
	}
	w.stats.LineCuts = w.line.made
	time.Sleep(time.Minute) // an append that hangs is nobody's; it ends by itself
}
