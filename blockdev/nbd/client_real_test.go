package nbd

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/devtest"
)

// TestRealServers runs the suite of all disks on those of other servers.
func TestRealServers(t *testing.T) {
	nbdkit := func(args ...string) func(t *testing.T, socket string) {
		return func(t *testing.T, socket string) { startNbdkit(t, socket, args...) }
	}
	for name, start := range map[string]func(t *testing.T, socket string){
		"nbdkit-memory":     nbdkit("memory", "size=4M"),
		"nbdkit-threads":    nbdkit("--filter=delay", "memory", "size=4M", "delay-write=1ms"),
		"nbdkit-oldest":     nbdkit("--mask-handshake=0", "memory", "size=4M"),
		"nbdkit-nozeroes":   nbdkit("--mask-handshake=1", "memory", "size=4M"),
		"nbdkit-no-zero":    nbdkit("--filter=nozero", "memory", "size=4M"),
		"nbdkit-no-fua":     nbdkit("--filter=fua", "memory", "size=4M"),
		"nbdkit-blocks-512": nbdkit("--filter=blocksize-policy", "memory", "size=4M", "blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"),
		"nbdkit-blocks-4k":  nbdkit("--filter=blocksize-policy", "memory", "size=4M", "blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=1M", "blocksize-error-policy=error"),
		"nbdkit-file": func(t *testing.T, socket string) {
			path, _ := image(t, 4<<20)
			startNbdkit(t, socket, "file", path)
		},
		"qemu-nbd": func(t *testing.T, socket string) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			if err := blockdev.CreateFile(path, 4<<20); err != nil {
				t.Fatal(err)
			}
			startQemuNbd(t, socket, path, "--discard=unmap")
		},
	} {
		t.Run(name, func(t *testing.T) {
			devtest.Run(t, func(t *testing.T) blockdev.Device {
				socket := tempSocket(t)
				start(t, socket)
				return dial(t, socket, "")
			}, devtest.Options{FixedSize: true, Steps: 100})
		})
	}
}

// TestRealOracle reads and writes back known data through both our ends.
func TestRealOracle(t *testing.T) {
	oracle := tempSocket(t)
	startNbdkit(t, oracle, "sparse-random", "size=64M", "seed=7", "percent=50")
	s := quiet()
	add(t, s, Export{Name: "x", Queue: blockdev.NewPool(dial(t, oracle, ""), 8)})
	c := dial(t, serve(t, s), "x")
	b := make([]byte, 1<<20)
	for off := int64(0); off < c.Size(); off += int64(len(b)) {
		if err := blockdev.ReadAt(c, b, off); err != nil {
			t.Fatal(err)
		}
		if err := blockdev.WriteAt(c, b, off); err != nil {
			t.Fatal(err)
		}
	}
	b[77] ^= 1
	if err := blockdev.WriteAt(c, b, 0); err == nil {
		t.Error("the oracle takes anything")
	}
}

// TestRealNoFlush: a server that cannot make writes durable must not be trusted
// to have done so.
func TestRealNoFlush(t *testing.T) {
	socket := tempSocket(t)
	// This plugin has neither flush nor FUA.
	startNbdkit(t, socket, "eval", "get_size=echo 1048576", "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none", "pwrite=cat > /dev/null")
	c := dial(t, socket, "")
	if err := blockdev.Flush(c); err != nil {
		t.Errorf("flush with nothing written: %v", err)
	}
	if err := blockdev.WriteAt(c, bytes.Repeat([]byte{1}, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := blockdev.Flush(c); !errors.Is(err, blockdev.ErrNotSupported) {
		t.Errorf("flush after a write: %v", err)
	}
	r := blockdev.Request{Op: blockdev.OpWrite, Flags: blockdev.FlagFUA, Len: 512, Buf: make([]byte, 512)}
	if err := blockdev.Do1(c, &r); !errors.Is(err, blockdev.ErrNotSupported) {
		t.Errorf("a durable write: %v", err)
	}
}
