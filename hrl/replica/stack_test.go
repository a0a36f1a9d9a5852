package replica

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// TestStack compares a stack with the sectors of its layers, put over one another.
func TestStack(t *testing.T) {
	const sectors = 400
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 1))
		dir := tempDir(t)
		v := &VM{fs: hrl.OS}
		var held []*heldLayer
		want, has := make([]byte, sectors*512), make([]bool, sectors)
		for range 1 + rng.IntN(6) {
			w, err := hrl.NewLayerWriter(hrl.OS, dir, hrl.LayerInfo{
				Generation: 1, Disk: "root", Q: hrl.Position{Incarnation: 1, Epoch: 1}, Size: sectors * 512, QTime: time.Unix(1, 0), Kind: hrl.CutCrash,
			})
			must(t, err)
			for at := rng.IntN(60); at < sectors; at += rng.IntN(60) {
				n := min(1+rng.IntN(40), sectors-at)
				p := want[at*512 : (at+n)*512]
				for k := range n {
					has[at+k] = true
				}
				if rng.IntN(3) == 0 {
					clear(p)
					must(t, w.Zero(int64(at)*512, int64(n)*512))
				} else {
					for k := range p {
						p[k] = byte(rng.Uint32())
					}
					must(t, w.Data(int64(at)*512, p))
				}
				at += n
			}
			f, err := w.Commit()
			must(t, err)
			l, err := hrl.OpenLayer(hrl.OS, f.Path)
			must(t, err)
			defer l.Close()
			held = append(held, &heldLayer{v: v, l: l})
		}
		s := newStack(t.Context(), held)
		for off := int64(0); ; { // over the disk, as a fold does
			run, ok, err := s.Lookup(off, sectors*512-off)
			must(t, err)
			next := int64(sectors * 512)
			if ok {
				next = run.Off
			}
			for k := off / 512; k < next/512; k++ {
				if has[k] {
					t.Fatalf("seed %d: sector %d is not found", seed, k)
				}
			}
			if !ok {
				break
			}
			checkRun(t, s, run, want, has)
			off = run.End()
		}
		for range 300 { // and here and there
			off := rng.Int64N(sectors) * 512
			n := (1 + rng.Int64N(sectors-off/512)) * 512
			run, ok, err := s.Lookup(off, n)
			must(t, err)
			first := off / 512
			for first < (off+n)/512 && !has[first] {
				first++
			}
			if ok != (first < (off+n)/512) || ok && (run.Off != first*512 || run.End() > off+n) {
				t.Fatalf("seed %d: %+v, %v of [%d, +%d)", seed, run, ok, off, n)
			}
			if ok {
				checkRun(t, s, run, want, has)
			}
			whole := true
			for k := off / 512; k < (off+n)/512; k++ {
				whole = whole && has[k]
			}
			if got, err := s.covers(blockdev.Extent{Off: off, Len: n}); err != nil || got != whole {
				t.Fatalf("seed %d: covers %v, %v", seed, got, err)
			}
		}
	}
}

func checkRun(t *testing.T, s *stack, run blockdev.Run, want []byte, has []bool) {
	t.Helper()
	p := make([]byte, run.Len)
	if n, err := s.ReadAt(p, run.Off); err != nil || n != len(p) || !bytes.Equal(p, want[run.Off:run.End()]) {
		t.Fatalf("%+v: %d bytes, %v", run, n, err)
	}
	if run.Zero && !zeroes(p) {
		t.Fatalf("%+v is not zero", run)
	}
	for k := run.Off / 512; k < run.End()/512; k++ {
		if !has[k] {
			t.Fatalf("%+v: nothing has sector %d", run, k)
		}
	}
}

// BenchmarkStack goes over a disk whose first copy came in many layers.
func BenchmarkStack(b *testing.B) {
	for _, layers := range []int64{16, 256, 4096} {
		b.Run(fmt.Sprint(layers), func(b *testing.B) {
			s := &stack{ctx: b.Context(), seen: make([]ahead, layers)}
			for i := range layers {
				s.layers = append(s.layers, &stretch{i * 1024 * sumBlock, 1024 * sumBlock})
				s.seen[i].from = 1 << 62
			}
			off := int64(0)
			for b.Loop() {
				run, ok, err := s.Lookup(off, layers*1024*sumBlock-off)
				if err != nil {
					b.Fatal(err)
				}
				if off = run.End(); !ok {
					off = 0
				}
			}
		})
	}
}

// A stretch is a layer that has one range, in blocks.
type stretch struct{ off, len int64 }

func (s *stretch) Name() string                          { return "stretch" }
func (s *stretch) DiskSize() int64                       { return 1 << 50 }
func (s *stretch) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

func (s *stretch) Lookup(off, n int64) (blockdev.Run, bool, error) {
	from := max(off, s.off)
	to := min(s.off+s.len, off+n, (from/sumBlock+1)*sumBlock)
	if from >= to {
		return blockdev.Run{}, false, nil
	}
	return blockdev.Run{Extent: blockdev.Extent{Off: from, Len: to - from}}, true, nil
}
