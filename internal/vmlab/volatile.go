package vmlab

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/blockdev/nbd"
)

// A VolatileDisk is a disk with a write cache that a power cut empties, in part
// and in any order: the opposite of a file of this host, whose page cache
// outlives QEMU. It lies in this process's memory and QEMU reaches it over NBD, so
// that a flush of the guest is a flush here. What a cut may leave behind is what
// [faultdev.Volatile] says: of each sector of 512 bytes that no flush has covered,
// one version by chance, the last durable one or any written since. A write of
// several sectors is torn at any of them.
//
// It is memory: for disks of some hundred MiB, of which little is not zero.
type VolatileDisk struct {
	name   string // of the export
	socket string

	server *nbd.Server

	// mu guards disk, which each cut replaces.
	mu   sync.Mutex
	disk *faultdev.Volatile
}

// volatileWorkers is how many requests of a disk run at once.
const volatileWorkers = 4

// NewVolatileDisk makes a disk with the content of a raw file (one that mkfs.ext4
// has been run on, for example). The file itself is only read. The disk is gone
// when the test ends.
func NewVolatileDisk(t testing.TB, image string) *VolatileDisk {
	t.Helper()
	mem, err := readImage(image)
	if err != nil {
		t.Fatalf("vmlab: a volatile disk: %v", err)
	}
	// Not t.TempDir: a socket's path may have only 107 bytes.
	dir, err := os.MkdirTemp("", "vmlab-")
	if err != nil {
		t.Fatal(err)
	}
	d := &VolatileDisk{
		name: "volatile", socket: filepath.Join(dir, "s"),
		server: &nbd.Server{Log: slog.New(slog.DiscardHandler)},
	}
	ln, err := nbd.ListenUnix(d.socket)
	if err == nil {
		err = d.offer(mem)
	}
	if err != nil {
		os.RemoveAll(dir)
		t.Fatalf("vmlab: a volatile disk: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.server.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("vmlab: serve a volatile disk: %v", err)
		}
		os.RemoveAll(dir)
	})
	return d
}

func readImage(image string) (*blockdev.Mem, error) {
	content, err := os.ReadFile(image)
	if err != nil {
		return nil, err
	}
	if len(content)%blockdev.SectorSize != 0 {
		return nil, fmt.Errorf("%s: %d bytes are no number of sectors", image, len(content))
	}
	mem := blockdev.NewMem(int64(len(content)))
	const page = 4096
	for off := 0; off < len(content); off += page {
		p := content[off:min(off+page, len(content))]
		if zero(p) {
			continue // takes no memory
		}
		if err := blockdev.WriteAt(mem, p, int64(off)); err != nil {
			return nil, err
		}
	}
	return mem, nil
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// uri is where QEMU finds it.
func (d *VolatileDisk) uri() string { return nbd.URI{Socket: d.socket, Export: d.name}.String() }

// offer puts a disk, all of it durable, under the export.
func (d *VolatileDisk) offer(mem *blockdev.Mem) error {
	disk, err := faultdev.NewVolatile(mem)
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.disk = disk
	d.mu.Unlock()
	return d.server.Add(nbd.Export{Name: d.name, Queue: blockdev.NewPool(disk, volatileWorkers)})
}

// cutLimit bounds how long a client's connection may take to end what has begun;
// then it is cut.
const cutLimit = 10 * time.Second

// Cut is the power cut. Its clients are thrown out first, so a VM that has the
// disk must have ended; [VM.PowerCut] calls it. The seed chooses what is left. It
// returns how many sectors there were to be chosen for.
func (d *VolatileDisk) Cut(seed uint64) (sectors int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), cutLimit)
	defer cancel()
	if err := d.server.Remove(ctx, d.name); err != nil {
		return 0, err
	}
	d.mu.Lock()
	sectors, left := d.disk.Unsettled(), d.disk.Crash(seed)
	d.mu.Unlock()
	return sectors, d.offer(left)
}

// Read reads from the disk as it is now.
func (d *VolatileDisk) Read(p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return blockdev.ReadAt(d.disk, p, off)
}
