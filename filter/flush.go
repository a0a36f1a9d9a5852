package filter

import (
	"slices"
	"sync"

	"afterimage/blockdev"
)

// flusher makes the disk durable for those who ask. A request is answered only
// by a sync that began after it arrived (RULES F2). Several syncs may run at
// once, which on file systems that merge them is faster than waiting for each
// other; beyond that, those who wait share the next one.
type flusher struct {
	sync func() error

	mu      sync.Mutex
	running int
	next    *flushRun // not begun; whoever arrives now may join it
}

type flushRun struct {
	done chan struct{}
	err  error
}

const flushesMax = 4

func (f *flusher) flush() error {
	f.mu.Lock()
	if f.running < flushesMax {
		f.running++
		f.mu.Unlock()
		err := f.sync()
		f.finished()
		return err
	}
	r := f.next
	if r == nil {
		r = &flushRun{done: make(chan struct{})}
		f.next = r
	}
	f.mu.Unlock()
	<-r.done
	return r.err
}

// finished ends one sync and begins the one that was waited for.
func (f *flusher) finished() {
	f.mu.Lock()
	r := f.next
	f.next = nil
	if r == nil {
		f.running--
	}
	f.mu.Unlock()
	if r != nil {
		go func() {
			r.err = f.sync()
			close(r.done)
			f.finished()
		}()
	}
}

// syncOrder makes the outcome of syncs that run at once known to each other.
// Linux reports a failed write-back to one of them alone: another may then
// return without an error before the first has even come back to latch it. So
// a sync's success counts only once all that began before it had ended have
// latched theirs (RULES F1). That one of these may be a FLUSH, and slow, is the
// price for a FUA write; both go to the disk through one descriptor.
type syncOrder struct {
	mu      sync.Mutex
	changed sync.Cond // open has changed; L is mu
	next    uint64
	open    []uint64 // begun and not ended, in order
}

func (s *syncOrder) begin() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next++
	s.open = append(s.open, s.next)
	return s.next
}

// end is called when the sync has returned and its failure, if it failed, is
// latched. It waits for those that may have taken the report of this one's.
// Nobody waits for who waits here.
func (s *syncOrder) end(ticket uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.open, ticket)
	s.open = slices.Delete(s.open, i, i+1)
	s.changed.Broadcast()
	for last := s.next; len(s.open) > 0 && s.open[0] <= last; {
		s.changed.Wait()
	}
}

// syncDisk is one sync of the disk, through the latch.
func (f *Filter) syncDisk() error {
	if err := f.latch.err(); err != nil {
		return err
	}
	begin := blockdev.Monotonic()
	ticket := f.syncs.begin()
	err := blockdev.Flush(f.dev)
	f.stats.Flush.record(blockdev.Monotonic() - begin)
	if isDiskError(err) {
		err = f.syncFailed(err)
	}
	f.syncs.end(ticket)
	if err != nil {
		return err
	}
	// Another sync may have failed meanwhile, and taken the report of an error
	// that concerns this one.
	return f.latch.err()
}
