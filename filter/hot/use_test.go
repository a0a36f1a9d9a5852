package hot

import (
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"afterimage/hrl"
)

// TestNobodyIsAdmittedUnmarked: many writers and one who cools. A checker reads
// along what the map writes: an extent is durably marked from the sync after the
// transaction that marks it until the first byte of the one that clears it. Every
// writer looks, when it is admitted and before it leaves.
func TestNobodyIsAdmittedUnmarked(t *testing.T) {
	const extents, writers = 300, 8
	rounds := 3000
	if raceEnabled {
		rounds = 1000
	}
	fs := newVolatileFS()
	m := fresh(t, fs, extents*mib, Options{Cap: 8 * mib})
	var marked, inRange [extents]atomic.Bool
	var last transaction // one commit is under way at a time
	fs.mu.Lock()
	fs.before = func(op string, _ *volatileFile, p []byte, _ int64) {
		if op != "write" || len(p) != txBytes {
			return
		}
		if err := last.decode(p, extents); err != nil {
			t.Error(err)
		}
		for _, u := range last.updates {
			for i := u.first; u.clear && i < u.end(); i++ {
				marked[i].Store(false)
			}
		}
		now := newBitmap(extents)
		for _, r := range last.ranges {
			now.set(r)
		}
		for i := range int64(extents) {
			if !now.has(i) {
				inRange[i].Store(false)
			}
		}
	}
	fs.after = func(string, *volatileFile) {
		for _, u := range last.updates {
			for i := u.first; !u.clear && i < u.end(); i++ {
				marked[i].Store(true)
			}
		}
		for _, r := range last.ranges {
			for i := r.first; i < r.end(); i++ {
				inRange[i].Store(true)
			}
		}
		last.updates, last.ranges = nil, nil
	}
	fs.mu.Unlock()

	var wg, cooler sync.WaitGroup
	stop := make(chan struct{})
	for n := range uint64(writers) {
		rng := rand.New(rand.NewPCG(n, 1))
		wg.Go(func() {
			for range rounds {
				i, n, is := rng.Int64N(40), 1+rng.Int64N(2), &marked
				if rng.IntN(50) == 0 {
					i, n, is = rng.Int64N(3)*70, 70+rng.Int64N(20), &inRange
				}
				look := func(when string) {
					for k := i; k < i+n; k++ {
						if !is[k].Load() {
							t.Errorf("extent %d of %d from %d on: %s, and not marked", k, n, i, when)
						}
					}
				}
				enter(t, m, i*mib, n*mib)
				look("admitted")
				if rng.IntN(4) == 0 {
					runtime.Gosched()
					look("writing")
				}
				m.Leave(i*mib, n*mib)
			}
		})
	}
	cooler.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if r, ok := m.Cooling(); ok {
				runtime.Gosched()
				if err := m.Cleared(r, true); err != nil {
					t.Error(err)
				}
			}
			runtime.Gosched()
		}
	})
	wg.Wait()
	close(stop)
	cooler.Wait()
	s := m.Stats()
	t.Logf("%+v", s)
	if s.Cleared == 0 || s.ClearedRanges < 2 {
		t.Error("nothing was cleared meanwhile")
	}
	for i := range int64(extents) {
		if v := m.cell(i).Load(); v >= writer || v == marking || v == clearing {
			t.Errorf("extent %d ends as %d", i, v)
		}
	}
}

func TestEnterAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	m := fresh(t, newVolatileFS(), 1000*mib, Options{})
	write(t, m, 7, 8)
	once := func() {
		if !m.Enter(8*mib-100, 4096) {
			t.Error("not hot")
		}
		m.Leave(8*mib-100, 4096)
	}
	if n := testing.AllocsPerRun(1000, once); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestOS is a session on the host's file system.
func TestOS(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image.afterimage", "hot")
	m, found, err := Open(hrl.OS, path, 100*mib, Options{})
	if err != nil || found.Kind != New {
		t.Fatal(found, err)
	}
	m.Forget()
	r, ok := m.Cooling()
	if !ok || m.Cleared(r, true) != nil {
		t.Fatal("the range of all stays")
	}
	write(t, m, 50)
	if err := m.Close(false); err != nil {
		t.Fatal(err)
	}
	m, found, err = Open(hrl.OS, path, 100*mib, Options{})
	if err != nil || len(found.Hot) != 1 || found.Hot[0] != runs(50, 1)[0] {
		t.Fatal(found, err)
	}
	m.Forget()
	if err := m.Close(true); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkEnterLeave is the hot path of a 4 KiB write.
func BenchmarkEnterLeave(b *testing.B) {
	m := fresh(b, newVolatileFS(), 1<<40, Options{})
	for i := range int64(1000) {
		write(b, m, i)
	}
	off := int64(0)
	for b.Loop() {
		if !m.Enter(off, 4096) {
			b.Fatal("not hot")
		}
		m.Leave(off, 4096)
		off = (off + 7*mib + 4096) % (1000*mib - 4096) &^ 4095
	}
}

// BenchmarkEnterLeaveParallel has all processors at extents of their own.
func BenchmarkEnterLeaveParallel(b *testing.B) {
	m := fresh(b, newVolatileFS(), 1<<40, Options{})
	for i := range int64(1000) {
		write(b, m, i)
	}
	var next atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		off := next.Add(100) % 1000 * mib
		for pb.Next() {
			m.Enter(off, 4096)
			m.Leave(off, 4096)
		}
	})
}

// BenchmarkMarkCold is one writer that finds every extent cold: a pwrite and an
// fdatasync of 4 KiB, on the file system of the temporary directory.
func BenchmarkMarkCold(b *testing.B) {
	m := fresh(b, hrl.OS, 1<<40, Options{})
	i := int64(0)
	for b.Loop() {
		i = (i + 7919) % (1 << 20)
		enter(b, m, i*mib, 4096)
		m.Leave(i*mib, 4096)
	}
}

// TestGrowMeetsMark has writers mark while the map grows again and again. Whenever
// something has been synced, in the old ring or the new, a power cut then finds
// everything that was admitted until then, and no damage.
func TestGrowMeetsMark(t *testing.T) {
	const extents = 4000
	fs := newVolatileFS()
	m := fresh(t, fs, extents*mib, Options{})
	var admitted [extents]atomic.Bool
	rng := rand.New(rand.NewPCG(1, 2))
	looks := 0
	fs.mu.Lock()
	fs.after = func(string, *volatileFile) { // by who holds committer
		if looks++; looks%8 != 0 {
			return
		}
		var must []int64
		for i := range int64(extents) {
			if admitted[i].Load() {
				must = append(must, i)
			}
		}
		after, found, err := Open(fs.crash(rng), "d/hot", extents*mib, Options{})
		if err != nil || found.Why != nil {
			t.Errorf("opened with %v: %+v", err, found)
			return
		}
		defer after.Close(false)
		for _, i := range must {
			if !covers(found.Hot, i) {
				t.Errorf("extent %d is not found", i)
				return
			}
		}
	}
	fs.mu.Unlock()

	var wg sync.WaitGroup
	for n := range int64(4) {
		wg.Go(func() {
			for k := range int64(100) {
				i, n := n*1000+k*5, int64(1) // not in sequence
				if k%10 == 9 {
					n = 100
					i = i/100*100 + 500
				}
				enter(t, m, i*mib, n*mib)
				for e := i; e < i+n; e++ {
					admitted[e].Store(true)
				}
				m.Leave(i*mib, n*mib)
			}
		})
	}
	for k := range int64(12) {
		if err := m.Grow((extents + (k+1)*1500) * mib); err != nil {
			t.Fatal(err)
		}
		at := extents + (k+1)*1500 - 1 // may be written at once
		enter(t, m, at*mib, 1)
		m.Leave(at*mib, 1)
	}
	wg.Wait()
}

// TestEnterBeforeGrowReturns: who is too early is not admitted, harms nothing, and is
// admitted when the disk has grown.
func TestEnterBeforeGrowReturns(t *testing.T) {
	const before, after = 100, chunkCells + 1000
	fs := newVolatileFS()
	m := fresh(t, fs, before*mib, Options{})
	early := [][2]int64{{before, 1}, {before - 1, 2}, {after - 1, 1}, {before - 10, 70}, {after - 100, 100}}
	entered := false
	fs.mu.Lock()
	fs.before = func(op string, _ *volatileFile, p []byte, _ int64) {
		if op != "write" || len(p) <= txBytes || entered {
			return
		}
		entered = true
		for range 2 {
			for _, e := range early {
				if m.Enter(e[0]*mib, e[1]*mib) {
					t.Errorf("%d extents from %d on: admitted", e[1], e[0])
				}
			}
			for _, e := range early {
				if m.Mark(e[0]*mib, e[1]*mib) == nil {
					t.Errorf("%d extents from %d on: marked", e[1], e[0])
				}
			}
		}
	}
	fs.mu.Unlock()
	// This one enters before Grow even begins, and is in the ring that it writes.
	first := [2]int64{before + 100, 100}
	if m.Enter(first[0]*mib, first[1]*mib) {
		t.Error("admitted")
	}
	if err := m.Grow(after * mib); err != nil || !entered {
		t.Fatal(err, entered)
	}
	early = append(early, first)
	m.Enter(first[0]*mib, first[1]*mib) // once more, for it leaves twice
	_, found := open(t, fs.crash(rand.New(rand.NewPCG(3, 3))), after*mib, Options{})
	for _, e := range early {
		if m.Enter(e[0]*mib, e[1]*mib) && !covers(found.Hot, e[0]+e[1]-1) {
			t.Errorf("%d extents from %d on: admitted, and not marked", e[1], e[0])
		}
		m.Leave(e[0]*mib, e[1]*mib)
	}
	for range 2 {
		for _, e := range early {
			if err := m.Mark(e[0]*mib, e[1]*mib); err != nil {
				t.Error(err)
			}
			m.Leave(e[0]*mib, e[1]*mib)
		}
	}
	_, found = open(t, fs.crash(rand.New(rand.NewPCG(3, 3))), after*mib, Options{})
	for _, e := range early {
		for i := e[0]; i < e[0]+e[1]; i++ {
			if !covers(found.Hot, i) {
				t.Errorf("extent %d is not found", i)
			}
		}
	}
	if found.Why != nil || found.All {
		t.Errorf("found %+v", found)
	}
	if err := m.Close(true); err != nil {
		t.Error(err)
	}
}

// TestEarlyRangeIsNoDamage: a range beyond the disk that somebody is counted into is
// in no transaction, which a reader would take for damaged.
func TestEarlyRangeIsNoDamage(t *testing.T) {
	fs := newVolatileFS()
	m := fresh(t, fs, 1000*mib, Options{})
	for _, off := range []int64{950, 2000} {
		if m.Enter(off*mib, 100*mib) {
			t.Error("admitted")
		}
		if m.Mark(off*mib, 100*mib) == nil {
			t.Error("marked")
		}
		write(t, m, off/100) // takes the ranges with it
		if m.Enter(off*mib, 100*mib) {
			t.Error("admitted by somebody else's commit")
		}
	}
	_, found := open(t, fs.crash(rand.New(rand.NewPCG(4, 4))), 1000*mib, Options{})
	if found.Why != nil || found.All || !covers(found.Hot, 9) || !covers(found.Hot, 20) {
		t.Errorf("found %+v", found)
	}
}
