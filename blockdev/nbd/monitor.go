package nbd

import "time"

const (
	// tick is how often the monitor looks while anything happens.
	tick = 5 * time.Millisecond
	// hungTicks is after how many looks at the same Submit its loop is taken
	// away: it has been in there for at least two ticks then.
	hungTicks = 3
	// idleTicks is after how many looks without any Submit the monitor sleeps.
	idleTicks = 40
	// maxTaken is how many goroutines of one connection may be left in a
	// Submit that hangs. One more, and the connection waits.
	maxTaken = 64
)

// The monitor is one goroutine per server, from the first connection to the
// last. It takes the loop from a goroutine that has been in Submit for too long.
// A batch pays for that with a store and a compare-and-swap.
//
// conn.loopWord is odd while the loop's owner is in Submit. The owner makes it
// odd, and even again by a compare-and-swap when it is back; the monitor makes
// it even by a compare-and-swap of the odd value it has seen for too long. One
// of the two succeeds, and as the word only grows it is the same Submit. Whoever
// succeeds decides who owns the loop from then on: the one that came back, or a
// fresh goroutine, and then the one that comes back ends.

// wakeMonitor is called before each Submit.
func (s *Server) wakeMonitor() {
	if s.asleep.Load() && s.asleep.CompareAndSwap(true, false) {
		select {
		case s.wake <- struct{}{}:
		default: // of an earlier sleep, and as good
		}
	}
}

// monitor runs until done is closed.
func (s *Server) monitor(done <-chan struct{}) {
	t := time.NewTicker(tick)
	defer t.Stop()
	s.asleep.Store(false)
	idle := 0
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		if s.look() {
			idle = 0
			continue
		}
		if idle++; idle < idleTicks {
			continue
		}
		t.Stop()
		s.asleep.Store(true)
		// A Submit that began before asleep was seen is looked at once more.
		if s.look() {
			s.wakeMonitor()
		}
		select {
		case <-done:
			return
		case <-s.wake:
		}
		idle = 0
		t.Reset(tick)
	}
}

// look visits all connections and reports whether any has been in Submit since
// the last time.
func (s *Server) look() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	busy := false
	for c, w := range s.watched {
		word := c.loopWord.Load()
		if word != w.word {
			*w = watch{word: word, ticks: 1}
			busy = true
			continue
		}
		if word%2 == 0 {
			continue
		}
		busy = true
		w.ticks++
		if w.ticks < hungTicks || c.taken.Load() >= maxTaken {
			continue
		}
		c.taken.Add(1)
		if !c.loopWord.CompareAndSwap(word, word+1) {
			c.taken.Add(-1)
			continue
		}
		c.goroutines.Go(c.loop)
	}
	return busy
}

// watch is what the monitor has seen of a connection.
type watch struct {
	word  uint64
	ticks int // looks at the same word
}

// watch puts the connection under the monitor's eye.
func (s *Server) watch(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watched[c] = &watch{}
}

func (s *Server) unwatch(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.watched, c)
}
