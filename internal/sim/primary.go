package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"afterimage/hrl/ship"
	"afterimage/internal/shim"
	"afterimage/internal/sim/simfs"
)

// A primary is one life of the process that serves the VM.
type primary struct {
	proc   *simfs.Process
	client *ship.Client
	vm     *shim.VM
	ship   *ship.Shipper
	synced []synced    // guarded by world.mu
	up     atomic.Bool // it has started: its log may hang
}

// startPrimary starts it. With die, it ends in its nth operation.
func (w *world) startPrimary(die int) {
	p := &primary{}
	p.proc = w.phost.Start(w.rng.Uint64(), func() {
		w.line.cutNow()
	})
	p.proc.DieAfter(die)
	p.proc.Delay = func(op simfs.Op, path string) time.Duration { return w.delay(p, op, path) }
	if w.plain {
		p.proc.Delay = func(op simfs.Op, path string) time.Duration {
			if op == simfs.OpWrite && strings.HasPrefix(path, logDir) && w.late.CompareAndSwap(true, false) {
				return 20 * time.Millisecond
			}
			return 0
		}
	}
	w.mu.Lock()
	w.badDisk = false
	w.mu.Unlock()
	if err := w.open(p); err != nil {
		if !p.proc.Gone() {
			w.wrong("the primary does not start: %v", err)
		}
		w.note("the primary does not start: %v", err)
		p.proc.Die()
		w.pri = p
		return
	}
	w.pri = p
	p.up.Store(true)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked("the primary has started, life %d", w.life)
	for i, d := range w.model.disks {
		if d.latched == 0 {
			continue
		}
		f := p.vm.Disks()[i]
		if f.Latched() == nil {
			w.wrongLocked("disk %d has forgotten that a sync has failed", i)
		}
		if w.rng.IntN(2) == 0 {
			// If the process ends in it, nobody knows whether it was done.
			err := f.Reopen()
			d.latched = 0
			w.noteLocked("disk %d is reopened: %v", i, err)
		}
	}
}

func (w *world) open(p *primary) error {
	o := shim.VMOptions{
		Name: "vm", Warn: w.log("primary"), FS: p.proc, HotCap: 1, // as little as can be
		Life: func(string) ([32]byte, error) { return [32]byte{w.life}, nil },
	}
	for i, s := range w.specs {
		dev, err := p.proc.OpenDisk(image(i), s.info, !w.plain)
		if err != nil {
			return err
		}
		o.Disks = append(o.Disks, shim.VMDisk{Name: fmt.Sprintf("disk%d", i), Device: dev, Meta: fmt.Sprintf("/p/meta%d", i)})
	}
	var err error
	if p.vm, err = shim.OpenVM(context.Background(), o); err != nil {
		return err
	}
	p.client = ship.Dial("127.0.0.1:1", w.keys.primary)
	p.client.DialBy(w.line.dial)
	w.mu.Lock()
	state := bytes.Clone(w.saved)
	w.mu.Unlock()
	p.ship, err = ship.Start(context.Background(), ship.Options{
		VM: p.vm, ID: w.id, Name: "vm", Client: p.client, FS: p.proc, LogDir: logDir, LogQuota: w.quota,
		Every: w.every, Keep: w.keep, State: state, Warn: w.log("ship"),
		Save: func(b json.RawMessage) error {
			part, err := p.proc.Step(simfs.OpSave, statePath)
			if err == nil || part && p.proc.IntN(2) == 0 {
				w.mu.Lock()
				w.saved = bytes.Clone(b)
				w.mu.Unlock()
			}
			if part {
				p.proc.Die()
			}
			return err
		},
	})
	return err
}

// delay is how long an operation of the primary takes.
func (w *world) delay(pri *primary, op simfs.Op, path string) time.Duration {
	p := pri.proc
	const us = time.Microsecond
	if path != image(0) && path != image(1) && path != image(2) { // the log
		if pri.up.Load() && w.slow.Load() && p.IntN(8) == 0 {
			return time.Duration(60+p.IntN(200)) * time.Millisecond
		}
		if p.IntN(6) == 0 {
			return time.Duration(p.IntN(15000)) * us
		}
		return time.Duration(p.IntN(300)) * us
	}
	if op == simfs.OpSync {
		return time.Duration(500+p.IntN(8000)) * us
	}
	switch p.IntN(100) {
	case 0:
		return time.Duration(p.IntN(3000)) * time.Millisecond
	case 1, 2, 3, 4, 5, 6, 7, 8, 9, 10:
		return time.Duration(p.IntN(20000)) * us
	}
	return time.Duration(20+p.IntN(600)) * us
}

// stopPrimary ends the process cleanly.
func (w *world) stopPrimary() {
	p := w.pri
	w.settled()
	w.end(p, true)
	w.pri = nil
	if p.proc.Gone() {
		w.afterCrash(w.rng.IntN(2) == 0)
		return
	}
	p.proc.Die()
	w.phost.Kill()
	w.found(false)
}

// end lets go of what a process holds, with its files or without.
func (w *world) end(p *primary, clean bool) {
	if p.ship != nil {
		if err := p.ship.Close(); err != nil {
			w.wrong("closing the shipper: %v", err)
		}
	}
	if p.client != nil {
		_ = p.client.Close()
	}
	if p.vm != nil {
		if clean {
			if err := p.vm.Close(); err != nil {
				w.note("closing the VM: %v", err)
			}
		} else {
			_ = p.vm.Abort()
		}
	}
	w.line.cutNow()
}

// crashPrimary ends it as a kill or a power cut does. What it does not know is
// found again by whoever starts it.
func (w *world) crashPrimary(power bool) {
	w.pri.proc.Die()
	w.settled()
	w.end(w.pri, false)
	w.pri = nil
	w.afterCrash(power)
}

func (w *world) afterCrash(power bool) {
	w.mu.Lock()
	w.model.crashed()
	if power {
		w.stats.PowerCuts++
		w.life++
	} else {
		w.stats.Kills++
	}
	w.noteLocked("the primary is gone, power cut %v", power)
	w.mu.Unlock()
	if power {
		w.phost.PowerCut()
	} else {
		w.phost.Kill()
	}
	w.found(power)
}

// found takes what is on the disks as what they hold.
func (w *world) found(power bool) {
	found := w.disksNow()
	defer time.Sleep(time.Microsecond) // what comes is later
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return
	}
	if err := w.model.adopt(found, power || w.badSync, power); err != nil {
		w.wrongLocked("after a crash, power cut %v: %w", power, err)
	}
	w.badSync = false // what that sync has lost is lost by now
}
