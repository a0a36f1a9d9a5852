package hrl

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

const testDisk = 4 << 20

// history appends to a log what it does to a model.
type history struct {
	t     testing.TB
	rng   *rand.Rand
	bytes *rand.ChaCha8 // fills payloads; far cheaper than rng under the race detector
	l     *Log
	disk  DiskID
	model []byte
	g     *Group
}

// tempDir is in memory where that is possible: nothing here is about durability.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "hrl")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func openTest(t testing.TB, dir string, opt Options) (*Log, Recovery) {
	t.Helper()
	if opt.SegmentBytes == 0 {
		opt.SegmentBytes = minSegmentBytes
	}
	if opt.AppendLimit == 0 {
		opt.AppendLimit = -1 // a loaded machine is late now and then
	}
	l, rec, err := Open(dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	return l, rec
}

func newHistory(t testing.TB, l *Log, seed uint64) *history {
	t.Helper()
	id, err := l.AddDisk("root", testDisk)
	if err != nil {
		t.Fatal(err)
	}
	l.Recovered()
	return &history{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), bytes: rand.NewChaCha8([32]byte{byte(seed)}),
		l: l, disk: id, model: make([]byte, testDisk), g: NewGroup(),
	}
}

// step appends a random group and returns Append's error. The model has the
// changes in any case, as the disk would.
func (h *history) step() error {
	h.g.Reset()
	for n := 1 + h.rng.IntN(4); n > 0; n-- {
		size := int64(1+h.rng.IntN(32)) * sectorBytes
		if h.rng.IntN(20) == 0 {
			size = int64(1+h.rng.IntN(2048)) * sectorBytes
		}
		off := h.rng.Int64N((testDisk-size)/sectorBytes) * sectorBytes
		if h.rng.IntN(4) == 0 {
			h.g.Add(Entry{Kind: KindZero, Disk: h.disk, Off: off, Len: size})
			clear(h.model[off : off+size])
			continue
		}
		data := make([]byte, size)
		_, _ = h.bytes.Read(data)
		h.g.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: off, Len: size, Data: data})
		copy(h.model[off:], data)
		if h.g.Entries[0].Len+size > PayloadMax {
			break
		}
	}
	err := h.l.Append(h.g)
	if err == nil {
		h.l.Finished(h.g)
	}
	return err
}

func (h *history) steps(n int) {
	h.t.Helper()
	for range n {
		if err := h.step(); err != nil {
			h.t.Fatal(err)
		}
	}
}

func replayed(t testing.TB, dir string) ([]byte, error) {
	t.Helper()
	r, err := OpenSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dev := blockdev.NewMem(testDisk)
	_, err = r.Replay("root", dev, nil)
	out := make([]byte, testDisk)
	if rerr := blockdev.ReadAt(dev, out, 0); rerr != nil {
		t.Fatal(rerr)
	}
	return out, err
}

func checkReplay(t testing.TB, dir string, model []byte) {
	t.Helper()
	got, err := replayed(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Fatalf("the replayed log differs from the model at byte %d", firstDiff(got, model))
	}
}

func firstDiff(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestReplayEqualsModel: what was appended, over segments, cuts and
// incarnations, closed cleanly or killed, is what a replay gives.
func TestReplayEqualsModel(t *testing.T) {
	for _, clean := range []bool{true, false} {
		t.Run(fmt.Sprintf("clean=%v", clean), func(t *testing.T) {
			dir := filepath.Join(tempDir(t), "log")
			var model []byte
			for i := range 4 {
				l, rec := openTest(t, dir, Options{})
				want := RecoverNew
				if i > 0 && clean {
					want = RecoverClean
				} else if i > 0 {
					want = RecoverKill
				}
				if rec != want || l.Incarnation() != uint64(i+1) {
					t.Fatalf("recovery %v, incarnation %d", rec, l.Incarnation())
				}
				h := newHistory(t, l, uint64(i))
				if model != nil {
					h.model = model
				}
				for range 5 {
					h.steps(60)
					if _, err := l.Cut(CutCrash); err != nil {
						t.Fatal(err)
					}
				}
				model = h.model
				var err error
				if clean {
					err = l.Close()
				} else {
					err = l.Abort()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			checkReplay(t, dir, model)
			r, err := OpenSegments(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if f := r.Verify(); len(f) > 0 {
				t.Fatalf("findings in a whole log: %v", f)
			}
			if len(r.Segments) < 8 {
				t.Fatalf("only %d segments: the test does not roll", len(r.Segments))
			}
		})
	}
}

// TestCutTouched: a cut's set is what its epoch touched, no more.
func TestCutTouched(t *testing.T) {
	l, _ := openTest(t, tempDir(t), Options{})
	defer l.Close()
	h := newHistory(t, l, 3)
	for epoch := uint64(1); epoch < 6; epoch++ {
		var want BlockSet
		for range 100 {
			if err := h.step(); err != nil {
				t.Fatal(err)
			}
			for _, e := range h.g.Entries {
				want.Add(e.Disk, e.Off, e.Len)
			}
		}
		info, err := l.Cut(CutApp)
		if err != nil {
			t.Fatal(err)
		}
		if info.Epoch != epoch || !bytes.Equal(info.Touched.Append(nil), want.Append(nil)) {
			t.Fatalf("epoch %d touched %d bytes, not %d", info.Epoch, info.Touched.Bytes(), want.Bytes())
		}
	}
}

// TestConcurrentAppends: many goroutines append; what each did last to its own
// place is what a replay gives, and every number was given once.
func TestConcurrentAppends(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	id, err := l.AddDisk("root", testDisk)
	if err != nil {
		t.Fatal(err)
	}
	l.Recovered()
	const writers, rounds = 8, 300
	model := make([]byte, testDisk)
	seqs := make([][]uint64, writers)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 9))
			part := model[w*testDisk/writers : (w+1)*testDisk/writers]
			g := NewGroup()
			for range rounds {
				g.Reset()
				for range 1 + rng.IntN(GroupMax) {
					at := rng.Int64N(int64(len(part))/4096) * 4096
					data := bytes.Repeat([]byte{byte(rng.Uint32())}, 4096)
					g.Add(Entry{Kind: KindWrite, Disk: id, Off: int64(w*testDisk/writers) + at, Len: 4096, Data: data})
					copy(part[at:], data)
				}
				if err := l.Append(g); err != nil {
					t.Error(err)
					return
				}
				for _, e := range g.Entries {
					seqs[w] = append(seqs[w], e.Seq)
				}
				l.Finished(g)
			}
		})
	}
	wg.Go(func() {
		for range 50 {
			if _, err := l.Cut(CutCrash); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]bool{}
	for _, s := range seqs {
		for i, q := range s {
			if seen[q] || i > 0 && q <= s[i-1] {
				t.Fatalf("number %d given twice or out of order", q)
			}
			seen[q] = true
		}
	}
	checkReplay(t, dir, model)
}

// TestTornTail: a log cut off at any byte replays to the state after some
// prefix of its changes.
func TestTornTail(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 5)
	states := [][]byte{bytes.Clone(h.model)}
	var ends []int64
	for range 12 {
		h.g.Reset()
		data := bytes.Repeat([]byte{byte(1 + len(states))}, 1024)
		off := h.rng.Int64N(4) * 512
		h.g.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: off, Len: 1024, Data: data})
		if err := l.Append(h.g); err != nil {
			t.Fatal(err)
		}
		l.Finished(h.g)
		copy(h.model[off:], data)
		states = append(states, bytes.Clone(h.model))
		ends = append(ends, l.tail.end)
	}
	path := l.tail.path
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	first := ends[0]
	for cut := first - 1500; cut <= ends[len(ends)-1]; cut += 631 {
		// What lies behind the tear are zeroes, or bytes of an earlier use.
		for _, junk := range []byte{0, 0xa5} {
			torn := bytes.Clone(whole[:ends[len(ends)-1]+4096])
			copy(torn[cut:], bytes.Repeat([]byte{junk}, len(torn)-int(cut)))
			pokeAll(t, path, 0, torn)
			n := 0
			for n < len(ends) && ends[n] <= cut {
				n++
			}
			if cut < headerBytes+100 {
				continue
			}
			got, err := replayed(t, dir)
			if n == 0 && errors.Is(err, ErrNoDisk) {
				continue
			}
			if err != nil || !bytes.Equal(got, states[n]) {
				t.Fatalf("cut at %d: not the state after %d changes: %v", cut, n, err)
			}
		}
	}
}

// TestFailEveryOperation fails each file operation in turn, once or from then
// on: appends that fail are known as a gap, all else replays, and nothing hangs.
func TestFailEveryOperation(t *testing.T) {
	for _, mode := range []string{"once", "sticky", "short"} {
		t.Run(mode, func(t *testing.T) {
			k, by := testenv.Every(t, 3)
			for fired := true; fired; k += by {
				fired = failNth(t, k, mode)
			}
		})
	}
}

func failNth(t *testing.T, k int, mode string) bool {
	fsys := newFaultFS()
	fsys.failAt, fsys.sticky, fsys.short = k, mode == "sticky", mode == "short"
	dir := filepath.Join(tempDir(t), "log")
	l, _, err := Open(dir, Options{FS: fsys, SegmentBytes: minSegmentBytes, Spares: 1, AppendLimit: -1})
	if err != nil {
		if !errors.Is(err, errInjected) {
			t.Fatalf("operation %d: %v", k, err)
		}
		// It can be opened as soon as the fault is gone.
		l, rec, err := Open(dir, Options{SegmentBytes: minSegmentBytes})
		if err != nil || rec == RecoverPowerCut {
			t.Fatalf("operation %d failed, and after it: %v %v", k, rec, err)
		}
		l.Abort()
		return true
	}
	h := newHistory(t, l, uint64(k))
	lost := make([]bool, testDisk/BlockBytes)
	for i := range 16 {
		if err := h.step(); err != nil {
			for _, e := range h.g.Entries {
				for b := e.Off / BlockBytes; b <= (e.Off+e.Len-1)/BlockBytes; b++ {
					lost[b] = true
				}
			}
			l.mu.Lock()
			l.retryAt = time.Time{} // no need to wait the second out
			l.mu.Unlock()
			l.keeper.kick()
		}
		if i%5 == 4 {
			_, _ = l.Cut(CutCrash)
		}
	}
	closeErr := l.Close()
	fired := fsys.fired
	lossless := true
	for _, b := range lost {
		lossless = lossless && !b
	}
	got, err := replayed(t, dir)
	var inc *IncompleteError
	if errors.As(err, &inc) {
		for _, e := range inc.Extents {
			for b := e.Off / BlockBytes; b < e.End()/BlockBytes; b++ {
				if !lost[b] {
					t.Fatalf("operation %d: the log says block %d is missing, which it is not", k, b)
				}
			}
			copy(got[e.Off:e.End()], h.model[e.Off:e.End()])
		}
	} else if err != nil && !(errors.Is(err, ErrNoDisk) && !lossless) {
		t.Fatalf("operation %d: %v", k, err)
	}
	if closeErr == nil && !bytes.Equal(got, h.model) {
		t.Fatalf("operation %d: closed cleanly, yet the log differs from the model at %d", k, firstDiff(got, h.model))
	}
	if lossless && !bytes.Equal(got, h.model) {
		t.Fatalf("operation %d: no append failed, yet the log differs from the model at %d", k, firstDiff(got, h.model))
	}
	return fired
}

// TestHungAppend: an append that hangs is let go after its limit, for the
// leader and for those who wait, and when it lands at last it does no harm.
func TestHungAppend(t *testing.T) {
	fsys := newFaultFS()
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{FS: fsys, AppendLimit: 50 * time.Millisecond})
	h := newHistory(t, l, 1)
	h.steps(3)
	hang := make(chan struct{})
	fsys.set(func() { fsys.hang = hang })

	abandoned := make(chan error, 1)
	returned := make(chan error, 2)
	lead, follow := NewGroup(), NewGroup()
	lead.Abandoned = func(err error) { abandoned <- err }
	old := bytes.Repeat([]byte{1}, 4096)
	lead.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: 0, Len: 4096, Data: old})
	follow.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: 1 << 20, Len: 4096, Data: old})
	go func() { returned <- l.Append(lead) }()
	fsys.waitHanging(t)
	// It waits behind the one that hangs, then leads into a log that has just failed.
	if err := l.Append(follow); err == nil {
		t.Fatal("an append behind a hung one succeeded")
	}
	if err := <-abandoned; !errors.Is(err, ErrLate) {
		t.Fatal(err)
	}
	if got := l.LostBytes(); got != 2*BlockBytes {
		t.Fatalf("%d bytes are known as lost", got)
	}
	fsys.set(func() { fsys.hang = nil })
	close(hang)
	if err := <-returned; !errors.Is(err, ErrAbandoned) {
		t.Fatal(err)
	}
	// The log comes back; a newer write of the block wins over the late one.
	deadline := time.Now().Add(10 * time.Second)
	g := NewGroup()
	for {
		g.Reset()
		g.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: 0, Len: BlockBytes, Data: bytes.Repeat([]byte{2}, BlockBytes)})
		if l.Append(g) == nil {
			l.Finished(g)
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the log does not come back")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := replayed(t, dir)
	var inc *IncompleteError
	if !errors.As(err, &inc) || inc.Bytes != BlockBytes || inc.Extents[0].Off != 1<<20 {
		t.Fatalf("the replay says %v", err)
	}
	if got[0] != 2 || got[4095] != 2 {
		t.Fatal("the late append won over a newer one")
	}
}

// TestQuota: at its quota the log gives up its oldest segment, the caller is
// told before, and the log says what it lacks.
func TestQuota(t *testing.T) {
	dir := tempDir(t)
	var mu sync.Mutex
	var given BlockSet
	l, _ := openTest(t, dir, Options{Quota: 6 * minSegmentBytes, Prewrite: true, Reclaimed: func(s *BlockSet) error {
		mu.Lock()
		given.AddSet(s)
		mu.Unlock()
		return nil
	}})
	data, err := l.AddDisk("data", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	h := newHistory(t, l, 8)
	// A gap must outlive its segment.
	h.g.Reset()
	h.g.Add(GapEntry(data, 5*BlockBytes, 1))
	if err := l.Append(h.g); err != nil {
		t.Fatal(err)
	}
	l.Finished(h.g)
	// So must what a segment's first section touched.
	h.g.Reset()
	h.g.Add(Entry{Kind: KindZero, Disk: data, Off: 9 * BlockBytes, Len: 512})
	if err := l.Append(h.g); err != nil {
		t.Fatal(err)
	}
	l.Finished(h.g)
	for i := range 1500 {
		if err := h.step(); err != nil {
			t.Fatal(err)
		}
		if i%30 == 0 { // the cuts' sections are part of what a segment touched
			if _, err := l.Cut(CutCrash); err != nil {
				t.Fatal(err)
			}
		}
	}
	if l.Stats().Reclaimed == 0 {
		t.Fatal("nothing was reclaimed")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	if len(files) > 6 {
		t.Fatalf("%d segments at a quota of 6", len(files))
	}
	r, err := OpenSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var inc *IncompleteError
	_, err = r.Replay("data", blockdev.NewMem(1<<30), nil)
	if !errors.As(err, &inc) || inc.Bytes != 2*BlockBytes || inc.Extents[0].Off != 5*BlockBytes ||
		!given.Has(data, 5*BlockBytes) || !given.Has(data, 9*BlockBytes) {
		t.Fatalf("the gap was forgotten with its segment: %v", err)
	}
	inc = nil
	got, err := replayed(t, dir)
	if err != nil && !errors.As(err, &inc) {
		t.Fatal(err)
	}
	for off := 0; off < testDisk; off += sectorBytes {
		if !bytes.Equal(got[off:off+sectorBytes], h.model[off:off+sectorBytes]) {
			if !given.Has(h.disk, int64(off)) {
				t.Fatalf("byte %d differs and no gap says so", off)
			}
			named := false
			for i := 0; inc != nil && i < len(inc.Extents); i++ {
				e := inc.Extents[i]
				named = named || e.Off <= int64(off) && int64(off) < e.End()
			}
			if !named {
				t.Fatalf("byte %d differs and the log does not say so", off)
			}
		}
	}
}

// TestOpenRefuses: what must not be opened is not, and stays as it was.
func TestOpenRefuses(t *testing.T) {
	t.Run("another process", func(t *testing.T) {
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{})
		defer l.Close()
		if _, _, err := Open(dir, Options{}); !errors.Is(err, ErrLocked) {
			t.Fatal(err)
		}
	})
	t.Run("other files", func(t *testing.T) {
		dir := tempDir(t)
		if err := os.WriteFile(filepath.Join(dir, "letter.txt"), []byte("dear"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Open(dir, Options{}); err == nil {
			t.Fatal("took a directory with other files")
		}
	})
	t.Run("another version", func(t *testing.T) {
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{})
		h := newHistory(t, l, 1)
		h.steps(1)
		path := l.tail.path
		l.Close()
		poke(t, path, 7, FormatVersion+1)
		if _, _, err := Open(dir, Options{}); !errors.Is(err, ErrVersion) {
			t.Fatal(err)
		}
		if _, err := OpenSegments(dir); !errors.Is(err, ErrVersion) {
			t.Fatal(err)
		}
		poke(t, path, 7, FormatVersion)
		poke(t, filepath.Join(dir, metaName), 7, metaVersion+1)
		poke(t, filepath.Join(dir, metaName), metaPage+7, metaVersion+1)
		if _, _, err := Open(dir, Options{}); !errors.Is(err, ErrVersion) {
			t.Fatal(err)
		}
	})
	t.Run("killed while it recovers from a power cut", func(t *testing.T) {
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{Life: [32]byte{1}})
		l.Abort()
		for range 3 {
			l, rec := openTest(t, dir, Options{Life: [32]byte{2}})
			if rec != RecoverPowerCut {
				t.Fatal(rec)
			}
			l.Abort()
		}
		l, _ = openTest(t, dir, Options{Life: [32]byte{2}})
		if err := l.Recovered(); err != nil {
			t.Fatal(err)
		}
		l.Abort()
		l, rec := openTest(t, dir, Options{Life: [32]byte{2}})
		if rec != RecoverKill {
			t.Fatal(rec)
		}
		l.Abort()
	})
	t.Run("power cut", func(t *testing.T) {
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{Life: [32]byte{1}})
		l.Abort()
		l, rec := openTest(t, dir, Options{Life: [32]byte{2}})
		defer l.Close()
		if rec != RecoverPowerCut {
			t.Fatal(rec)
		}
	})
}

func poke(t testing.TB, path string, off int64, b byte) {
	t.Helper()
	pokeAll(t, path, off, []byte{b})
}

func pokeAll(t testing.TB, path string, off int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// TestDamage: any byte of a sealed segment that is turned over is found, by
// verify and by replay, before anything is written.
func TestDamage(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 2)
	h.steps(4)
	path := l.tail.path
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r, err := OpenSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	end := r.Segments[0].End
	r.Close()
	for i := 0; i < 400; i++ {
		at := h.rng.Int64N(end)
		poke(t, path, at, whole[at]^1<<h.rng.IntN(8))
		r, err := OpenSegments(dir)
		poke(t, path, at, whole[at])
		if at == 7 && errors.Is(err, ErrVersion) {
			continue
		}
		if err != nil {
			t.Fatalf("byte %d: %v", at, err)
		}
		if len(r.Verify()) == 0 && !isPadding(whole, at) {
			t.Fatalf("byte %d of %d was turned over and verify found nothing", at, end)
		}
		r.Close()
	}
}

// isPadding reports whether the byte may be padding between frames, which no
// checksum covers and nothing reads.
func isPadding(whole []byte, at int64) bool {
	return whole[at] == 0 && at%8 != 0 && whole[at|7] == 0
}

// TestMissingSegment: a log of which a segment was deleted says so.
func TestMissingSegment(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 4)
	h.steps(400)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := OpenSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Segments) < 3 {
		t.Fatal("too few segments")
	}
	gone := r.Segments[1].Path
	r.Close()
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}
	if r, err = OpenSegments(dir); err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if f := r.Verify(); len(f) != 1 {
		t.Fatalf("a missing segment gives %v", f)
	}
}
