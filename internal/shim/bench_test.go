package shim

import (
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"afterimage/blockdev"
)

// BenchmarkColdWrite is one 4 KiB write after the other, uniformly over a sparse disk of
// 100 GiB: without a log, logged with all marks to be made, and logged over a disk of
// which all of the working set is hot. Marks are synced on the file system of TMPDIR.
func BenchmarkColdWrite(b *testing.B) {
	const size = 100 << 30
	for _, c := range []struct {
		name string
		log  bool
		span int64
	}{{"no log", false, size}, {"cold", true, size}, {"warm", true, 64 << 20}} {
		b.Run(c.name, func(b *testing.B) {
			dir := b.TempDir()
			image := filepath.Join(dir, "vm.raw")
			if err := blockdev.CreateFile(image, size); err != nil {
				b.Fatal(err)
			}
			dev, err := blockdev.OpenFile(image, blockdev.FileOptions{Raw: true})
			if err != nil {
				b.Fatal(err)
			}
			vm, err := OpenVM(b.Context(), VMOptions{
				Disks: []VMDisk{{Name: "root", Image: image, Device: dev}}, Warn: slog.New(slog.DiscardHandler),
			})
			if err != nil {
				b.Fatal(err)
			}
			if c.log {
				if _, err := vm.StartLog(b.Context(), LogOptions{Dir: filepath.Join(dir, "log"), Quota: 4 << 30}); err != nil {
					b.Fatal(err)
				}
			}
			d, buf := vm.Disks()[0], make([]byte, 4096)
			write := func(off int64) {
				done := make(asking)
				d.Submit([]*blockdev.Request{{Op: blockdev.OpWrite, Off: off, Len: 4096, Buf: buf, Owner: done}})
				<-done
			}
			if c.name == "warm" {
				for off := int64(0); off < c.span; off += 1 << 20 {
					write(off)
				}
			}
			b.ResetTimer()
			for range b.N {
				write(rand.Int64N(c.span/4096) * 4096)
			}
			b.StopTimer()
			if h := d.Stats().Hot; h != nil {
				b.ReportMetric(float64(h.HotExtents), "hot")
			}
			if err := vm.Abort(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
