package filter

import (
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// A copyRun copies a disk's gaps beside its writers, as the shipper does.
type copyRun struct {
	t      *testing.T
	f      *Filter
	l      *hrl.Log
	copies *blockdev.Mem // what was copied, the newest of each block
	buf    []byte
}

// pass copies until no gap is open.
func (c *copyRun) pass() {
	for off := int64(0); ; {
		e, ok := c.f.NextGap(off, int64(len(c.buf)))
		if !ok && off == 0 {
			return
		}
		if !ok {
			off = 0
			continue
		}
		err := c.f.CopyGap(e, c.buf, func(got *Copied) {
			if got.Zero {
				return
			}
			if err := blockdev.WriteAt(c.copies, got.Data, got.Off); err != nil {
				c.t.Error(err)
			}
		})
		if err != nil {
			c.t.Error(err)
			return
		}
		off = e.Off + (e.Len+hrl.BlockBytes-1)&^(hrl.BlockBytes-1)
	}
}

// TestCopyGaps: the copies and, over them, a layer of what the log has since the
// session began are the disk, whatever was written meanwhile (rule R5).
func TestCopyGaps(t *testing.T) {
	const size = 8<<20 + 12<<10
	disk := blockdev.NewMem(size)
	f := newFilter(t, disk, Options{})
	q := &queueDevice{Filter: f}
	rng := rand.New(rand.NewPCG(3, 4))
	for range 60 { // the rest stays zero
		off := rng.Int64N(size/4096) * 4096
		if err := ask(q, blockdev.OpWrite, 0, off, randomBytes(rng, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	dir := tempDir(t)
	l, _ := openLog(t, dir, hrl.Options{AppendLimit: -1})
	attach(t, f, l)
	begin, err := l.Cut(hrl.CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	if !f.GapAll() {
		t.Fatal("the log takes no gap")
	}
	c := &copyRun{t: t, f: f, l: l, copies: blockdev.NewMem(size), buf: make([]byte, 24*hrl.BlockBytes)}
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 3 {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(9, uint64(w)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				n := int64(1+rng.IntN(20)) * 512
				off := rng.Int64N((size-n)/512) * 512
				op, b := blockdev.OpWrite, randomBytes(rng, int(n))
				if rng.IntN(5) == 0 {
					op = blockdev.OpWriteZeroes
				}
				if err := ask(q, op, 0, off, b); err != nil {
					t.Error(err)
					return
				}
				if rng.IntN(20) == 0 {
					f.AddGap(off, n)
				}
			}
		})
	}
	for range 4 {
		c.pass()
	}
	close(stop)
	writers.Wait()
	c.pass()
	f.SealGaps()
	cut, err := l.Cut(hrl.CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	if all, open := f.GapBytes(); open != 0 || all < size {
		t.Errorf("%d bytes are gaps and %d of them open before the acknowledgement", all, open)
	}
	r, err := l.OpenBehind(begin.Mark())
	if err != nil {
		t.Fatal(err)
	}
	layers := tempDir(t)
	file, err := r.WriteLayer(hrl.OS, layers, hrl.LayerOptions{Generation: 1, Disk: "root", CopiesBelow: true, Span: hrl.Span{
		Q: hrl.Position{Incarnation: cut.Incarnation, Epoch: cut.Epoch}, From: hrl.Position{Incarnation: begin.Incarnation, Epoch: begin.Epoch},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := hrl.OpenLayer(hrl.OS, file.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file.Path)
	defer layer.Close()
	if err := blockdev.Fold(c.copies, layer); err != nil {
		t.Fatal(err)
	}
	equalDisks(t, disk, c.copies)

	// A gap that comes after the cut survives its acknowledgement.
	f.AddGap(1<<20, 512)
	f.AckGaps()
	if all, open := f.GapBytes(); all != hrl.BlockBytes || open != hrl.BlockBytes {
		t.Errorf("after the acknowledgement %d and %d bytes are gaps", all, open)
	}
	c.pass()
	f.ReopenGaps()
	if all, open := f.GapBytes(); all != hrl.BlockBytes || open != hrl.BlockBytes {
		t.Errorf("after the copies were given up %d and %d bytes are gaps", all, open)
	}
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// TestCopyWatch: a block that is written while it is read is read again, and no other.
func TestCopyWatch(t *testing.T) {
	const block = 64 << 10
	var table lockTable
	w, beside := watch{off: 2 * block, end: 5*block + 512}, watch{off: 0, end: 64 * block}
	table.watch(&w)
	table.watch(&beside)
	apart, copied := lock{off: block, end: 2 * block}, lock{off: 2 * block, end: 3 * block, copies: true}
	other := lock{off: 3*block + 4096, end: 4*block + 512}
	for _, l := range []*lock{&apart, &copied, &other} {
		table.take(l)
		table.releaseOne(l)
	}
	for b, want := range []bool{true, true, false, false, true} {
		off := int64(b+1) * block
		if b > 0 && table.undisturbed(&w, off) != want {
			t.Errorf("block %d is undisturbed: %v", b+1, !want)
		}
	}
	if beside.touched != 1<<1|1<<3|1<<4 {
		t.Errorf("the other watch saw %b", beside.touched)
	}
	table.unwatch(&beside)
	whole := lock{off: 0, end: wholeDisk}
	table.take(&whole)
	table.unwatch(&w)
	table.watch(&w)
	for b := int64(2); b < 6; b++ {
		if table.undisturbed(&w, b*block) {
			t.Errorf("a write under way in block %d was not noticed", b)
		}
	}
}
