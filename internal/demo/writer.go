package demo

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
)

// placeOf is the block of the area that write n goes to: most go to a hot tenth of
// it, as a guest's do. The same for every run.
func placeOf(n int64) int64 {
	r := rand.New(rand.NewPCG(uint64(n), 20))
	if r.IntN(10) < 8 {
		return r.Int64N(areaBlocks / 10)
	}
	return r.Int64N(areaBlocks)
}

// stamp fills a block with the number of its write.
func stamp(b []byte, n int64) {
	for i := 0; i < len(b); i += 16 {
		binary.LittleEndian.PutUint64(b[i:], uint64(n))
		binary.LittleEndian.PutUint64(b[i+8:], uint64(i)^uint64(n)*0x9e3779b97f4a7c15)
	}
}

// A writer is the guest. It numbers its writes from 1 and has one in flight.
type writer struct {
	uri    string
	cancel context.CancelFunc
	done   chan struct{} // nil: never started

	begins atomic.Int64 // the number of the newest write that was begun
	mu     sync.Mutex
	times  []time.Time // times[n-1]: when write n was acknowledged
	err    error
	ending bool // an error is what is to be expected
}

func newWriter(uri string) *writer { return &writer{uri: uri} }

// start opens the disk and begins to write.
func (w *writer) start(ctx context.Context) error {
	dev, err := nbd.Dial(ctx, w.uri, nbd.Options{})
	if err != nil {
		return err
	}
	ctx, w.cancel = context.WithCancel(ctx)
	w.done = make(chan struct{})
	go func() {
		defer close(w.done)
		defer dev.Close()
		w.run(ctx, dev)
	}()
	return nil
}

func (w *writer) run(ctx context.Context, dev blockdev.Device) {
	buf := make([]byte, blockBytes)
	for n := int64(1); ctx.Err() == nil; n++ {
		stamp(buf, n)
		w.begins.Store(n)
		err := blockdev.WriteAt(dev, buf, areaOff+placeOf(n)*blockBytes)
		w.mu.Lock()
		if err != nil {
			w.err = err
			w.mu.Unlock()
			return
		}
		w.times = append(w.times, time.Now())
		w.mu.Unlock()
	}
}

// stop ends the writing and waits for it. The host may be gone by then.
func (w *writer) stop() {
	if w.done == nil {
		return
	}
	w.mu.Lock()
	w.ending = true
	w.mu.Unlock()
	w.cancel()
	<-w.done
}

// failed is why the guest could not write, if that was not to be expected.
func (w *writer) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ending {
		return nil
	}
	return w.err
}

func (w *writer) begun() int64 { return w.begins.Load() }

// acked is how many writes were acknowledged.
func (w *writer) acked() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int64(len(w.times))
}

// ackedBefore is how many writes had been acknowledged by then.
func (w *writer) ackedBefore(then time.Time) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	// Wall clock with wall clock: then comes from another process.
	return int64(sort.Search(len(w.times), func(i int) bool { return !w.times[i].Round(0).Before(then) }))
}
