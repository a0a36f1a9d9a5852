package hrl

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The keeper is a log's one background goroutine. It does everything that
// would make an append wait: making and prewriting spares, writing seals,
// starting write-back. If the log's disk hangs, the keeper hangs with it, and
// appends find no spare and become gaps: that is all that happens.
type keeper struct {
	l        *Log
	wakeup   chan struct{} // capacity 1
	quit     chan struct{}
	done     chan struct{}
	watchers sync.WaitGroup // the watchdog

	toSeal   []*segment    // guarded by Log.mu
	sealing  bool          // guarded by Log.mu: a seal is being written
	asked    chan struct{} // guarded by Log.mu: GiveUp waits until it is closed; or nil
	toRemove []string      // guarded by Log.mu: segments that nothing needs any more
	ended    bool          // guarded by Log.mu: it touches no file any more
	names    uint64        // of segment files; the keeper's own
	pause    time.Duration // until a spare is tried to be made again; the keeper's own
	clean    bool          // set before quit is closed: sync everything
	err      error         // of the syncs, valid when done is closed
}

const (
	// writeBehindStep is how much is appended between two calls that start
	// write-back, so that an unsynced log neither fills the page cache with
	// dirty pages nor makes the disk idle (RULES C7).
	writeBehindStep = 8 << 20
	// retryMin and retryMax bound how long the keeper waits until it tries again what
	// failed: twice as long each time. What works for healthyAfter is taken to be
	// well again.
	retryMin     = time.Second
	retryMax     = 30 * time.Second
	healthyAfter = time.Minute
)

// errNeeded says that a segment at the quota may not be given up yet.
var errNeeded = errors.New("still needed")

// stopLimit is how long Close waits for a log disk that does not answer; tests
// do not wait that long.
var stopLimit = 10 * time.Second

const segmentSuffix = ".hrl"

func (k *keeper) start(l *Log) {
	k.l = l
	k.wakeup = make(chan struct{}, 1)
	k.quit = make(chan struct{})
	k.done = make(chan struct{})
	k.kick()
	go k.run()
}

// kick wakes the keeper. It never blocks.
func (k *keeper) kick() {
	select {
	case k.wakeup <- struct{}{}:
	default:
	}
}

// stop ends the keeper and the watchdog. With clean it returns when all
// segments are sealed and durable, or an error.
func (k *keeper) stop(clean bool) error {
	k.clean = clean
	close(k.quit)
	k.watchers.Wait()
	limit := time.NewTimer(stopLimit)
	defer limit.Stop()
	select {
	case <-k.done:
		return k.err
	case <-limit.C:
		return errors.New("the log's disk does not answer")
	}
}

func (k *keeper) run() {
	defer func() {
		k.l.mu.Lock()
		k.ended = true
		k.l.mu.Unlock()
		close(k.done)
		_ = k.l.release()
	}()
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-k.wakeup:
		case <-retry.C:
			k.pause = min(2*k.pause, retryMax)
		case <-k.quit:
			if k.clean {
				k.err = k.finish()
			}
			// Not left to a crash: a file that should be gone, between others
			// that are, looks like a segment that is missing.
			k.remove()
			return
		}
		k.seal()
		k.clearBroken()
		k.remove()
		k.give()
		k.release()
		k.noteBegun()
		k.writeBehind()
		err := k.spare()
		if err == nil || errors.Is(err, errNeeded) {
			k.pause = 0
		}
		k.pause = max(k.pause, retryMin)
		if err != nil {
			retry.Reset(k.untilRetry())
		}
	}
}

// untilRetry is how long to wait before spares are tried again.
func (k *keeper) untilRetry() time.Duration {
	k.l.mu.Lock()
	defer k.l.mu.Unlock()
	if wait := time.Until(k.l.retryAt); k.l.suspect && wait > 0 {
		return wait
	}
	return k.pause
}

// backOffLocked refuses appends for a while: longer each time, if it is again that they
// fail. So a log that fails, or hangs, or is too slow whenever it is used costs a guest's
// write its time now and then, and seldom.
func (l *Log) backOffLocked(again bool) {
	if again && l.pause > 0 {
		l.pause = min(2*l.pause, retryMax)
	} else {
		l.pause = retryMin
	}
	l.retryAt = time.Now().Add(l.pause)
}

// probe finds out whether the log's disk takes writes, in the time that an append has:
// it writes the last page of a spare as it is. So what a disk that still hangs holds up
// is the keeper, and no guest.
func (k *keeper) probe(s *segment) error {
	begin := time.Now()
	page := make([]byte, footerBytes)
	if _, err := s.f.ReadAt(page, s.size-footerBytes); err != nil {
		return err
	}
	if _, err := s.f.WriteAt(page, s.size-footerBytes); err != nil {
		return err
	}
	if limit := k.l.opt.AppendLimit; limit > 0 && time.Since(begin) > limit {
		return ErrLate
	}
	return nil
}

// comeBack lets a log that has failed take appends again, if there is a spare and it can
// be written.
func (k *keeper) comeBack() {
	l := k.l
	l.mu.Lock()
	if !l.suspect || time.Until(l.retryAt) > 0 || len(l.spares) == 0 || l.closed {
		l.mu.Unlock()
		return
	}
	s := l.spares[0] // nobody takes it while appends are refused
	l.mu.Unlock()
	err := k.probe(s)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.backOffLocked(true)
		l.spareErr = fmt.Errorf("the log still fails: %w", err)
		return
	}
	l.suspect, l.spareErr, l.returned = false, nil, time.Now()
	l.room.Broadcast()
}

// noteBegun notes in LOG which segment is the newest, so that the next Open knows
// if it is missing. Not synced: after a power cut nobody relies on the log anyway.
func (k *keeper) noteBegun() {
	l := k.l
	l.mu.Lock()
	begun := l.begun
	l.mu.Unlock()
	l.metaMu.Lock()
	defer l.metaMu.Unlock()
	if begun > l.meta.begun {
		l.meta.begun = begun
		_ = noteMeta(l.metaFile, &l.meta) // if it fails, less is noticed
	}
}

// seal writes the seals that are due and closes the segments.
func (k *keeper) seal() {
	l := k.l
	for {
		l.mu.Lock()
		if len(k.toSeal) == 0 {
			l.mu.Unlock()
			return
		}
		s := k.toSeal[0]
		k.toSeal = k.toSeal[:copy(k.toSeal, k.toSeal[1:])]
		k.sealing = true
		l.mu.Unlock()
		// Without its seal a segment is still whole: it takes a scan to
		// find its end. The error will come again at the sync in Close.
		_ = s.writeSeal()
		s.f.WriteBehind(0, s.size, true)
		l.mu.Lock()
		k.sealing = false
		l.mu.Unlock()
		k.closeSealed(s)
	}
}

// closeSealed closes the file of a sealed segment, unless an append may still write it.
func (k *keeper) closeSealed(s *segment) {
	k.l.mu.Lock()
	f := s.f
	if s.outstanding > 0 {
		f = nil
	} else {
		s.f = nil
	}
	k.l.mu.Unlock()
	if f != nil {
		_ = f.Close() // nothing to learn from it that the sync does not say
	}
}

// writeBehind starts write-back of what was appended since the last time.
func (k *keeper) writeBehind() {
	l := k.l
	l.mu.Lock()
	s := l.tail
	var off, n int64
	if s != nil && s.end-s.behind >= writeBehindStep {
		off, n = s.behind, s.end-s.behind
		s.behind = s.end
	}
	l.mu.Unlock()
	if n > 0 {
		s.f.WriteBehind(off, n, false)
	}
}

// clearBroken seals and closes the segments that failed appends ended, and
// removes those of them that never held anything.
func (k *keeper) clearBroken() {
	l := k.l
	for {
		var broken *segment
		l.mu.Lock()
		for i, s := range l.sealed {
			if s.broken && s.f != nil && s.outstanding == 0 {
				broken = s
				if s.empty {
					l.sealed = append(l.sealed[:i], l.sealed[i+1:]...)
				}
				break
			}
		}
		l.mu.Unlock()
		if broken == nil {
			return
		}
		if !broken.empty {
			_ = broken.writeSeal() // as in seal
		}
		k.closeSealed(broken)
		if broken.empty {
			// Should its header have reached the file after all, its
			// frames are true and counted as lost as well: no harm.
			_ = l.fs.Remove(broken.path)
		}
	}
}

// remove removes the files of segments that were given up. One that stays is
// found by the next Open, and what it says is true.
func (k *keeper) remove() {
	l := k.l
	l.mu.Lock()
	paths := l.keeper.toRemove
	l.keeper.toRemove = nil
	l.mu.Unlock()
	for _, p := range paths {
		_ = l.fs.Remove(p)
	}
}

// spare makes spares until there are enough. After a failed append it first
// lets a while pass, in which appends are refused at once.
func (k *keeper) spare() error {
	l := k.l
	for {
		k.comeBack()
		l.mu.Lock()
		wait := l.suspect && time.Until(l.retryAt) > 0
		if l.spareErr != nil && !l.suspect && len(l.spares) > 0 {
			l.spareErr = nil
			l.room.Broadcast()
		}
		enough := len(l.spares) >= l.opt.Spares || l.closed
		err := l.spareErr
		l.mu.Unlock()
		if enough || wait {
			return err
		}
		// A spare may take long: seals must not wait for all of them.
		k.seal()
		k.writeBehind()
		s, err := k.reclaim(false)
		if len(s) == 0 && err == nil {
			s, err = k.grow()
		}
		l.mu.Lock()
		switch {
		case err == nil:
			l.spares = append(l.spares, s...)
			if !l.suspect {
				l.spareErr = nil
			}
		case len(l.spares) == 0:
			l.spareErr = err // else there still is one to use
		}
		l.room.Broadcast()
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// errReserve says that what room there is belongs to the disks.
var errReserve = fmt.Errorf("the room that is left is kept for the disks: %w", syscall.ENOSPC)

// grow makes a new segment; where there is no room for one, the oldest is used anew.
func (k *keeper) grow() ([]*segment, error) {
	err := error(errReserve)
	if k.mayGrow() {
		var s *segment
		if s, err = k.make(); err == nil {
			return []*segment{s}, nil
		}
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		if old, rerr := k.reclaim(true); len(old) > 0 || rerr != nil {
			return old, rerr
		}
	}
	return nil, err
}

// mayGrow says whether one more segment leaves the disks their room (RULES F5). The
// fewest that a log works with it has anyway, until a disk has missed that room.
func (k *keeper) mayGrow() bool {
	l := k.l
	room := l.opt.Room == nil || l.opt.Room(l.opt.SegmentBytes)
	l.mu.Lock()
	defer l.mu.Unlock()
	if room {
		l.starved = false
		return true
	}
	n := len(l.sealed) + len(l.spares)
	if l.tail != nil {
		n++
	}
	return !l.starved && n <= l.opt.Spares
}

// make makes a new segment file: allocated, and with Prewrite written once, so
// that an append changes no metadata of the file system. A crash leaves a
// file without a header, which the next Open takes up as a spare or removes.
func (k *keeper) make() (*segment, error) {
	l := k.l
	names, err := l.fs.ReadDir(l.dir)
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		var i uint64
		if _, err := fmt.Sscanf(n, "%016x"+segmentSuffix, &i); err == nil && strings.HasSuffix(n, segmentSuffix) {
			k.names = max(k.names, i)
		}
	}
	k.names++
	s := &segment{path: filepath.Join(l.dir, fmt.Sprintf("%016x%s", k.names, segmentSuffix)), size: l.opt.SegmentBytes}
	if s.f, err = l.fs.Create(s.path); err != nil {
		return nil, err
	}
	err = s.f.Allocate(s.size)
	if err == nil && l.opt.Prewrite {
		err = prewrite(s.f, s.size)
	}
	if err != nil {
		s.f.Close()
		_ = l.fs.Remove(s.path) // else the next Open removes it
		return nil, err
	}
	return s, nil
}

// prewriteChunk is how much is prewritten in one call.
const prewriteChunk = 1 << 20

func prewrite(f File, size int64) error {
	zeroes := make([]byte, prewriteChunk)
	for off := int64(0); off < size; off += prewriteChunk {
		if _, err := f.WriteAt(zeroes[:min(prewriteChunk, size-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// finish makes everything durable that this incarnation wrote.
func (k *keeper) finish() error {
	k.seal()
	k.clearBroken()
	k.remove()
	l := k.l
	l.mu.Lock()
	sealed := append([]*segment(nil), l.sealed...)
	l.mu.Unlock()
	for _, s := range sealed {
		if !s.unsynced {
			continue
		}
		l.mu.Lock()
		outstanding := s.outstanding
		l.mu.Unlock()
		if outstanding > 0 {
			return fmt.Errorf("segment %s: an append has not returned", s.path)
		}
		f := s.f
		if f == nil {
			var err error
			if f, err = l.fs.Edit(s.path); err != nil {
				return err
			}
		}
		err := f.Sync()
		if s.f == nil {
			f.Close()
		}
		if err != nil {
			return err
		}
		s.unsynced = false
	}
	return l.fs.SyncDir(l.dir)
}
