package main

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
)

// progress shows a person how far a long command is: a line on the terminal
// with rate and time left, from its third second on, wiped at the end. Where
// stderr is no terminal it shows nothing.
type progress struct {
	w     io.Writer
	what  string
	total int64 // bytes; 0: not known
	begun time.Time
	done  atomic.Int64
	stop  chan struct{}
	ended chan struct{} // closed by the goroutine that prints
}

const progressAfter = 2 * time.Second

// startProgress begins to count towards total bytes. finish must be called.
func (a *app) startProgress(what string, total int64) *progress {
	p := &progress{
		w: a.stderr, what: what, total: total, begun: time.Now(),
		stop: make(chan struct{}), ended: make(chan struct{}),
	}
	if !isTerminal(a.stderr) {
		close(p.ended)
		return p
	}
	go p.show()
	return p
}

// add counts n more bytes as done, from any goroutine.
func (p *progress) add(n int64) { p.done.Add(n) }

// finish ends the showing and waits for it.
func (p *progress) finish() {
	close(p.stop)
	<-p.ended
}

func (p *progress) show() {
	defer close(p.ended)
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	const wipe = "\r\x1b[K" // to the line's beginning, and erase it
	shown := false
	for {
		select {
		case <-p.stop:
			if shown {
				fmt.Fprint(p.w, wipe)
			}
			return
		case <-tick.C:
			if spent := time.Since(p.begun); spent >= progressAfter {
				fmt.Fprint(p.w, wipe, p.line(p.done.Load(), spent))
				shown = true
			}
		}
	}
}

// line is what is shown after done bytes in the time spent.
func (p *progress) line(done int64, spent time.Duration) string {
	rate := float64(done) / spent.Seconds()
	s := p.what + " " + humanize.IBytes(uint64(done))
	if p.total > 0 {
		s += " of " + humanize.IBytes(uint64(p.total))
	}
	s += ", " + humanize.IBytes(uint64(rate)) + "/s"
	if rate > 0 && done < p.total {
		left := time.Duration(float64(p.total-done) / rate * float64(time.Second))
		s += fmt.Sprintf(", %v left", left.Round(time.Second))
	}
	return s
}
