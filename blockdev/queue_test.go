package blockdev_test

import (
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/internal/testenv"
)

// owner counts how often each of its requests is completed.
type owner struct {
	mu       sync.Mutex
	finished map[*blockdev.Request]int
	gone     atomic.Bool
}

func (o *owner) Complete(reqs []*blockdev.Request) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, r := range reqs {
		o.finished[r]++
	}
}

func (o *owner) Gone() bool { return o.gone.Load() }

func (o *owner) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.finished)
}

func newOwner() *owner { return &owner{finished: make(map[*blockdev.Request]int)} }

// noNoWait is a disk of which every read has to wait.
type noNoWait struct{ blockdev.Device }

func (d noNoWait) Do(reqs []*blockdev.Request) {
	for _, r := range reqs {
		if r.Flags&blockdev.FlagNoWait != 0 {
			r.Err = blockdev.ErrWouldBlock
			continue
		}
		d.Device.Do([]*blockdev.Request{r})
	}
}

func TestPoolCompletesEachOnce(t *testing.T) {
	for name, dev := range map[string]blockdev.Device{
		"memory":          blockdev.NewMem(testSize),
		"file":            newFile(t, t.TempDir(), blockdev.FileOptions{}),
		"O_DIRECT":        newFile(t, t.TempDir(), blockdev.FileOptions{Direct: true}),
		"reads that wait": noNoWait{blockdev.NewMem(testSize)},
	} {
		t.Run(name, func(t *testing.T) {
			defer dev.Close()
			p := blockdev.NewPool(dev, 4)
			var wg sync.WaitGroup
			for w := range 8 {
				wg.Go(func() {
					o := newOwner()
					var all []*blockdev.Request
					for round := range 20 {
						var reqs []*blockdev.Request
						for i := range blockdev.BatchMax {
							op := blockdev.OpWrite
							if round%2 == 1 {
								op = blockdev.OpRead
							}
							reqs = append(reqs, &blockdev.Request{
								Op: op, Off: int64(w*blockdev.BatchMax+i) * 4096, Len: 4096, Buf: blockdev.AlignedBuf(4096), Owner: o,
							})
							if op == blockdev.OpWrite {
								reqs[i].Buf[0] = byte(round + w)
							}
						}
						all = append(all, reqs...)
						p.Submit(reqs)
						testenv.Until(t, "all completed", func() bool { return o.count() == len(all) })
						for _, r := range reqs {
							if r.Err != nil {
								t.Errorf("%s at %d: %v", r.Op, r.Off, r.Err)
							} else if r.Op == blockdev.OpRead && r.Buf[0] != byte(round-1+w) {
								t.Errorf("read at %d: wrong bytes", r.Off)
							}
							if r.Flags != 0 {
								t.Errorf("%s comes back with flags %#x", r.Op, r.Flags)
							}
						}
					}
					for _, r := range all {
						if n := o.finished[r]; n != 1 {
							t.Errorf("a request was completed %d times", n)
						}
					}
				})
			}
			wg.Wait()
			p.Drain()
		})
	}
}

// TestPoolSlowBesideFast: a request that hangs holds up neither those after it
// nor, once its owner has gone, keeps what had not begun from being dropped.
func TestPoolSlowBesideFast(t *testing.T) {
	dev := faultdev.New(blockdev.NewMem(testSize))
	dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Times: 2, Hang: true})
	p := blockdev.NewPool(dev, 2)
	o := newOwner()
	write := func(i int) *blockdev.Request {
		return &blockdev.Request{Op: blockdev.OpWrite, Off: int64(i) * 4096, Len: 4096, Buf: make([]byte, 4096), Owner: o}
	}
	hung := []*blockdev.Request{write(0), write(1)}
	p.Submit(hung)
	testenv.Until(t, "two hang", func() bool { return dev.Hanging() == 2 })
	read := &blockdev.Request{Op: blockdev.OpRead, Len: 4096, Buf: make([]byte, 4096), Owner: o}
	p.Submit([]*blockdev.Request{read})
	if o.count() != 1 || read.Err != nil {
		t.Fatalf("a read that need not wait waits: %d completed, %v", o.count(), read.Err)
	}
	waiting := write(2) // both workers hang
	p.Submit([]*blockdev.Request{waiting})
	o.gone.Store(true)
	dev.Release()
	p.Drain()
	if o.count() != 4 {
		t.Errorf("%d of 4 completed when Drain returned", o.count())
	}
	for _, r := range hung {
		if r.Err != nil {
			t.Errorf("a write that had begun: %v", r.Err)
		}
	}
	if !errors.Is(waiting.Err, blockdev.ErrGone) {
		t.Errorf("a write that had not begun when its owner went: got %v, want ErrGone", waiting.Err)
	}
}

func TestWorkers(t *testing.T) {
	w := blockdev.Workers{Max: 3}
	w.Wait() // for nothing
	var running, most, done atomic.Int64
	for range 2 { // they end and begin again
		for range 200 {
			w.Go(func() {
				n := running.Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				runtime.Gosched()
				running.Add(-1)
				done.Add(1)
			})
		}
		w.Wait()
	}
	if done.Load() != 400 || running.Load() != 0 {
		t.Errorf("%d of 400 done, %d running after Wait", done.Load(), running.Load())
	}
	if most.Load() > 3 {
		t.Errorf("%d at once, at most 3 allowed", most.Load())
	}
}
