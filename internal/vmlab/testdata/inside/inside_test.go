package inside

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/internal/vmlab/guest"
)

func TestGood(t *testing.T) {
	if !guest.Inside() || os.Geteuid() != 0 {
		t.Error("not in the guest, or not as root")
	}
	text, err := os.ReadFile("testdata/data.txt")
	if err != nil || string(text) != "test data\n" {
		t.Errorf("the package's test data: %q, %v", text, err)
	}
	t.Run("part", func(t *testing.T) { t.Log("a good part") })
}

func TestBad(t *testing.T) {
	t.Run("good", func(*testing.T) {})
	t.Run("bad", func(t *testing.T) { t.Error("fails on purpose") })
}

func TestDies(*testing.T) { panic("dies on purpose") }

// The tests below are parts of a power cut. The file system is on the drive
// "data".
const mountPoint = "/mnt"

func mount(t *testing.T) {
	t.Helper()
	if err := os.MkdirAll(mountPoint, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/dev/vmlab/data", mountPoint, "ext4", 0, ""); err != nil {
		t.Fatal("mount:", err)
	}
}

// content is what file n has: several pages, and its number all over.
func content(n int) []byte { return bytes.Repeat(fmt.Appendf(nil, "file %06d\n", n), 2000) }

func name(n int) string { return filepath.Join(mountPoint, fmt.Sprintf("synced-%d", n)) }

// write makes a file durable, or leaves it with the drive, which may lose it.
func write(t *testing.T, path string, text []byte, sync bool) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(text); err != nil {
		t.Fatal(err)
	}
	if !sync {
		const andWait = unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		if err := unix.SyncFileRange(int(f.Fd()), 0, 0, andWait); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		t.Fatal(err)
	}
}

// TestWriteForever makes files durable one after the other, and says so of each.
func TestWriteForever(t *testing.T) {
	mount(t)
	for n := 1; ; n++ {
		write(t, name(n), content(n), true)
		guest.Event("synced %d", n)
		write(t, filepath.Join(mountPoint, fmt.Sprintf("dirty-%d", n)), content(n), false)
	}
}

// TestWriteRaw writes all of the drive "raw", flushes it, and writes it again.
func TestWriteRaw(t *testing.T) {
	f, err := os.OpenFile("/dev/vmlab/raw", os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := blockdev.AlignedBuf(RawSectors * blockdev.SectorSize)
	for _, version := range []byte{RawFlushed, RawWritten} {
		for i := range p {
			p[i] = version
		}
		if _, err := f.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if version == RawFlushed {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestSynced looks for the first files of TestWriteForever, as many as SYNCED says.
func TestSynced(t *testing.T) {
	count, err := strconv.Atoi(os.Getenv("SYNCED"))
	if err != nil {
		t.Fatal(err)
	}
	mount(t)
	for n := 1; n <= count; n++ {
		text, err := os.ReadFile(name(n))
		if err != nil || !bytes.Equal(text, content(n)) {
			t.Errorf("file %d of %d: %d bytes, %v", n, count, len(text), err)
		}
	}
	if err := os.WriteFile(filepath.Join(mountPoint, "late"), content(0), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestLate looks for what TestSynced has written and not synced.
func TestLate(t *testing.T) {
	mount(t)
	text, err := os.ReadFile(filepath.Join(mountPoint, "late"))
	if err != nil || !bytes.Equal(text, content(0)) {
		t.Errorf("%d bytes, %v", len(text), err)
	}
}
