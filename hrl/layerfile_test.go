package hrl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// goldenLayer is a layer with frames that are stored as they are, so that its
// bytes do not depend on a compressor's version, and the same with ones that
// are compressed.
func goldenLayer(t testing.TB, compressed bool) []byte {
	t.Helper()
	dir := tempDir(t)
	w, err := NewLayerWriter(OS, dir, LayerInfo{
		VM: golden16(1), Generation: 2, Disk: "root", P: Position{3, 4}, Q: Position{5, 6}, Size: 8 << 20,
		PTime: time.Unix(0, 1700000000123456789), QTime: time.Unix(0, 1700000001123456789), Kind: CutApp, PGeneration: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1536)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(p)
	steps := []func() error{
		func() error { return w.Zero(0, 4096) },
		func() error { return w.Data(8192, p) },
		func() error { return w.Zero(8192+1536, 512) },
		func() error { return w.Zero(8192+2048, 512) }, // joins the one before
		func() error { return w.Data(LayerDataMax-512, p[:1024]) },
		func() error { return w.Data(LayerDataMax+512, p[:512]) },
		func() error { return w.Zero(4<<20, 4096) },
		func() error { return w.Unreadable(4<<20+4096, 4096) },
		func() error { return w.Unreadable(4<<20+8192, 4096) }, // joins the one before
		func() error { return w.Zero(4<<20+12288, 4<<20-12288) },
	}
	if compressed {
		steps = slices.Insert(steps, 6, func() error { return w.Data(1<<20, bytes.Repeat([]byte("text"), 25<<10)) })
	}
	for _, s := range steps {
		if err := s(); err != nil {
			t.Fatal(err)
		}
	}
	f, err := w.Commit()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// layerGolden names the golden files of the present version of layers.
var layerGolden = filepath.Join("..", fmt.Sprintf("v%d", LayerVersion), "layer")

func TestGoldenLayer(t *testing.T) {
	path := filepath.Join(goldenDir, layerGolden+".hex")
	b := goldenLayer(t, false)
	if *updateGolden {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, hexLines(b), 0o644); err != nil {
			t.Fatal(err)
		}
		// What a compressor makes may change with its version; what was made
		// must be readable for ever.
		if err := os.WriteFile(filepath.Join(goldenDir, layerGolden+"-zstd.hex"), hexLines(goldenLayer(t, true)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(b, readGolden(t, layerGolden)) {
		t.Error("the format was changed: raise LayerVersion")
	}
	for _, version := range []string{"v1", "v2"} {
		if _, err := OpenLayer(memFS{data: readGolden(t, filepath.Join("..", version, "layer-zstd"))}, "f"); !errors.Is(err, ErrVersion) {
			t.Errorf("a layer of version %s: %v", version, err)
		}
	}
	l, err := OpenLayer(memFS{data: readGolden(t, layerGolden+"-zstd")}, "f")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Verify(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100<<10)
	if n, err := l.ReadAt(got, 1<<20); err != nil || n != len(got) || !bytes.Equal(got, bytes.Repeat([]byte("text"), 25<<10)) {
		t.Fatalf("%d bytes: %v", n, err)
	}
	var runs []blockdev.Run
	if err := l.Extents(func(r blockdev.Run) bool { runs = append(runs, r); return true }); err != nil || len(runs) != 9 {
		t.Fatalf("%v, %v", runs, err)
	}
	var lost []blockdev.Extent
	if err := l.Unreadable(func(e blockdev.Extent) bool { lost = append(lost, e); return true }); err != nil ||
		!slices.Equal(lost, []blockdev.Extent{{Off: 4<<20 + 4096, Len: 8192}}) {
		t.Fatalf("unreadable: %v, %v", lost, err)
	}
	// What is unreadable is passed over: the layer does not have it.
	if run, ok, err := l.Lookup(4<<20+6000, 1<<20); err != nil || !ok || run.Off != 4<<20+12288 || !run.Zero {
		t.Fatalf("%v, %v, %v", run, ok, err)
	}
	if _, ok, err := l.Lookup(4<<20+4096, 8192); ok || err != nil {
		t.Fatalf("found in what is unreadable: %v", err)
	}
	if n, err := l.ReadAt(got[:8192], 4<<20); n != 4096 || !errors.Is(err, ErrAbsent) {
		t.Fatalf("%d bytes of what is unreadable: %v", n, err)
	}
	if n, err := l.ReadAt(got[:1024], 4096-512); n != 512 || !errors.Is(err, ErrAbsent) {
		t.Fatalf("%d bytes of what the layer does not have: %v", n, err)
	}
}

// TestLayerDamage: a change of any byte, and any shortening, is found and
// named, and what is read without looking for damage first is right or an error.
func TestLayerDamage(t *testing.T) {
	whole := goldenLayer(t, true)
	good, err := OpenLayer(memFS{data: whole}, "f")
	if err != nil {
		t.Fatal(err)
	}
	type part struct {
		blockdev.Run
		data []byte
	}
	var parts []part
	_ = good.Extents(func(r blockdev.Run) bool {
		p := part{r, make([]byte, r.Len)}
		if _, err := good.ReadAt(p.data, r.Off); err != nil {
			t.Fatal(err)
		}
		parts = append(parts, p)
		return true
	})
	got := make([]byte, 4<<20)
	for at := range whole {
		b := bytes.Clone(whole)
		b[at] ^= 0x10
		l, err := OpenLayer(memFS{data: b}, "f")
		if err == nil {
			err = l.Verify()
			for _, p := range parts {
				if p.Zero {
					continue
				}
				if n, err := l.ReadAt(got[:p.Len], p.Off); err == nil && !bytes.Equal(got[:n], p.data) {
					t.Fatalf("byte %d: wrong bytes were read", at)
				}
			}
		}
		if at == 7 {
			if !errors.Is(err, ErrVersion) {
				t.Fatalf("another version: %v", err)
			}
			continue
		}
		var le *LayerError
		if !errors.As(err, &le) || !errors.Is(err, ErrDamaged) || le.Layer != "f" || le.Off > int64(at) || le.Hint() == "" {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
	for n := 0; n < len(whole); n += 1 + n/50 {
		if _, err := OpenLayer(memFS{data: whole[:n]}, "f"); !errors.Is(err, ErrDamaged) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	if _, err := OpenLayer(memFS{data: append(bytes.Clone(whole), 0)}, "f"); !errors.Is(err, ErrDamaged) {
		t.Fatalf("a byte too much: %v", err)
	}
	// Whole, but not what its name says.
	l, err := OpenLayer(memFS{data: whole}, LayerName([32]byte{1}))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Verify(); !errors.Is(err, ErrDamaged) {
		t.Fatalf("another digest: %v", err)
	}
}

// syncedFS sees to it that no file gets a layer's name before its content is
// durable.
type syncedFS struct {
	FS
	t     *testing.T
	mu    sync.Mutex
	dirty map[string]bool
}

type syncedFile struct {
	File
	fs   *syncedFS
	path string
}

func (s *syncedFS) mark(path string, dirty bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dirty[path] = dirty
}

func (s *syncedFS) Create(path string) (File, error) {
	f, err := s.FS.Create(path)
	if err != nil {
		return nil, err
	}
	s.mark(path, true)
	return &syncedFile{f, s, path}, nil
}

func (s *syncedFS) Rename(from, to string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dirty[from] {
		s.t.Errorf("%s was renamed before it was synced", from)
	}
	return s.FS.Rename(from, to)
}

func (f *syncedFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.mark(f.path, true)
	return f.File.WriteAt(p, off)
}

func (f *syncedFile) Sync() error {
	err := f.File.Sync()
	if err == nil {
		f.fs.mark(f.path, false)
	}
	return err
}

// TestLayerFailEveryOperation: whichever operation fails, what has a layer's
// name is a whole one, and nothing else is left.
func TestLayerFailEveryOperation(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 3)
	h.steps(40)
	c, err := l.Cut(CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	failed := 0
	first, by := testenv.Every(t, 3)
	for k := first; ; k += by {
		out := tempDir(t)
		faulty := newFaultFS()
		faulty.FS = &syncedFS{FS: OS, t: t, dirty: map[string]bool{}}
		faulty.sticky = k%2 == 0
		r, err := openSegments(faulty, []string{dir})
		if err != nil {
			t.Fatal(err)
		}
		faulty.set(func() { faulty.ops, faulty.failAt = 0, k })
		f, err := r.WriteLayer(faulty, out, LayerOptions{Disk: "root", Span: Span{Q: Position{c.Incarnation, c.Epoch}}})
		r.Close()
		if faulty.fired != (err != nil) {
			t.Fatalf("operation %d: failed %v, error %v", k, faulty.fired, err)
		}
		names, rerr := os.ReadDir(out)
		if rerr != nil {
			t.Fatal(rerr)
		}
		for _, n := range names {
			if !strings.HasSuffix(n.Name(), layerSuffix) {
				t.Fatalf("operation %d: %s was left", k, n.Name())
			}
			if err := openLayer(t, filepath.Join(out, n.Name())).Verify(); err != nil {
				t.Fatal(err)
			}
		}
		if err == nil {
			if len(names) != 1 || filepath.Base(f.Path) != names[0].Name() {
				t.Fatalf("%v, %+v", names, f)
			}
			break
		}
		failed++
	}
	if (failed+1)*by < 10 {
		t.Fatalf("only %d operations", failed)
	}
}

// TestLayerReadFails: a read that fails is an error, and no damage.
func TestLayerReadFails(t *testing.T) {
	path := filepath.Join(tempDir(t), "f")
	if err := os.WriteFile(path, goldenLayer(t, true), 0o600); err != nil {
		t.Fatal(err)
	}
	for k := 1; ; k++ {
		faulty := newFaultFS()
		faulty.failAt = k
		l, err := OpenLayer(faulty, path)
		if err == nil {
			err = l.Verify()
			if err == nil {
				_, err = l.ReadAt(make([]byte, 512), 8192)
			}
			l.Close()
		}
		if !faulty.fired {
			if err != nil {
				t.Fatal(err)
			}
			return
		}
		if !errors.Is(err, errInjected) || errors.Is(err, ErrDamaged) {
			t.Fatalf("operation %d: %v", k, err)
		}
	}
}

func TestRemoveUnfinished(t *testing.T) {
	dir := tempDir(t)
	for _, n := range []string{"1.layer.new", "1.index.layer.new", "2.layer", "other"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := RemoveUnfinished(OS, dir); err != nil {
		t.Fatal(err)
	}
	if names, err := OS.ReadDir(dir); err != nil || len(names) != 2 {
		t.Fatalf("%v, %v", names, err)
	}
}

// TestLayerWriterRefuses: what does not follow, or lies outside.
func TestLayerWriterRefuses(t *testing.T) {
	info := LayerInfo{Disk: "root", Q: Position{1, 1}, Size: 1 << 20, Kind: CutCrash}
	for name, call := range map[string]func(w *LayerWriter) error{
		"backwards":  func(w *LayerWriter) error { _ = w.Zero(4096, 4096); return w.Data(4096, make([]byte, 512)) },
		"beyond":     func(w *LayerWriter) error { return w.Zero(1<<20, 512) },
		"across":     func(w *LayerWriter) error { return w.Zero(1<<20-512, 1024) },
		"unaligned":  func(w *LayerWriter) error { return w.Data(0, make([]byte, 100)) },
		"nothing":    func(w *LayerWriter) error { return w.Zero(0, 0) },
		"after end":  func(w *LayerWriter) error { _ = w.Abort(); return w.Zero(0, 512) },
		"negative":   func(w *LayerWriter) error { return w.Zero(-512, 512) },
		"overflowed": func(w *LayerWriter) error { return w.Zero(512, 1<<62) },
	} {
		dir := tempDir(t)
		w, err := NewLayerWriter(OS, dir, info)
		if err != nil {
			t.Fatal(err)
		}
		if call(w) == nil {
			t.Errorf("%s: taken", name)
		}
		if _, err := w.Commit(); err == nil {
			t.Errorf("%s: made", name)
		}
		if names, err := OS.ReadDir(dir); err != nil || len(names) != 0 {
			t.Errorf("%s: left %v, %v", name, names, err)
		}
	}
	info.Disk = ""
	if _, err := NewLayerWriter(OS, tempDir(t), info); err == nil {
		t.Error("a disk without a name")
	}
}

// TestLayerMemory: neither writing nor reading a layer takes memory that grows
// with its index.
func TestLayerMemory(t *testing.T) {
	const entries, limit = 200_000, 3 << 20 // the index has 6.4 MB
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	w, err := NewLayerWriter(OS, tempDir(t), LayerInfo{Disk: "root", Q: Position{1, 1}, Size: 1 << 40, Kind: CutCrash})
	if err != nil {
		t.Fatal(err)
	}
	before := heap()
	for i := range int64(entries) {
		if err := w.Zero(i*8192, 512); err != nil {
			t.Fatal(err)
		}
	}
	if grown := heap() - before; grown > limit {
		t.Errorf("writing took %d bytes", grown)
	}
	f, err := w.Commit()
	if err != nil {
		t.Fatal(err)
	}
	l := openLayer(t, f.Path)
	rng := rand.New(rand.NewPCG(1, 1))
	before = heap()
	for range 5_000 {
		i := rng.Int64N(entries)
		if r, ok, err := l.Lookup(i*8192-4096, 8192); err != nil || !ok || r.Off != i*8192 || r.Len != 512 || !r.Zero {
			t.Fatalf("%+v, %v, %v", r, ok, err)
		}
	}
	if err := l.Verify(); err != nil {
		t.Fatal(err)
	}
	if grown := heap() - before; grown > limit {
		t.Errorf("reading took %d bytes", grown)
	}
}

// fixLayer makes every checksum of a layer right, so that what lies behind them
// is reached.
func fixLayer(b []byte) {
	if len(b) < layerHeaderBytes+layerTrailerBytes {
		return
	}
	le := binary.LittleEndian
	sd := crc32.Checksum(b[12:layerHeaderBytes], castagnoli)
	le.PutUint32(b[8:], sd)
	end := b[len(b)-layerTrailerBytes:]
	le.PutUint32(end[8:], crc32.Update(sd, castagnoli, end[12:]))
	index := int64(le.Uint64(end[16:]))
	if index < layerHeaderBytes || index > int64(len(b)-layerTrailerBytes) {
		return
	}
	for at := index; at+layerPageBytes <= int64(len(b)-layerTrailerBytes); at += layerPageBytes {
		le.PutUint32(b[at:], crc32.Update(sd, castagnoli, b[at+4:at+layerPageBytes]))
	}
	for at := int64(layerHeaderBytes); at+layerFrameBytes <= index; {
		stored := le.Uint32(b[at+20:])
		if at+layerSpan(stored) > index {
			break
		}
		data := b[at+layerFrameBytes:][:stored]
		le.PutUint32(b[at+24:], crc32.Update(sd, castagnoli, data))
		le.PutUint32(b[at:], crc32.Update(sd, castagnoli, b[at+4:at+layerFrameBytes]))
		at += layerSpan(stored)
	}
}

// FuzzLayer reads arbitrary bytes, and a layer with arbitrary changes whose
// checksums are right all the same.
func FuzzLayer(f *testing.F) {
	whole := goldenLayer(f, true)
	f.Add([]byte{}, true)
	f.Add(goldenLayer(f, false), false)
	f.Add([]byte{72, 0, 9, 0x48, 0, 0xff}, true)
	f.Add([]byte{0x20, 2, 0xff, 0x24, 2, 1}, true)
	f.Fuzz(func(t *testing.T, data []byte, changes bool) {
		if len(data) > 1<<16 {
			return
		}
		b := data
		if changes {
			// Triples of position (16 bits) and what to xor the byte there with.
			b = bytes.Clone(whole)
			for ; len(data) >= 3; data = data[3:] {
				b[int(binary.LittleEndian.Uint16(data))%len(b)] ^= data[2]
			}
			fixLayer(b)
		}
		l, err := OpenLayer(memFS{data: b}, "f")
		if err != nil {
			return
		}
		defer l.Close()
		verified := l.Verify()
		buf := make([]byte, LayerDataMax)
		last := int64(0)
		err = l.Extents(func(r blockdev.Run) bool {
			if r.Len <= 0 || r.Off < 0 || r.End() > l.Size || verified == nil && r.Off < last {
				t.Fatalf("run %+v of a disk of %d", r, l.Size)
			}
			last = r.End()
			p := buf[:min(r.Len, LayerDataMax)]
			if _, err := l.ReadAt(p, r.Off); verified == nil && err != nil {
				t.Fatalf("whole, and %v", err)
			}
			got, ok, err := l.Lookup(r.Off, r.Len)
			if verified == nil && (err != nil || !ok || got != r) {
				t.Fatalf("%+v is found as %+v: %v", r, got, err)
			}
			return true
		})
		if verified == nil && err != nil {
			t.Fatal(err)
		}
	})
}
