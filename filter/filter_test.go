package filter

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"afterimage/blockdev"
	"afterimage/blockdev/devtest"
	"afterimage/blockdev/faultdev"
	"afterimage/hrl"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// queueDevice is a Device that asks a Filter: what the suite tests.
type queueDevice struct {
	*Filter
	dev blockdev.Device
	log *hrl.Log
}

type waiter struct {
	wg sync.WaitGroup
}

func (w *waiter) Complete(reqs []*blockdev.Request) { w.wg.Add(-len(reqs)) }
func (w *waiter) Gone() bool                        { return false }

func (d *queueDevice) Do(reqs []*blockdev.Request) {
	for len(reqs) > 0 {
		var w waiter
		n := min(len(reqs), blockdev.BatchMax)
		w.wg.Add(n)
		for _, r := range reqs[:n] {
			r.Owner = &w
		}
		d.Submit(reqs[:n])
		w.wg.Wait()
		reqs = reqs[n:]
	}
}

func (d *queueDevice) Close() error {
	if err := d.dev.Close(); err != nil {
		return err
	}
	if d.log != nil {
		return d.log.Abort()
	}
	return nil
}

// tempDir is in memory where that is possible.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "filter")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newFilter(t *testing.T, dev blockdev.Device, o Options) *Filter {
	t.Helper()
	o.Warn = slog.New(slog.DiscardHandler)
	f, err := New(dev, o)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func openLog(t *testing.T, dir string, opt hrl.Options) (*hrl.Log, hrl.Recovery) {
	t.Helper()
	if opt.SegmentBytes == 0 {
		opt.SegmentBytes = 4 << 20
	}
	if opt.AppendLimit == 0 {
		opt.AppendLimit = -1
	}
	l, rec, err := hrl.Open(dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	return l, rec
}

func attach(t *testing.T, f *Filter, l *hrl.Log) {
	t.Helper()
	id, err := l.AddDisk("root", f.Size())
	if err != nil {
		t.Fatal(err)
	}
	l.Recovered()
	f.AttachLog(l, id)
}

// TestConformance: a filter is a disk like any other, with and without a log,
// over devices of any block size.
func TestConformance(t *testing.T) {
	disks := map[string]func() blockdev.Device{
		"mem":  func() blockdev.Device { return blockdev.NewMem(1 << 20) },
		"4kn":  func() blockdev.Device { return &coarse{Device: blockdev.NewMem(1 << 20)} },
		"slow": func() blockdev.Device { return &coarse{Device: blockdev.NewMem(1 << 20), slow: true} },
	}
	for name, disk := range disks {
		for _, tee := range []bool{false, true} {
			t.Run(name+map[bool]string{true: "-tee", false: ""}[tee], func(t *testing.T) {
				devtest.Run(t, func(t *testing.T) blockdev.Device {
					d := &queueDevice{dev: disk()}
					d.Filter = newFilter(t, d.dev, Options{})
					if tee {
						d.log, _ = openLog(t, filepath.Join(tempDir(t), "log"), hrl.Options{})
						attach(t, d.Filter, d.log)
					}
					return d
				}, devtest.Options{Steps: 60})
			})
		}
	}
}

// coarse is a disk with blocks of 4096 bytes that takes only aligned memory, as
// O_DIRECT does.
type coarse struct {
	blockdev.Device
	slow bool
}

func (c *coarse) Info() blockdev.Info {
	i := c.Device.Info()
	i.BlockSize, i.MemAlign, i.Slow = 4096, 512, c.slow
	return i
}

func (c *coarse) Do(reqs []*blockdev.Request) {
	info := c.Info()
	var ok []*blockdev.Request
	for _, r := range reqs {
		r.Err = r.Check(&info, c.Size())
		if r.Err == nil && (r.Op == blockdev.OpRead || r.Op == blockdev.OpWrite) && !(&Filter{mem: 512}).fitsMemory(r.Buf) {
			r.Err = blockdev.ErrAlignment
		}
		if r.Err == nil {
			ok = append(ok, r)
		}
	}
	c.Device.Do(ok)
}

func ask(d *queueDevice, op blockdev.Op, flags blockdev.Flags, off int64, b []byte) error {
	r := &blockdev.Request{Op: op, Flags: flags, Off: off, Len: int64(len(b)), Buf: b}
	d.Do([]*blockdev.Request{r})
	return r.Err
}

// TestDiskErrors: a write that fails is a gap before the guest has its error,
// in memory and in the log, on the fast path and on a worker. One that was to be
// durable makes all of the disk doubtful.
func TestDiskErrors(t *testing.T) {
	for flags, gap := range map[blockdev.Flags]blockdev.Extent{
		0:                {Off: 1 << 20, Len: hrl.BlockBytes},
		blockdev.FlagFUA: {Off: 0, Len: 4 << 20},
	} {
		dev := faultdev.New(blockdev.NewMem(4 << 20))
		d := &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{})}
		dir := tempDir(t)
		d.log, _ = openLog(t, dir, hrl.Options{})
		attach(t, d.Filter, d.log)
		if err := ask(d, blockdev.OpWrite, 0, 0, bytes.Repeat([]byte{1}, 8192)); err != nil {
			t.Fatal(err)
		}
		dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Err: syscall.EIO, Partial: 4096})
		if err := ask(d, blockdev.OpWrite, flags, 1<<20, bytes.Repeat([]byte{2}, 8192)); !errors.Is(err, syscall.EIO) {
			t.Fatalf("the guest was told %v", err)
		}
		if n := d.Stats().GapBytes; n != gap.Len {
			t.Fatalf("gaps of %d bytes", n)
		}
		dev.Reset()
		d.AttachLog(nil, 0)
		if err := d.log.Close(); err != nil {
			t.Fatal(err)
		}
		err := replayInto(t, dir, blockdev.NewMem(4<<20))
		var inc *hrl.IncompleteError
		if !errors.As(err, &inc) || inc.Extents[0] != gap {
			t.Fatalf("the log says %v", err)
		}
		dev.Close()
	}
}

func replayInto(t *testing.T, dir string, dev blockdev.Device) error {
	t.Helper()
	r, err := hrl.OpenSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, err = r.Replay("root", dev, nil)
	return err
}

// TestLatch: a failed sync, of a flush or of a FUA write, fails every later
// flush and FUA write, over restarts, until the operator clears it; plain
// writes go on.
func TestLatch(t *testing.T) {
	for _, first := range []string{"flush", "fua"} {
		t.Run(first, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "vm.afterimage", "latch")
			dev := faultdev.New(blockdev.NewMem(1 << 20))
			d := &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{Latch: path})}
			dev.Add(faultdev.Rule{Op: blockdev.OpFlush, Times: 1, Err: syscall.EIO})
			dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Times: 1, Err: syscall.EIO})
			sector := make([]byte, 512)
			if first == "flush" {
				if err := ask(d, blockdev.OpFlush, 0, 0, nil); err == nil {
					t.Fatal("the failed flush succeeded")
				}
			} else if err := ask(d, blockdev.OpWrite, blockdev.FlagFUA, 0, sector); err == nil {
				t.Fatal("the failed FUA write succeeded")
			}
			dev.Reset()
			check := func(f *Filter) {
				t.Helper()
				d := &queueDevice{dev: dev, Filter: f}
				var l *LatchedError
				if err := ask(d, blockdev.OpFlush, 0, 0, nil); !errors.As(err, &l) {
					t.Fatalf("a flush after it: %v", err)
				}
				if err := ask(d, blockdev.OpWrite, blockdev.FlagFUA, 0, sector); !errors.As(err, &l) {
					t.Fatalf("a FUA write after it: %v", err)
				}
				if err := ask(d, blockdev.OpWrite, 0, 0, sector); err != nil {
					t.Fatalf("a plain write after it: %v", err)
				}
			}
			check(d.Filter)
			check(newFilter(t, dev, Options{Latch: path}))
			if err := newFilter(t, dev, Options{Latch: path}).Reopen(); err != nil {
				t.Fatal(err)
			}
			d = &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{Latch: path})}
			if err := ask(d, blockdev.OpFlush, 0, 0, nil); err != nil {
				t.Fatal(err)
			}
			dev.Close()
		})
	}
}

// TestNoRoomIsNoLatch: a FUA write into a full disk fails and latches nothing.
func TestNoRoomIsNoLatch(t *testing.T) {
	dev := faultdev.New(blockdev.NewMem(1 << 20))
	defer dev.Close()
	d := &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{})}
	dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Times: 2, Err: syscall.ENOSPC})
	if err := ask(d, blockdev.OpWrite, blockdev.FlagFUA, 0, make([]byte, 512)); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := d.Latched(); err != nil {
		t.Fatal(err)
	}
	if err := ask(d, blockdev.OpWrite, blockdev.FlagFUA, 0, make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
}

// TestFlushBeginsAfter: a flush that arrives while syncs run is answered by one
// that began after it arrived (RULES F2).
func TestFlushBeginsAfter(t *testing.T) {
	var mu sync.Mutex
	began, newest := 0, 0 // syncs are numbered; newest is the last begun of those that ended
	var f flusher
	f.sync = func() error {
		mu.Lock()
		began++
		n := began
		mu.Unlock()
		time.Sleep(time.Millisecond)
		mu.Lock()
		newest = max(newest, n)
		mu.Unlock()
		return nil
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for range 20 {
				mu.Lock()
				before := began
				mu.Unlock()
				if err := f.flush(); err != nil {
					t.Error(err)
				}
				mu.Lock()
				if newest <= before {
					t.Error("answered by a sync that had begun before")
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if began >= 400 {
		t.Errorf("%d syncs for 400 flushes: none was shared", began)
	}
}

// TestBarrier: AttachLog returns only when every change that the log lacks has
// finished (RULES A7).
func TestBarrier(t *testing.T) {
	dev := faultdev.New(blockdev.NewMem(1 << 20))
	defer dev.Close()
	d := &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{})}
	dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Times: 1, Hang: true})
	wrote := make(chan error, 1)
	go func() { wrote <- ask(d, blockdev.OpWrite, 0, 0, bytes.Repeat([]byte{7}, 512)) }()
	for dev.Hanging() == 0 {
		time.Sleep(time.Millisecond)
	}
	dir := tempDir(t)
	l, _ := openLog(t, dir, hrl.Options{})
	id, err := l.AddDisk("root", d.Size())
	if err != nil {
		t.Fatal(err)
	}
	l.Recovered()
	attached := make(chan struct{})
	go func() { d.AttachLog(l, id); close(attached) }()
	// New requests go the new way while the old one hangs.
	for {
		if err := ask(d, blockdev.OpWrite, 0, 4096, bytes.Repeat([]byte{8}, 512)); err != nil {
			t.Fatal(err)
		}
		if l.Stats().Frames > 0 {
			break
		}
	}
	select {
	case <-attached:
		t.Fatal("the barrier did not wait for the write under way")
	default:
	}
	dev.Release()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	<-attached
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestGone: what has not begun when its client is gone is not done (RULES A6).
func TestGone(t *testing.T) {
	dev := faultdev.New(blockdev.NewMem(1 << 20))
	defer dev.Close()
	f := newFilter(t, dev, Options{})
	d := &queueDevice{dev: dev, Filter: f}
	dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Times: 1, Hang: true})
	first := make(chan error, 1)
	go func() { first <- ask(d, blockdev.OpWrite, 0, 0, bytes.Repeat([]byte{1}, 512)) }()
	for dev.Hanging() == 0 {
		time.Sleep(time.Millisecond)
	}
	o := &mortal{done: make(chan error, 1)}
	r := &blockdev.Request{Op: blockdev.OpWrite, Len: 512, Buf: bytes.Repeat([]byte{2}, 512), Owner: o}
	f.Submit([]*blockdev.Request{r}) // waits for the range
	o.die()
	dev.Release()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if err := <-o.done; !errors.Is(err, blockdev.ErrGone) {
		t.Fatalf("the request of a dead client: %v", err)
	}
	old := &mortal{done: make(chan error, 1)}
	r = &blockdev.Request{
		Op: blockdev.OpWrite, Len: 512, Buf: bytes.Repeat([]byte{3}, 512), Owner: old,
		Arrived: blockdev.Monotonic() - waitMax - 1,
	}
	f.Submit([]*blockdev.Request{r})
	if err := <-old.done; !errors.Is(err, blockdev.ErrGone) {
		t.Fatalf("a request that waited too long: %v", err)
	}
	b := make([]byte, 512)
	if err := blockdev.ReadAt(dev, b, 0); err != nil || b[0] != 1 {
		t.Fatalf("the disk has %d: %v", b[0], err)
	}
}

type mortal struct {
	mu   sync.Mutex
	gone bool
	done chan error
}

func (m *mortal) die() {
	m.mu.Lock()
	m.gone = true
	m.mu.Unlock()
}

func (m *mortal) Gone() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gone
}

func (m *mortal) Complete(reqs []*blockdev.Request) {
	for _, r := range reqs {
		m.done <- r.Err
	}
}

// TestRecoverAfterKill: whatever part of the newest writes reached the disk,
// log and disk agree after the recovery (RULES E5).
func TestRecoverAfterKill(t *testing.T) {
	for torn := 0; torn <= 4; torn++ {
		dir := tempDir(t)
		inner := blockdev.NewMem(1 << 20)
		dev := faultdev.New(inner)
		d := &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{})}
		l, _ := openLog(t, dir, hrl.Options{})
		attach(t, d.Filter, l)
		if err := ask(d, blockdev.OpWrite, 0, 0, bytes.Repeat([]byte{1}, 64<<10)); err != nil {
			t.Fatal(err)
		}
		if err := ask(d, blockdev.OpWriteZeroes, 0, 8192, nil); err != nil {
			t.Fatal(err)
		}
		r := &blockdev.Request{Op: blockdev.OpWriteZeroes, Off: 8192, Len: 16384}
		d.Do([]*blockdev.Request{r})
		// The process dies with the disk's write half done.
		dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Partial: int64(torn) * 1024, Err: syscall.EIO})
		g := hrl.NewGroup()
		g.Add(hrl.Entry{Kind: hrl.KindWrite, Off: 4096, Len: 4096, Data: bytes.Repeat([]byte{2}, 4096)})
		if err := l.Append(g); err != nil {
			t.Fatal(err)
		}
		_ = blockdev.WriteAt(dev, bytes.Repeat([]byte{2}, 4096), 4096)
		dev.Reset()
		if err := l.Abort(); err != nil {
			t.Fatal(err)
		}

		l, rec := openLog(t, dir, hrl.Options{})
		f := newFilter(t, dev, Options{})
		id, err := l.AddDisk("root", f.Size())
		if err != nil {
			t.Fatal(err)
		}
		out, err := f.Recover(l, id, "root", Found{Log: rec}, nil)
		if err != nil || rec != hrl.RecoverKill || out.AgainBytes != 4096-int64(torn)*1024 || out.GapBytes != 0 {
			t.Fatalf("torn at %d KiB: %v %+v %v", torn, rec, out, err)
		}
		l.Recovered()
		f.AttachLog(l, id)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		copied := blockdev.NewMem(1 << 20)
		if err := replayInto(t, dir, copied); err != nil {
			t.Fatal(err)
		}
		equalDisks(t, inner, copied)
	}
}

// TestRecoverAfterPowerCut: the log proves nothing, and says so.
func TestRecoverAfterPowerCut(t *testing.T) {
	dir := tempDir(t)
	dev := blockdev.NewMem(1 << 20)
	l, _ := openLog(t, dir, hrl.Options{Life: [32]byte{1}})
	f := newFilter(t, dev, Options{})
	attach(t, f, l)
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
	l, rec := openLog(t, dir, hrl.Options{Life: [32]byte{2}})
	f = newFilter(t, dev, Options{})
	id, err := l.AddDisk("root", f.Size())
	if err != nil {
		t.Fatal(err)
	}
	out, err := f.Recover(l, id, "root", Found{Log: rec}, nil)
	if err != nil || out.Whole == nil || out.GapBytes != f.Size() || f.Stats().GapBytes != f.Size() {
		t.Fatalf("%v %+v %v", rec, out, err)
	}
	if err := l.Recovered(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var inc *hrl.IncompleteError
	if err := replayInto(t, dir, blockdev.NewMem(1<<20)); !errors.As(err, &inc) || inc.Bytes != f.Size() {
		t.Fatalf("the log says %v", err)
	}
}

func equalDisks(t *testing.T, a, b blockdev.Device) {
	t.Helper()
	x, y := make([]byte, a.Size()), make([]byte, b.Size())
	if err := blockdev.ReadAt(a, x, 0); err != nil {
		t.Fatal(err)
	}
	if err := blockdev.ReadAt(b, y, 0); err != nil {
		t.Fatal(err)
	}
	for i := range x {
		if x[i] != y[i] {
			t.Fatalf("the disks differ at byte %d: %d, %d", i, x[i], y[i])
		}
	}
}
