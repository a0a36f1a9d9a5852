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
		got, ok, err := c.f.CopyGap(off, c.buf)
		if err != nil {
			c.t.Error(err)
			return
		}
		if !ok && off == 0 {
			return
		}
		if !ok {
			off = 0
			continue
		}
		if !got.Zero {
			if err := blockdev.WriteAt(c.copies, got.Data, got.Off); err != nil {
				c.t.Error(err)
			}
		}
		off = got.End()
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
	c := &copyRun{t: t, f: f, l: l, copies: blockdev.NewMem(size), buf: make([]byte, hrl.BlockBytes)}
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

// TestCopyWatch: a block that is written while it is read is read again.
func TestCopyWatch(t *testing.T) {
	var table lockTable
	own := lock{off: 0, end: 64 << 10}
	w := watch{lock: &own}
	table.watch(&w)
	other, apart := lock{off: 4096, end: 8192}, lock{off: 64 << 10, end: 128 << 10}
	table.take(&apart)
	if w.touched {
		t.Error("a range beside it touched the block")
	}
	table.take(&other)
	table.releaseOne(&other)
	table.takeWatched(&w)
	if !w.touched {
		t.Error("the write was not noticed")
	}
	table.releaseOne(&own)
	table.take(&other)
	w = watch{lock: &own}
	table.watch(&w)
	if !w.touched {
		t.Error("a write under way was not noticed")
	}
}
