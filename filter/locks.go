package filter

import (
	"slices"
	"sync"
)

// A lock is a byte range of the disk, held or waited for. Its memory is the
// caller's, who must not touch it between taking and releasing it.
type lock struct {
	off, end int64
	round    uint8 // of the barrier; see lockTable.rounds
	copies   bool  // whoever takes it changes nothing there
	index    int   // in held
	ready    chan struct{}
}

func (l *lock) overlaps(o *lock) bool { return l.off < o.end && o.off < l.end }

const (
	lockBlock   = 64 << 10 // granularity of the counts
	lockBuckets = 4096     // power of two
	lockWide    = 16       // a range over more blocks is not counted but searched for
)

// lockTable is the set of locked ranges of one disk.
//
// A newcomer is first looked up in counts, where every held or waiting range
// has counted itself in for the blocks it touches: zeroes prove that nothing
// conflicts, and that is nearly always so. Otherwise the ranges themselves are
// compared.
type lockTable struct {
	mu      sync.Mutex
	held    []*lock
	waiting []*lock // in order of arrival
	counts  [lockBuckets]uint16
	wide    int // held or waiting ranges that are not in counts

	// Locks are taken in rounds; a barrier begins the next and waits until
	// nothing of the one before is held. Only the newest two can be held.
	round   uint8
	rounds  [2]int // held in round 0 and 1
	turning chan struct{}

	tee *tee // who takes a lock uses the tee it finds at that moment

	watches []*watch // of those who read without a lock, few
}

// A watch tells who reads a range without a lock which of its blocks were locked
// meanwhile, by somebody who may have changed them.
type watch struct {
	off, end int64
	touched  uint64 // a bit for each block from off's on: the range has 64 at most
}

// watch begins to look out for w's range.
func (t *lockTable) watch(w *watch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w.touched = 0
	t.watches = append(t.watches, w)
	for _, h := range t.held {
		w.see(h)
	}
}

func (t *lockTable) unwatch(w *watch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.watches = slices.DeleteFunc(t.watches, func(o *watch) bool { return o == w })
}

// undisturbed reports whether nobody has locked the block at off since the watch
// began. The caller holds the block.
func (t *lockTable) undisturbed(w *watch, off int64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return w.touched&(1<<(off/lockBlock-w.off/lockBlock)) == 0
}

func (w *watch) see(l *lock) {
	lo, hi := max(l.off, w.off), min(l.end, w.end)
	if l.copies || lo >= hi {
		return
	}
	first, last := lo/lockBlock-w.off/lockBlock, (hi-1)/lockBlock-w.off/lockBlock
	w.touched |= ^uint64(0) >> (63 - (last - first)) << first
}

// tryAll takes the ranges of those locks that conflict with nothing, neither
// with a range held or waited for nor with one earlier in the batch, and puts
// false in took for the others. It never waits. The tee is the one to be used
// for them.
func (t *lockTable) tryAll(locks []lock, took []bool) *tee {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range locks {
		took[i] = !t.conflictsLocked(&locks[i], len(t.waiting))
		if took[i] {
			t.holdLocked(&locks[i])
			t.countLocked(&locks[i], 1)
		}
	}
	return t.tee
}

// take takes the range, waiting in line for it. The caller holds no other lock.
func (t *lockTable) take(l *lock) *tee {
	t.mu.Lock()
	conflict := t.conflictsLocked(l, len(t.waiting))
	t.countLocked(l, 1)
	if !conflict {
		t.holdLocked(l)
		tee := t.tee
		t.mu.Unlock()
		return tee
	}
	l.ready = make(chan struct{})
	t.waiting = append(t.waiting, l)
	t.mu.Unlock()
	<-l.ready
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tee
}

// release gives ranges back and lets in who waited for them.
func (t *lockTable) release(locks []lock, took []bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range locks {
		if took[i] {
			t.releaseLocked(&locks[i])
		}
	}
	t.admitLocked()
}

func (t *lockTable) releaseOne(l *lock) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.releaseLocked(l)
	t.admitLocked()
}

func (t *lockTable) holdLocked(l *lock) {
	l.round = t.round
	t.rounds[l.round]++
	for _, w := range t.watches {
		w.see(l)
	}
	l.index = len(t.held)
	t.held = append(t.held, l)
}

func (t *lockTable) releaseLocked(l *lock) {
	last := len(t.held) - 1
	t.held[l.index] = t.held[last]
	t.held[l.index].index = l.index
	t.held[last] = nil
	t.held = t.held[:last]
	t.countLocked(l, -1)
	t.rounds[l.round]--
	if t.turning != nil && l.round != t.round && t.rounds[l.round] == 0 {
		close(t.turning)
		t.turning = nil
	}
}

// admitLocked gives their ranges to those waiters that conflict with nothing
// held and with nobody who has waited longer.
func (t *lockTable) admitLocked() {
	rest := t.waiting[:0]
	for i, w := range t.waiting {
		// Those before w that still wait are in rest, which is no longer
		// than i: the part of waiting it overlays has been looked at.
		t.waiting[i] = nil
		conflict := false
		for _, h := range t.held {
			conflict = conflict || h.overlaps(w)
		}
		for _, o := range rest {
			conflict = conflict || o.overlaps(w)
		}
		if conflict {
			rest = append(rest, w)
			continue
		}
		t.holdLocked(w)
		close(w.ready)
	}
	t.waiting = rest
}

// conflictsLocked reports whether l overlaps a range that is held or waited
// for by one of the first n in line.
func (t *lockTable) conflictsLocked(l *lock, n int) bool {
	if t.wide == 0 && !l.isWide() {
		clear := true
		for b := l.off / lockBlock; b <= (l.end-1)/lockBlock; b++ {
			clear = clear && t.counts[bucket(b)] == 0
		}
		if clear {
			return false
		}
	}
	for _, h := range t.held {
		if h.overlaps(l) {
			return true
		}
	}
	for _, w := range t.waiting[:n] {
		if w.overlaps(l) {
			return true
		}
	}
	return false
}

func (t *lockTable) countLocked(l *lock, n int) {
	if l.isWide() {
		t.wide += n
		return
	}
	for b := l.off / lockBlock; b <= (l.end-1)/lockBlock; b++ {
		t.counts[bucket(b)] += uint16(n)
	}
}

func (l *lock) isWide() bool { return (l.end-1)/lockBlock-l.off/lockBlock >= lockWide }

// bucket spreads block numbers; neighbours get different buckets.
func bucket(b int64) int64 { return (b ^ b>>12) & (lockBuckets - 1) }

// teeNow is the tee that a lock taken now would be given.
func (t *lockTable) teeNow() *tee {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tee
}

// setTee changes the tee and returns when every request that used the old one
// has finished (RULES A7). Barriers are made one at a time; see Filter.barrier.
func (t *lockTable) setTee(tee *tee) {
	t.mu.Lock()
	t.tee = tee
	old := t.round
	t.round ^= 1
	if t.rounds[old] == 0 {
		t.mu.Unlock()
		return
	}
	done := make(chan struct{})
	t.turning = done
	t.mu.Unlock()
	<-done
}
