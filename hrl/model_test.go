package hrl

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// TestLatestModel: over random histories of everything that can happen to a
// disk, Latest gives each byte once, and what a naive replay forwards gives.
func TestLatestModel(t *testing.T) {
	const most = 3 * regionBytes // so that pages and their edges matter
	for seed := range uint64(testenv.Rounds(8, 2)) {
		rng := rand.New(rand.NewPCG(seed, 7))
		fill := rand.NewChaCha8([32]byte{byte(seed)})
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{})
		size := int64(most / 2)
		other, err := l.AddDisk("other", most)
		if err != nil {
			t.Fatal(err)
		}
		id, err := l.AddDisk("root", size)
		if err != nil {
			t.Fatal(err)
		}
		l.Recovered()
		// For every sector, what the newest frame said of it.
		kinds := make([]Kind, most/sectorBytes)
		data := make([]byte, most)
		set := func(k Kind, off, n int64) {
			for s := off / sectorBytes; s < (off+n)/sectorBytes; s++ {
				kinds[s] = k
			}
			if k != KindWrite {
				clear(data[off : off+n])
			}
		}
		g := NewGroup()
		for range 300 {
			g.Reset()
			for range 1 + rng.IntN(3) {
				off := rng.Int64N(size/sectorBytes) * sectorBytes
				n := min(size-off, (1+rng.Int64N(40))*sectorBytes)
				switch rng.IntN(12) {
				case 0:
					n = min(size-off, rng.Int64N(most/sectorBytes)*sectorBytes)
					fallthrough
				case 1, 2:
					g.Add(Entry{Kind: KindZero, Disk: id, Off: off, Len: n})
					set(KindZero, off, n)
				case 3:
					g.Add(Entry{Kind: KindCopy, Disk: id, Off: off, Len: n, Data: bytes.Repeat([]byte{5}, digestBytes)})
					set(KindCopy, off, n)
				case 4:
					g.Add(GapEntry(id, off, n))
					lo := off / BlockBytes * BlockBytes
					set(KindGap, lo, min(size, (off+n+BlockBytes-1)/BlockBytes*BlockBytes)-lo)
				case 5:
					to := (1 + rng.Int64N(most/sectorBytes)) * sectorBytes
					g.Add(ResizeEntry(id, size, to))
					set(KindZero, min(size, to), max(size, to)-min(size, to))
					size = to
				case 6:
					g.Add(Entry{Kind: KindZero, Disk: other, Off: off, Len: n})
				default:
					p := make([]byte, n)
					_, _ = fill.Read(p)
					g.Add(Entry{Kind: KindWrite, Disk: id, Off: off, Len: n, Data: p})
					set(KindWrite, off, n)
					copy(data[off:], p)
				}
			}
			if err := l.Append(g); err != nil {
				t.Fatal(err)
			}
			l.Finished(g)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		seen := make([]Kind, most/sectorBytes)
		got := make([]byte, most)
		_, err = mustOpen(t, dir).Latest("root", func(v *Version) error {
			for s := v.Off / sectorBytes; s < (v.Off+v.Len)/sectorBytes; s++ {
				if seen[s] != 0 {
					t.Fatalf("seed %d: sector %d is given twice", seed, s)
				}
				seen[s] = v.Kind
			}
			if v.Kind == KindWrite {
				copy(got[v.Off:], v.Data)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for s := range kinds {
			if s >= int(size/sectorBytes) {
				break // cut off: whatever
			}
			if seen[s] != kinds[s] || !bytes.Equal(got[s*sectorBytes:(s+1)*sectorBytes], data[s*sectorBytes:(s+1)*sectorBytes]) {
				t.Fatalf("seed %d: sector %d is given as %v, not %v", seed, s, seen[s], kinds[s])
			}
		}
	}
}

// TestLatestWindows: a disk touched in more regions than a window may have.
func TestLatestWindows(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	const regionsUsed = 2*windowRegions + 5
	id, err := l.AddDisk("root", (regionsUsed+10)*regionBytes)
	if err != nil {
		t.Fatal(err)
	}
	g := NewGroup()
	add := func(off int64, b byte) {
		g.Reset()
		g.Add(Entry{Kind: KindWrite, Disk: id, Off: off, Len: 512, Data: bytes.Repeat([]byte{b}, 512)})
		if err := l.Append(g); err != nil {
			t.Fatal(err)
		}
		l.Finished(g)
	}
	for i := range int64(regionsUsed) {
		add(i*regionBytes, 1)
		if i%3 == 0 {
			add(i*regionBytes, 2)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	seen := map[int64]byte{}
	stats, err := mustOpen(t, dir).Latest("root", func(v *Version) error {
		if _, twice := seen[v.Off]; twice || v.Len != 512 {
			t.Fatalf("%+v", v)
		}
		seen[v.Off] = v.Data[0]
		return nil
	})
	if err != nil || len(seen) != regionsUsed || stats.LatestBytes != regionsUsed*512 ||
		stats.Frames != regionsUsed+(regionsUsed+2)/3 {
		t.Fatalf("%d ranges, %+v: %v", len(seen), stats, err)
	}
	for i := range int64(regionsUsed) {
		if want := byte(1); seen[i*regionBytes] != want && i%3 != 0 || i%3 == 0 && seen[i*regionBytes] != 2 {
			t.Fatalf("region %d has %d", i, seen[i*regionBytes])
		}
	}
}

// TestVerifyFindings: what is wrong between segments.
func TestVerifyFindings(t *testing.T) {
	seg := func(path string, inc, ordinal, first, last uint64, change func(*Segment)) *Segment {
		s := &Segment{Path: path, Incarnation: inc, Ordinal: ordinal, First: first, Last: last, head: segmentHeader{ordinal: ordinal}}
		if change != nil {
			change(s)
		}
		return s
	}
	loss := func(s *Segment) { s.AfterLoss = true }
	damaged := func(s *Segment) { s.Damage = &CorruptError{s.Path, 77, io.ErrUnexpectedEOF} }
	headless := func(s *Segment) { damaged(s); s.head = segmentHeader{} }
	for _, c := range []struct {
		name string
		segs []*Segment
		want []string // a part of each finding
	}{
		{"none", nil, nil},
		{"whole", []*Segment{seg("a", 1, 1, 1, 9, nil), seg("b", 1, 2, 10, 20, nil), seg("c", 2, 3, 1, 5, nil)}, nil},
		{"begins late", []*Segment{seg("a", 1, 7, 100, 120, nil)}, nil},
		{"segments missing", []*Segment{seg("a", 1, 1, 1, 9, nil), seg("b", 1, 4, 30, 40, nil)}, []string{"b@0: is number 4, the one before it is 1: 2 segments"}},
		{"frames missing", []*Segment{seg("a", 1, 1, 1, 9, nil), seg("b", 1, 2, 12, 20, nil)}, []string{"a@0: ends with frame 9"}},
		{"said to be lost", []*Segment{seg("a", 1, 1, 1, 9, nil), seg("b", 1, 3, 12, 20, loss)}, nil},
		{"twice", []*Segment{seg("a", 1, 1, 1, 9, nil), seg("b", 1, 1, 10, 20, nil)}, []string{"b@0: is number 1, as a is"}},
		{"damaged", []*Segment{seg("a", 1, 1, 1, 4, damaged), seg("b", 1, 2, 10, 20, nil)}, []string{"a@77: unexpected EOF"}},
		{"headless", []*Segment{seg("x", 0, 0, 0, 0, headless), seg("a", 1, 1, 1, 9, nil)}, []string{"x@77"}},
		{"new incarnation", []*Segment{seg("a", 1, 1, 1, 9, nil), seg("b", 2, 9, 1, 20, nil)}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := (&Segments{Segments: c.segs}).Verify()
			if len(got) != len(c.want) {
				t.Fatalf("findings %v", got)
			}
			for i, f := range got {
				if s := fmt.Sprintf("%s@%d: %s", f.Segment, f.Off, f.Problem); !strings.Contains(s, c.want[i]) {
					t.Errorf("%q, not %q", s, c.want[i])
				}
			}
		})
	}
}

// TestAppendRefuses: groups that no reader would take are refused, and the log
// neither holds nor lacks anything by that.
func TestAppendRefuses(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 1)
	b := make([]byte, PayloadMax+512)
	for name, es := range map[string][]Entry{
		"empty":            {},
		"payload too long": {{Kind: KindWrite, Len: PayloadMax + 512, Data: b}},
		"other length":     {{Kind: KindWrite, Len: 512, Data: b[:1024]}},
		"unaligned":        {{Kind: KindWrite, Off: 100, Len: 512, Data: b[:512]}},
		"negative":         {{Kind: KindZero, Off: -512, Len: 512}},
		"beyond any disk":  {{Kind: KindZero, Off: diskBytesMax, Len: 512}},
		"no such disk":     {{Kind: KindZero, Disk: 1, Len: 512}},
		"zero with bytes":  {{Kind: KindZero, Len: 512, Data: b[:512]}},
		"no digest":        {{Kind: KindCopy, Len: 512}},
		"no kind":          {{Len: 512}},
		"a cut":            {{Kind: KindCut, Disk: noDisk, Data: b[:cutPayloadBytes]}},
		"a seal":           {{Kind: KindSeal, Disk: noDisk}},
		"bad gap":          {{Kind: KindGap, Disk: noDisk, Data: []byte{1, 2, 3}}},
		"bad resize":       {{Kind: KindResize, Off: 512, Len: 512, Data: make([]byte, 8)}},
		"too many":         make([]Entry, GroupMax+1),
		"group too long": {
			{Kind: KindWrite, Len: PayloadMax, Data: b[:PayloadMax]}, {Kind: KindWrite, Len: PayloadMax, Data: b[:PayloadMax]},
		},
	} {
		g := NewGroup()
		g.Entries = append(g.Entries, es...)
		if err := l.Append(g); err == nil {
			t.Errorf("%s: appended", name)
		}
	}
	if l.LostBytes() != 0 {
		t.Fatal("a refused group counts as lost")
	}
	if err := h.write(0, PayloadMax, 1); err != nil {
		t.Fatalf("the longest payload: %v", err)
	}
	h.g.Reset()
	for i := range GroupMax {
		h.g.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: int64(i) * 512, Len: 512, Data: b[:512]})
		clear(h.model[i*512:][:512])
	}
	if err := l.Append(h.g); err != nil {
		t.Fatal(err)
	}
	l.Finished(h.g)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("one entry too many was added")
			}
		}()
		h.g.Add(Entry{})
	}()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(h.g); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	checkReplay(t, dir, h.model)
}

// TestOptions: what cannot work is refused before a file is made.
func TestOptions(t *testing.T) {
	given := func(*BlockSet) error { return nil }
	for _, o := range []Options{
		{SegmentBytes: minSegmentBytes - 4096}, {SegmentBytes: minSegmentBytes + 1}, {SegmentBytes: 2 * maxSegmentBytes},
		{SegmentBytes: minSegmentBytes, Quota: 4 * minSegmentBytes, Reclaimed: given}, {Quota: 1 << 40}, {Spares: -1},
	} {
		dir := tempDir(t)
		if _, _, err := Open(dir, o); err == nil {
			t.Errorf("opened with %+v", o)
		}
		if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
			t.Errorf("left %v, %v", names, err)
		}
	}
}

// TestAppendAllocates: an append allocates nothing but when it rolls the segment.
func TestAppendAllocates(t *testing.T) {
	for _, n := range []int{1, GroupMax} {
		l, _ := openTest(t, tempDir(t), Options{SegmentBytes: 256 << 20, Spares: 1})
		defer l.Abort()
		id, err := l.AddDisk("root", 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		g, at, data := NewGroup(), uint64(1), make([]byte, 4096)
		once := func() {
			fillGroup(g, id, n, &at, data)
			for i := range g.Entries {
				g.Entries[i].Off %= 1 << 30
			}
			if err := l.Append(g); err != nil {
				t.Fatal(err)
			}
			l.Finished(g)
		}
		once()
		if got := testing.AllocsPerRun(500, once); got > 0 {
			t.Errorf("groups of %d: %v allocations", n, got)
		}
	}
}

// TestReplayProgress: progress adds up to what was applied.
func TestReplayProgress(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 1)
	h.steps(50)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var sum int64
	stats, err := mustOpen(t, dir).Replay("root", blockdev.NewMem(testDisk), func(n int64) { sum += n })
	if err != nil || sum != stats.LatestBytes || stats.LatestBytes != stats.LatestData+stats.ZeroedBytes {
		t.Fatalf("%d, %+v, %v", sum, stats, err)
	}
}
