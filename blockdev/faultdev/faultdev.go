// Package faultdev has disks with every fault that a disk can have. It is a
// fake, for what real parts cannot be made to do on demand: fail the k-th
// request, fail a sync once and then claim success, hang, tear a write, lose at
// a power cut what was not yet durable. What real parts can do is tested with
// them.
//
//	faultdev.go  Device: faults by rule, over any disk
//	volatile.go  Volatile: a disk with a write cache, and what a power cut leaves
//
// Put a Volatile over a Device, not beneath, so that a sync that fails is seen
// by the cache.
package faultdev

import (
	"fmt"
	"sync"
	"syscall"
	"time"

	"afterimage/blockdev"
)

// A Rule says which requests fail, and how. A request is subject to the first
// rule that matches it; one without Err, Hang or Delay does nothing.
type Rule struct {
	Op     blockdev.Op     // zero: any
	Within blockdev.Extent // only requests that overlap it; empty: any, flushes too
	Skip   int             // let that many matching requests pass first
	Times  int             // then strike that many; 0: all

	// Err is what the request fails with.
	Err error
	// Partial is how many bytes from the beginning of a write, trim or zeroing
	// are done before it fails with Err; a multiple of the block size.
	Partial int64
	// Delay is waited before the request is done or fails.
	Delay time.Duration
	// Hang keeps the request until Release or Close is called. Then it fails
	// with Err, or is done if there is none.
	Hang bool
}

func (r *Rule) matches(req *blockdev.Request) bool {
	if r.Op != 0 && r.Op != req.Op {
		return false
	}
	if r.Within.Len == 0 {
		return true
	}
	return req.Op != blockdev.OpFlush && req.Extent().Overlaps(r.Within)
}

// Device is a disk whose requests fail by rule. Without rules it is the disk
// beneath.
type Device struct {
	blockdev.Device

	mu      sync.Mutex
	rules   []*Rule
	fired   int
	hanging int
	release chan struct{} // closed to let go what hangs
}

// New returns a disk over dev that has no faults yet.
func New(dev blockdev.Device) *Device {
	return &Device{Device: dev, release: make(chan struct{})}
}

// FailAt returns a disk over dev whose k-th request, counted from 1, fails with
// EIO and without touching anything. If k is larger than the number of requests
// that come, Fired stays false.
func FailAt(k int, dev blockdev.Device) *Device {
	d := New(dev)
	d.Add(Rule{Skip: k - 1, Times: 1, Err: syscall.EIO})
	return d
}

// Add adds a rule after those there are.
func (d *Device) Add(r Rule) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules = append(d.rules, &r)
}

// Reset removes all rules. What hangs goes on hanging.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules = nil
}

// Fired reports whether any rule has struck.
func (d *Device) Fired() bool { return d.Strikes() > 0 }

// Strikes is how many requests a rule has struck.
func (d *Device) Strikes() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.fired
}

// Hanging is how many requests hang now.
func (d *Device) Hanging() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hanging
}

// Release lets go what hangs now.
func (d *Device) Release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.release)
	d.release = make(chan struct{})
}

// Close implements blockdev.Device.
func (d *Device) Close() error {
	d.Release()
	return d.Device.Close()
}

// Do implements blockdev.Device. What no rule strikes is done as one batch
// first, so that a request that hangs holds up none but the caller.
func (d *Device) Do(reqs []*blockdev.Request) {
	rules, struck := d.match(reqs)
	if !struck {
		d.Device.Do(reqs)
		return
	}
	pass := make([]*blockdev.Request, 0, len(reqs))
	for i, r := range reqs {
		if rules[i] == nil {
			pass = append(pass, r)
		}
	}
	d.Device.Do(pass)
	for i, r := range reqs {
		if rules[i] != nil {
			d.strike(rules[i], r)
		}
	}
}

// match finds the rule for each request and counts.
func (d *Device) match(reqs []*blockdev.Request) (rules []*Rule, struck bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.rules) == 0 {
		return nil, false
	}
	rules = make([]*Rule, len(reqs))
	for i, r := range reqs {
		for _, rule := range d.rules {
			if !rule.matches(r) {
				continue
			}
			if rule.Skip > 0 {
				rule.Skip--
				continue
			}
			if rule.Times < 0 {
				continue // used up
			}
			if rule.Times > 0 {
				if rule.Times--; rule.Times == 0 {
					rule.Times = -1
				}
			}
			rules[i], struck = rule, true
			d.fired++
			break
		}
	}
	return rules, struck
}

// strike does to the request what the rule says. Of the rule only what never
// changes is read here.
func (d *Device) strike(rule *Rule, r *blockdev.Request) {
	if rule.Delay > 0 {
		time.Sleep(rule.Delay)
	}
	if rule.Hang {
		d.mu.Lock()
		d.hanging++
		release := d.release
		d.mu.Unlock()
		<-release
		d.mu.Lock()
		d.hanging--
		d.mu.Unlock()
	}
	if rule.Err == nil {
		d.Device.Do([]*blockdev.Request{r})
		return
	}
	r.Done = blockdev.Extent{}
	info := d.Info()
	if err := r.Check(&info, d.Size()); err != nil {
		r.Err = err
		return
	}
	if n := min(rule.Partial, r.Len); n > 0 && r.Op != blockdev.OpRead && r.Op != blockdev.OpFlush {
		part := &blockdev.Request{Op: r.Op, Flags: r.Flags, Off: r.Off, Len: n}
		if r.Buf != nil {
			part.Buf = r.Buf[:n]
		}
		d.Device.Do([]*blockdev.Request{part})
	}
	r.Err = &blockdev.IOError{Name: info.Name, Op: r.Op, Err: fmt.Errorf("injected: %w", rule.Err)}
	if r.Op != blockdev.OpFlush {
		r.Err.(*blockdev.IOError).Extent = r.Extent()
	}
}
