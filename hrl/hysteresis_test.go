package hrl

import (
	"errors"
	"syscall"
	"testing"
	"time"
)

// again lets the time pass in which the log refuses appends, and waits until the keeper
// has taken note.
func (h *history) again() {
	h.t.Helper()
	eventually(h.t, "the log takes appends again", func() bool {
		h.recover()
		h.l.mu.Lock()
		defer h.l.mu.Unlock()
		return h.l.spareErr == nil && !h.l.suspect
	})
}

// TestBackOff: a log that fails whenever it comes back stays away for longer each time;
// one that was well for a minute begins anew.
func TestBackOff(t *testing.T) {
	fsys := newFaultFS()
	l, _ := openTest(t, tempDir(t), Options{FS: fsys})
	h := newHistory(t, l, 1)
	h.writeUntilGood(0, 512, 1)
	fail := func(want time.Duration) {
		t.Helper()
		fsys.set(func() { fsys.noAppend = true })
		if err := h.write(0, 512, 2); !errors.Is(err, errInjected) {
			t.Fatal(err)
		}
		l.mu.Lock()
		pause, wait := l.pause, time.Until(l.retryAt)
		l.mu.Unlock()
		if pause != want || wait > want || wait < want-10*time.Second {
			t.Errorf("a pause of %v, %v left; it should be %v", pause, wait, want)
		}
		if err := h.write(0, 512, 2); err == nil {
			t.Error("appended in the pause")
		}
		h.again()
		fsys.set(func() { fsys.noAppend = false })
	}
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		fail(want * time.Second)
	}
	h.writeUntilGood(0, 512, 3)
	l.mu.Lock()
	l.returned = time.Now().Add(-healthyAfter)
	l.mu.Unlock()
	fail(retryMin)
	fail(2 * retryMin)
	h.writeUntilGood(0, 512, 3)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestProbe: what finds out that a log still hangs, or fails, or is slow, is the keeper. No
// append tries.
func TestProbe(t *testing.T) {
	fsys := newFaultFS()
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{FS: fsys, AppendLimit: 20 * time.Millisecond})
	h := newHistory(t, l, 1)
	h.writeUntilGood(0, 512, 1)
	probing, let := make(chan struct{}, 100), make(chan error)
	fsys.set(func() {
		fsys.noAppend = true
		fsys.reading = func() error {
			probing <- struct{}{}
			return <-let
		}
	})
	if err := h.write(0, 512, 2); !errors.Is(err, errInjected) {
		t.Fatal(err)
	}
	fsys.set(func() { fsys.noAppend = false })
	refused := func(when string) {
		t.Helper()
		before := l.Stats().Appends
		for range 100 {
			if err := h.write(0, 512, 2); err == nil {
				t.Fatalf("appended %s", when)
			}
		}
		if st := l.Stats(); st.Appends != before || st.Late != 0 {
			t.Errorf("tried %s: %+v", when, st)
		}
	}
	h.recover()
	<-probing
	refused("while the probe hangs")
	time.Sleep(25 * time.Millisecond)
	let <- nil
	eventually(t, "the slow probe is over", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return l.pause == 2*retryMin })
	refused("after a probe that was late")
	h.recover()
	<-probing
	let <- errInjected
	eventually(t, "the bad probe is over", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return l.pause == 4*retryMin })
	refused("after a probe that failed")
	fsys.set(func() { fsys.reading = nil })
	h.writeUntilGood(0, BlockBytes, 3)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	checkReplay(t, dir, h.model)
}

// TestReclaimBunch: at its quota a log gives up several segments at once, so that the
// next time is not soon; the gap frames of all of them are true.
func TestReclaimBunch(t *testing.T) {
	dir := tempDir(t)
	var given BlockSet
	calls := 0
	l, _ := openTest(t, dir, Options{Quota: 24 * minSegmentBytes, Reclaimed: func(s *BlockSet) error {
		calls++
		given.AddSet(s)
		return nil
	}})
	h := newHistory(t, l, 1)
	data := make([]byte, PayloadMax)
	for i := range 24*8 + 60 {
		_, _ = h.bytes.Read(data)
		h.writeUntilGood(h.rng.Int64N(testDisk-PayloadMax)/512*512, PayloadMax, byte(i))
	}
	n := l.Stats().Reclaimed
	if calls == 0 || int64(calls)*3 > n+2 {
		t.Errorf("%d segments were given up in %d goes", n, calls)
	}
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
	if f := mustOpen(t, dir).Verify(); len(f) > 0 {
		t.Fatalf("verify: %v", f)
	}
	got, err := replayed(t, dir)
	var inc *IncompleteError
	if err != nil && !errors.As(err, &inc) {
		t.Fatal(err)
	}
	for off := range got {
		if got[off] != h.model[off] && !given.Has(h.disk, int64(off)) {
			t.Fatalf("byte %d differs", off)
		}
	}
}

// TestNoRoom: a log that finds no room, or has to leave it to the disks, goes on with what it
// has.
func TestNoRoom(t *testing.T) {
	for _, reserved := range []bool{false, true} {
		fsys := newFaultFS()
		made := 0
		full := func() bool { made++; return made > 6 }
		o := Options{FS: fsys, Quota: 100 * minSegmentBytes}
		if reserved {
			o.Room = func(int64) bool { return !full() }
		} else {
			fsys.before = func(op string) error {
				if op == "allocate" && full() {
					return syscall.ENOSPC
				}
				return nil
			}
		}
		var given BlockSet
		o.Reclaimed = func(s *BlockSet) error { given.AddSet(s); return nil }
		dir := tempDir(t)
		l, _ := openTest(t, dir, o)
		h := newHistory(t, l, 1)
		for i := range 100 {
			if err := h.write(h.rng.Int64N(testDisk-PayloadMax)/512*512, PayloadMax, byte(i)); err != nil && !errors.Is(err, ErrNoSegment) {
				t.Fatalf("append %d: %v", i, err)
			}
		}
		if st := l.Stats(); st.Reclaimed == 0 || st.SegmentBytes > 7*minSegmentBytes {
			t.Errorf("%+v", st)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if f := mustOpen(t, dir).Verify(); len(f) > 0 {
			t.Fatalf("verify: %v", f)
		}
	}
}

// TestNoSegmentOnce: while the keeper hangs, one append waits for the segment that it was to
// make, and no other; when there is one they go on.
func TestNoSegmentOnce(t *testing.T) {
	fsys := newFaultFS()
	dir := tempDir(t)
	let := make(chan struct{})
	made := 0
	fsys.before = func(op string) error {
		if op == "allocate" {
			if made++; made > 3 {
				<-let
			}
		}
		return nil
	}
	l, _ := openTest(t, dir, Options{FS: fsys, AppendLimit: 20 * time.Millisecond})
	h := newHistory(t, l, 1)
	var err error
	for i := 0; err == nil && i < 100; i++ {
		err = h.write(0, PayloadMax, byte(i))
	}
	if !errors.Is(err, ErrNoSegment) {
		t.Fatal(err)
	}
	for range 100 {
		if err := h.write(0, 512, 1); !errors.Is(err, ErrNoSegment) {
			t.Fatal(err)
		}
	}
	if st := l.Stats(); st.Late != 1 {
		t.Errorf("%d appends waited", st.Late)
	}
	close(let)
	eventually(t, "there is a segment", func() bool { return h.write(0, PayloadMax, 7) == nil })
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	checkReplay(t, dir, h.model)
}
