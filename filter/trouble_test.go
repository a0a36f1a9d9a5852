package filter

import (
	"bytes"
	"errors"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/hrl"
)

// within fails the test, and lets go what hangs, if do takes far longer than
// any limit there is.
func within(t *testing.T, what string, letGo, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Errorf("%s: waits for the log", what)
		letGo()
		<-done
	}
}

// TestHungLogAndDiskError: what a failed write has to say in the log keeps
// nobody waiting, neither does a resize, nor the end.
func TestHungLogAndDiskError(t *testing.T) {
	fsys := &failingFS{FS: hrl.OS}
	l, _ := openLog(t, tempDir(t), hrl.Options{FS: fsys, AppendLimit: 10 * time.Millisecond})
	hang := make(chan struct{})
	gone := false
	letGo := func() {
		if !gone {
			gone = true
			fsys.set(nil, nil)
			close(hang)
		}
	}
	mem := blockdev.NewMem(1 << 20)
	dev := faultdev.New(&failsLate{Device: mem, fail: func() { fsys.set(nil, hang) }})
	d := &queueDevice{dev: dev, log: l, Filter: newFilter(t, dev, Options{})}
	attach(t, d.Filter, l)
	within(t, "a write that fails", letGo, func() {
		if err := ask(d, blockdev.OpWrite, 0, 0, make([]byte, 4096)); !errors.Is(err, syscall.EIO) {
			t.Error(err)
		}
	})
	within(t, "a write to the same range", letGo, func() {
		if err := ask(d, blockdev.OpWrite, blockdev.FlagFUA, 0, make([]byte, 4096)); err != nil {
			t.Error(err)
		}
	})
	within(t, "a resize", letGo, func() {
		if err := d.Resize(2 << 20); err != nil {
			t.Error(err)
		}
	})
	within(t, "the end", letGo, func() {
		if err := d.Filter.Close(); err != nil {
			t.Error(err)
		}
	})
	letGo()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestCloseWithHungWorker: a worker that hangs in an abandoned append does not
// keep the disk from being made durable.
func TestCloseWithHungWorker(t *testing.T) {
	fsys := &failingFS{FS: hrl.OS}
	l, _ := openLog(t, tempDir(t), hrl.Options{FS: fsys, AppendLimit: 10 * time.Millisecond})
	hang := make(chan struct{})
	dev := blockdev.NewMem(1 << 20)
	d := &queueDevice{dev: dev, log: l, Filter: newFilter(t, dev, Options{})}
	attach(t, d.Filter, l)
	fsys.set(nil, hang)
	gone := false
	letGo := func() {
		if !gone {
			gone = true
			fsys.set(nil, nil)
			close(hang)
		}
	}
	within(t, "a FUA write", letGo, func() {
		if err := ask(d, blockdev.OpWrite, blockdev.FlagFUA, 0, make([]byte, 4096)); err != nil {
			t.Error(err)
		}
	})
	within(t, "the end", letGo, func() {
		if err := d.Filter.Close(); err != nil {
			t.Error(err)
		}
	})
	letGo()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// failsLate is a disk of which the first write fails, after fail was called.
type failsLate struct {
	blockdev.Device
	fail func()
	n    atomic.Int32
}

func (d *failsLate) Do(reqs []*blockdev.Request) {
	if reqs[0].Op == blockdev.OpWrite && d.n.Add(1) == 1 {
		d.fail()
		for _, r := range reqs {
			r.Err = syscall.EIO
		}
		return
	}
	d.Device.Do(reqs)
}

// TestSyncsThatRunAtOnce: the kernel tells one of two syncs that a write-back
// failed; the other, which it tells nothing, must not be a success because it
// comes back first (RULES F1).
func TestSyncsThatRunAtOnce(t *testing.T) {
	for _, second := range []string{"flush", "fua"} {
		t.Run(second, func(t *testing.T) {
			dev := faultdev.New(blockdev.NewMem(1 << 20))
			d := &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{})}
			// The first has its report and is not yet back.
			dev.Add(faultdev.Rule{Op: blockdev.OpFlush, Times: 1, Hang: true, Err: syscall.EIO})
			first := make(chan error)
			go func() { first <- ask(d, blockdev.OpFlush, 0, 0, nil) }()
			poll(t, func() bool { return dev.Hanging() == 1 })
			other := make(chan error, 1)
			go func() {
				if second == "fua" {
					other <- ask(d, blockdev.OpWrite, blockdev.FlagFUA, 0, make([]byte, 512))
				} else {
					other <- ask(d, blockdev.OpFlush, 0, 0, nil)
				}
			}()
			poll(t, func() bool {
				d.syncs.mu.Lock()
				defer d.syncs.mu.Unlock()
				return d.syncs.next == 2 && len(d.syncs.open) == 1 // it is back
			})
			select {
			case err := <-other:
				t.Errorf("answered before it is known what the other sync found: %v", err)
				other <- err
			default:
			}
			dev.Release()
			if err := <-first; err == nil {
				t.Error("the first sync failed and succeeded")
			}
			var l *LatchedError
			if err := <-other; !errors.As(err, &l) {
				t.Errorf("the second sync: %v", err)
			}
			if err := dev.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func poll(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it never happened")
		}
	}
}

// TestLatchAndLog: what was written before a sync failed may vanish later, so
// the log names it as a gap, and what is logged after it again when the
// disk is opened the next time, reopened by the operator or not.
func TestLatchAndLog(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(t.TempDir(), "latch")
	dev := faultdev.New(blockdev.NewMem(1 << 20))
	open := func() (*queueDevice, Recovered) {
		l, rec := openLog(t, dir, hrl.Options{})
		d := &queueDevice{dev: dev, log: l, Filter: newFilter(t, dev, Options{Latch: path})}
		id, err := l.AddDisk("root", dev.Size())
		if err != nil {
			t.Fatal(err)
		}
		out, err := d.Recover(l, id, "root", Found{Log: rec}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Recovered(); err != nil {
			t.Fatal(err)
		}
		d.AttachLog(l, id)
		return d, out
	}
	missing := func() int64 {
		t.Helper()
		var inc *hrl.IncompleteError
		if err := replayInto(t, dir, blockdev.NewMem(1<<20)); !errors.As(err, &inc) {
			t.Fatalf("the log says %v", err)
		}
		return inc.Bytes
	}
	block := bytes.Repeat([]byte{1}, 64<<10)
	d, _ := open()
	if err := ask(d, blockdev.OpWrite, 0, 0, block); err != nil {
		t.Fatal(err)
	}
	dev.Add(faultdev.Rule{Op: blockdev.OpFlush, Times: 1, Err: syscall.EIO})
	if err := ask(d, blockdev.OpFlush, 0, 0, nil); err == nil {
		t.Fatal("the failed flush succeeded")
	}
	if err := ask(d, blockdev.OpWrite, 0, 64<<10, block); err != nil {
		t.Fatal(err)
	}
	if err := d.log.Abort(); err != nil {
		t.Fatal(err)
	}
	if n := missing(); n != 1<<20-64<<10 {
		t.Errorf("the log lacks %d bytes", n)
	}

	d, out := open()
	var l *LatchedError
	if !errors.As(out.Whole, &l) {
		t.Errorf("after the failure: %+v", out)
	}
	if err := d.Reopen(); err != nil {
		t.Fatal(err)
	}
	if err := d.Filter.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	if n := missing(); n != 1<<20 {
		t.Errorf("then the log lacks %d bytes", n)
	}
	d, out = open()
	if out.Whole != nil || d.Latched() != nil {
		t.Errorf("reopened: %+v, %v", out, d.Latched())
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRecoverResized: a disk whose size changed while it was not served is
// what the log gives, and what was cut off does not come back (RULES L2).
func TestRecoverResized(t *testing.T) {
	for _, clean := range []bool{true, false} {
		dir := tempDir(t)
		dev := blockdev.NewMem(4 << 20)
		// A write at off, then the size the disk gets while nobody looks, and
		// what is put into it there.
		for i, step := range []struct{ off, size, put int64 }{
			{3 << 20, 1 << 20, -1}, {0, 4 << 20, -1}, {1 << 20, 8 << 20, 6 << 20}, {2 << 20, 8 << 20, -1},
		} {
			l, rec := openLog(t, dir, hrl.Options{})
			f := newFilter(t, dev, Options{})
			d := &queueDevice{dev: dev, Filter: f, log: l}
			id, err := l.AddDisk("root", f.Size())
			if err != nil {
				t.Fatal(err)
			}
			if out, err := f.Recover(l, id, "root", Found{Log: rec}, nil); err != nil || out.GapBytes != 0 {
				t.Fatalf("%+v %v", out, err)
			}
			if err := l.Recovered(); err != nil {
				t.Fatal(err)
			}
			f.AttachLog(l, id)
			if err := ask(d, blockdev.OpWrite, 0, step.off, bytes.Repeat([]byte{byte(i + 1)}, 8192)); err != nil {
				t.Fatal(err)
			}
			if clean {
				err = l.Close()
			} else {
				err = l.Abort()
			}
			if err != nil {
				t.Fatal(err)
			}
			copied := blockdev.NewMem(4 << 20)
			if err := replayInto(t, dir, copied); err != nil {
				t.Fatal(err)
			}
			equalDisks(t, dev, copied)
			if err := dev.Resize(step.size); err != nil {
				t.Fatal(err)
			}
			if step.put >= 0 {
				if err := blockdev.WriteAt(dev, bytes.Repeat([]byte{99}, 4096), step.put); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// TestRecoverCannotSay: a power cut whose gap the log does not take is not
// forgotten, for the opening fails and the next one finds the same.
func TestRecoverCannotSay(t *testing.T) {
	dir := tempDir(t)
	dev := blockdev.NewMem(1 << 20)
	l, _ := openLog(t, dir, hrl.Options{Life: [32]byte{1}})
	attach(t, newFilter(t, dev, Options{}), l)
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
	fsys := &failingFS{FS: hrl.OS}
	for try := range 2 {
		l, rec := openLog(t, dir, hrl.Options{Life: [32]byte{2}, FS: fsys})
		if rec != hrl.RecoverPowerCut {
			t.Fatal(rec)
		}
		f := newFilter(t, dev, Options{})
		id, err := l.AddDisk("root", f.Size())
		if err != nil {
			t.Fatal(err)
		}
		if try == 0 {
			if err := l.Ready(); err != nil {
				t.Fatal(err)
			}
			fsys.set(syscall.EIO, nil)
		}
		out, err := f.Recover(l, id, "root", Found{Log: rec}, nil)
		if (err == nil) != (try == 1) || out.Whole == nil {
			t.Fatalf("try %d: %+v %v", try, out, err)
		}
		fsys.set(nil, nil)
		if err := l.Abort(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSubmitAllocs: a batch of writes on its way to log and disk allocates
// nothing.
func TestSubmitAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates, and drops what pools hold")
	}
	path := filepath.Join(tempDir(t), "disk")
	if err := blockdev.CreateFile(path, 64<<20); err != nil {
		t.Fatal(err)
	}
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l, _ := openLog(t, tempDir(t), hrl.Options{SegmentBytes: 256 << 20, AppendLimit: 50 * time.Millisecond})
	d := &queueDevice{dev: dev, log: l, Filter: newFilter(t, dev, Options{})}
	attach(t, d.Filter, l)
	if err := l.Ready(); err != nil {
		t.Fatal(err)
	}
	var reqs [blockdev.BatchMax]*blockdev.Request
	o := &immediate{}
	for i := range reqs {
		reqs[i] = &blockdev.Request{Op: blockdev.OpWrite, Off: int64(i) << 20, Len: 4096, Buf: make([]byte, 4096), Owner: o}
	}
	if n := testing.AllocsPerRun(2000, func() { d.Submit(reqs[:]) }); n >= 1 {
		t.Errorf("%v allocations a batch", n)
	}
	d.Drain()
	if o.failed.Load() != nil {
		t.Error(*o.failed.Load())
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// immediate owns requests that are done when Submit returns.
type immediate struct{ failed atomic.Pointer[error] }

func (o *immediate) Complete(reqs []*blockdev.Request) {
	for _, r := range reqs {
		if r.Err != nil {
			err := r.Err
			o.failed.Store(&err)
		}
	}
}

func (o *immediate) Gone() bool { return false }
