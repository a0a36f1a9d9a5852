package blockdev

import (
	"errors"
	"fmt"
	"sync"
)

// A Completer owns requests that it has submitted to a Queue.
type Completer interface {
	// Complete is called with finished requests of this owner, each request
	// once, from any goroutine. It may be given several at once so that
	// their replies can leave together, and keeps neither the slice nor, past
	// its return, any claim that the Queue still holds the requests: they are
	// the owner's again. It must not block on anything but the owner's own
	// client.
	Complete(reqs []*Request)
	// Gone reports that nobody waits for the requests any more (the client's
	// connection is dead): what has not begun must not begin. See RULES A6.
	Gone() bool
}

// A Queue takes requests in batches and completes each on its own.
type Queue interface {
	Info() Info
	Size() int64
	Extents(off, length int64, visit func(Run) bool) error
	// Submit takes a batch of requests, all of one Owner, at most
	// [BatchMax] of them, and sees to it that each is completed exactly once.
	// Those that need not wait are done and completed on the caller's
	// goroutine before Submit returns, the others later on another. The
	// slice is the caller's again when Submit returns.
	Submit(reqs []*Request)
	// Drain returns when every request submitted before the call is
	// completed.
	Drain()
}

// BatchMax is the most requests that a Submit may take. Replies leave once a
// batch, so it is also how far the client lags behind the server: larger
// batches save system calls, smaller ones let both sides work at once.
const BatchMax = 16

// ErrGone is what a request fails with that was dropped because its owner had
// gone, or because it had waited too long to be begun.
var ErrGone = fmt.Errorf("dropped before it began: nobody waits for it any more")

// Pool is the Queue over a bare Device: reads that need not wait are done in
// place, everything else by one of a bounded number of workers. It orders
// nothing; requests that overlap and are in flight together may mix.
type Pool struct {
	dev     Device
	workers Workers
}

// NewPool returns a Queue over dev with at most n workers.
func NewPool(dev Device, n int) *Pool {
	return &Pool{dev: dev, workers: Workers{Max: n}}
}

// Info implements Queue.
func (p *Pool) Info() Info { return p.dev.Info() }

// Size implements Queue.
func (p *Pool) Size() int64 { return p.dev.Size() }

// Extents implements Queue.
func (p *Pool) Extents(off, length int64, visit func(Run) bool) error {
	return p.dev.Extents(off, length, visit)
}

// Submit implements Queue.
func (p *Pool) Submit(reqs []*Request) {
	slow := p.dev.Info().Slow
	for _, r := range reqs {
		one := [1]*Request{r}
		if r.Op == OpRead && !slow {
			r.Flags |= FlagNoWait
			p.dev.Do(one[:])
			r.Flags &^= FlagNoWait
			if !errors.Is(r.Err, ErrWouldBlock) {
				r.Owner.Complete(one[:])
				continue
			}
		}
		p.workers.Go(func() {
			if r.Owner.Gone() {
				r.Err = ErrGone
			} else {
				p.dev.Do(one[:])
			}
			r.Owner.Complete(one[:])
		})
	}
}

// Drain implements Queue.
func (p *Pool) Drain() { p.workers.Wait() }

// Workers runs functions on at most Max goroutines, which end when there is
// nothing left to do. Its zero value with Max set is ready. What it is given
// while all are busy waits in line, so the caller bounds how much it gives.
type Workers struct {
	Max int

	mu      sync.Mutex
	idle    sync.Cond // signalled when running falls to zero; L is set by Wait
	line    []func()
	running int
}

// Go runs f soon.
func (w *Workers) Go(f func()) {
	w.mu.Lock()
	if w.running >= w.Max {
		w.line = append(w.line, f)
		w.mu.Unlock()
		return
	}
	w.running++
	w.mu.Unlock()
	go w.run(f)
}

func (w *Workers) run(f func()) {
	for {
		f()
		w.mu.Lock()
		if len(w.line) == 0 {
			w.running--
			if w.running == 0 && w.idle.L != nil {
				w.idle.Broadcast()
			}
			w.mu.Unlock()
			return
		}
		f = w.line[0]
		w.line[0] = nil
		w.line = w.line[1:]
		w.mu.Unlock()
	}
}

// Wait returns when everything given to Go before has returned.
func (w *Workers) Wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.idle.L = &w.mu
	for w.running > 0 {
		w.idle.Wait()
	}
}
