package hrl

import (
	"bytes"
	"math/rand/v2"
	"os"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// TestRelease ships span after span as a primary does: what was acknowledged is
// released, the process is killed now and then, and the copy stays equal to the
// disk at every cut, with a log of a few segments.
func TestRelease(t *testing.T) {
	for _, quota := range []int64{0, 64 << 20} {
		dir, layers := tempDir(t), tempDir(t)
		rng := rand.New(rand.NewPCG(7, uint64(quota)))
		opt := Options{Quota: quota, Reclaimed: func(*BlockSet) error { t.Error("a segment was reclaimed below the quota"); return nil }}
		l, _ := openTest(t, dir, opt)
		h := newHistory(t, l, 5)
		replica := blockdev.NewMem(testDisk)
		var p Position
		var acked Mark
		released := int64(0)
		for range testenv.Rounds(40, 20) {
			h.steps(40 + rng.IntN(60))
			if rng.IntN(4) == 0 {
				released += l.Stats().Released
				if err := l.Abort(); err != nil {
					t.Fatal(err)
				}
				l, _ = openTest(t, dir, opt)
				next := newHistory(t, l, 5)
				h.l, h.disk = l, next.disk
				continue
			}
			cut, err := l.Cut(CutCrash)
			if err != nil {
				t.Fatal(err)
			}
			r, err := l.OpenBehind(acked)
			if err != nil {
				t.Fatal(err)
			}
			q := Position{cut.Incarnation, cut.Epoch}
			f, err := r.WriteLayer(OS, layers, LayerOptions{Generation: 1, Disk: "root", Span: Span{P: p, Q: q}})
			if cerr := r.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				t.Fatal(err)
			}
			layer, err := OpenLayer(OS, f.Path)
			if err != nil {
				t.Fatal(err)
			}
			if err := blockdev.Fold(replica, layer); err != nil {
				t.Fatal(err)
			}
			layer.Close()
			os.Remove(f.Path)
			got := make([]byte, testDisk)
			if err := blockdev.ReadAt(replica, got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, h.model) {
				t.Fatalf("at cut %v the copy differs at byte %d", q, firstDiff(got, h.model))
			}
			p, acked = q, cut.Mark()
			l.Release(acked)
		}
		released += l.Stats().Released
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if released < 5 {
			t.Errorf("only %d segments were released", released)
		}
		r := mustOpen(t, dir)
		if n := len(r.Segments); n > 6 {
			t.Errorf("%d segments are left", n)
		}
		if f := r.Verify(); len(f) > 0 {
			t.Errorf("what is left does not verify: %v", f)
		}
		r.Close()
	}
}

// TestReleaseWaits: a segment that is read, or of which a write has not ended on
// the disk, stays.
func TestReleaseWaits(t *testing.T) {
	l, _ := openTest(t, tempDir(t), Options{})
	h := newHistory(t, l, 3)
	g := NewGroup()
	g.Add(Entry{Kind: KindWrite, Disk: h.disk, Len: 512, Data: make([]byte, 512)})
	if err := l.Append(g); err != nil {
		t.Fatal(err)
	}
	h.steps(60)
	for l.Stats().Segments < 3 {
		h.steps(10)
	}
	cut, err := l.Cut(CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	kick := func() int64 {
		l.Release(cut.Mark())
		l.keeper.release() // what the keeper does when it is kicked; here to have it done
		return l.Stats().Released
	}
	if n := kick(); n != 0 {
		t.Errorf("%d segments released with a write unfinished", n)
	}
	l.Finished(g)
	r, err := l.OpenBehind(Mark{})
	if err != nil {
		t.Fatal(err)
	}
	if n := kick(); n != 0 {
		t.Errorf("%d segments released under a reader", n)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// A reader of what lies behind the mark is in nobody's way.
	if r, err = l.OpenBehind(cut.Mark()); err != nil {
		t.Fatal(err)
	}
	kick()
	testenv.Until(t, "segments are released beside a reader", func() bool { return l.Stats().Released > 0 })
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil { // ends the keeper, which may be releasing
		t.Fatal(err)
	}
	if l.Stats().Released == 0 {
		t.Error("nothing was released at all")
	}
}

// TestNewestRemoved: a log whose newest segments somebody has removed can vouch for
// nothing, whether it was closed or not.
func TestNewestRemoved(t *testing.T) {
	for _, clean := range []bool{true, false} {
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{})
		h := newHistory(t, l, 3)
		for l.Stats().Segments < 3 {
			h.steps(10)
		}
		l.keeper.noteBegun() // as it does when it is kicked
		err := l.Abort
		if clean {
			err = l.Close
		}
		if err := err(); err != nil {
			t.Fatal(err)
		}
		r := mustOpen(t, dir)
		newest := r.Segments[len(r.Segments)-1].Path
		r.Close()
		want := map[bool]Recovery{true: RecoverClean, false: RecoverKill}[clean]
		l, rec := openTest(t, dir, Options{})
		if rec != want {
			t.Errorf("whole: %v, not %v", rec, want)
		}
		if err := l.Abort(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(newest); err != nil {
			t.Fatal(err)
		}
		for range 2 { // it stays so until the recovery is done
			l, rec = openTest(t, dir, Options{})
			if rec != RecoverPowerCut {
				t.Errorf("without its newest segment: %v", rec)
			}
			if err := l.Abort(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestUnhealed: gaps and copies before the mark hide nothing.
func TestUnhealed(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 3)
	one := func(e Entry) {
		t.Helper()
		g := NewGroup()
		g.Add(e)
		if err := l.Append(g); err != nil {
			t.Fatal(err)
		}
		l.Finished(g)
	}
	data := bytes.Repeat([]byte{7}, 4096)
	one(Entry{Kind: KindWrite, Disk: h.disk, Off: 0, Len: 4096, Data: data})
	one(GapEntry(h.disk, 0, 4096))
	one(Entry{Kind: KindCopy, Disk: h.disk, Off: 0, Len: BlockBytes, Data: make([]byte, digestBytes)})
	cut, err := l.Cut(CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	one(GapEntry(h.disk, 1<<20, 4096)) // repeats the cut's number
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		acked Mark
		want  map[Kind]int64
	}{
		{Mark{}, map[Kind]int64{KindCopy: BlockBytes, KindGap: BlockBytes}},
		{cut.Mark(), map[Kind]int64{KindWrite: 4096, KindGap: BlockBytes}},
	} {
		r := mustOpen(t, dir)
		got := map[Kind]int64{}
		if _, err := r.LatestUnhealed("root", c.acked, func(v *Version) error {
			got[v.Kind] += v.Len
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		r.Close()
		for k := KindWrite; k <= KindSeal; k++ {
			if got[k] != c.want[k] {
				t.Errorf("with %v acknowledged %d bytes of %s, not %d", c.acked, got[k], k, c.want[k])
			}
		}
	}
}

// TestBlockSetRemove compares a set with a plain map.
func TestBlockSetRemove(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const blocks = 3*pageBits + 100
	var s BlockSet
	model := make([]bool, blocks)
	for range 400 {
		first := rng.Int64N(blocks)
		n := 1 + rng.Int64N(min(blocks-first, 1<<rng.IntN(17)))
		add := rng.IntN(2) == 0
		if add {
			s.Add(3, first*BlockBytes+1, n*BlockBytes-1)
		} else {
			s.Remove(3, first*BlockBytes, n*BlockBytes)
		}
		for i := first; i < first+n; i++ {
			model[i] = add
		}
		at := rng.Int64N(blocks)
		want, end := at, at
		for want < blocks && !model[want] {
			want++
		}
		for end = want; end < blocks && model[end]; end++ {
		}
		start, length, ok := s.Next(3, at*BlockBytes+5)
		if ok != (want < blocks) || ok && (start != want*BlockBytes || length != (end-want)*BlockBytes) {
			t.Fatalf("from block %d on: %d, %d, %v; want blocks %d to %d", at, start/BlockBytes, length/BlockBytes, ok, want, end)
		}
	}
	for b, in := range model {
		if s.Has(3, int64(b)*BlockBytes) != in {
			t.Fatalf("block %d: %v", b, !in)
		}
	}
}
