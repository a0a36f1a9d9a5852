package ship_test

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// TestShipDependency: a guest writes a number to one disk and, when that is
// acknowledged, the same number to another, while others load both disks as fast
// as they can. No point may show the second disk ahead of the first (rule R2).
func TestShipDependency(t *testing.T) {
	points := testenv.Rounds(100, 30)
	// The load is kept at what a fast disk takes, not at what memory does. Under the race
	// detector reading the log takes ten times as long as writing it.
	pause := time.Millisecond
	if testenv.Race {
		pause = 10 * time.Millisecond
	}
	w := newWorld(t, 8, 16<<20, 16<<20)
	w.every, w.keep = 30*time.Millisecond, 2*points
	w.startPrimary()
	disks := w.vm.Disks()
	stop := make(chan struct{})
	var writers sync.WaitGroup
	write := func(disk int, off int64, buf []byte) bool {
		if err := ask(disks[disk], blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: int64(len(buf)), Buf: buf}); err != nil {
			t.Error(err)
			return false
		}
		select {
		case <-stop:
			return false
		default:
			return true
		}
	}
	writers.Go(func() {
		buf := make([]byte, 512)
		for n := uint64(1); ; n++ {
			binary.LittleEndian.PutUint64(buf, n)
			if !write(0, 0, buf) || !write(1, 0, buf) {
				return
			}
		}
	})
	for load := range 2 {
		writers.Go(func() {
			buf := make([]byte, 64<<10)
			for n := int64(1); write(load, (1+n%200)*int64(len(buf)), buf); n++ {
				binary.LittleEndian.PutUint64(buf, uint64(n))
				time.Sleep(pause)
			}
		})
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		v, err := w.store.VM(w.id)
		if err == nil && len(v.Points()) >= points {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("there are no %d points: %+v", points, w.s.Status())
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	close(stop)
	writers.Wait()
	if err := w.s.Close(); err != nil {
		t.Fatal(err)
	}
	opened, lead := 0, uint64(0)
	for _, p := range w.replicaVM().Points() {
		var number [2]uint64
		for i, name := range w.disks {
			d, err := w.replicaVM().OpenPoint(p.ID, name)
			if err != nil {
				t.Fatal(err)
			}
			var b [512]byte
			if err := blockdev.ReadAt(d, b[:], 0); err != nil {
				t.Fatal(err)
			}
			number[i] = binary.LittleEndian.Uint64(b[:])
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if number[1] > number[0] || number[0] > number[1]+1 {
			t.Errorf("point %v has number %d on the first disk and %d on the second", p.ID, number[0], number[1])
		}
		opened++
		lead += number[0] - number[1]
	}
	t.Logf("%d points opened, in %d the first disk was ahead", opened, lead)
	if opened < points {
		t.Errorf("%d points were opened", opened)
	}
}
