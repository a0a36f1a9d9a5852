package shim

import (
	"errors"
	"time"

	"afterimage/filter/hot"
	"afterimage/hrl"
)

// A cooler clears marks of a VM's disks by rule R4: it makes disks, log and gaps
// durable, and then clears what nobody has written since before that. It does so when
// more is hot than there should be, never by the clock, and no write ever waits for it.
type cooler struct {
	v    *VM
	log  *hrl.Log
	kick chan struct{} // capacity 1
	quit chan struct{}
	done chan struct{}
	// old says that marks of a killed process were found: they are forgotten once
	// all that it had written is durable.
	old bool
}

const (
	// coolPause is the least time between two rounds.
	coolPause = time.Second
	// coolRetry is how long a round waits for a log that hangs.
	coolRetry = 5 * time.Second
)

func startCooler(v *VM, log *hrl.Log, old bool) *cooler {
	c := &cooler{v: v, log: log, kick: v.marked, quit: make(chan struct{}), done: make(chan struct{}), old: old}
	v.kickCooler()
	go c.run()
	return c
}

// kickCooler never blocks.
func (v *VM) kickCooler() {
	select {
	case v.marked <- struct{}{}:
	default:
	}
}

// stop ends the cooler and waits for it.
func (c *cooler) stop() {
	close(c.quit)
	<-c.done
}

func (c *cooler) run() {
	defer close(c.done)
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-c.quit:
			return
		case <-c.kick:
		}
		wait := coolPause
		if !c.round() {
			wait = coolRetry
		}
		pause.Reset(wait)
		select {
		case <-c.quit:
			return
		case <-pause.C:
		}
	}
}

// A cooling is a round of one disk.
type cooling struct {
	t     *track
	round hot.Round
}

// round does one round for each disk that wants one; false: it has to be tried again.
func (c *cooler) round() bool {
	var rounds []cooling
	disks := false
	for _, t := range c.v.tracks {
		if t.hot == nil {
			continue
		}
		disks = true
		if r, ok := t.hot.Cooling(); ok {
			rounds = append(rounds, cooling{t, r})
		}
	}
	if !disks || len(rounds) == 0 && !c.old {
		return true
	}
	// All of these begin after the rounds did.
	err := c.durable()
	if errors.Is(err, hrl.ErrUnsettled) || errors.Is(err, hrl.ErrClosed) {
		for _, r := range rounds {
			_ = r.t.hot.GiveUp(r.round)
		}
		c.v.kickCooler()
		return false
	}
	if err != nil {
		c.v.opt.Warn.Warn("marks of hot extents stay, because something cannot be made durable", "why", err)
	}
	for _, r := range rounds {
		if cerr := r.t.hot.Cleared(r.round, err == nil); cerr != nil {
			c.v.opt.Warn.Warn("marks of hot extents cannot be cleared", "why", cerr)
		}
	}
	if err != nil {
		c.freeze()
		return true
	}
	if c.old {
		c.old = false
		for _, t := range c.v.tracks {
			if t.hot != nil {
				t.hot.Forget()
			}
		}
		c.v.kickCooler()
	}
	return true
}

func (c *cooler) freeze() {
	for _, t := range c.v.tracks {
		if t.hot != nil {
			t.hot.Freeze()
		}
	}
}

// durable makes everything durable that was written, logged or stored as a gap so far.
func (c *cooler) durable() error {
	for _, d := range c.v.disks {
		if err := d.Flush(); err != nil {
			return err
		}
	}
	err := c.log.Sync()
	if err != nil && !errors.Is(err, hrl.ErrUnsettled) && !errors.Is(err, hrl.ErrClosed) {
		// What the log's files hold is unknown now (RULES C4).
		c.v.gap(c.log.Unsynced())
	}
	return errors.Join(err, c.v.syncGaps())
}
