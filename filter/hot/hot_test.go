package hot

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
)

func open(t testing.TB, fs hrl.FS, size int64, o Options) (*Map, Found) {
	t.Helper()
	path := "d/hot"
	if fs == hrl.OS {
		path = filepath.Join(t.TempDir(), path)
	}
	m, found, err := Open(fs, path, size, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close(false) })
	return m, found
}

// fresh is a new map that owes nothing any more, not even the range of all.
func fresh(t testing.TB, fs hrl.FS, size int64, o Options) *Map {
	t.Helper()
	m, _ := open(t, fs, size, o)
	m.Forget()
	for r, ok := m.Cooling(); ok; r, ok = m.Cooling() {
		if err := m.Cleared(r, true); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// enter is what a write does before it is issued.
func enter(t testing.TB, m *Map, off, length int64) {
	t.Helper()
	if !m.Enter(off, length) {
		if err := m.Mark(off, length); err != nil {
			t.Fatal(err)
		}
	}
}

func write(t testing.TB, m *Map, extents ...int64) {
	t.Helper()
	for _, i := range extents {
		enter(t, m, i*mib, 1)
		m.Leave(i*mib, 1)
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func runs(pairs ...int64) (out []blockdev.Extent) {
	for ; len(pairs) > 0; pairs = pairs[2:] {
		out = append(out, blockdev.Extent{Off: pairs[0] * mib, Len: pairs[1] * mib})
	}
	return out
}

func TestSessions(t *testing.T) {
	fs := newVolatileFS()
	size := int64(1000*mib - 4096)
	m, found := open(t, fs, size, Options{})
	if found.Kind != New || !found.All || !slices.Equal(found.Hot, []blockdev.Extent{{Off: 0, Len: size}}) {
		t.Fatalf("new: %+v", found)
	}
	if _, ok := m.Cooling(); ok {
		t.Error("what was found is to be cleared before it is forgotten")
	}
	if err := m.Close(true); !errors.Is(err, ErrUnclean) {
		t.Errorf("closed as clean, with all of it owed: %v", err)
	}
	m, found = open(t, fs, size, Options{})
	if found.Kind != Unclean || !found.All && !slices.Equal(found.Hot, []blockdev.Extent{{Off: 0, Len: size}}) {
		t.Fatalf("after new, not forgotten: %+v", found)
	}
	m.Close(false)

	m = fresh(t, fs, size, Options{})
	write(t, m, 4, 3, 500, 999) // not in sequence
	m.Close(false)
	want := []blockdev.Extent{{Off: 3 * mib, Len: 2 * mib}, {Off: 500 * mib, Len: mib}, {Off: 999 * mib, Len: mib - 4096}}
	for range 2 { // not forgotten, so found again
		m, found = open(t, fs, size, Options{})
		if found.Kind != Unclean || found.All || found.Why != nil || !slices.Equal(found.Hot, want) {
			t.Fatalf("unclean: %+v", found)
		}
		if !m.Enter(500*mib, 10) {
			t.Error("what was found is not hot")
		}
		m.Leave(500*mib, 10)
		m.Close(false)
	}
	m, found = open(t, fs, 900*mib, Options{})
	if !slices.Equal(found.Hot, runs(3, 2, 500, 1)) {
		t.Errorf("of a shrunk disk: %+v", found)
	}
	m.Forget()
	if err := m.Close(true); err != nil {
		t.Fatal(err)
	}
	for _, warm := range []bool{true, false} {
		m, found = open(t, fs, size, Options{Warm: warm})
		if found.Kind != Clean || found.All || found.Hot != nil {
			t.Fatalf("clean: %+v", found)
		}
		if m.Enter(3*mib, 2*mib) != warm {
			t.Errorf("warm %v", warm)
		}
		m.Leave(3*mib, 2*mib)
		if err := m.Close(true); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWarmUpToCap(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 100*mib, Options{})
	write(t, m, 30, 24, 23, 22, 21, 20, 14, 13, 12, 11, 10)
	if err := m.Close(true); err != nil {
		t.Fatal(err)
	}
	m, _ = open(t, fs, 100*mib, Options{Warm: true, Cap: 8 * mib})
	if n := m.Stats().HotExtents; n != 8 {
		t.Errorf("%d extents are warm", n)
	}
	m.Close(false)
	if _, found := open(t, fs, 100*mib, Options{}); !slices.Equal(found.Hot, runs(10, 5, 20, 3)) {
		t.Errorf("warm marks are found as %+v", found)
	}
}

func TestLocked(t *testing.T) {
	fs := newVolatileFS()
	open(t, fs, mib, Options{})
	if _, _, err := Open(fs, "d/hot", mib, Options{}); !errors.Is(err, hrl.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
}

func TestEmptyAndHuge(t *testing.T) {
	fs := newVolatileFS()
	m, found := open(t, fs, 0, Options{})
	if len(found.Hot) != 0 {
		t.Errorf("%+v", found)
	}
	if !m.Enter(0, 0) || m.Mark(0, 0) != nil {
		t.Error("nothing has to wait")
	}
	m.Leave(0, 0)
	if err := m.Grow(10 * mib); err != nil {
		t.Fatal(err)
	}
	enter(t, m, 9*mib, mib)
	if err := m.Grow(1 << 62); err == nil || m.Broken() != nil {
		t.Errorf("%v, broken: %v", err, m.Broken())
	}
	if _, _, err := Open(fs, "other", 1<<62, Options{}); err == nil {
		t.Error("opened")
	}
}

func TestGrow(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 100*mib, Options{})
	write(t, m, 7, 99)
	enter(t, m, 10*mib, 80*mib)
	for _, extents := range []int64{50, 200, 40000, 70000} {
		if err := m.Grow(extents * mib); err != nil {
			t.Fatal(err)
		}
	}
	write(t, m, 16383, 39999, 69999)
	m.Leave(10*mib, 80*mib)
	m.Close(false)
	_, found := open(t, fs, 80000*mib, Options{})
	if want := runs(7, 1, 10, 80, 99, 1, 16383, 1, 39999, 1, 69999, 1); found.All || !slices.Equal(found.Hot, want) {
		t.Errorf("found %+v", found)
	}
}

// TestGroupCommit: whoever asks while a commit is under way shares the next.
func TestGroupCommit(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 1000*mib, Options{})
	before := m.Stats()
	syncing, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fs.mu.Lock()
	fs.before = func(op string, _ *volatileFile, _ []byte, _ int64) {
		if op == "sync" {
			once.Do(func() { close(syncing); <-goOn })
		}
	}
	fs.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { write(t, m, 0) })
	<-syncing
	const n = 100
	for i := range int64(n) {
		wg.Go(func() { write(t, m, 2+2*i) })
	}
	eventually(t, "all have asked", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return count(m.marks) == n
	})
	if m.Enter(0, 1) {
		t.Error("admitted before the mark is durable")
	}
	m.Leave(0, 1)
	close(goOn)
	wg.Wait()
	if got := m.Stats().Commits - before.Commits; got != 2 {
		t.Errorf("%d commits", got)
	}
}

func TestMarkAhead(t *testing.T) {
	m := fresh(t, newVolatileFS(), 5000*mib, Options{})
	before := m.Stats()
	for i := range int64(170) { // two streams
		write(t, m, i, 1000+i)
	}
	s := m.Stats()
	if n := s.Commits - before.Commits; n > 30 {
		t.Errorf("%d commits for 340 extents in sequence", n)
	}
	if s.HotExtents > 340+2*aheadMax {
		t.Errorf("%d extents are hot", s.HotExtents)
	}
	ahead := s.Ahead
	for i := range int64(20) {
		write(t, m, 2000+i*50)
	}
	if n := m.Stats().Ahead - ahead; n != 0 {
		t.Errorf("%d extents marked ahead of no sequence", n)
	}
	write(t, m, 4997, 4998, 4999) // up to the end of the disk
}

func TestRanges(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 20000*mib, Options{})
	for i := range int64(50) {
		before := m.Stats().Commits
		enter(t, m, i*300*mib, 100*mib)
		if n := m.Stats().Commits - before; n != 1 {
			t.Fatalf("%d commits for a range", n)
		}
	}
	if s := m.Stats(); s.Ranges > rangesMax || s.Marks != 0 {
		t.Errorf("%+v", s)
	}
	if !m.Enter(100, 90*mib) {
		t.Error("part of a range is not hot")
	}
	_, found := open(t, fs.crash(rand.New(rand.NewPCG(1, 1))), 20000*mib, Options{})
	for i := range int64(50) {
		for e := i * 300; e < i*300+100; e++ {
			if !covers(found.Hot, e) {
				t.Fatalf("extent %d is not found", e)
			}
		}
	}
	m.Leave(100, 90*mib)
	for i := range int64(50) {
		m.Leave(i*300*mib, 100*mib)
	}
	for _, w := range m.wides {
		if w.writers != 0 {
			t.Errorf("%d writers in range %v", w.writers, w.run)
		}
	}
}

// TestClosed: what comes after the end is an error, and Close may come twice.
func TestClosed(t *testing.T) {
	m := fresh(t, newVolatileFS(), 100*mib, Options{})
	enter(t, m, 5*mib, 1)
	if err := m.Close(true); !errors.Is(err, ErrUnclean) {
		t.Errorf("closed as clean with a writer: %v", err)
	}
	if m.Close(true) != nil || !errors.Is(m.Mark(0, 1), ErrClosed) || !errors.Is(m.Grow(1<<40), ErrClosed) {
		t.Error("not closed")
	}
}

// TestFailTheNth fails each operation of a session in turn, once or from then
// on, and then cuts the power.
func TestFailTheNth(t *testing.T) {
	cuts := uint64(4)
	if raceEnabled {
		cuts = 1
	}
	for _, sticky := range []bool{false, true} {
		for k, fired := 1, true; fired; k++ {
			fs := newVolatileFS()
			fs.failAt, fs.sticky = k, sticky
			must := map[int64]bool{}
			m, _, err := Open(fs, "d/hot", 200*mib, Options{Cap: 8 * mib})
			if err == nil {
				failingSession(t, m, must)
			}
			fired = fs.fired
			var broken error
			if err == nil {
				broken = m.Broken()
				m.Close(false)
			}
			for seed := range cuts {
				left := fs.crash(rand.New(rand.NewPCG(uint64(k), seed)))
				after, found, err := Open(left, "d/hot", 300*mib, Options{})
				if err != nil {
					t.Fatalf("operation %d: open after it: %v", k, err)
				}
				after.Close(false)
				for i := range must {
					if !covers(found.Hot, i) {
						t.Errorf("operation %d: extent %d is not found: %+v", k, i, found)
					}
				}
				if broken != nil && !sticky && (!found.All || found.Kind == Clean) {
					t.Errorf("operation %d: the map broke, and is believed: %+v", k, found)
				}
			}
			if t.Failed() {
				return
			}
		}
	}
}

func failingSession(t *testing.T, m *Map, must map[int64]bool) {
	at := func(off, n int64) {
		if m.Enter(off*mib, n*mib) || m.Mark(off*mib, n*mib) == nil {
			for i := off; i < off+n; i++ {
				must[i] = true
			}
		} else if m.Broken() == nil {
			t.Error("no mark, and the map is not broken")
		}
		m.Leave(off*mib, n*mib)
	}
	m.Forget()
	for i := range int64(20) {
		at(5*i, 2)
	}
	at(100, 80)
	for range 2 {
		if r, ok := m.Cooling(); ok {
			at(0, 1)
			_ = m.Cleared(r, true) // it says so again below
			for _, e := range r.Extents() {
				for i := e.Off / mib; i*mib < e.End(); i++ {
					if i != 0 {
						delete(must, i)
					}
				}
			}
		}
	}
	if m.Grow(300*mib) == nil {
		at(290, 3)
	}
	at(30, 2)
	if broken := m.Broken(); broken != nil {
		if _, ok := m.Cooling(); ok {
			t.Error("a broken map cools")
		}
		if err := m.Mark(199*mib, 1); !errors.Is(err, broken) {
			t.Errorf("a broken map marks: %v", err)
		}
	}
}
