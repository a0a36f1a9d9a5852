package hrl

import (
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"afterimage/internal/testenv"
)

// readCounter counts the bytes that are read from files opened for reading.
type readCounter struct {
	FS
	bytes atomic.Int64
}

func (c *readCounter) Open(path string) (File, error) {
	f, err := c.FS.Open(path)
	return countedFile{f, c}, err
}

type countedFile struct {
	File
	c *readCounter
}

func (f countedFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	f.c.bytes.Add(int64(n))
	return n, err
}

// A cutter appends to a log of two disks, and makes layers of it.
type cutter struct {
	t   testing.TB
	l   *Log
	g   *Group
	rng *rand.Rand

	sizes [2]int64
}

var cutterDisks = [2]string{"root", "data"}

func (c *cutter) open(dir string, opt Options) {
	c.t.Helper()
	c.l, _ = openTest(c.t, dir, opt)
	c.g = NewGroup()
	for i, name := range cutterDisks {
		if _, err := c.l.AddDisk(name, c.sizes[i]); err != nil {
			c.t.Fatal(err)
		}
	}
	c.l.Recovered()
}

func (c *cutter) append(e Entry) {
	c.g.Reset()
	c.g.Add(e)
	if err := c.l.Append(c.g); err != nil {
		c.t.Error(err)
		return
	}
	c.l.Finished(c.g)
}

// write writes n bytes somewhere on the first 8 MiB of a disk.
func (c *cutter) write(disk int, n int64) {
	p := make([]byte, n)
	p[0], p[n-1] = byte(c.rng.Uint32()), byte(c.rng.Uint32())
	c.append(Entry{Kind: KindWrite, Disk: DiskID(disk), Off: c.rng.Int64N((8<<20-n)/512) * 512, Len: n, Data: p})
}

func (c *cutter) resize(disk int) {
	to := 8<<20 + c.rng.Int64N(1<<12)*512
	if to == c.sizes[disk] {
		return
	}
	c.append(ResizeEntry(DiskID(disk), c.sizes[disk], to))
	c.sizes[disk] = to
}

func (c *cutter) cut() CutInfo {
	c.t.Helper()
	info, err := c.l.Cut(CutCrash)
	if err != nil {
		c.t.Fatal(err)
	}
	return info
}

// layers makes the layers of all disks and closes the segments.
func (c *cutter) layers(r *Segments, span Span, dir string) (out [2]LayerFile) {
	c.t.Helper()
	for i, disk := range cutterDisks {
		f, err := r.WriteLayer(OS, dir, LayerOptions{Generation: 1, Disk: disk, Span: span})
		if err != nil {
			c.t.Fatalf("layer of %+v: %v", span, err)
		}
		f.Path = ""
		out[i] = f
	}
	if err := r.Close(); err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c *cutter) behind(m Mark) *Segments {
	c.t.Helper()
	r, err := c.l.OpenBehind(m)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

func position(c *CutInfo) Position { return Position{c.Incarnation, c.Epoch} }

// TestBehindIsCheap: what is read for a small span does not grow with what lies before
// it in its segment, nor with what is appended behind it, nor with the disks.
func TestBehindIsCheap(t *testing.T) {
	var read []int64
	for _, fill := range []int{4, 200} {
		c := &cutter{t: t, rng: rand.New(rand.NewPCG(3, 3)), sizes: [2]int64{8 << 20, 8 << 20}}
		fsys := &readCounter{FS: OS}
		dir, layers := tempDir(t), tempDir(t)
		c.open(dir, Options{FS: fsys, SegmentBytes: 32 << 20})
		for range fill {
			c.write(0, 64<<10)
		}
		p := c.cut()
		for range 8 {
			c.write(1, 4096)
		}
		q := c.cut()
		fsys.bytes.Store(0)
		r := c.behind(p.Mark())
		for range fill {
			c.write(0, 64<<10)
		}
		c.layers(r, Span{P: position(&p), Q: position(&q)}, layers)
		read = append(read, fsys.bytes.Load())
		if err := c.l.Abort(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d bytes were read", read)
	// The header, the scan, one walk back for the disk that changed, and its data.
	if most := int64(4 * (headerBytes + 10*(4096+2*frameBytes))); read[0] != read[1] || read[0] > most {
		t.Errorf("%d and %d bytes were read, %d are the most", read[0], read[1], most)
	}
}

// TestBehindEqualsWhole makes layers through the places that the log knows, while it is
// appended to, and of the whole log from its headers: they are the same, byte for byte.
func TestBehindEqualsWhole(t *testing.T) {
	for seed := range uint64(testenv.Rounds(3, 1)) {
		c := &cutter{t: t, rng: rand.New(rand.NewPCG(seed, 4)), sizes: [2]int64{8 << 20, 8 << 20}}
		dir, layers := tempDir(t), tempDir(t)
		c.open(dir, Options{SegmentBytes: 4 << 20})
		cuts := []CutInfo{c.cut()}
		inside := 0
		for range 24 {
			for range c.rng.IntN(30) {
				switch disk := c.rng.IntN(2); c.rng.IntN(8) {
				case 0:
					c.resize(disk)
				case 1:
					c.append(Entry{Kind: KindZero, Disk: DiskID(disk), Off: c.rng.Int64N(1<<12) * 512, Len: 1 << 20})
				default:
					c.write(disk, (1+c.rng.Int64N(128))*512)
				}
			}
			switch c.rng.IntN(8) {
			case 0:
				if err := c.l.Abort(); err != nil {
					t.Fatal(err)
				}
				c.open(dir, Options{SegmentBytes: 4 << 20})
			case 1:
				for range c.rng.IntN(2 * placesMax) {
					cuts = append(cuts, c.cut())
				}
			}
			q := c.cut()
			p := cuts[c.rng.IntN(len(cuts))]
			if c.rng.IntN(2) == 0 {
				p = cuts[len(cuts)-1-c.rng.IntN(min(3, len(cuts)))]
			}
			cuts = append(cuts, q)
			var writer sync.WaitGroup
			for range c.rng.IntN(3) {
				writer.Go(func() {
					g := NewGroup()
					for range 20 {
						g.Reset()
						g.Add(Entry{Kind: KindWrite, Disk: 0, Len: 64 << 10, Data: make([]byte, 64<<10)})
						if err := c.l.Append(g); err != nil {
							t.Error(err)
							return
						}
						c.l.Finished(g)
					}
				})
			}
			span := Span{P: position(&p), Q: position(&q)}
			r := c.behind(p.Mark())
			if slices.ContainsFunc(r.Segments, func(s *Segment) bool { return s.from > headerBytes }) {
				inside++
			}
			got := c.layers(r, span, layers)
			writer.Wait()
			if want := c.layers(mustOpen(t, dir), span, layers); got != want {
				t.Fatalf("seed %d, span %+v: %+v, from the headers %+v", seed, span, got, want)
			}
		}
		if err := c.l.Abort(); err != nil {
			t.Fatal(err)
		}
		if inside < 6 {
			t.Errorf("only %d spans were read from within a segment", inside)
		}
	}
}

// TestBehindDamage: damage behind the mark is found, and what lies before it does not
// matter. After a restart, when only the file can say where frames begin, it does.
func TestBehindDamage(t *testing.T) {
	c := &cutter{t: t, rng: rand.New(rand.NewPCG(5, 5)), sizes: [2]int64{8 << 20, 8 << 20}}
	dir, layers := tempDir(t), tempDir(t)
	c.open(dir, Options{})
	c.write(0, 4096)
	path, first := c.l.tail.path, c.l.tail.end
	p := c.cut()
	c.write(0, 4096)
	second := c.l.tail.end
	q := c.cut()
	span := Span{P: position(&p), Q: position(&q)}
	poke(t, path, first-100, 0xff)
	c.layers(c.behind(p.Mark()), span, layers)
	// Without its beginning a segment does not do for a span that begins there.
	r := c.behind(p.Mark())
	if _, err := r.WriteLayer(OS, layers, LayerOptions{Generation: 1, Disk: "root", Span: Span{Q: span.Q}}); err == nil {
		t.Error("a layer was made of the log's beginning, which was not read")
	}
	r.Close()
	poke(t, path, second-100, 0xff)
	r = c.behind(p.Mark())
	if len(r.Segments) != 1 || r.Segments[0].Damage == nil {
		t.Error("damage behind the mark was not found")
	}
	r.Close()
	poke(t, path, second-100, 0)
	c.layers(c.behind(p.Mark()), span, layers)
	if err := c.l.Abort(); err != nil {
		t.Fatal(err)
	}
	c.open(dir, Options{})
	r = c.behind(p.Mark())
	if len(r.Segments) != 1 || r.Segments[0].Damage == nil || r.Segments[0].from != headerBytes {
		t.Error("after a restart a segment was not read from its header")
	}
	r.Close()
	if err := c.l.Abort(); err != nil {
		t.Fatal(err)
	}
}
