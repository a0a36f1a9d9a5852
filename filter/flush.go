package filter

import (
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

// syncDisk is one sync of the disk, through the latch.
func (f *Filter) syncDisk() error {
	if err := f.latch.err(); err != nil {
		return err
	}
	begin := blockdev.Monotonic()
	err := blockdev.Flush(f.dev)
	f.stats.Flush.record(blockdev.Monotonic() - begin)
	if err != nil && !isDiskError(err) {
		return err
	}
	if err != nil {
		return f.latch.set(f.info.Name, err)
	}
	// Another sync may have failed meanwhile, and taken the report of an error
	// that concerns this one (RULES F1).
	return f.latch.err()
}
