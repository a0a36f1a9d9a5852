package gap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"afterimage/hrl"
)

func open(t testing.TB, fs hrl.FS, size int64) (*Map, Found) {
	t.Helper()
	m, found, err := Open(fs, "d/gaps", size, true)
	if err != nil {
		t.Fatal(err)
	}
	return m, found
}

func runs(m *Map) string {
	s := ""
	m.Runs(func(off, n int64) { s += fmt.Sprintf("%d+%d ", off/kib, n/kib) })
	return s
}

func TestMap(t *testing.T) {
	const size = 3*gib + 100*kib
	fs := newVolatileFS()
	m, found := open(t, fs, size)
	if found != (Found{Kind: New}) || m.Bytes() != 0 || m.Dirty() {
		t.Errorf("found %+v", found)
	}
	for _, r := range [][2]int64{{0, 1}, {100 * kib, 64 * kib}, {size - 1, 1}, {2044<<20 - 1, 2}} {
		if err := m.Add(r[0], r[1]); err != nil {
			t.Fatal(err)
		}
	}
	const want = "0+192 2092992+128 3145792+36 "
	if got := runs(m); got != want || m.Bytes() != (192+128+36)*kib {
		t.Errorf("gaps are %s(%d bytes), not %s", got, m.Bytes(), want)
	}
	if !m.Has(0, 192*kib) || m.Has(0, 193*kib) || m.Has(256*kib, 1) || m.Has(0, 0) || m.Has(size, 1) || m.Has(size-1, 2) {
		t.Error("Has is wrong")
	}
	if off, n, ok := m.Next(100 * kib); !ok || off != 64*kib || n != 128*kib {
		t.Errorf("the next run is at %d, of %d bytes", off, n)
	}
	var s hrl.BlockSet
	m.AppendTo(&s)
	if s.Bytes() != (192+128+64)*kib || !m.Dirty() {
		t.Errorf("the set has %d bytes", s.Bytes())
	}
	if err := m.Sync(); err != nil || m.Dirty() {
		t.Error("dirty when synced", err)
	}
	if err := m.Remove(64*kib, 64*kib); err != nil || m.Dirty() {
		t.Error(err)
	}
	if _, _, err := Open(fs, "d/gaps", size, true); !errors.Is(err, hrl.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	for _, r := range [][2]int64{{-1, 2}, {size, 1}, {size - 1, 2}, {0, 1<<63 - 1}} {
		if err := m.Add(r[0], r[1]); err == nil {
			t.Errorf("%d bytes at byte %d of %d are on the disk", r[1], r[0], size)
		}
	}
	if m.Bytes() != size {
		t.Error("the part of a range that is on the disk was not added")
	}
	if err := m.RemoveSet(&s); err != nil || m.Bytes() != size-(192+128+36)*kib {
		t.Error(m.Bytes(), err)
	}
	if err := m.Close(); err != nil || m.Close() != nil {
		t.Error(err)
	}
	if err := m.Add(0, 1); !errors.Is(err, ErrClosed) || !errors.Is(m.Sync(), ErrClosed) || !errors.Is(m.Resize(1), ErrClosed) {
		t.Error(err)
	}
	if m, found = open(t, fs, size); found != (Found{Kind: Clean}) || m.Bytes() != size-(192+128+36)*kib {
		t.Errorf("found %+v, %d bytes", found, m.Bytes())
	}
	if _, _, err := Open(fs, "d/other", sizeMax+1, true); !errors.Is(err, errSize) {
		t.Error(err)
	}
}

func TestResize(t *testing.T) {
	fs := newVolatileFS()
	m, _ := open(t, fs, gib)
	add := func(b int64) {
		t.Helper()
		if err := m.Add(b*block, 1); err != nil {
			t.Fatal(err)
		}
	}
	resize := func(size int64, want string) {
		t.Helper()
		if err := m.Resize(size); err != nil {
			t.Fatal(err)
		}
		if got := runs(m); got != want {
			t.Errorf("gaps are %q, not %q", got, want)
		}
		left, found := open(t, fs.killed(), size)
		if got := runs(left); got != want || found.Why != nil {
			t.Errorf("a kill leaves %q, not %q: %v", got, want, found.Why)
		}
	}
	add(1)
	add(16000)
	resize(9*gib, "64+64 1024000+64 ")
	add(100000)
	resize(100*kib, "64+36 ")
	resize(9*gib, "64+64 ") // what was lost is no gap, in whichever file
	add(100000)
	resize(0, "")
	resize(9*gib, "")
	add(16000)
	m.Close()
	for _, size := range []int64{1000 * block, 12 * gib} { // at Open
		m, found := open(t, fs.killed(), size)
		want := ""
		if size > gib {
			want = "1024000+64 "
		}
		if got := runs(m); found != (Found{Kind: Clean}) || got != want {
			t.Errorf("found %+v, gaps are %q", found, got)
		}
	}
}

func TestLargeDisk(t *testing.T) {
	m, _, err := Open(hrl.OS, filepath.Join(t.TempDir(), "gaps"), 64<<40, true)
	if err != nil {
		t.Skipf("a map of 64 TiB needs 128 MiB: %v", err)
	}
	defer m.Close()
	if err := m.Add(0, 64<<40); err != nil || m.Bytes() != 64<<40 || !m.Has(0, 64<<40) {
		t.Error(err)
	}
	if err := m.Remove(0, 64<<40); err != nil || m.Bytes() != 0 {
		t.Error(err)
	}
}

// TestAddDoesNotWaitForSync also has a Sync that comes while one is under way
// not be answered by it.
func TestAddDoesNotWaitForSync(t *testing.T) {
	fs := newVolatileFS()
	m, _ := open(t, fs, gib)
	syncs, begun, hold := 0, make(chan int, 4), make(chan struct{})
	fs.before = func(op string, _ *volatileFile, _ []byte, _ int64) {
		if op == "sync" {
			syncs++ // one at a time
			begun <- syncs
			<-hold
		}
	}
	var wg sync.WaitGroup
	sync := func() {
		if err := m.Sync(); err != nil {
			t.Error(err)
		}
	}
	if err := m.Add(0, 1); err != nil {
		t.Fatal(err)
	}
	wg.Go(sync)
	<-begun
	if err := m.Add(block, 1); err != nil || !m.Dirty() {
		t.Error(err)
	}
	wg.Go(sync)
	wg.Go(sync)
	time.Sleep(20 * time.Millisecond) // both wait
	hold <- struct{}{}
	if n := <-begun; n != 2 {
		t.Errorf("sync number %d", n)
	}
	close(hold)
	wg.Wait()
	if len(begun) != 0 {
		t.Error("two that wait do not share a sync")
	}
	if m.Dirty() {
		t.Error("dirty")
	}
}

// TestConcurrent has 8 goroutines change their own parts of a map, with syncs.
func TestConcurrent(t *testing.T) {
	const part, size = 3000 * block, 40 * 3000 * block
	path := filepath.Join(t.TempDir(), "gaps")
	m, _, err := Open(hrl.OS, path, size, true)
	if err != nil {
		t.Fatal(err)
	}
	var wants [8]map[int64]bool
	var wg sync.WaitGroup
	for g := range wants {
		wants[g] = map[int64]bool{}
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 7))
			for range 1000 {
				b := (int64(g) + 8*rng.Int64N(5)) * 3000
				b += rng.Int64N(part/block - 3)
				var err error
				switch n := rng.IntN(100); {
				case n < 60:
					err = m.Add(b*block, 3*block)
					wants[g][b], wants[g][b+1], wants[g][b+2] = true, true, true
				case n < 98:
					err = m.Remove(b*block, 2*block)
					delete(wants[g], b)
					delete(wants[g], b+1)
				default:
					err = m.Sync()
				}
				if err != nil {
					t.Error(err)
				}
				m.Next(b * block)
			}
		})
	}
	wg.Wait()
	total := 0
	for range 2 {
		total = 0
		for _, want := range wants {
			total += len(want)
			for b := range want {
				if !m.Has(b*block, 1) {
					t.Errorf("block %d is no gap", b)
				}
			}
		}
		if m.Bytes() != int64(total)*block {
			t.Errorf("%d bytes are gaps, not %d", m.Bytes(), total*block)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if m, _, err = Open(hrl.OS, path, size, true); err != nil {
			t.Fatal(err)
		}
	}
	m.Close()
}

func TestAddAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	m, _, err := Open(hrl.OS, filepath.Join(t.TempDir(), "gaps"), gib, true)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	b := int64(0)
	add := func() {
		if err := m.Add(b*block, 4096); err != nil {
			t.Error(err)
		}
	}
	add() // the first in a page allocates it
	if n := testing.AllocsPerRun(100, func() { b++; add() }); n > 0 {
		t.Errorf("a new gap allocates %v times", n)
	}
	if n := testing.AllocsPerRun(100, add); n > 0 {
		t.Errorf("one that is known allocates %v times", n)
	}
}

func BenchmarkAdd(b *testing.B) {
	for _, c := range []struct {
		name string
		new  bool
	}{{"new", true}, {"known", false}} {
		b.Run(c.name, func(b *testing.B) {
			const size = 16 << 40
			m, _, err := Open(hrl.OS, filepath.Join(b.TempDir(), "gaps"), size, true)
			if err != nil {
				b.Fatal(err)
			}
			defer m.Close()
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if err := m.Add(off, 4096); err != nil {
					b.Fatal(err)
				}
				if c.new {
					off = (off + block) % size
				}
			}
		})
	}
}

// TestMissingIsAll: a map that should be there and is not reads as all gaps, also
// when the process that found that out ends before it could do anything about it.
func TestMissingIsAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gaps")
	for range 2 {
		m, _, err := Open(hrl.OS, path, gib, false)
		if err != nil {
			t.Fatal(err)
		}
		if m.Bytes() != gib {
			t.Errorf("%d bytes are gaps", m.Bytes())
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
