package ship_test

import (
	"os"
	"testing"

	"afterimage/hrl/wire"
)

// resize gives a disk another size, as its daemon does.
func (w *world) resize(i int, size int64) {
	w.t.Helper()
	if err := w.vm.Resize(w.vm.Disks()[i], size); err != nil {
		w.t.Fatal(err)
	}
	w.resized(i, size)
}

// resized says so to the model.
func (w *world) resized(i int, size int64) {
	if m := w.model[i]; size <= int64(len(m)) {
		w.model[i] = m[:size:size]
	} else {
		w.model[i] = append(m, make([]byte, size-int64(len(m)))...)
	}
	w.sizes[i] = size
}

// TestResize: a point has the size its disk had, those before keep theirs, and what was
// cut off does not come back, whatever else happens in the same interval (RULES L2).
func TestResize(t *testing.T) {
	const unit = 256 << 10 // less is faster
	for _, tt := range []struct {
		name string
		do   func(w *world)
	}{
		{"grow", func(w *world) { w.resize(0, 6*unit+4096); w.write(0, 6*unit, 4096) }},
		{"grow in part of a block", func(w *world) { w.resize(0, 4*unit+4096); w.resize(0, 4*unit+3*4096); w.write(0, 4*unit+8192, 4096) }},
		{"shrink", func(w *world) { w.write(0, 3*unit, 8192); w.resize(0, unit+4096) }},
		{"shrink and grow", func(w *world) { w.resize(0, 2*unit+512*8); w.resize(0, 4*unit) }},
		{"shrink, grow, write", func(w *world) {
			w.resize(0, unit)
			w.resize(0, 8*unit)
			w.write(0, 2*unit, 4096)
			w.write(0, 7*unit, 512)
		}},
		{"grow and shrink", func(w *world) {
			w.resize(0, 8*unit)
			w.write(0, 7*unit, 4096)
			w.resize(0, 4*unit)
			w.write(0, 4*unit-512, 512)
		}},
		{"under gaps", func(w *world) {
			for _, d := range w.vm.Disks() {
				d.GapAll()
			}
			w.resize(0, unit)
			w.write(0, 4096, 4096)
			w.resize(0, 3*unit)
			w.resize(1, 2*unit)
		}},
		{"shrunk gaps", func(w *world) { w.vm.Disks()[0].AddGap(2*unit, 2*unit); w.resize(0, unit) }},
		{"nothing but the size", func(w *world) { w.resize(1, 4*unit) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, after := range []string{"", "restart", "kill", "power cut", "sync, then kill"} {
				w := newWorld(t, 3, 4*unit, unit)
				w.startPrimary()
				w.write(0, 0, 4*unit)
				w.write(1, 0, unit)
				first := w.sync()
				tt.do(w)
				switch after {
				case "restart", "kill", "power cut":
					w.stopPrimary(after == "restart")
					if after == "power cut" {
						w.boots++
					}
					w.startPrimary()
				case "sync, then kill":
					w.sync()
					w.stopPrimary(false)
					w.startPrimary()
				}
				w.changes(5)
				second := w.sync()
				// The size that the replica tells of the VM is the newest one.
				for i, d := range w.replicaVM().Disks() {
					if d.Size != w.sizes[i] {
						t.Errorf("after %q: disk %s has %d bytes at the replica, %d here", after, d.Name, d.Size, w.sizes[i])
					}
				}
				w.resize(0, 4*unit)
				w.changes(5)
				third := w.sync()
				for _, id := range []wire.PointID{first, second, third} {
					w.check(id)
				}
				if w.checkHistory() < 3 {
					t.Error("points are missing")
				}
				w.stopPrimary(true)
			}
		})
	}
}

// TestResizeMeanwhile: disks are resized while all of them is copied.
func TestResizeMeanwhile(t *testing.T) {
	const mib = 1 << 20
	w := newWorld(t, 5, 12*mib, 6*mib)
	w.startPrimary()
	for i := range w.disks {
		w.write(i, 0, w.sizes[i])
	}
	w.sync()
	for round := range 4 {
		for _, d := range w.vm.Disks() {
			d.GapAll()
		}
		done := make(chan wire.PointID)
		go func() {
			id, err := w.s.Sync(t.Context())
			if err != nil {
				t.Errorf("disks are resized, and copying fails: %v", err)
			}
			done <- id
		}()
		for n := range 12 {
			i := n % 2
			w.resize(i, int64(1+w.rng.IntN(3*12))*mib/3&^4095)
			w.write(i, w.sizes[i]-512, 512)
			w.changes(3)
		}
		if id := <-done; id.IsZero() {
			t.Fatal("no point while disks were resized")
		}
		if round%2 == 1 {
			w.stopPrimary(round == 1)
			w.startPrimary()
		}
		w.sync()
	}
	w.checkHistory()
}

// TestResizedOffline: an image that somebody has resized while the VM was not served.
func TestResizedOffline(t *testing.T) {
	const mib = 1 << 20
	for _, clean := range []bool{true, false} {
		w := newWorld(t, 7, 4*mib)
		w.startPrimary()
		w.write(0, 0, 4*mib)
		w.sync()
		for _, size := range []int64{mib + 4096, 4 * mib, 2 * mib, 8 * mib} {
			w.changes(5)
			w.stopPrimary(clean)
			if err := os.Truncate(w.image(0), size); err != nil {
				t.Fatal(err)
			}
			w.resized(0, size)
			w.startPrimary()
			w.changes(5)
			w.sync()
		}
		w.checkHistory()
		w.stopPrimary(true)
	}
}
