package ship_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/ship"
	"afterimage/internal/testenv"
)

const block = hrl.BlockBytes

// write writes what is random to a disk.
func (w *world) write(disk int, off, n int64) {
	w.t.Helper()
	buf := make([]byte, n)
	w.fill(buf)
	w.put(disk, off, buf)
}

func (w *world) put(disk int, off int64, buf []byte) {
	w.t.Helper()
	n := int64(len(buf))
	if err := ask(w.vm.Disks()[disk], blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: n, Buf: buf}); err != nil {
		w.t.Fatal(err)
	}
	copy(w.model[disk][off:], buf)
}

// fillImages gives the images content, before there is a primary.
func (w *world) fillImages() {
	w.t.Helper()
	for i := range w.disks {
		dev, err := blockdev.OpenFile(w.image(i), blockdev.FileOptions{})
		if err != nil {
			w.t.Fatal(err)
		}
		w.fill(w.model[i])
		if err := errors.Join(blockdev.WriteAt(dev, w.model[i], 0), blockdev.Flush(dev), dev.Close()); err != nil {
			w.t.Fatal(err)
		}
	}
}

// delivered is how many layers of copies the replica has complete that no point has.
func (w *world) delivered() (n int) {
	st, err := w.client.State(context.Background(), w.id)
	if err != nil {
		return 0
	}
	for _, l := range st.Layers {
		if l.Complete {
			n++
		}
	}
	return n
}

// copying waits, on a slow line, until some of the layers of a copy are delivered and
// on record here.
func (w *world) copying(layers int) {
	w.t.Helper()
	testenv.Until(w.t, "layers of copies are delivered", func() bool { return w.delivered() > layers })
}

// failingLog is a file system on which nothing can be written to segments of a log
// while it is told so.
type failingLog struct {
	hrl.FS
	fails atomic.Bool
}

func (f *failingLog) wrap(file hrl.File, err error, path string) (hrl.File, error) {
	if err != nil || !strings.HasSuffix(path, ".hrl") {
		return file, err
	}
	return deafFile{file, f}, nil
}

func (f *failingLog) Create(path string) (hrl.File, error) {
	file, err := f.FS.Create(path)
	return f.wrap(file, err, path)
}

func (f *failingLog) Edit(path string) (hrl.File, error) {
	file, err := f.FS.Edit(path)
	return f.wrap(file, err, path)
}

type deafFile struct {
	hrl.File
	fs *failingLog
}

func (f deafFile) WriteAt(p []byte, off int64) (int, error) {
	if f.fs.fails.Load() {
		return 0, syscall.EIO
	}
	return f.File.WriteAt(p, off)
}

func (f deafFile) WritevAt(bufs [][]byte, off int64) (int64, error) {
	if f.fs.fails.Load() {
		return 0, syscall.EIO
	}
	return f.File.WritevAt(bufs, off)
}

// TestSessionGoesOn: what was copied and delivered is not copied again, whatever ends
// the primary or the replica; and the point is right, whatever was written meanwhile.
func TestSessionGoesOn(t *testing.T) {
	const size, layer = 64 * block, 4 * block
	defer ship.SetCopyLayerMax(layer)()
	kill := func(w *world) { w.stopPrimary(false); w.startPrimary() }
	powerCut := func(w *world) { w.stopPrimary(false); w.boots++; w.startPrimary() }
	for _, c := range []struct {
		name  string
		cut   func(w *world)
		whole bool  // all is copied again
		hot   int64 // bytes that a power cut makes doubtful
	}{
		{name: "kill", cut: kill},
		{name: "three kills", cut: func(w *world) { kill(w); kill(w); kill(w) }},
		{name: "restart", cut: func(w *world) { w.stopPrimary(true); w.startPrimary() }},
		{name: "power cut", cut: powerCut},
		{name: "power cut and kill", cut: func(w *world) { powerCut(w); kill(w) }},
		{name: "two power cuts", cut: func(w *world) { powerCut(w); powerCut(w) }},
		{name: "kill and power cut", cut: func(w *world) { kill(w); powerCut(w) }},
		{name: "replica restarted", cut: func(w *world) {
			_ = w.host.Stop()
			w.store.Close()
			w.openStore()
			w.host.Start(w.ca)
		}},
		{name: "both", cut: func(w *world) {
			w.stopPrimary(false)
			_ = w.host.Stop()
			w.store.Close()
			w.openStore()
			w.host.Start(w.ca)
			w.startPrimary()
		}},
		{name: "replica lost what was staged", whole: true, cut: func(w *world) {
			w.stopPrimary(false)
			if err := w.replicaVM().Discard(nil); err != nil {
				t.Error(err)
			}
			w.startPrimary()
		}},
		{name: "writes and kill", cut: func(w *world) {
			for b := range int64(16) {
				w.write(0, b*4*block+512, 1024)
			}
			kill(w)
			w.changes(5)
		}},
		{name: "writes and power cut", hot: 2 << 20, cut: func(w *world) {
			w.write(0, 3*block+512, 1024)
			w.write(0, 40*block, 3*block)
			powerCut(w)
			w.changes(5)
		}},
		{name: "write that the log does not take, and kill", hot: block, cut: func(w *world) {
			log := w.fs.(*failingLog)
			log.fails.Store(true)
			w.write(0, 512, 1024) // of the first block, which was delivered
			w.stopPrimary(false)
			log.fails.Store(false)
			w.startPrimary()
		}},
		{name: "write that the log does not take, and power cut", hot: 1 << 20, cut: func(w *world) {
			log := w.fs.(*failingLog)
			log.fails.Store(true)
			w.write(0, 512, 1024)
			w.stopPrimary(false)
			log.fails.Store(false)
			w.boots++
			w.startPrimary()
		}},
		{name: "the newest point's content comes back, the log does not take it, and kill", hot: block, cut: func(w *world) {
			log := w.fs.(*failingLog)
			log.fails.Store(true)
			w.put(0, 0, w.old[:block])
			w.stopPrimary(false)
			log.fails.Store(false)
			w.startPrimary()
		}},
	} {
		for _, compare := range []bool{false, true} {
			name := c.name + ", first copy"
			if compare {
				name = c.name + ", comparison"
			}
			t.Run(name, func(t *testing.T) {
				w := newWorld(t, 7, size)
				w.fs, w.boots, w.streams = &failingLog{FS: hrl.OS}, 1, 1
				w.fillImages()
				w.old = bytes.Clone(w.model[0])
				if compare { // everything differs from what the replica has
					w.startPrimary()
					w.sync()
					w.stopPrimary(true)
					w.saved = nil
					w.fillImages()
				}
				var before ship.Totals // none: the state is gone
				w.limit = 4 << 20
				w.startPrimary()
				w.copying(4)
				w.limit = 0
				w.s.SetLimit(w.limit)
				c.cut(w)
				if st := w.s.Status(); st.InitialTotal > 0 && st.InitialDone < 3*layer && !c.whole && c.hot == 0 {
					t.Errorf("after it %d of %d bytes are copied", st.InitialDone, st.InitialTotal)
				}
				w.sync()
				st := w.s.Status()
				// The session's totals go on: what was copied or sent twice counts twice.
				// Four layers were on record; all of the disk is one batch, and had been read.
				read, sent := st.Totals.CopiedBytes-before.CopiedBytes-size, st.Totals.ShippedRawBytes-before.ShippedRawBytes-size
				t.Logf("%d KiB were read twice, and %d KiB sent twice", read>>10, sent>>10)
				if limit := c.hot + size - 4*layer; !c.whole && read > limit {
					t.Errorf("%d bytes were read again, not %d", read, limit)
				}
				if limit := c.hot + layer + 64<<10; !c.whole && sent > limit {
					t.Errorf("%d bytes were sent again, not %d", sent, limit)
				}
				w.changes(5)
				w.sync()
				w.checkHistory()
			})
		}
	}
}

// TestCopyRate: copying is not throttled below the rate at which the guest writes, and
// if the line is slower than that, the status says so.
func TestCopyRate(t *testing.T) {
	defer ship.SetPace(50*time.Millisecond, 200*time.Millisecond)()
	defer ship.SetCopyLayerMax(4 * block)()
	w := newWorld(t, 8, 256*block)
	w.limit = 64 << 10
	w.fillImages()
	w.startPrimary()
	testenv.Until(t, "the limit follows the guest", func() bool {
		for range 16 {
			w.write(0, w.rng.Int64N(256)*block, block)
		}
		return w.s.LineLimit() > 1<<20
	})
	testenv.Until(t, "the status says that the replica cannot catch up", func() bool {
		for range 64 {
			w.write(0, w.rng.Int64N(256)*block, block)
		}
		for _, r := range w.s.Status().Reasons {
			if strings.Contains(r, "cannot catch up") {
				return true
			}
		}
		return false
	})
	w.s.SetLimit(0)
	w.sync()
	if why := w.s.Status().Reasons; len(why) > 0 {
		t.Errorf("at rest: %v", why)
	}
	w.s.SetLimit(64 << 10)
	if got := w.s.LineLimit(); got != 64<<10 {
		t.Errorf("at rest the limit is %v", got)
	}
}

// TestCopyHoles: what is a hole now and had content at the newest point is zero in the
// next one; and a hole costs no bytes.
func TestCopyHoles(t *testing.T) {
	w := newWorld(t, 10, 64*block)
	w.fillImages()
	w.startPrimary()
	w.sync()
	w.stopPrimary(true)
	// Behind everybody's back the image becomes sparse.
	dev, err := blockdev.OpenFile(w.image(0), blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hole := blockdev.Extent{Off: 8 * block, Len: 32*block + 4096}
	if err := errors.Join(blockdev.WriteZeroes(dev, hole), dev.Close()); err != nil {
		t.Fatal(err)
	}
	clear(w.model[0][hole.Off:hole.End()])
	w.saved = nil
	w.startPrimary()
	w.sync()
	if n := w.s.Status().Totals.ShippedRawBytes; n > block {
		t.Errorf("%d bytes were sent for a hole", n)
	}
	w.checkHistory()
}
