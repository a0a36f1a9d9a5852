// Package devtest is the suite that every blockdev.Device passes.
//
//	devtest.go  Run, and what a disk must do for single requests
//	model.go    random batches against a plain slice of bytes
package devtest

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"afterimage/blockdev"
)

// Options say what the disks under test need not be able to do. The zero value
// asks for everything.
type Options struct {
	// FixedSize: Resize must give ErrNotSupported.
	FixedSize bool
	// ReadOnly opens a disk for reading only; nil leaves those tests out.
	ReadOnly func(t *testing.T) blockdev.Device
	// Steps is how many random batches the model test makes; 0 for the usual
	// number.
	Steps int
	// Seed makes the model test repeat a run; 0 takes a new one, which a
	// failure prints.
	Seed uint64
}

// minSize is what a disk under test must have, in bytes.
const minSize = 1 << 20

// Run tests the disks that open returns: each a new one that reads as zero, of
// at least 1 MiB and a multiple of 64 KiB, and closed by the suite.
func Run(t *testing.T, open func(t *testing.T) blockdev.Device, o Options) {
	t.Helper()
	tests := []struct {
		name string
		run  func(t *testing.T, d blockdev.Device, o Options)
	}{
		{"info", testInfo},
		{"bounds", testBounds},
		{"alignment", testAlignment},
		{"empty", testEmpty},
		{"unknown-op", testUnknownOp},
		{"fua", testFUA},
		{"zero", testZero},
		{"trim", testTrim},
		{"batches", testBatches},
		{"mixed-batch", testMixedBatch},
		{"nowait", testNoWait},
		{"extents", testExtents},
		{"resize", testResize},
		{"concurrent", testConcurrent},
		{"model", testModel},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := open(t)
			defer closeDevice(t, d)
			if size := d.Size(); size < minSize || size%(64<<10) != 0 {
				t.Fatalf("the disk under test has %d bytes", size)
			}
			test.run(t, d, o)
		})
	}
	t.Run("closed", func(t *testing.T) { testClosed(t, open(t)) })
	if o.ReadOnly != nil {
		t.Run("read-only", func(t *testing.T) {
			d := o.ReadOnly(t)
			defer closeDevice(t, d)
			testReadOnly(t, d)
		})
	}
}

func closeDevice(t *testing.T, d blockdev.Device) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func testInfo(t *testing.T, d blockdev.Device, _ Options) {
	info := d.Info()
	if info.Name == "" {
		t.Error("it has no name")
	}
	if b := info.BlockSize; b != 1 && b != 512 && b != 4096 {
		t.Errorf("block size %d", b)
	}
	if p := info.Preferred; p < 512 || p&(p-1) != 0 || p < info.BlockSize {
		t.Errorf("preferred size %d", p)
	}
	if a := info.MemAlign; a < 1 || a > 4096 || a&(a-1) != 0 {
		t.Errorf("memory alignment %d", a)
	}
	if info.ReadOnly {
		t.Error("it is read-only")
	}
}

// every data op, on a range; reads and writes get a buffer where one of that
// size can be had.
func dataOps(off, length int64) []*blockdev.Request {
	var reqs []*blockdev.Request
	for _, op := range []blockdev.Op{blockdev.OpRead, blockdev.OpWrite, blockdev.OpTrim, blockdev.OpWriteZeroes} {
		r := &blockdev.Request{Op: op, Off: off, Len: length}
		if op == blockdev.OpRead || op == blockdev.OpWrite {
			if length < 0 || length > 1<<24 {
				continue
			}
			r.Buf = blockdev.AlignedBuf(int(length))
		}
		reqs = append(reqs, r)
	}
	return reqs
}

func testBounds(t *testing.T, d blockdev.Device, _ Options) {
	size := d.Size()
	fill(t, d, 1)
	want := content(t, d)
	const top = math.MaxInt64 &^ 4095
	for _, c := range []struct{ off, length int64 }{
		{size, 4096}, {size - 4096, 8192}, {size + 4096, 4096}, {0, size + 4096},
		{top, 4096}, {top, top}, {4096, top}, {-4096, 4096}, {0, -4096}, {size + 4096, 0}, {math.MinInt64, 4096},
	} {
		for _, r := range dataOps(c.off, c.length) {
			if err := blockdev.Do1(d, r); !errors.Is(err, blockdev.ErrBounds) {
				t.Errorf("%s of %d bytes at %d of %d: got %v, want ErrBounds", r.Op, c.length, c.off, size, err)
			}
			if r.Done != (blockdev.Extent{}) {
				t.Errorf("%s of %d bytes at %d: Done is %v", r.Op, c.length, c.off, r.Done)
			}
		}
		err := d.Extents(c.off, c.length, func(blockdev.Run) bool { return true })
		if !errors.Is(err, blockdev.ErrBounds) {
			t.Errorf("extents of %d bytes at %d of %d: got %v, want ErrBounds", c.length, c.off, size, err)
		}
	}
	compare(t, d, want)
}

func testAlignment(t *testing.T, d blockdev.Device, _ Options) {
	b := d.Info().BlockSize
	if b == 1 {
		// Every byte is its own: an odd range must change exactly itself.
		fill(t, d, 1)
		want := content(t, d)
		p := pattern(4099, 2)
		copy(want[4093:], p)
		if err := blockdev.WriteAt(d, p, 4093); err != nil {
			t.Fatal(err)
		}
		compare(t, d, want)
		return
	}
	fill(t, d, 1)
	want := content(t, d)
	for _, c := range []struct{ off, length int64 }{{b / 2, b}, {0, b / 2}, {b - 1, b + 1}} {
		for _, r := range dataOps(c.off, c.length) {
			if err := blockdev.Do1(d, r); !errors.Is(err, blockdev.ErrAlignment) {
				t.Errorf("%s of %d bytes at %d: got %v, want ErrAlignment", r.Op, c.length, c.off, err)
			}
		}
	}
	compare(t, d, want)
}

func testEmpty(t *testing.T, d blockdev.Device, _ Options) {
	fill(t, d, 1)
	want := content(t, d)
	for _, off := range []int64{0, 4096, d.Size()} {
		for _, r := range dataOps(off, 0) {
			if err := blockdev.Do1(d, r); err != nil || r.Done.Len != 0 {
				t.Errorf("%s of nothing at %d: %v, done %v", r.Op, off, err, r.Done)
			}
		}
		if err := d.Extents(off, 0, func(r blockdev.Run) bool { t.Errorf("no extent, but %v", r); return true }); err != nil {
			t.Error(err)
		}
	}
	d.Do(nil)
	compare(t, d, want)
}

func testUnknownOp(t *testing.T, d blockdev.Device, _ Options) {
	for _, op := range []blockdev.Op{0, 99} {
		if err := blockdev.Do1(d, &blockdev.Request{Op: op, Len: 4096, Buf: blockdev.AlignedBuf(4096)}); !errors.Is(err, blockdev.ErrNotSupported) {
			t.Errorf("op %d: got %v, want ErrNotSupported", op, err)
		}
	}
	r := &blockdev.Request{Op: blockdev.OpWrite, Len: 8192, Buf: blockdev.AlignedBuf(4096)}
	if err := blockdev.Do1(d, r); err == nil {
		t.Error("a write whose buffer is shorter than it says succeeded")
	}
	compare(t, d, make([]byte, d.Size()))
}

func testFUA(t *testing.T, d blockdev.Device, _ Options) {
	want := make([]byte, d.Size())
	for i := range 4 {
		off := int64(i) * 12288
		p := pattern(8192, byte(i+1))
		copy(want[off:], p)
		r := &blockdev.Request{Op: blockdev.OpWrite, Flags: blockdev.FlagFUA, Off: off, Len: 8192, Buf: p}
		if err := blockdev.Do1(d, r); err != nil {
			t.Fatal(err)
		}
	}
	for _, op := range []blockdev.Op{blockdev.OpWriteZeroes, blockdev.OpTrim} {
		off := int64(op-blockdev.OpTrim) * 12288
		r := &blockdev.Request{Op: op, Flags: blockdev.FlagFUA, Off: off, Len: 4096}
		if err := blockdev.Do1(d, r); err != nil {
			t.Fatal(err)
		}
		if op == blockdev.OpWriteZeroes {
			clear(want[off : off+4096])
		} else {
			clear(want[r.Done.Off:r.Done.End()])
		}
	}
	if err := blockdev.Flush(d); err != nil {
		t.Fatal(err)
	}
	compare(t, d, want)
}

func testZero(t *testing.T, d blockdev.Device, _ Options) {
	size := d.Size()
	odd := d.Info().BlockSize
	for _, flags := range []blockdev.Flags{
		0, blockdev.FlagNoHole, blockdev.FlagFUA, blockdev.FlagFUA | blockdev.FlagNoHole,
		blockdev.FlagFastZero, blockdev.FlagFastZero | blockdev.FlagNoHole, blockdev.FlagFastZero | blockdev.FlagNoHole | blockdev.FlagFUA,
	} {
		for _, e := range []blockdev.Extent{{Off: 0, Len: 4096}, {Off: odd, Len: 65536}, {Off: 65536, Len: 128 << 10}, {Off: 8192 + odd, Len: odd}, {Off: 0, Len: size}, {Off: size - odd, Len: odd}} {
			fill(t, d, byte(flags)+1)
			want := content(t, d)
			r := &blockdev.Request{Op: blockdev.OpWriteZeroes, Flags: flags, Off: e.Off, Len: e.Len}
			err := blockdev.Do1(d, r)
			switch {
			case err == nil:
				clear(want[e.Off:e.End()])
			case flags&blockdev.FlagFastZero == 0 || !errors.Is(err, blockdev.ErrNotSupported):
				t.Errorf("zero %v with flags %#x: %v", e, flags, err)
			}
			if r.Done != (blockdev.Extent{}) {
				t.Errorf("zero %v: Done is %v, which is for trims", e, r.Done)
			}
			compare(t, d, want)
		}
	}
}

func testTrim(t *testing.T, d blockdev.Device, _ Options) {
	size := d.Size()
	odd := d.Info().BlockSize
	for _, e := range []blockdev.Extent{{Off: 0, Len: 4096}, {Off: odd, Len: 65536}, {Off: 4096, Len: odd}, {Off: 512 << 10, Len: 512 << 10}, {Off: 0, Len: size}} {
		fill(t, d, 1)
		want := content(t, d)
		done, err := blockdev.Trim(d, e)
		if err != nil {
			t.Errorf("trim %v: %v", e, err)
		}
		if done.Len != 0 && (done.Off < e.Off || done.End() > e.End()) {
			t.Fatalf("trim %v: did %v", e, done)
		}
		if !d.Info().CheapTrim && done.Len != 0 {
			t.Errorf("trim %v: did %v, although Info says that it cannot", e, done)
		}
		if d.Info().CheapTrim && e.Len >= 65536 && done.Len == 0 {
			t.Errorf("trim %v: did nothing, although Info says that it can", e)
		}
		clear(want[done.Off:done.End()])
		compare(t, d, want)
	}
}

func testBatches(t *testing.T, d blockdev.Device, _ Options) {
	const block = 4096
	rng := rand.New(rand.NewPCG(1, 2))
	want := make([]byte, d.Size())
	for _, n := range []int{1, 2, 3, 15, 16, 17, 63, 64} {
		for _, kind := range []string{"adjacent", "backwards", "gaps", "shuffled"} {
			at := make([]int64, n)
			for i := range at {
				switch kind {
				case "backwards":
					at[i] = int64(n - 1 - i)
				case "gaps":
					at[i] = int64(2 * i)
				default:
					at[i] = int64(i)
				}
			}
			if kind == "shuffled" {
				rng.Shuffle(n, func(i, j int) { at[i], at[j] = at[j], at[i] })
			}
			writes, reads := make([]*blockdev.Request, n), make([]*blockdev.Request, n)
			for i := range writes {
				p := pattern(block, byte(rng.Uint32()))
				off := at[i] * block
				copy(want[off:], p)
				writes[i] = &blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: block, Buf: p}
				if i%5 == 4 {
					writes[i].Flags = blockdev.FlagFUA
				}
				reads[i] = &blockdev.Request{Op: blockdev.OpRead, Off: off, Len: block, Buf: blockdev.AlignedBuf(block)}
			}
			for _, batch := range [][]*blockdev.Request{writes, reads} {
				d.Do(batch)
				for _, r := range batch {
					if r.Err != nil {
						t.Fatalf("%d %s: %s at %d: %v", n, kind, r.Op, r.Off, r.Err)
					}
					if !bytes.Equal(r.Buf, want[r.Off:r.Off+r.Len]) {
						t.Fatalf("%d %s: after the %s at %d: wrong content", n, kind, r.Op, r.Off)
					}
				}
			}
		}
	}
	compare(t, d, want)
}

// testMixedBatch has requests of all kinds, bad ones among them, in one batch:
// each must have its own outcome, whatever an earlier user of it left there.
func testMixedBatch(t *testing.T, d blockdev.Device, _ Options) {
	size := d.Size()
	fill(t, d, 1)
	want := content(t, d)
	stale := errors.New("stale")
	p := pattern(4096, 9)
	reqs := []*blockdev.Request{
		{Op: blockdev.OpWrite, Off: 0, Len: 4096, Buf: p},
		{Op: blockdev.OpWrite, Off: size, Len: 4096, Buf: p}, // beyond the end
		{Op: blockdev.OpWrite, Off: 4096, Len: 4096, Buf: p},
		{Op: blockdev.OpRead, Off: 8192, Len: 4096, Buf: blockdev.AlignedBuf(4096)},
		{Op: blockdev.OpFlush},
		{Op: blockdev.OpWriteZeroes, Off: 12288, Len: 4096},
		{Op: blockdev.OpRead, Off: 16384, Len: 4096, Buf: blockdev.AlignedBuf(4096)},
		{Op: blockdev.OpRead, Off: 20480, Len: 0},
		{Op: blockdev.OpRead, Off: 20480, Len: 4096, Buf: blockdev.AlignedBuf(4096)},
		{Op: blockdev.OpWrite, Off: size - 4096, Len: 4096, Buf: p},
		{Op: blockdev.OpWrite, Off: size, Len: 4096, Buf: p}, // adjacent, and beyond the end
	}
	for _, r := range reqs {
		r.Err, r.Done = stale, blockdev.Extent{Off: 1, Len: 1}
	}
	d.Do(reqs)
	copy(want, p)
	copy(want[4096:], p)
	clear(want[12288:16384])
	copy(want[size-4096:], p)
	for i, r := range reqs {
		if i == 1 || i == len(reqs)-1 {
			if !errors.Is(r.Err, blockdev.ErrBounds) {
				t.Errorf("request %d: got %v, want ErrBounds", i, r.Err)
			}
			continue
		}
		if r.Err != nil {
			t.Errorf("request %d (%s): %v", i, r.Op, r.Err)
		}
		if r.Done != (blockdev.Extent{}) {
			t.Errorf("request %d (%s): Done is %v", i, r.Op, r.Done)
		}
		if r.Op == blockdev.OpRead && !bytes.Equal(r.Buf, want[r.Off:r.Off+r.Len]) {
			t.Errorf("request %d: read the wrong bytes", i)
		}
	}
	compare(t, d, want)
}

// testNoWait: a read that would have to wait says so, any other is right.
func testNoWait(t *testing.T, d blockdev.Device, _ Options) {
	fill(t, d, 3)
	want := content(t, d)
	var reqs []*blockdev.Request
	for off := int64(0); off < 256<<10; off += 4096 {
		reqs = append(reqs, &blockdev.Request{
			Op: blockdev.OpRead, Flags: blockdev.FlagNoWait, Off: off, Len: 4096, Buf: blockdev.AlignedBuf(4096),
		})
	}
	d.Do(reqs)
	for _, r := range reqs {
		switch {
		case errors.Is(r.Err, blockdev.ErrWouldBlock):
		case r.Err != nil:
			t.Errorf("read at %d: %v", r.Off, r.Err)
		case !bytes.Equal(r.Buf, want[r.Off:r.Off+r.Len]):
			t.Errorf("read at %d: wrong bytes", r.Off)
		}
	}
}

func testExtents(t *testing.T, d blockdev.Device, _ Options) {
	size := d.Size()
	want := make([]byte, size)
	check := func() {
		t.Helper()
		for _, e := range []blockdev.Extent{{Off: 0, Len: size}, {Off: 0, Len: 4096}, {Off: 65536, Len: size - 65536}, {Off: 4096, Len: 200 << 10}, {Off: size - 4096, Len: 4096}} {
			checkExtents(t, d, e, want)
		}
	}
	check()
	for _, off := range []int64{0, 4096, 65536, 300 << 10, size - 4096} {
		p := pattern(4096, 7)
		copy(want[off:], p)
		if err := blockdev.WriteAt(d, p, off); err != nil {
			t.Fatal(err)
		}
		check()
	}
	fill(t, d, 1)
	want = content(t, d)
	check()
	for _, e := range []blockdev.Extent{{Off: 65536, Len: 65536}, {Off: 512 << 10, Len: 4096}} {
		if err := blockdev.WriteZeroes(d, e); err != nil {
			t.Fatal(err)
		}
		clear(want[e.Off:e.End()])
		check()
	}
	calls := 0
	if err := d.Extents(0, size, func(blockdev.Run) bool { calls++; return false }); err != nil || calls != 1 {
		t.Errorf("a visit that returns false was called %d times, %v", calls, err)
	}
}

// checkExtents: the runs cover e in order without holes between them, and what
// is said to be zero is zero.
func checkExtents(t *testing.T, d blockdev.Device, e blockdev.Extent, want []byte) {
	t.Helper()
	at := e.Off
	err := d.Extents(e.Off, e.Len, func(r blockdev.Run) bool {
		if r.Off != at || r.Len <= 0 || r.End() > e.End() {
			t.Errorf("extents of %v: run %v follows %d", e, r, at)
			return false
		}
		if r.Zero && !allZero(want[r.Off:r.End()]) {
			t.Errorf("extents of %v: run %v is not zero", e, r)
		}
		at = r.End()
		return true
	})
	if err != nil {
		t.Errorf("extents of %v: %v", e, err)
	}
	if at != e.End() {
		t.Errorf("extents of %v end at %d", e, at)
	}
}

func testResize(t *testing.T, d blockdev.Device, o Options) {
	size := d.Size()
	fill(t, d, 1)
	want := content(t, d)
	if o.FixedSize {
		if err := d.Resize(size + 64<<10); !errors.Is(err, blockdev.ErrNotSupported) {
			t.Errorf("got %v, want ErrNotSupported", err)
		}
		compare(t, d, want)
		return
	}
	for _, bad := range []int64{-512, size + 1, 100} {
		if err := d.Resize(bad); err == nil {
			t.Errorf("resize to %d bytes succeeded", bad)
		}
	}
	if d.Size() != size {
		t.Fatalf("refused sizes changed the size to %d", d.Size())
	}
	for _, to := range []int64{size + 64<<10, size / 2, size/2 + 4096, 4096, 2 * size, 0, size} {
		if err := d.Resize(to); err != nil {
			t.Fatalf("resize to %d bytes: %v", to, err)
		}
		if d.Size() != to {
			t.Fatalf("resize to %d bytes: the size is %d", to, d.Size())
		}
		if grow := to - int64(len(want)); grow > 0 {
			want = append(want, make([]byte, grow)...)
		}
		clear(want[to:])
		want = want[:to]
		compare(t, d, want)
		if to > 0 {
			checkExtents(t, d, blockdev.Extent{Off: 0, Len: to}, want)
		}
		err := blockdev.ReadAt(d, blockdev.AlignedBuf(4096), to)
		if !errors.Is(err, blockdev.ErrBounds) {
			t.Errorf("a read beyond the new end: got %v, want ErrBounds", err)
		}
	}
}

// testConcurrent has 8 goroutines, each on its own range of the disk.
func testConcurrent(t *testing.T, d blockdev.Device, _ Options) {
	const workers = 8
	share := d.Size() / workers &^ 4095
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			m := newModel(d, blockdev.Extent{Off: int64(w) * share, Len: share}, uint64(w)+1)
			for range 40 {
				if err := m.step(); err != nil {
					t.Errorf("goroutine %d: %v", w, err)
					return
				}
			}
			if err := m.check(); err != nil {
				t.Errorf("goroutine %d: %v", w, err)
			}
		})
	}
	wg.Wait()
}

func testModel(t *testing.T, d blockdev.Device, o Options) {
	seed := o.Seed
	if seed == 0 {
		seed = rand.Uint64()
	}
	steps := o.Steps
	if steps == 0 {
		steps = 300
	}
	m := newModel(d, blockdev.Extent{Off: 0, Len: d.Size()}, seed)
	for i := range steps {
		err := m.step()
		if err == nil && i%20 == 0 {
			err = m.check()
		}
		if err != nil {
			t.Fatalf("seed %d, step %d: %v", seed, i, err)
		}
	}
	if err := m.check(); err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
}

func testClosed(t *testing.T, d blockdev.Device) {
	size := d.Size()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	reqs := append(dataOps(0, 4096), &blockdev.Request{Op: blockdev.OpFlush})
	d.Do(reqs)
	for _, r := range reqs {
		if !errors.Is(r.Err, blockdev.ErrClosed) {
			t.Errorf("%s: got %v, want ErrClosed", r.Op, r.Err)
		}
	}
	if err := d.Extents(0, size, func(blockdev.Run) bool { return true }); !errors.Is(err, blockdev.ErrClosed) {
		t.Errorf("extents: got %v, want ErrClosed", err)
	}
	if err := d.Resize(size); !errors.Is(err, blockdev.ErrClosed) {
		t.Errorf("resize: got %v, want ErrClosed", err)
	}
	if err := d.Close(); !errors.Is(err, blockdev.ErrClosed) {
		t.Errorf("close: got %v, want ErrClosed", err)
	}
}

func testReadOnly(t *testing.T, d blockdev.Device) {
	if !d.Info().ReadOnly {
		t.Error("Info does not say that it is read-only")
	}
	want := content(t, d)
	for _, r := range dataOps(0, 4096) {
		err := blockdev.Do1(d, r)
		if r.Op == blockdev.OpRead {
			if err != nil {
				t.Errorf("read: %v", err)
			}
		} else if !errors.Is(err, blockdev.ErrReadOnly) {
			t.Errorf("%s: got %v, want ErrReadOnly", r.Op, err)
		}
	}
	if err := blockdev.Flush(d); err != nil {
		t.Errorf("flush: %v", err)
	}
	if err := d.Resize(d.Size() * 2); !errors.Is(err, blockdev.ErrReadOnly) && !errors.Is(err, blockdev.ErrNotSupported) {
		t.Errorf("resize: got %v, want ErrReadOnly", err)
	}
	checkExtents(t, d, blockdev.Extent{Off: 0, Len: d.Size()}, want)
	compare(t, d, want)
}

// pattern returns n bytes, none of them zero, that differ from place to place
// (up to 8 MiB) and from seed to seed.
func pattern(n int, seed byte) []byte {
	const period = 64 << 10
	p := blockdev.AlignedBuf(n)
	for i := range p[:min(n, period)] {
		p[i] = byte(i) ^ byte(i>>8)*31 ^ seed | 1
	}
	// Byte by byte is slow under the race detector.
	for i := period; i < n; i += period {
		copy(p[i:], p[:period])
	}
	for i := period; i < n; i += blockdev.SectorSize {
		p[i] = byte(i>>16)<<1 | 1
	}
	return p
}

func fill(t *testing.T, d blockdev.Device, seed byte) {
	t.Helper()
	if err := blockdev.WriteAt(d, pattern(int(d.Size()), seed), 0); err != nil {
		t.Fatal(err)
	}
}

func content(t *testing.T, d blockdev.Device) []byte {
	t.Helper()
	p := blockdev.AlignedBuf(int(d.Size()))
	if err := blockdev.ReadAt(d, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func compare(t *testing.T, d blockdev.Device, want []byte) {
	t.Helper()
	if err := differ(content(t, d), want); err != nil {
		t.Fatal(err)
	}
}

// differ says where two contents differ, or returns nil.
func differ(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	if len(got) != len(want) {
		return fmt.Errorf("the disk has %d bytes, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte %d is %#x, want %#x", i, got[i], want[i])
		}
	}
	return nil
}

func allZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
