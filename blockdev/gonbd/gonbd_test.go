package gonbd

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"

	"afterimage/blockdev"
	"afterimage/blockdev/devtest"
)

func fromBackend(t *testing.T, b backend.Backend) blockdev.Device {
	t.Helper()
	d, err := FromBackend(b)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	backends := map[string]func(t *testing.T) backend.Backend{
		"their memory": func(t *testing.T) backend.Backend { return backend.NewMemoryBackend(make([]byte, 1<<20)) },
		"their file": func(t *testing.T) backend.Backend {
			f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			if err := f.Truncate(1 << 20); err != nil {
				t.Fatal(err)
			}
			return backend.NewFileBackend(f)
		},
		"ours, there and back": func(t *testing.T) backend.Backend { return ToBackend(blockdev.NewMem(1 << 20)) },
	}
	for name, open := range backends {
		t.Run(name, func(t *testing.T) {
			devtest.Run(t, func(t *testing.T) blockdev.Device { return fromBackend(t, open(t)) }, devtest.Options{FixedSize: true, Steps: 100})
		})
	}
}

// TestToBackendDirect: go-nbd's buffers lie anywhere, those of O_DIRECT do not.
func TestToBackendDirect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := blockdev.CreateFile(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	dev, err := blockdev.OpenFile(path, blockdev.FileOptions{Direct: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	b := ToBackend(dev)
	odd := make([]byte, 8193)[1:]
	for i := range odd {
		odd[i] = byte(i)
	}
	if n, err := b.WriteAt(odd, 4096); n != len(odd) || err != nil {
		t.Fatal(n, err)
	}
	if err := b.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8193)[1:]
	if n, err := b.ReadAt(got, 4096); n != len(got) || err != nil || !bytes.Equal(got, odd) {
		t.Fatal(n, err, "or other bytes")
	}
}

func TestToBackendAtTheEnd(t *testing.T) {
	b := ToBackend(blockdev.NewMem(8192))
	p := make([]byte, 8192)
	if n, err := b.ReadAt(p, 4096); n != 4096 || !errors.Is(err, io.EOF) {
		t.Errorf("a read over the end: %d, %v", n, err)
	}
	if n, err := b.ReadAt(p, 8192); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("a read at the end: %d, %v", n, err)
	}
	if n, err := b.WriteAt(p, 4096); n != 0 || !errors.Is(err, blockdev.ErrBounds) {
		t.Errorf("a write over the end: %d, %v", n, err)
	}
	if _, err := b.ReadAt(p, -1); err == nil {
		t.Error("a read before the beginning succeeded")
	}
	if size, err := b.Size(); size != 8192 || err != nil {
		t.Error(size, err)
	}
}

func TestFromBackendRefusesOddSizes(t *testing.T) {
	if _, err := FromBackend(backend.NewMemoryBackend(make([]byte, 1000))); !errors.Is(err, blockdev.ErrAlignment) {
		t.Errorf("got %v, want ErrAlignment", err)
	}
}
