package hrl

import (
	"time"
)

const (
	// giveUpLimit is how long a guest's write that finds no room waits for what the log
	// can give, and giveUpWait how long the keeper waits, of that, for segments that are
	// still needed.
	giveUpLimit = 5 * time.Second
	giveUpWait  = time.Second
	giveUpTick  = 2 * time.Millisecond
)

// GiveUp gives the log's room back to its file system, for a disk has none (RULES F5):
// spares, and, as at the quota, all segments whose writes have ended on the disk. It
// returns when that is done, or takes too long, and says whether any room was given.
//
// From then on appends are refused until Options.Room says that the log may grow, and
// for the usual while at least. The caller has called Finished for what it has
// appended and not written, and stored that as a gap, for its segment goes too.
func (l *Log) GiveUp() bool {
	l.mu.Lock()
	before := l.given
	l.mu.Unlock()
	l.giving.Lock()
	defer l.giving.Unlock()
	limit := time.Now().Add(giveUpLimit)
	l.mu.Lock()
	if l.given != before {
		l.mu.Unlock()
		return true // to somebody who had come before
	}
	if l.closed || l.tail == nil && len(l.spares) == 0 && (len(l.sealed) == 0 || l.opt.Reclaimed == nil) {
		l.mu.Unlock()
		return false
	}
	for l.tail != nil && l.op != nil && l.op.writing && time.Now().Before(limit) {
		l.mu.Unlock()
		time.Sleep(giveUpTick)
		l.mu.Lock()
	}
	if l.tail != nil && (l.op == nil || !l.op.writing) {
		l.sealLocked()
	}
	l.starved, l.suspect, l.spareErr = true, true, errReserve
	l.backOffLocked(time.Since(l.returned) < healthyAfter)
	asked := make(chan struct{})
	l.keeper.asked = asked
	l.room.Broadcast()
	l.mu.Unlock()
	l.keeper.kick()
	select {
	case <-asked:
	case <-time.After(time.Until(limit)):
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keeper.asked = nil
	return l.given != before
}

// give does what GiveUp asks for. A crash leaves segments that count, or whose removal
// is known (forgetBefore), and what they touched in the caller's gaps.
func (k *keeper) give() {
	l := k.l
	l.mu.Lock()
	asked := k.asked
	var spares []*segment
	if asked != nil {
		spares, l.spares = l.spares, nil
		for _, s := range spares {
			if !s.lost.Empty() {
				l.lost.AddSet(&s.lost)
				l.lossy = true
			}
			k.toRemove = append(k.toRemove, s.path)
			k.toRemove = append(k.toRemove, s.surplus...)
		}
		k.toRemove = append(k.toRemove, l.surplus...)
		l.surplus = nil
	}
	l.mu.Unlock()
	if asked == nil {
		return
	}
	for _, s := range spares {
		_ = s.f.Close()
	}
	segs := k.takeAll()
	var touched BlockSet
	l.mu.Lock()
	disks := append([]diskState(nil), l.disks...)
	l.mu.Unlock()
	for _, s := range segs {
		touched.AddSet(s.touchedSet(l, disks))
	}
	if len(segs) > 0 && k.giveUp(segs, &touched) != nil {
		segs = nil
	}
	l.mu.Lock()
	if len(segs) > 0 {
		l.lost.AddSet(&touched)
		l.lossy = true
		l.stats.Reclaimed += int64(len(segs))
	}
	for _, s := range segs {
		k.toRemove = append(k.toRemove, s.path)
	}
	if len(segs)+len(spares) > 0 {
		l.given++
	}
	l.mu.Unlock()
	k.remove()
	close(asked)
	l.mu.Lock()
	if k.asked == asked {
		k.asked = nil
	}
	l.mu.Unlock()
}

// takeAll takes the segments out of the log that may be given up, after a moment in which
// those become so that are needed still.
func (k *keeper) takeAll() []*segment {
	var segs []*segment
	for end := time.Now().Add(giveUpWait); ; time.Sleep(giveUpTick) {
		k.seal()
		k.clearBroken()
		s, err := k.reclaimable(true)
		for s != nil && err == nil && s.f == nil {
			segs = append(segs, s)
			s, err = k.reclaimable(true)
		}
		k.l.mu.Lock()
		done := len(k.l.sealed) == 0 || k.l.opt.Quota == 0 || k.l.closed
		k.l.mu.Unlock()
		if done || time.Now().After(end) {
			return segs
		}
	}
}
