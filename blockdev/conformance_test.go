package blockdev_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/blockdev/devtest"
	"afterimage/internal/testenv"
)

const testSize = 1 << 20

func TestMemConformance(t *testing.T) {
	devtest.Run(t, func(t *testing.T) blockdev.Device { return blockdev.NewMem(testSize) }, devtest.Options{})
}

// shm returns a directory on tmpfs.
func shm(t *testing.T) string {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Fatalf("this test needs a tmpfs at /dev/shm: mount -t tmpfs none /dev/shm (%v)", err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "blockdev")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newFile makes an image in dir and opens it.
func newFile(t *testing.T, dir string, o blockdev.FileOptions) *blockdev.File {
	t.Helper()
	sub, err := os.MkdirTemp(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(sub, "disk.raw")
	if err := blockdev.CreateFile(path, testSize); err != nil {
		t.Fatal(err)
	}
	f, err := blockdev.OpenFile(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func fileConformance(t *testing.T, dir string, o blockdev.FileOptions) {
	ro := o
	ro.ReadOnly = true
	devtest.Run(t, func(t *testing.T) blockdev.Device { return newFile(t, dir, o) }, devtest.Options{
		ReadOnly: func(t *testing.T) blockdev.Device { return newFile(t, dir, ro) },
	})
}

func TestFileConformanceTmpfs(t *testing.T) {
	fileConformance(t, shm(t), blockdev.FileOptions{})
}

func TestFileConformanceDisk(t *testing.T) {
	fileConformance(t, t.TempDir(), blockdev.FileOptions{})
}

func TestFileConformanceDirect(t *testing.T) {
	fileConformance(t, t.TempDir(), blockdev.FileOptions{Direct: true})
}

// TestFileConformanceWithout is what is left where kernel or file system can do
// less.
func TestFileConformanceWithout(t *testing.T) {
	for name, l := range map[string]blockdev.Lacks{
		"holes":          {Punch: true},
		"any fallocate":  {Punch: true, ZeroRange: true},
		"RWF flags":      {ZeroRange: true, DSync: true, NoWait: true},
		"zeroing ranges": {ZeroRange: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shm(t)
			if !l.ZeroRange {
				dir = t.TempDir() // tmpfs cannot zero a range
			}
			devtest.Run(t, func(t *testing.T) blockdev.Device {
				f := newFile(t, dir, blockdev.FileOptions{})
				f.Pretend(l)
				return f
			}, devtest.Options{Steps: 60})
		})
	}
}

// loop makes a zeroed loop device over a new file.
func loop(t *testing.T, dir string, more ...string) string {
	t.Helper()
	losetup := testenv.Need(t, "losetup")
	sub, err := os.MkdirTemp(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(sub, "backing")
	if err := blockdev.CreateFile(path, testSize); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, append([]string{"--find", "--show", path}, more...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

func TestRootBlockDeviceConformance(t *testing.T) {
	testenv.NeedRoot(t)
	for _, c := range []struct {
		name string
		o    blockdev.FileOptions
		more []string
	}{
		{"buffered", blockdev.FileOptions{}, nil},
		{"direct", blockdev.FileOptions{Direct: true}, nil},
		{"4Kn", blockdev.FileOptions{Direct: true}, []string{"--sector-size", "4096"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			open := func(t *testing.T, o blockdev.FileOptions) blockdev.Device {
				f, err := blockdev.OpenFile(loop(t, dir, c.more...), o)
				if err != nil {
					t.Fatal(err)
				}
				return f
			}
			ro := c.o
			ro.ReadOnly = true
			devtest.Run(t, func(t *testing.T) blockdev.Device { return open(t, c.o) }, devtest.Options{
				FixedSize: true,
				ReadOnly:  func(t *testing.T) blockdev.Device { return open(t, ro) },
			})
		})
	}
}
