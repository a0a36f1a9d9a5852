package shim

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// TestLife: the same boot and mounts are the same life; another image under the
// name, and a disk whose cache is another host's, are not.
func TestLife(t *testing.T) {
	dir := t.TempDir()
	image, log := filepath.Join(dir, "vm.raw"), filepath.Join(dir, "none", "log")
	if err := blockdev.CreateFile(image, 1<<20); err != nil {
		t.Fatal(err)
	}
	first, err := life(log, []VMDisk{{Image: image}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(log, 0o700); err != nil {
		t.Fatal(err)
	}
	if again, err := life(log, []VMDisk{{Image: image}}); err != nil || again != first {
		t.Errorf("making the log directory began a new life: %v", err)
	}
	if err := os.Rename(image, image+".old"); err != nil {
		t.Fatal(err)
	}
	if err := blockdev.CreateFile(image, 1<<20); err != nil {
		t.Fatal(err)
	}
	if other, err := life(log, []VMDisk{{Image: image}}); err != nil || other == first {
		t.Errorf("another file under the name lives the life of the first: %v", err)
	}
	if elsewhere, err := life("/proc", []VMDisk{{Image: image}}); err != nil || elsewhere == first {
		t.Errorf("another file system for the log lives the same life: %v", err)
	}
	remote := blockdev.NewMem(512)
	a, err := life(log, []VMDisk{{Device: remote}})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := life(log, []VMDisk{{Device: remote}}); err != nil || a == b {
		t.Errorf("a remote disk lives on: %v", err)
	}
}

func TestSegmentFor(t *testing.T) {
	for _, c := range []struct{ quota, want, size int64 }{
		{40 << 20, 0, 4 << 20},
		{639 << 20, 0, 32 << 20},
		{640 << 20, 0, 64 << 20},
		{1 << 40, 0, 64 << 20},
		{1 << 40, 8 << 20, 8 << 20},
	} {
		if got := segmentFor(c.quota, c.want); got != c.size {
			t.Errorf("a quota of %d gives segments of %d, not %d", c.quota, got, c.size)
		}
	}
}

// TestOpenThatFails lets go of the image and of the log.
func TestOpenThatFails(t *testing.T) {
	dir := t.TempDir()
	image, log := filepath.Join(dir, "vm.raw"), filepath.Join(dir, "log")
	if err := blockdev.CreateFile(image, 1<<20); err != nil {
		t.Fatal(err)
	}
	o := Options{Name: "vm", Image: image, LogDir: log, Warn: slog.New(slog.DiscardHandler), SegmentBytes: 1000}
	open := func() (*Disk, error) {
		dev, err := blockdev.OpenFile(image, blockdev.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return Open(t.Context(), dev, o)
	}
	if _, err := open(); err == nil {
		t.Fatal("segments of 1000 bytes")
	}
	o.SegmentBytes, o.Name = 4<<20, "a/b"
	if _, err := open(); err == nil {
		t.Fatal("a name with a slash")
	}
	o.Name = "vm"
	d, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// Closed cleanly: nothing to compare at the next opening.
	d, err = open()
	if err != nil || d.Recovered.Found != hrl.RecoverClean || d.Recovered.ReadBytes != 0 {
		t.Fatalf("%+v: %v", d.Recovered, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
