package blockdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/devtest"
	"afterimage/blockdev/faultdev"
)

// memLayer is a layer of sectors: absent, zero, or all of one byte.
type memLayer struct {
	size    int64
	sectors map[int64]byte // a sector's content
	fail    error
}

func (m *memLayer) Name() string    { return "layer" }
func (m *memLayer) DiskSize() int64 { return m.size }

func (m *memLayer) Lookup(off, n int64) (blockdev.Run, bool, error) {
	const s = blockdev.SectorSize
	for at := off / s; at*s < off+n; at++ {
		b, ok := m.sectors[at]
		if !ok {
			continue
		}
		end := at + 1
		for c, ok := m.sectors[end]; ok && (c == 0) == (b == 0); c, ok = m.sectors[end] {
			end++
		}
		lo, hi := max(off, at*s), min(off+n, end*s)
		return blockdev.Run{Extent: blockdev.Extent{Off: lo, Len: hi - lo}, Zero: b == 0}, true, m.fail
	}
	return blockdev.Run{}, false, m.fail
}

func (m *memLayer) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		b, ok := m.sectors[(off+int64(i))/blockdev.SectorSize]
		if !ok {
			return i, errors.New("absent")
		}
		p[i] = b
	}
	return len(p), m.fail
}

// stack makes random layers over a random base, and what they amount to.
func stack(rng *rand.Rand, layers int) (*blockdev.Mem, []blockdev.Layered, []byte) {
	base := blockdev.NewMem(testSize)
	want := bytes.Repeat([]byte{0xbb}, testSize)
	if err := blockdev.WriteAt(base, want, 0); err != nil {
		panic(err)
	}
	var out []blockdev.Layered
	for range layers {
		size := int64(testSize/2 + rng.IntN(testSize/1024)*512)
		l := &memLayer{size: size, sectors: map[int64]byte{}}
		if old := int64(len(want)); size < old {
			want = want[:size]
		} else {
			want = append(want, make([]byte, size-old)...)
			for s := old / 512; s < size/512; s++ {
				l.sectors[s] = 0
			}
		}
		for range 40 {
			s, b := rng.Int64N(size/512), byte(rng.IntN(6))
			for n := 1 + rng.IntN(60); n > 0 && s < size/512; s, n = s+1, n-1 {
				l.sectors[s] = b
				copy(want[s*512:], bytes.Repeat([]byte{b}, 512))
			}
		}
		out = append(out, l)
	}
	return base, out, want
}

func newOverlay(t *testing.T, base blockdev.Device, layers []blockdev.Layered, top *blockdev.Top) blockdev.Device {
	t.Helper()
	d, err := blockdev.NewOverlay(base, layers, top)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func contentIs(t *testing.T, d blockdev.Device, want []byte) {
	t.Helper()
	if d.Size() != int64(len(want)) {
		t.Fatalf("%d bytes, not %d", d.Size(), len(want))
	}
	got := blockdev.AlignedBuf(len(want))
	if err := blockdev.ReadAt(d, got, 0); err != nil {
		t.Fatal(err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, not %#x", i, got[i], want[i])
		}
	}
}

// TestOverlayModel: layers over a base read as the newest of them, whole and in
// parts, their extents say what is so, and folding them gives the same.
func TestOverlayModel(t *testing.T) {
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 1))
		base, layers, want := stack(rng, int(seed%5))
		d := newOverlay(t, base, layers, nil)
		contentIs(t, d, want)
		for range 200 {
			off := rng.Int64N(int64(len(want))/512) * 512
			p := make([]byte, min(int64(len(want))-off, rng.Int64N(100)*512))
			if err := blockdev.ReadAt(d, p, off); err != nil || !bytes.Equal(p, want[off:off+int64(len(p))]) {
				t.Fatalf("seed %d: %d bytes at %d: %v", seed, len(p), off, err)
			}
			at := off
			err := d.Extents(off, int64(len(p)), func(r blockdev.Run) bool {
				if r.Off != at || r.Len <= 0 || r.Zero && !bytes.Equal(want[r.Off:r.End()], make([]byte, r.Len)) {
					t.Fatalf("seed %d: run %+v at %d", seed, r, at)
				}
				at = r.End()
				return true
			})
			if err != nil || at != off+int64(len(p)) {
				t.Fatalf("seed %d: extents end at %d: %v", seed, at, err)
			}
		}
		for i, l := range layers {
			if i%2 == 1 { // half done, and again
				l.(*memLayer).fail = errors.New("injected")
				if err := blockdev.Fold(base, l); err == nil {
					t.Fatal("folded a layer that cannot be read")
				}
				l.(*memLayer).fail = nil
				if err := blockdev.Fold(base, l); err != nil {
					t.Fatal(err)
				}
			}
			if err := blockdev.Fold(base, l); err != nil {
				t.Fatal(err)
			}
		}
		contentIs(t, base, want)
	}
}

// alignedOnly is a base of 4 KiB blocks that wants aligned buffers.
type alignedOnly struct{ blockdev.Device }

func (a alignedOnly) Info() blockdev.Info {
	i := a.Device.Info()
	i.BlockSize, i.MemAlign = 4096, 4096
	return i
}

func (a alignedOnly) Do(reqs []*blockdev.Request) {
	info := a.Info()
	for _, r := range reqs {
		if r.Err = r.Check(&info, a.Size()); r.Err == nil {
			a.Device.Do([]*blockdev.Request{r})
		}
	}
}

func TestOverlayAlignedBase(t *testing.T) {
	base, layers, want := stack(rand.New(rand.NewPCG(3, 3)), 3)
	contentIs(t, newOverlay(t, alignedOnly{base}, layers, nil), want)
}

var under, life = [32]byte{1}, [32]byte{2}

func fileTop(t *testing.T, size int64) (*blockdev.Top, string) {
	t.Helper()
	path := filepath.Join(shm(t), "top")
	if err := blockdev.CreateTop(path, size, under, life); err != nil {
		t.Fatal(err)
	}
	return openTop(t, path, size, life), path
}

func openTop(t *testing.T, path string, size int64, life [32]byte) *blockdev.Top {
	t.Helper()
	top, err := blockdev.OpenTop(path, size, under, life)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { top.Close() })
	return top
}

func TestOverlayConformance(t *testing.T) {
	zero := func(size int64) blockdev.Layered {
		l := &memLayer{size: size, sectors: map[int64]byte{}}
		for s := range size / 512 {
			if s%7 != 0 {
				l.sectors[s] = 0
			}
		}
		return l
	}
	dirty := func(size int64) blockdev.Layered {
		l := &memLayer{size: size, sectors: map[int64]byte{}}
		for s := range size / 512 {
			if s%7 != 0 {
				l.sectors[s] = 9
			}
		}
		return l
	}
	for name, layers := range map[string][]blockdev.Layered{
		"none": nil, "two": {dirty(testSize), zero(testSize)},
	} {
		t.Run(name, func(t *testing.T) {
			devtest.Run(t, func(t *testing.T) blockdev.Device {
				top, _ := fileTop(t, testSize)
				return newOverlay(t, blockdev.NewMem(testSize), layers, top)
			}, devtest.Options{FixedSize: true, Steps: 150, ReadOnly: func(t *testing.T) blockdev.Device {
				return newOverlay(t, blockdev.NewMem(testSize), layers, nil)
			}})
		})
	}
}

// change makes a random change of the disk and of want.
func change(t *testing.T, rng *rand.Rand, d blockdev.Device, want []byte) {
	t.Helper()
	n := min((1+rng.Int64N(20))*512, int64(len(want)))
	off := rng.Int64N((int64(len(want))-n)/512+1) * 512
	r := &blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: n}
	switch rng.IntN(4) {
	case 0:
		r.Op = blockdev.OpWriteZeroes
	case 1:
		r.Op = blockdev.OpTrim
	default:
		r.Buf = bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, int(n))
	}
	if err := blockdev.Do1(d, r); err != nil {
		t.Fatal(err)
	}
	switch r.Op {
	case blockdev.OpWrite:
		copy(want[off:], r.Buf)
	case blockdev.OpWriteZeroes:
		clear(want[off : off+n])
	case blockdev.OpTrim:
		clear(want[r.Done.Off:r.Done.End()])
	}
}

// TestTopReopen: a top that is opened again, never flushed, in the same life
// has all that was written; nothing below it was changed; what is none of this
// disk is refused.
func TestTopReopen(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	base, layers, want := stack(rng, 3)
	untouched := bytes.Clone(want)
	size := int64(len(want))
	top, path := fileTop(t, size)
	for round := range 5 {
		d := newOverlay(t, base, layers, top)
		contentIs(t, d, want)
		for range 60 {
			change(t, rng, d, want)
		}
		if round == 2 {
			if err := blockdev.Flush(d); err != nil {
				t.Fatal(err)
			}
		}
		contentIs(t, d, want)
		if err := top.Close(); err != nil {
			t.Fatal(err)
		}
		top = openTop(t, path, size, life)
	}
	if top.Present() == 0 {
		t.Fatal("nothing is present")
	}
	contentIs(t, newOverlay(t, base, layers, nil), untouched)
	if _, err := blockdev.NewOverlay(blockdev.NewMem(size+4096), nil, top); err == nil {
		t.Error("a top of another size was taken")
	}
	top.Close()
	for name, open := range map[string]func() (*blockdev.Top, error){
		"other disk": func() (*blockdev.Top, error) { return blockdev.OpenTop(path, size, [32]byte{9}, life) },
		"other size": func() (*blockdev.Top, error) { return blockdev.OpenTop(path, size+4096, under, life) },
	} {
		if got, err := open(); !errors.Is(err, blockdev.ErrTop) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if err := blockdev.RemoveTop(path); err != nil {
		t.Fatal(err)
	}
	if err := blockdev.RemoveTop(path); err != nil {
		t.Fatal(err)
	}
	if _, err := blockdev.OpenTop(path, size, under, life); err == nil {
		t.Error("opened a top that was removed")
	}
}

// TestTopPowerCut: after a power cut that leaves any mix of what was not synced,
// each sector is what it was at the last flush, or what was written since; the
// other blocks are as they were below.
func TestTopPowerCut(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 8))
		base, layers, want := stack(rng, 2)
		size := int64(len(want))
		memData, memMap := blockdev.NewMem((size+4095)/4096*4096), blockdev.NewMem(blockdev.TopMapBytes(size))
		if err := blockdev.FormatTop(memMap, size, under, life); err != nil {
			t.Fatal(err)
		}
		data, err := faultdev.NewVolatile(memData)
		if err != nil {
			t.Fatal(err)
		}
		presence, err := faultdev.NewVolatile(memMap)
		if err != nil {
			t.Fatal(err)
		}
		top, err := blockdev.NewTop("top", data, presence, size, under, life)
		if err != nil {
			t.Fatal(err)
		}
		d := newOverlay(t, base, layers, top)
		for range 1 + rng.IntN(3) {
			for range 30 {
				change(t, rng, d, want)
			}
			if err := blockdev.Flush(d); err != nil {
				t.Fatal(err)
			}
		}
		// Of each sector, what it may be from here on.
		may := make([][]byte, size/512)
		for s := range may {
			may[s] = []byte{want[s*512]}
		}
		for range 30 {
			change(t, rng, d, want)
			for s := range may {
				may[s] = append(may[s], want[s*512])
			}
		}
		for cut := range uint64(3) {
			left, leftMap := data.Crash(seed*10+cut), presence.Crash(seed*10+cut)
			again, err := blockdev.NewTop("top", left, leftMap, size, under, [32]byte{77, byte(cut)})
			if err != nil {
				t.Fatal(err)
			}
			d := newOverlay(t, base, layers, again)
			got := make([]byte, size)
			if err := blockdev.ReadAt(d, got, 0); err != nil {
				t.Fatal(err)
			}
			for s := range may {
				if b := got[s*512 : s*512+512]; !bytes.Equal(b, bytes.Repeat(b[:1], 512)) || !bytes.Contains(may[s], b[:1]) {
					t.Fatalf("seed %d: sector %d is %#x, none of %x", seed, s, b[0], may[s])
				}
			}
			// And it goes on from there, through another reopening in its new life.
			for range 30 {
				change(t, rng, d, got)
			}
			contentIs(t, d, got)
			if again, err = blockdev.NewTop("top", left, leftMap, size, under, [32]byte{77, byte(cut)}); err != nil {
				t.Fatal(err)
			}
			contentIs(t, newOverlay(t, base, layers, again), got)
		}
	}
}

// TestTopFlushFails: after a flush that failed no bit becomes durable.
func TestTopFlushFails(t *testing.T) {
	const size = testSize
	memMap := blockdev.NewMem(blockdev.TopMapBytes(size))
	if err := blockdev.FormatTop(memMap, size, under, life); err != nil {
		t.Fatal(err)
	}
	data := &failFlush{Device: blockdev.NewMem(size)}
	top, err := blockdev.NewTop("top", data, memMap, size, under, life)
	if err != nil {
		t.Fatal(err)
	}
	d := newOverlay(t, blockdev.NewMem(size), nil, top)
	if err := blockdev.WriteAt(d, bytes.Repeat([]byte{1}, 4096), 0); err != nil {
		t.Fatal(err)
	}
	data.fail = true
	if err := blockdev.Flush(d); err == nil {
		t.Fatal("flushed")
	}
	data.fail = false
	if err := blockdev.Flush(d); err == nil {
		t.Fatal("a later flush succeeded")
	}
	again, err := blockdev.NewTop("top", data, memMap, size, under, [32]byte{55})
	if err != nil || again.Present() != 0 {
		t.Fatalf("%v: what no flush confirmed is there after a power cut", err)
	}
}

type failFlush struct {
	blockdev.Device
	fail bool
}

func (f *failFlush) Do(reqs []*blockdev.Request) {
	f.Device.Do(reqs)
	for _, r := range reqs {
		if f.fail && r.Op == blockdev.OpFlush {
			r.Err = fmt.Errorf("injected")
		}
	}
}

// TestTopHeader: a map with any damage in its header is refused.
func TestTopHeader(t *testing.T) {
	const size = testSize
	for at := range 128 {
		m := blockdev.NewMem(blockdev.TopMapBytes(size))
		if err := blockdev.FormatTop(m, size, under, life); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		if err := blockdev.ReadAt(m, b, int64(at)); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 4
		if err := blockdev.WriteAt(m, b, int64(at)); err != nil {
			t.Fatal(err)
		}
		if _, err := blockdev.NewTop("top", blockdev.NewMem(size), m, size, under, life); !errors.Is(err, blockdev.ErrTop) {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
}
