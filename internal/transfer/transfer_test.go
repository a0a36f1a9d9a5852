package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"afterimage/blockdev"
)

// coarse is a disk with blocks of 4096 bytes that says when it is misused.
type coarse struct {
	*blockdev.Mem
	t *testing.T
}

func (c coarse) Info() blockdev.Info {
	info := c.Mem.Info()
	info.BlockSize = 4096
	return info
}

func (c coarse) Do(reqs []*blockdev.Request) {
	info := c.Info()
	for _, r := range reqs {
		if err := r.Check(&info, c.Size()); err != nil {
			c.t.Errorf("%s %s: %v", r.Op, r.Extent(), err)
		}
	}
	c.Mem.Do(reqs)
}

// mute is a disk that knows nothing of its holes.
type mute struct{ *blockdev.Mem }

func (m mute) Extents(off, length int64, visit func(blockdev.Run) bool) error {
	visit(blockdev.Run{Extent: blockdev.Extent{Off: off, Len: length}})
	return nil
}

// failing fails its nth request of one kind.
type failing struct {
	*blockdev.Mem
	op    blockdev.Op
	after *atomic.Int64
}

var errInjected = errors.New("injected")

func (f failing) Do(reqs []*blockdev.Request) {
	for _, r := range reqs {
		f.Mem.Do([]*blockdev.Request{r})
		if r.Op == f.op && f.after.Add(-1) == 0 {
			r.Err = errInjected
		}
	}
}

// scribble makes a disk of random runs: data, zeroes written as data, holes.
func scribble(t *testing.T, r *rand.Rand, size int64) *blockdev.Mem {
	t.Helper()
	m := blockdev.NewMem(size)
	for range 3 + r.IntN(40) {
		off := r.Int64N(size/512) * 512
		n := min(512*(1+r.Int64N(1<<r.IntN(13))), size-off)
		p := make([]byte, n)
		if r.IntN(4) > 0 {
			fill := byte(1 + r.IntN(255))
			for i := range p {
				p[i] = fill
			}
		}
		if err := blockdev.WriteAt(m, p, off); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func content(t *testing.T, d blockdev.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if err := blockdev.ReadAt(d, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func holes(t *testing.T, d blockdev.Device) (n int64) {
	t.Helper()
	err := d.Extents(0, d.Size(), func(r blockdev.Run) bool {
		if r.Hole {
			n += r.Len
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// variants are ways a disk in memory can behave.
func variants(t *testing.T, m *blockdev.Mem) map[string]blockdev.Device {
	v := map[string]blockdev.Device{"memory": m, "mute": mute{m}}
	if m.Size()%4096 == 0 {
		v["coarse"] = coarse{m, t}
	}
	return v
}

func TestCopy(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for round, size := range []int64{512, 4096, 5<<20 + 512} {
		src := scribble(t, r, size)
		want := content(t, src)
		for from, s := range variants(t, src) {
			for _, extra := range []int64{0, 8192} {
				for _, fresh := range []bool{true, false} {
					target := blockdev.NewMem(size + extra)
					if !fresh {
						target = scribble(t, r, size+extra)
					}
					before := content(t, target)
					for to, d := range variants(t, target) {
						t.Run(fmt.Sprintf("%d/%s to %s+%d fresh=%v", round, from, to, extra, fresh), func(t *testing.T) {
							var seen atomic.Int64
							done, err := Copy(t.Context(), d, s, CopyOptions{
								TargetZero: fresh, Progress: func(n int64) { seen.Add(n) },
							})
							if err != nil {
								t.Fatal(err)
							}
							if done.Data+done.Zeros != size || seen.Load() != size {
								t.Errorf("%+v and progress %d, want %d in all", done, seen.Load(), size)
							}
							got := content(t, target)
							if !bytes.Equal(got[:size], want) {
								t.Error("the copy differs")
							}
							if !bytes.Equal(got[size:], before[size:]) {
								t.Error("bytes past the source's end have changed")
							}
							if extra == 0 && holes(t, target) < holes(t, src)/zeroUnit*zeroUnit && from == "memory" {
								t.Errorf("%d bytes of holes, the source has %d", holes(t, target), holes(t, src))
							}
						})
					}
				}
			}
		}
	}
}

func TestCopyIntoSmaller(t *testing.T) {
	dst := blockdev.NewMem(4096)
	_, err := Copy(t.Context(), dst, blockdev.NewMem(8192), CopyOptions{})
	if !errors.Is(err, blockdev.ErrBounds) {
		t.Errorf("got %v, want ErrBounds", err)
	}
}

// TestCopyFaults fails every request of a copy in turn: the error is told and
// no goroutine is left at work on the disks.
func TestCopyFaults(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	src := scribble(t, r, 5<<20)
	for _, op := range []blockdev.Op{blockdev.OpRead, blockdev.OpWrite, blockdev.OpWriteZeroes, blockdev.OpFlush} {
		for n := int64(1); ; n++ {
			var after atomic.Int64
			after.Store(n)
			s := failing{src, op, &after}
			d := failing{blockdev.NewMem(5 << 20), op, &after}
			_, err := Copy(t.Context(), d, s, CopyOptions{})
			if after.Load() > 0 { // it did not come so far
				if err != nil {
					t.Errorf("%s: %v without a fault", op, err)
				}
				if n == 1 {
					t.Errorf("no %s to fail", op)
				}
				break
			}
			if !errors.Is(err, errInjected) {
				t.Errorf("%s %d: got %v", op, n, err)
			}
		}
	}
}

func TestCompare(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for round, size := range []int64{512, 4096, 5<<20 + 512} {
		for _, changes := range []int{0, 1, 7} {
			a := scribble(t, r, size)
			b := blockdev.NewMem(size)
			if err := blockdev.WriteAt(b, content(t, a), 0); err != nil { // equal, other holes
				t.Fatal(err)
			}
			for range changes {
				p := make([]byte, 1+r.IntN(3000))
				for i := range p {
					p[i] = byte(r.Uint32())
				}
				off := r.Int64N(size)
				p = p[:min(int64(len(p)), size-off)]
				if err := blockdev.WriteAt(b, p, off); err != nil {
					t.Fatal(err)
				}
			}
			want := naive(content(t, a), content(t, b))
			for an, da := range variants(t, a) {
				for bn, db := range variants(t, b) {
					t.Run(fmt.Sprintf("%d/%d changes/%s and %s", round, changes, an, bn), func(t *testing.T) {
						var seen int64
						got, err := Compare(t.Context(), da, db, func(n int64) { seen += n })
						if err != nil || got != want || seen != size {
							t.Errorf("got %+v, %v, progress %d; want %+v", got, err, seen, want)
						}
						if got.Equal() != (got.Bytes == 0) {
							t.Errorf("Equal is %v of %+v", got.Equal(), got)
						}
					})
				}
			}
		}
	}
}

// naive counts differences the obvious way.
func naive(a, b []byte) Difference {
	d := Difference{First: -1}
	inRun := false
	for s := 0; s < len(a); s += 512 {
		e := min(s+512, len(a))
		same := bytes.Equal(a[s:e], b[s:e])
		if !same && !inRun {
			d.Extents++
		}
		inRun = !same
		for i := s; i < e; i++ {
			if a[i] != b[i] {
				d.Bytes++
				if d.First < 0 {
					d.First = int64(i)
				}
			}
		}
	}
	return d
}

func TestCompareReadError(t *testing.T) {
	a := scribble(t, rand.New(rand.NewPCG(7, 8)), 5<<20)
	for _, swap := range []bool{false, true} {
		var after atomic.Int64
		after.Store(2)
		x, y := blockdev.Device(failing{a, blockdev.OpRead, &after}), blockdev.Device(mute{blockdev.NewMem(5 << 20)})
		if swap {
			x, y = y, x
		}
		if _, err := Compare(t.Context(), x, y, nil); !errors.Is(err, errInjected) {
			t.Errorf("got %v", err)
		}
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a, b := blockdev.NewMem(1<<20), blockdev.NewMem(1<<20)
	if _, err := Compare(ctx, a, b, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("compare: %v", err)
	}
	if _, err := Copy(ctx, b, a, CopyOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("copy: %v", err)
	}
}
