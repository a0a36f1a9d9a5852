package sim

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/shim"
)

// These are holes that a reader of the argument for crash safety has found.

const readersBlock = 64 << 10

// plainWorld plays f in a world of one disk of 64 blocks.
func plainWorld(t *testing.T, seed uint64, keys *keys, f func(w *world)) {
	t.Helper()
	var trace []string
	var wrong error
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed, keys, diskSpec{64 * readersBlock, blockdev.Info{BlockSize: 512, CheapTrim: true, CheapZero: true}})
		w.plain, w.quota = true, 20<<20
		defer func() {
			w.close()
			trace, wrong = w.trace, w.err
		}()
		w.startReplica(0)
		f(w)
	})
	if wrong != nil {
		t.Errorf("seed %d: %s", seed, report(0, wrong, trace))
	}
}

// serveOnly starts a process that serves the VM without its log, as the daemon does when
// the log cannot be opened.
func (w *world) serveOnly() {
	p := &primary{proc: w.phost.Start(w.rng.Uint64(), func() { w.line.cutNow() })}
	o := shim.VMOptions{
		Name: "vm", Warn: w.log("primary"), FS: p.proc, HotCap: 1,
		Life: func(string) ([32]byte, error) { return [32]byte{w.life}, nil },
	}
	for i, s := range w.specs {
		dev, err := p.proc.OpenDisk(image(i), s.info, false)
		if err != nil {
			w.wrong("%v", err)
			return
		}
		o.Disks = append(o.Disks, shim.VMDisk{Name: fmt.Sprintf("disk%d", i), Device: dev, Meta: fmt.Sprintf("/p/meta%d", i)})
	}
	var err error
	if p.vm, err = shim.OpenVM(context.Background(), o); err != nil {
		w.wrong("%v", err)
	}
	w.pri = p
	p.up.Store(true)
}

func (w *world) put(off, n int64) {
	w.ask(w.pri, 0, []*blockdev.Request{{Op: blockdev.OpWrite, Flags: blockdev.FlagFUA, Off: off, Len: n, Buf: make([]byte, n)}})
	time.Sleep(time.Millisecond)
}

// TestWrittenWithoutLog: what a process that is no more wrote without a log has no mark,
// and may be in memory alone: it is durable before it is copied.
func TestWrittenWithoutLog(t *testing.T) {
	keys := newKeys(t)
	warm(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for seed := uint64(1); seed <= 12; seed++ {
		plainWorld(t, seed, keys, func(w *world) {
			w.startPrimary(0)
			w.put(40*readersBlock, 4096)
			w.letter('a')
			w.stopPrimary()
			w.serveOnly()
			w.letter('w')
			time.Sleep(time.Millisecond)
			w.crashPrimary(false)
			w.mu.Lock()
			w.saved = nil
			w.mu.Unlock()
			w.phost.RemoveAll(logDir)
			w.startPrimary(0)
			w.letter('a') // all is compared
			w.checkSynced()
			w.crashPrimary(true)
			w.startPrimary(0)
			if !w.failed() {
				w.finish()
			}
		})
	}
}

// TestLatchedWithoutLog: a disk whose sync has failed while it was not logged can be
// logged all the same.
func TestLatchedWithoutLog(t *testing.T) {
	keys := newKeys(t)
	warm(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	plainWorld(t, 1, keys, func(w *world) {
		w.serveOnly()
		w.letter('w')
		w.letter('F')
		if _, err := w.pri.vm.StartLog(context.Background(), shim.LogOptions{Dir: logDir}); err != nil {
			w.wrong("it is not logged: %v", err)
		}
	})
}

// TestResizedInSession: a disk that shrinks and grows while copies of it wait at the
// replica keeps none of them for what the newest point had.
func TestResizedInSession(t *testing.T) {
	keys := newKeys(t)
	warm(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for seed := uint64(1); seed <= 4; seed++ {
		plainWorld(t, seed, keys, func(w *world) {
			const at = 40 * readersBlock
			w.startPrimary(0)
			w.put(at, 4096) // the first content
			w.letter('a')
			w.put(at-512, 4096+512) // another, over it
			w.pri.vm.Disks()[0].AddGap(at, readersBlock)
			w.setCutAt(cutForGood)
			_, _ = w.sync(time.Second / 2) // a copy is delivered, and no point listed
			w.crashPrimary(true)
			w.startPrimary(0)
			d := w.pri.vm.Disks()[0]
			for _, n := range []int64{30, 64} {
				if err := w.pri.vm.Resize(d, n*readersBlock); err != nil {
					w.wrong("%v", err)
				}
			}
			w.put(at-512, 512)
			w.put(at, 4096) // the same bytes as first: as the newest point has them
			w.line.heal()
			id, err := w.sync(time.Minute)
			if err != nil {
				w.wrong("%v", err)
				return
			}
			b, err := readPoint(w.replicaVM(), id, "disk0", 64*readersBlock)
			if err != nil {
				w.wrong("%v", err)
			} else if disk := w.phost.Read(image(0)); !bytes.Equal(b, disk) {
				w.wrong("point %v is not the disk", id)
			}
		})
	}
}
