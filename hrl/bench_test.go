package hrl

import (
	"fmt"
	"testing"
)

// benchLog is a log in memory with one disk of 64 GiB.
func benchLog(t testing.TB, opt Options) (*Log, DiskID, string) {
	t.Helper()
	dir := tempDir(t)
	l, _ := openTest(t, dir, opt)
	id, err := l.AddDisk("root", 64<<30)
	if err != nil {
		t.Fatal(err)
	}
	l.Recovered()
	return l, id, dir
}

// fillGroup makes g n writes of 4 KiB at pseudo-random places.
func fillGroup(g *Group, id DiskID, n int, at *uint64, data []byte) {
	g.Reset()
	for range n {
		*at = *at*6364136223846793005 + 1442695040888963407
		g.Add(Entry{Kind: KindWrite, Disk: id, Off: int64(*at>>40) % (1 << 20) * 4096, Len: 4096, Data: data})
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{1, 16} {
		b.Run(fmt.Sprintf("%dx4KiB", n), func(b *testing.B) {
			// The quota makes the log recycle, as it does in use.
			l, id, _ := benchLog(b, Options{
				SegmentBytes: 64 << 20, Quota: 8 * 64 << 20, Prewrite: true, Reclaimed: func(*BlockSet) error { return nil },
			})
			defer l.Abort()
			g, at, data := NewGroup(), uint64(1), make([]byte, 4096)
			b.SetBytes(int64(n * 4096))
			b.ReportAllocs()
			for b.Loop() {
				fillGroup(g, id, n, &at, data)
				if err := l.Append(g); err != nil {
					b.Fatal(err)
				}
				l.Finished(g)
			}
		})
	}
}

// BenchmarkAppendParallel is what several connections see.
func BenchmarkAppendParallel(b *testing.B) {
	l, id, _ := benchLog(b, Options{
		SegmentBytes: 64 << 20, Quota: 8 * 64 << 20, Prewrite: true, Reclaimed: func(*BlockSet) error { return nil },
	})
	defer l.Abort()
	b.SetBytes(4096)
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		g, at, data := NewGroup(), uint64(1), make([]byte, 4096)
		for pb.Next() {
			fillGroup(g, id, 1, &at, data)
			if err := l.Append(g); err != nil {
				b.Fatal(err)
			}
			l.Finished(g)
		}
	})
}

func BenchmarkCut(b *testing.B) {
	for _, n := range []int{0, 1000} {
		b.Run(fmt.Sprintf("after%d", n), func(b *testing.B) {
			l, id, _ := benchLog(b, Options{
				SegmentBytes: 64 << 20, Quota: 8 * 64 << 20, Prewrite: true, Reclaimed: func(*BlockSet) error { return nil },
			})
			defer l.Abort()
			g, at, data := NewGroup(), uint64(1), make([]byte, 512)
			for b.Loop() {
				b.StopTimer()
				for range n {
					fillGroup(g, id, 1, &at, data)
					g.Entries[0].Data, g.Entries[0].Len = data, 512
					if err := l.Append(g); err != nil {
						b.Fatal(err)
					}
					l.Finished(g)
				}
				b.StartTimer()
				if _, err := l.Cut(CutCrash); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// benchSegments writes size bytes of log and returns its directory.
func benchSegments(b *testing.B, size int64) string {
	l, id, dir := benchLog(b, Options{SegmentBytes: 64 << 20})
	g, at, data := NewGroup(), uint64(1), make([]byte, 4096)
	for l.Stats().Bytes < size {
		fillGroup(g, id, GroupMax, &at, data)
		if err := l.Append(g); err != nil {
			b.Fatal(err)
		}
		l.Finished(g)
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	return dir
}

func BenchmarkLatest(b *testing.B) {
	const size = 256 << 20
	dir := benchSegments(b, size)
	b.Run("open", func(b *testing.B) { // the forward scan
		b.SetBytes(size)
		for b.Loop() {
			r, err := OpenSegments(dir)
			if err != nil {
				b.Fatal(err)
			}
			r.Close()
		}
	})
	b.Run("latest", func(b *testing.B) {
		r, err := OpenSegments(dir)
		if err != nil {
			b.Fatal(err)
		}
		defer r.Close()
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := r.Latest("root", func(*Version) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkBehind makes the layers of two disks, of a span of 4 MiB that lies behind a
// fill of its segment, as each cycle of replication does.
func BenchmarkBehind(b *testing.B) {
	for _, fill := range []int{0, 28, 56} {
		b.Run(fmt.Sprintf("fill%dMiB", fill), func(b *testing.B) {
			l, _ := openTest(b, tempDir(b), Options{SegmentBytes: 64 << 20})
			defer l.Abort()
			disks := []string{"root", "data"}
			for _, d := range disks {
				if _, err := l.AddDisk(d, 64<<30); err != nil {
					b.Fatal(err)
				}
			}
			l.Recovered()
			g, data := NewGroup(), make([]byte, 64<<10)
			write := func(n int) {
				for i := range n {
					g.Reset()
					g.Add(Entry{Kind: KindWrite, Disk: DiskID(i % 2), Off: int64(i) * 64 << 10, Len: 64 << 10, Data: data})
					if err := l.Append(g); err != nil {
						b.Fatal(err)
					}
					l.Finished(g)
				}
			}
			cut := func() CutInfo {
				c, err := l.Cut(CutCrash)
				if err != nil {
					b.Fatal(err)
				}
				return c
			}
			write(fill << 4)
			p := cut()
			write(4 << 4)
			q := cut()
			layers := tempDir(b)
			for b.Loop() {
				r, err := l.OpenBehind(p.Mark())
				if err != nil {
					b.Fatal(err)
				}
				for _, d := range disks {
					_, err := r.WriteLayer(OS, layers, LayerOptions{Generation: 1, Disk: d, Span: Span{
						P: Position{p.Incarnation, p.Epoch}, Q: Position{q.Incarnation, q.Epoch},
					}})
					if err != nil {
						b.Fatal(err)
					}
				}
				r.Close()
			}
		})
	}
}
