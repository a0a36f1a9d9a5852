package hot

import (
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
)

// TestRound: who enters a candidate takes it out of the round, even if it has
// left again.
func TestRound(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 1000*mib, Options{Cap: 8 * mib})
	wides := runs(100, 100, 300, 100)
	for _, e := range wides {
		enter(t, m, e.Off, e.Len)
		m.Leave(e.Off, e.Len)
	}
	for i := range int64(20) {
		write(t, m, 2*i)
	}
	enter(t, m, 6*mib, 1) // and stays
	r, ok := m.Cooling()
	if !ok || !slices.Equal(r.Extents()[len(r.Extents())-2:], wides) {
		t.Fatalf("round %v", r.Extents())
	}
	if covers(r.Extents(), 6) {
		t.Error("a candidate has a writer")
	}
	if _, ok := m.Cooling(); ok {
		t.Error("two rounds at once")
	}
	again := r.Extents()[0]
	if !m.Enter(again.Off, 1) || !m.Enter(wides[1].Off, wides[1].Len) {
		t.Fatal("a candidate made a writer wait")
	}
	m.Leave(again.Off, 1)
	half := r.Extents()[1].Off / mib
	m.cell(half).Add(writer) // Enter has counted in, and not yet looked
	m.Leave(wides[1].Off, wides[1].Len)
	if err := m.Cleared(r, true); err != nil {
		t.Fatal(err)
	}
	if s := m.cell(half).Load(); s != idle+writer {
		t.Errorf("cleared under a writer: %d", s)
	}
	m.Close(false)
	_, found := open(t, fs, 1000*mib, Options{})
	for i, want := range map[int64]bool{6: true, half: true, again.Off / mib: true, 350: true, 150: false} {
		if covers(found.Hot, i) != want {
			t.Errorf("extent %d is found: %v", i, !want)
		}
	}
	if n := len(found.Hot); n >= 20 {
		t.Errorf("%d runs found", n)
	}
}

// TestCoolingSparesWhatIsUsed: of two sets of extents the one that is written
// again and again stays.
func TestCoolingSparesWhatIsUsed(t *testing.T) {
	m := fresh(t, newVolatileFS(), 1000*mib, Options{Cap: 64 * mib})
	for i := range int64(500) {
		write(t, m, 2*(i%16), 100+i)
		if r, ok := m.Cooling(); ok {
			for k := range int64(16) {
				write(t, m, 2*k)
			}
			if err := m.Cleared(r, true); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := m.Stats()
	if s.Marks-s.Ahead > 600 || s.HotExtents > 70+aheadMax {
		t.Errorf("%+v", s)
	}
}

func TestFrozen(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 1000*mib, Options{Cap: 8 * mib})
	for i := range int64(20) {
		write(t, m, 2*i)
	}
	r, ok := m.Cooling()
	if !ok {
		t.Fatal("nothing to cool")
	}
	m.Freeze() // a guest's flush failed
	if err := m.Cleared(r, true); err != nil || m.Stats().Cleared != 0 {
		t.Errorf("%v, %+v", err, m.Stats())
	}
	if _, ok := m.Cooling(); ok || !m.Frozen() {
		t.Error("not frozen")
	}
	write(t, m, 500)
	if err := m.Close(true); !errors.Is(err, ErrUnclean) {
		t.Errorf("closed as clean: %v", err)
	}
	if _, found := open(t, fs, 1000*mib, Options{}); len(found.Hot) != 21 {
		t.Errorf("found %+v", found)
	}
}

// TestEnterMeetsCleared has a writer go through the candidates of a round while
// it is cleared, so that both often come to an extent at the same moment. Whoever
// is admitted finds the extent hot, and it stays so.
func TestEnterMeetsCleared(t *testing.T) {
	const extents = 400
	m := fresh(t, newVolatileFS(), extents*mib, Options{Cap: 8 * mib})
	var round atomic.Pointer[Round]
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			r := round.Swap(nil)
			if r == nil {
				runtime.Gosched()
				continue
			}
			if r.m == nil {
				return
			}
			for _, c := range slices.Backward(r.marks) { // towards who clears
				for i := c.end() - 1; i >= c.first; i-- {
					if admitted := m.Enter(i*mib, 1); admitted && m.cell(i).Load()&stateMask != hot {
						t.Errorf("admitted to extent %d, which is being cleared", i)
					}
					m.Leave(i*mib, 1)
				}
			}
		}
	})
	for range 400 {
		for i := int64(0); i < extents; i += 50 {
			enter(t, m, i*mib, 50*mib)
			m.Leave(i*mib, 50*mib)
		}
		if r, ok := m.Cooling(); ok {
			round.Store(&r)
			if err := m.Cleared(r, true); err != nil {
				t.Fatal(err)
			}
		}
	}
	round.Store(&Round{}) // the end
	wg.Wait()
}

// TestClearedTwiceAtOnce: of two who end the same round, one does. The other must not
// open the door to a second round beside the next: in that an extent may turn
// from idle to hot and back behind the back of the first, whose syncs began
// before the write.
func TestClearedTwiceAtOnce(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 1000*mib, Options{Cap: 8 * mib})
	for i := range int64(40) {
		write(t, m, 2*i)
	}
	r, ok := m.Cooling()
	if !ok {
		t.Fatal("nothing to cool")
	}
	second := make(chan error, 1)
	var once sync.Once
	fs.mu.Lock()
	fs.before = func(op string, _ *volatileFile, _ []byte, _ int64) {
		if op != "sync" {
			return
		}
		once.Do(func() { // the first is in its commit
			go func() { second <- m.Cleared(r, true) }()
			eventually(t, "the second is refused", func() bool { return len(second) == 1 })
			if err := m.GiveUp(r); !errors.Is(err, ErrRound) {
				t.Errorf("given up while it is cleared: %v", err)
			}
			if _, ok := m.Cooling(); ok {
				t.Error("a round beside one that is not over")
			}
		})
	}
	fs.mu.Unlock()
	if err := m.Cleared(r, true); err != nil {
		t.Error(err)
	}
	if err := <-second; !errors.Is(err, ErrRound) {
		t.Errorf("ended again with %v", err)
	}
	if m.Stats().Cleared == 0 {
		t.Error("nothing was cleared")
	}
}

// TestFailedSyncOfAnOldRound: that a sync has failed counts, whatever became of
// the round it was for.
func TestFailedSyncOfAnOldRound(t *testing.T) {
	m := fresh(t, newVolatileFS(), 100*mib, Options{})
	if err := m.Cleared(Round{}, false); !errors.Is(err, ErrRound) || !m.Frozen() {
		t.Errorf("%v, frozen: %v", err, m.Frozen())
	}
}
