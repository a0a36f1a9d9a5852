package ship_test

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
)

// unreadable is what the newest point has as unreadable of a disk.
func (w *world) unreadable(i int) [][2]int64 {
	w.t.Helper()
	points := w.replicaVM().Points()
	p := points[len(points)-1]
	if p.Damaged != "" {
		w.t.Errorf("point %v counts as damaged: %s", p.ID, p.Damaged)
	}
	if got := w.s.Status().Unreadable; got != p.Unread() {
		w.t.Errorf("the primary says %q, the replica %q", got, p.Unread())
	}
	return p.Disks[i].Unreadable
}

// TestUnreadable: blocks that the disk does not give do not stop points; the replica
// keeps what it had there and names them, until they are written or can be read
// (RULES G5).
func TestUnreadable(t *testing.T) {
	const mib, bad = 1 << 20, 1<<20 + 4096
	w := newWorld(t, 11, 4*mib, 2*mib)
	var dev *faultdev.Device
	fail := false
	fault := func() {
		dev.Reset()
		if fail {
			dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: bad, Len: 8192}, Err: syscall.EIO})
			dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Within: blockdev.Extent{Off: bad, Len: 8192}, Err: syscall.EIO, Partial: 4096, Times: 1})
		}
	}
	w.wrap = func(i int, d blockdev.Device) blockdev.Device {
		if i > 0 {
			return d
		}
		dev = faultdev.New(d)
		fault()
		return dev
	}
	want := func(what string, ranges ...[2]int64) {
		t.Helper()
		if got := w.unreadable(0); !slices.Equal(got, ranges) {
			t.Fatalf("%s: unreadable %v, not %v", what, got, ranges)
		}
		if got := w.unreadable(1); got != nil {
			t.Fatalf("%s: the other disk's %v", what, got)
		}
		for i, d := range w.vm.Disks() {
			if all, _ := d.GapBytes(); all != 0 {
				t.Fatalf("%s: %d bytes of disk %d are gaps", what, all, i)
			}
		}
	}
	w.startPrimary()
	w.write(0, 0, 4*mib)
	w.sync()
	want("at first")

	// A write fails half way, and what it has left cannot be read.
	fail = true
	fault()
	half := make([]byte, 8192)
	w.fill(half)
	if err := ask(w.vm.Disks()[0], blockdev.Request{Op: blockdev.OpWrite, Off: bad, Len: 8192, Buf: half}); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	w.write(0, mib, 4096)       // in the same block
	w.write(0, mib+12288, 4096) // behind it
	w.write(0, 3*mib, 4096)
	w.sync() // the replica is what the model is: the failed write is not in it
	want("after a failed write", [2]int64{bad, 8192})
	if s := w.s.Status(); !strings.Contains(s.Unreadable, "disk0 [1052672, +8192)") || s.Health != "normal" {
		t.Errorf("the state is %+v", s)
	}
	w.write(0, 2*mib, 512)
	w.write(1, 0, 512)
	w.sync()
	want("at the next point", [2]int64{bad, 8192})
	for _, clean := range []bool{true, false} {
		w.stopPrimary(clean)
		w.startPrimary()
		w.write(0, 2*mib, 512)
		w.sync()
		want("after a restart", [2]int64{bad, 8192})
	}
	for _, d := range w.vm.Disks() {
		d.GapAll() // all is compared
	}
	w.sync()
	want("compared", [2]int64{bad, 8192})

	// A write heals what it covers.
	dev.Reset()
	dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: bad, Len: 8192}, Err: syscall.EIO})
	w.write(0, bad+4096, 4096)
	w.sync()
	want("written in part", [2]int64{bad, 4096})

	// It is killed with a frame in the log that cannot be compared.
	w.write(0, bad+4096, 4096)
	w.stopPrimary(false)
	w.startPrimary()
	w.model[0] = slices.Clone(w.model[0]) // of what is now unreadable the replica has what it had
	before := w.states[w.s.Status().LastPoint.ID]
	copy(w.model[0][bad:bad+8192], before[0][bad:bad+8192])
	lost := w.sync()
	want("killed", [2]int64{bad, 8192})
	w.check(lost)

	// What can be read again is copied by itself, here with the next start.
	fail = false
	w.stopPrimary(true)
	got := make([]byte, 8192)
	w.startPrimary()
	if err := blockdev.ReadAt(dev, got, bad); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got[:4096], half[:4096]) {
		t.Fatal("the failed write has not left what it should")
	}
	copy(w.model[0][bad:], got)
	w.sync()
	want("readable again")

	// Nothing but that: a whole block, with the content that the replica has.
	dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: 2 * mib, Len: 64 << 10}, Err: syscall.EIO})
	w.vm.Disks()[0].AddGap(2*mib, 512)
	w.sync()
	want("a whole block", [2]int64{2 * mib, 64 << 10})
	dev.Reset()
	w.vm.Disks()[0].AddGap(2*mib, 512)
	w.sync()
	want("compared and equal")
	w.checkHistory()
}

// TestUnreadableFirst: a disk that has unreadable blocks when it is first copied.
func TestUnreadableFirst(t *testing.T) {
	const mib = 1 << 20
	w := newWorld(t, 12, 2*mib+4096)
	w.wrap = func(_ int, d blockdev.Device) blockdev.Device {
		dev := faultdev.New(d)
		for _, off := range []int64{512, 8192 + 512, 128 << 10, mib - 512, 2 * mib} {
			dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: off, Len: 1024}, Err: syscall.EIO})
		}
		return dev
	}
	image, err := blockdev.OpenFile(w.image(0), blockdev.FileOptions{Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	w.fill(w.model[0])
	if err := errors.Join(blockdev.WriteAt(image, w.model[0], 0), image.Close()); err != nil {
		t.Fatal(err)
	}
	lost := [][2]int64{{0, 4096}, {8192, 4096}, {128 << 10, 4096}, {mib - 4096, 8192}, {2 * mib, 4096}}
	for _, r := range lost {
		clear(w.model[0][r[0] : r[0]+r[1]]) // there is nothing older
	}
	w.startPrimary()
	w.sync()
	if got := w.unreadable(0); !slices.Equal(got, lost) {
		t.Fatalf("unreadable %v, not %v", got, lost)
	}
	w.write(0, 0, mib)
	w.sync()
	if got := w.unreadable(0); !slices.Equal(got, [][2]int64{{mib, 4096}, {2 * mib, 4096}}) {
		t.Fatalf("unreadable %v", got)
	}
}

// TestUnreadableRandom: whatever is unreadable now and then, written, resized, killed and
// compared: but for what it names a point is the disk, and it names nothing that could
// always be read.
func TestUnreadableRandom(t *testing.T) {
	const mib = 1 << 20
	w := newWorld(t, 13, 2*mib+512*3)
	var dev *faultdev.Device
	var faults []blockdev.Extent
	ever := map[int64]bool{} // pieces that could not be read at some time
	set := func() {
		dev.Reset()
		for _, e := range faults {
			dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: e, Err: syscall.EIO})
		}
	}
	w.wrap = func(_ int, d blockdev.Device) blockdev.Device {
		dev = faultdev.New(d)
		set()
		return dev
	}
	check := func(id wire.PointID) (named int64) {
		t.Helper()
		d, err := w.replicaVM().OpenPoint(id, "disk0")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		got := make([]byte, d.Size())
		if err := blockdev.ReadAt(d, got, 0); err != nil {
			t.Fatal(err)
		}
		if int64(len(got)) != w.sizes[0] {
			t.Fatalf("point %v has %d bytes, the disk %d", id, len(got), w.sizes[0])
		}
		for _, r := range w.unreadable(0) {
			copy(got[r[0]:r[0]+r[1]], w.model[0][r[0]:])
			named += r[1]
			for off := r[0] &^ 4095; off < r[0]+r[1]; off += 4096 {
				if !ever[off] {
					t.Fatalf("point %v: byte %d counts as unreadable, and never was", id, off)
				}
			}
		}
		if !slices.Equal(got, w.model[0]) {
			k := 0
			for got[k] == w.model[0][k] {
				k++
			}
			t.Fatalf("point %v differs from the disk at byte %d, which is not named", id, k)
		}
		return named
	}
	point := func() wire.PointID {
		t.Helper()
		var id wire.PointID
		var err error
		for range 5 {
			if id, err = w.s.Sync(t.Context()); err == nil {
				return id
			}
		}
		t.Fatal(err)
		return id
	}
	w.startPrimary()
	var seen int64
	for range 60 {
		switch w.rng.IntN(8) {
		case 0, 1, 2:
			e := blockdev.Extent{Off: w.rng.Int64N(w.sizes[0]/512) * 512, Len: int64(1+w.rng.IntN(40)) * 512}
			faults = append(faults, e)
			for off := e.Off &^ 4095; off < e.End(); off += 4096 {
				ever[off] = true
			}
			set()
		case 3:
			faults = nil
			set()
		case 4:
			w.vm.Disks()[0].GapAll()
		case 5:
			w.resize(0, int64(2+w.rng.IntN(5000))*512)
		case 6:
			w.changes(3)
			w.stopPrimary(false)
			w.boots += byte(w.rng.IntN(2)) // or its power is cut
			w.startPrimary()
		}
		w.vm.Disks()[0].AddGap(w.rng.Int64N(w.sizes[0]), 1)
		w.changes(w.rng.IntN(6))
		seen += check(point())
	}
	if seen == 0 {
		t.Error("nothing was ever unreadable")
	}
	faults = nil
	w.stopPrimary(true)
	w.startPrimary()
	w.vm.Disks()[0].GapAll()
	if n := check(point()); n != 0 {
		t.Errorf("%d bytes are unreadable in the end", n)
	}
}

// TestUnreadableSession: a copy that goes on after a crash has not forgotten what could
// not be read: it is in the log alone, which counts for nothing after a power cut.
func TestUnreadableSession(t *testing.T) {
	defer ship.SetCopyLayerMax(4 * block)()
	for _, powerCut := range []bool{false, true} {
		w := newWorld(t, 14, 64*block)
		w.boots, w.streams = 1, 1
		w.wrap = func(_ int, d blockdev.Device) blockdev.Device {
			dev := faultdev.New(d)
			dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: block + 8192, Len: 4096}, Err: syscall.EIO})
			dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: 60 * block, Len: block}, Err: syscall.EIO})
			return dev
		}
		w.fillImages()
		clear(w.model[0][block+8192 : block+12288])
		clear(w.model[0][60*block : 61*block])
		w.limit = 4 << 20
		w.startPrimary()
		w.copying(4)
		w.limit = 0
		w.stopPrimary(false)
		if powerCut {
			w.boots++
		}
		w.startPrimary()
		w.sync()
		if got := w.unreadable(0); !slices.Equal(got, [][2]int64{{block + 8192, 4096}, {60 * block, block}}) {
			t.Errorf("power cut %v: unreadable %v", powerCut, got)
		}
		w.stopPrimary(true)
	}
}
