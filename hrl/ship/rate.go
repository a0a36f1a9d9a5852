package ship

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/time/rate"

	"afterimage/hrl"
)

// How often it is looked how fast the guest writes while gaps are copied, and how long
// it may be faster than the copying before that is worth a warning. Variables for tests.
var (
	rateEvery = 10 * time.Second
	slowAfter = time.Hour
)

// rateMargin is by how much copying has to be faster than the guest.
const rateMargin = 1.1

// A pace is how fast what has to be copied grows, and how fast it gets copied, both in
// bytes of the disk a second.
type pace struct {
	dirty, copied float64
	slow          time.Time // since when dirty has been more; zero: it is not
}

// SetLimit bounds what goes over the line, in bytes a second; 0: no bound. While gaps
// are copied it is exceeded as far as the guest writes faster than that: the copy would
// never end (RULES G4).
func (s *Shipper) SetLimit(bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound = bytes
	s.limitLocked()
}

func (s *Shipper) limitLocked() {
	if s.bound <= 0 {
		s.limit.SetLimit(rate.Inf)
		return
	}
	s.limit.SetLimit(rate.Limit(max(float64(s.bound), s.floor)))
}

// followRate keeps the limit above the rate at which the guest changes the disks, until
// the function is called that it returns.
func (s *Shipper) followRate(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	dirty := false
	go func() {
		defer close(done)
		t := time.NewTicker(rateEvery)
		defer t.Stop()
		at, logged, copied := time.Now(), s.opt.VM.Log().Stats().Bytes, s.copiedBytes()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			log := s.opt.VM.Log()
			cut, err := log.Cut(hrl.CutCrash)
			if err != nil {
				continue // nothing is logged: nothing new is known
			}
			dirty = dirty || !cut.Touched.Empty()
			now, l, c := time.Now(), log.Stats().Bytes, s.copiedBytes()
			// The cut knows blocks, each once; the log bytes, each as often as it was written.
			changed := min(cut.Touched.Bytes(), l-logged)
			spent := now.Sub(at).Seconds()
			s.notePace(float64(changed)/spent, float64(c-copied)/spent)
			at, logged, copied = now, l, c
		}
	}()
	return func() {
		cancel()
		<-done
		s.dirty = s.dirty || dirty
		s.mu.Lock()
		defer s.mu.Unlock()
		s.floor = 0
		s.limitLocked()
	}
}

func (s *Shipper) copiedBytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.copied
}

func (s *Shipper) notePace(dirty, copied float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &s.seen.pace
	p.dirty, p.copied = dirty, copied
	switch {
	case dirty <= copied:
		p.slow = time.Time{}
	case p.slow.IsZero():
		p.slow = time.Now()
	}
	s.floor = dirty * rateMargin
	s.limitLocked()
}

// judge says what is wrong with it, empty: nothing, or it is not known yet.
func (p *pace) judge() string {
	if p.slow.IsZero() || time.Since(p.slow) < slowAfter {
		return ""
	}
	return fmt.Sprintf("the guest changes %.1f MiB/s of its disks and %.1f MiB/s get copied, for %v: the replica cannot catch up",
		p.dirty/(1<<20), p.copied/(1<<20), time.Since(p.slow).Round(time.Second))
}
