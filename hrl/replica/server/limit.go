package server

import (
	"context"
	"fmt"
	"sync"
	"time"

	"afterimage/hrl/wire"
)

// sometimes lets something be logged now and then: a host that tries again and
// again must not fill the log.
type sometimes struct {
	mu   sync.Mutex
	said time.Time
	n    int // since then
}

// now counts once, and reports whether to say so, at the most once in every, and
// how often it came since the last time.
func (s *sometimes) now(every time.Duration) (n int, say bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	if !s.said.IsZero() && time.Since(s.said) < every {
		return 0, false
	}
	n, s.n, s.said = s.n, 0, time.Now()
	return n, true
}

// slots bounds what is worked on for each host.
type slots struct {
	mu sync.Mutex
	m  map[string]*hostSlots
}

type hostSlots struct {
	all, pieces chan struct{}
	users       int // guarded by slots.mu
}

// take waits for room for a request of the host. The function it returns gives it
// back.
func (s *slots) take(ctx context.Context, identity string, piece bool, o Options) (release func(), err error) {
	s.mu.Lock()
	if s.m == nil {
		s.m = map[string]*hostSlots{}
	}
	h := s.m[identity]
	if h == nil {
		h = &hostSlots{all: make(chan struct{}, o.MaxRequests), pieces: make(chan struct{}, o.MaxPieces)}
		s.m[identity] = h
	}
	h.users++
	s.mu.Unlock()

	var taken []chan struct{}
	release = func() {
		for _, c := range taken {
			<-c
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(s.m, identity)
		}
	}
	late := time.NewTimer(o.BusyWait)
	defer late.Stop()
	want := []chan struct{}{h.all}
	if piece {
		want = []chan struct{}{h.pieces, h.all} // who waits for a piece's room keeps no request out
	}
	for _, c := range want {
		select {
		case c <- struct{}{}:
			taken = append(taken, c)
		case <-ctx.Done():
			release()
			return nil, ctx.Err()
		case <-late.C:
			release()
			return nil, &wire.Error{
				Code:    wire.CodeBusy,
				Message: fmt.Sprintf("host %s works on as much of %s at a time as it may", o.Name, identity),
				Advice:  "it is tried again by itself",
			}
		}
	}
	return release, nil
}
