package hrl

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

var _ blockdev.Layered = (*Layer)(nil)

// A spanModel is a disk's history: its content at each cut.
type spanModel struct {
	dir    string
	cuts   []Position // the first is zero: the log's beginning
	after  []uint64   // sequence numbers of the cuts
	states [][]byte
	copies map[[sha256.Size]byte][]byte
}

func (m *spanModel) copied(e blockdev.Extent, digest [sha256.Size]byte, buf []byte) error {
	b, ok := m.copies[digest]
	if !ok || int64(len(b)) != e.Len {
		return errors.New("no such copy")
	}
	copy(buf, b)
	return nil
}

// spanHistory makes a log of a few incarnations and cuts.
func spanHistory(t *testing.T, seed uint64, cuts int) *spanModel {
	t.Helper()
	rng, fill := rand.New(rand.NewPCG(seed, 9)), rand.NewChaCha8([32]byte{byte(seed)})
	m := &spanModel{dir: tempDir(t), copies: map[[sha256.Size]byte][]byte{}}
	size := int64(regionBytes + regionBytes/4)
	now := make([]byte, size)
	m.cuts, m.after, m.states = []Position{{}}, []uint64{0}, [][]byte{bytes.Clone(now)}
	var l *Log
	var id DiskID
	open := func() {
		l, _ = openTest(t, m.dir, Options{})
		if _, err := l.AddDisk("other", 1<<30); err != nil {
			t.Fatal(err)
		}
		var err error
		if id, err = l.AddDisk("root", size); err != nil {
			t.Fatal(err)
		}
		l.Recovered()
	}
	open()
	g := NewGroup()
	appendOne := func(e Entry) {
		g.Reset()
		g.Add(e)
		if err := l.Append(g); err != nil {
			t.Fatal(err)
		}
		l.Finished(g)
	}
	for len(m.cuts) <= cuts {
		for range rng.IntN(60) {
			n := min(size, (1+rng.Int64N(200))*sectorBytes)
			off := rng.Int64N((size-n)/sectorBytes+1) * sectorBytes
			switch rng.IntN(12) {
			case 0:
				n = min(size-off, rng.Int64N(size/sectorBytes)*sectorBytes)
				fallthrough
			case 1, 2:
				appendOne(Entry{Kind: KindZero, Disk: id, Off: off, Len: n})
				clear(now[off : off+n])
			case 3:
				p := make([]byte, n)
				_, _ = fill.Read(p)
				sum := sha256.Sum256(p)
				m.copies[sum] = p
				appendOne(Entry{Kind: KindCopy, Disk: id, Off: off, Len: n, Data: sum[:]})
				copy(now[off:], p)
			case 4:
				to := regionBytes/2 + rng.Int64N(2*regionBytes/sectorBytes)*sectorBytes
				appendOne(ResizeEntry(id, size, to))
				if to < size {
					now = now[:to]
				} else {
					now = append(now, make([]byte, to-size)...)
				}
				size = to
			case 5:
				appendOne(Entry{Kind: KindWrite, Disk: 0, Off: off, Len: 512, Data: make([]byte, 512)})
			default:
				p := make([]byte, n)
				if rng.IntN(2) == 0 {
					p = bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, int(n))
				} else {
					_, _ = fill.Read(p)
				}
				appendOne(Entry{Kind: KindWrite, Disk: id, Off: off, Len: n, Data: p})
				copy(now[off:], p)
			}
		}
		if rng.IntN(3) == 0 {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			open()
			continue
		}
		c, err := l.Cut(CutCrash)
		if err != nil {
			t.Fatal(err)
		}
		m.cuts = append(m.cuts, Position{c.Incarnation, c.Epoch})
		m.after = append(m.after, c.Seq)
		m.states = append(m.states, bytes.Clone(now))
	}
	appendOne(Entry{Kind: KindZero, Disk: id, Off: 0, Len: size}) // behind the last cut
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return m
}

func openLayer(t *testing.T, path string) *Layer {
	t.Helper()
	l, err := OpenLayer(OS, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func sameDisk(t *testing.T, what string, d blockdev.Device, want []byte) {
	t.Helper()
	if d.Size() != int64(len(want)) {
		t.Fatalf("%s: %d bytes, not %d", what, d.Size(), len(want))
	}
	got := make([]byte, len(want))
	if err := blockdev.ReadAt(d, got, 0); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: differs at byte %d", what, firstDiff(got, want))
	}
}

// TestLayerModel: layers of single and merged spans, over incarnations, make
// of the disk at the one cut the disk at the other, stacked and folded.
func TestLayerModel(t *testing.T) {
	defer func(n int) { refsMax = n }(refsMax)
	for seed := range uint64(testenv.Rounds(2, 2)) {
		refsMax = []int{1 << 20, 20}[seed%2]
		m := spanHistory(t, seed, 5)
		r := mustOpen(t, m.dir)
		out := tempDir(t)
		rng := rand.New(rand.NewPCG(seed, 2))
		for range 2 {
			from := rng.IntN(3)
			fold := blockdev.NewMem(int64(len(m.states[from])))
			base := blockdev.NewMem(fold.Size())
			for _, d := range []blockdev.Device{fold, base} {
				if err := blockdev.WriteAt(d, m.states[from], 0); err != nil {
					t.Fatal(err)
				}
			}
			var layers []blockdev.Layered
			for at := from; at < len(m.cuts)-1; {
				to := at + 1 + rng.IntN(min(3, len(m.cuts)-1-at))
				f, err := r.WriteLayer(OS, out, LayerOptions{
					VM: golden16(4), Generation: 5, Disk: "root", Span: Span{P: m.cuts[at], Q: m.cuts[to]}, Copied: m.copied,
				})
				if err != nil {
					t.Fatalf("seed %d, (%v, %v]: %v", seed, m.cuts[at], m.cuts[to], err)
				}
				l := openLayer(t, f.Path)
				if err := l.Verify(); err != nil {
					t.Fatal(err)
				}
				data, zero := l.DataBytes()
				if l.P != m.cuts[at] || l.Q != m.cuts[to] || l.Size != int64(len(m.states[to])) || l.Disk != "root" || l.VM != golden16(4) ||
					l.Generation != 5 || l.QTime.IsZero() || l.PTime.IsZero() != (at == 0) || data != f.Data || zero != f.Zero {
					t.Fatalf("seed %d: %+v of %+v", seed, l.LayerInfo, f)
				}
				layers = append(layers, l)
				d, err := blockdev.NewOverlay(base, layers, nil)
				if err != nil {
					t.Fatal(err)
				}
				sameDisk(t, "overlay", d, m.states[to])
				if err := blockdev.Fold(fold, l); err != nil {
					t.Fatal(err)
				}
				sameDisk(t, "fold", fold, m.states[to])
				at = to
			}
		}
		names, err := os.ReadDir(out)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if !strings.HasSuffix(n.Name(), layerSuffix) {
				t.Errorf("%s was left", n.Name())
			}
		}
	}
}

// TestLatestIn: the whole span gives what single spans give one after the other.
func TestLatestIn(t *testing.T) {
	m := spanHistory(t, 11, 4)
	r := mustOpen(t, m.dir)
	now := bytes.Clone(m.states[1])
	for i := 2; i < len(m.cuts); i++ {
		want := m.states[i]
		now = slices.Grow(now, max(0, len(want)-len(now)))[:len(want)]
		_, err := r.LatestIn(Span{P: m.cuts[i-1], Q: m.cuts[i]}, "root", func(v *Version) error {
			n := min(v.Len, int64(len(want))-v.Off)
			if n <= 0 {
				return nil
			}
			switch v.Kind {
			case KindWrite:
				copy(now[v.Off:v.Off+n], v.Data)
			case KindCopy:
				copy(now[v.Off:v.Off+n], m.copies[[sha256.Size]byte(v.Data)][v.Off-v.of.off:])
			default:
				clear(now[v.Off : v.Off+n])
			}
			return nil
		})
		if err != nil || !bytes.Equal(now, want) {
			t.Fatalf("cut %v: differs at byte %d: %v", m.cuts[i], firstDiff(now, want), err)
		}
	}
}

// TestLayerSpans: which spans there are, and what makes a layer impossible.
func TestLayerSpans(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 1)
	cut := func() CutInfo {
		t.Helper()
		c, err := l.Cut(CutApp)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	add := func(e Entry) {
		t.Helper()
		h.g.Reset()
		h.g.Add(e)
		if err := l.Append(h.g); err != nil {
			t.Fatal(err)
		}
		l.Finished(h.g)
	}
	at := func(c CutInfo) Position { return Position{c.Incarnation, c.Epoch} }
	h.steps(10)
	a := cut()
	h.steps(10)
	b := cut()
	add(GapEntry(h.disk, 3*BlockBytes, 2*BlockBytes))
	if err := h.write(3*BlockBytes, BlockBytes, 7); err != nil {
		t.Fatal(err)
	}
	c := cut()
	bytesOfCopy := bytes.Repeat([]byte{8}, 8192)
	sum := sha256.Sum256(bytesOfCopy)
	add(Entry{Kind: KindCopy, Disk: h.disk, Off: 4096, Len: 8192, Data: sum[:]})
	d := cut()
	// Enough for the first segment to be sealed.
	for range 6 {
		if err := h.write(0, PayloadMax, 3); err != nil {
			t.Fatal(err)
		}
	}
	e := cut()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, dir)
	out := tempDir(t)
	layer := func(o LayerOptions) error {
		o.Disk = "root"
		_, err := r.WriteLayer(OS, out, o)
		return err
	}
	if err := layer(LayerOptions{Span: Span{P: at(a), Q: at(b)}}); err != nil {
		t.Fatal(err)
	}
	var missing *IncompleteError
	err := layer(LayerOptions{Span: Span{P: at(a), Q: at(c)}})
	if !errors.As(err, &missing) || !errors.Is(err, ErrDamaged) || missing.Copies != 0 ||
		!slices.Equal(missing.Extents, []blockdev.Extent{{Off: 4 * BlockBytes, Len: BlockBytes}}) {
		t.Fatalf("a gap: %v", err)
	}
	cd := Span{P: at(c), Q: at(d)}
	if err := layer(LayerOptions{Span: cd}); !errors.As(err, &missing) || missing.Copies != 8192 {
		t.Fatalf("copies that nobody has: %v", err)
	}
	for _, wrong := range []func(p []byte) error{
		func(p []byte) error { return nil },
		func(p []byte) error { return errInjected },
	} {
		err := layer(LayerOptions{Span: cd, Copied: func(_ blockdev.Extent, _ [sha256.Size]byte, p []byte) error { clear(p); return wrong(p) }})
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, errInjected) {
			t.Fatalf("a wrong copy: %v", err)
		}
	}
	if err := layer(LayerOptions{Span: cd, Copied: func(_ blockdev.Extent, _ [sha256.Size]byte, p []byte) error { copy(p, bytesOfCopy); return nil }}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.WriteLayer(OS, out, LayerOptions{Disk: "none", Span: cd}); !errors.Is(err, ErrNoDisk) {
		t.Fatalf("no such disk: %v", err)
	}
	for name, s := range map[string]Span{
		"backwards": {P: at(b), Q: at(a)}, "empty": {P: at(b), Q: at(b)},
		"no such q": {P: at(b), Q: Position{a.Incarnation, 99}}, "no such p": {P: Position{a.Incarnation - 1, 7}, Q: at(b)},
	} {
		if err := layer(LayerOptions{Span: s}); err == nil {
			t.Errorf("%s: made", name)
		}
	}
	if len(r.Segments) < 2 {
		t.Fatal("one segment")
	}
	// Without the first segment, the cut before what is left has to be known.
	rest := &Segments{fs: r.fs, Segments: r.Segments[1:]}
	before := r.Segments[1].First - 1
	from := Position{d.Incarnation, d.Epoch}
	for after, good := range map[uint64]bool{0: false, before - 1: false, before: true} {
		_, err := rest.WriteLayer(OS, out, LayerOptions{Disk: "root", Span: Span{P: from, Q: at(e), After: after}})
		if good != (err == nil) || !good && !errors.Is(err, ErrNoCut) {
			t.Errorf("after %d (of %d): %v", after, before, err)
		}
	}
	// Damage behind q does not matter, damage before it does.
	first := r.Segments[0]
	first.Damage = &CorruptError{first.Path, first.End, errInjected}
	if err := layer(LayerOptions{Span: Span{P: at(a), Q: at(b)}}); err != nil {
		t.Errorf("damage behind the span: %v", err)
	}
	if err := layer(LayerOptions{Span: Span{P: at(a), Q: at(e)}}); !errors.Is(err, ErrDamaged) {
		t.Errorf("damage in the span: %v", err)
	}
	if names, _ := filepath.Glob(filepath.Join(out, "*"+layerNew)); len(names) > 0 {
		t.Errorf("left: %v", names)
	}
}
