package blockdev_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

func TestOpenFileRefuses(t *testing.T) {
	dir := t.TempDir()
	odd := filepath.Join(dir, "odd")
	fifo := filepath.Join(dir, "fifo")
	qcow2 := filepath.Join(dir, "disk.qcow2")
	fresh := filepath.Join(dir, "fresh.qcow2")
	for path, content := range map[string]string{odd: strings.Repeat("x", 1000), qcow2: "QFI\xfb\x00\x00\x00\x03" + strings.Repeat("\x00", 504),
		// As qemu-img leaves it: no multiple of 512.
		fresh: "QFI\xfb\x00\x00\x00\x03" + strings.Repeat("\x00", 196608)} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		o          blockdev.FileOptions
		want       error
		hint       string
	}{
		{"missing", filepath.Join(dir, "none"), blockdev.FileOptions{}, fs.ErrNotExist, "disk create"},
		{"directory", dir, blockdev.FileOptions{}, syscall.EISDIR, "image file"},
		{"directory, read-only", dir, blockdev.FileOptions{ReadOnly: true}, syscall.EISDIR, "image file"},
		{"odd size", odd, blockdev.FileOptions{}, blockdev.ErrAlignment, "truncate"},
		{"FIFO", fifo, blockdev.FileOptions{}, blockdev.ErrFileType, "block device"},
		{"character device", "/dev/null", blockdev.FileOptions{}, blockdev.ErrFileType, "block device"},
		{"qcow2", qcow2, blockdev.FileOptions{}, blockdev.ErrNotSupported, "qemu-nbd"},
		{"qcow2 of a size that no disk has", fresh, blockdev.FileOptions{}, blockdev.ErrNotSupported, "qemu-nbd"},
		{"the same with O_DIRECT", fresh, blockdev.FileOptions{Direct: true}, blockdev.ErrNotSupported, "qemu-nbd"},
		{"sharing while writing", odd, blockdev.FileOptions{Share: true}, blockdev.ErrNotSupported, ""},
	} {
		before := snapshot(t, c.path)
		f, err := blockdev.OpenFile(c.path, c.o)
		if err == nil {
			f.Close()
			t.Errorf("%s: opened", c.name)
			continue
		}
		if c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
		var oe *blockdev.OpenError
		if !errors.As(err, &oe) || !strings.Contains(err.Error(), c.path) || !strings.Contains(oe.Hint(), c.hint) || (c.hint != "" && oe.Hint() == "") {
			t.Errorf("%s: %v (hint %q) does not say where and what to do", c.name, err, oe.Hint())
		}
		if after := snapshot(t, c.path); after != before {
			t.Errorf("%s: the file was changed: %s, it was %s", c.name, after, before)
		}
	}
	var format *blockdev.FormatError
	if _, err := blockdev.OpenFile(qcow2, blockdev.FileOptions{}); !errors.As(err, &format) || format.Format != "qcow2" {
		t.Errorf("qcow2: %v", err)
	}
	open(t, qcow2, blockdev.FileOptions{Raw: true})
}

// snapshot says what must not change of a file, times included.
func snapshot(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err.Error()
	}
	var content []byte
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		var err error
		if content, err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	return fmt.Sprintf("mode %o, %d bytes, %d sectors, modified %v, changed %v, content %x",
		st.Mode, st.Size, st.Blocks, st.Mtim, st.Ctim, sha256.Sum256(content))
}

// TestOpenFileChangesNothing: who only opens and reads leaves no trace.
func TestOpenFileChangesNothing(t *testing.T) {
	for _, dir := range []string{t.TempDir(), shm(t)} {
		path := filepath.Join(dir, "disk")
		if err := blockdev.CreateFile(path, testSize); err != nil {
			t.Fatal(err)
		}
		before := snapshot(t, path)
		for _, o := range []blockdev.FileOptions{{}, {ReadOnly: true}, {Raw: true}, {ReadOnly: true, Share: true}} {
			f, err := blockdev.OpenFile(path, o)
			if err != nil {
				t.Fatal(err)
			}
			if err := blockdev.ReadAt(f, make([]byte, 8192), 4096); err != nil {
				t.Error(err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			if after := snapshot(t, path); after != before {
				t.Errorf("opened with %+v: %s, it was %s", o, after, before)
			}
		}
	}
}

// TestOpenFileDirectTmpfs: where the kernel does not tell what alignment
// O_DIRECT needs, none is assumed.
func TestOpenFileDirectTmpfs(t *testing.T) {
	path := filepath.Join(shm(t), "disk")
	if err := blockdev.CreateFile(path, testSize); err != nil {
		t.Fatal(err)
	}
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Direct: true})
	if err == nil { // a kernel that tells
		f.Close()
	} else if !errors.Is(err, blockdev.ErrNotSupported) {
		t.Errorf("got %v, want ErrNotSupported", err)
	}
}

func TestDirectWantsAlignedMemory(t *testing.T) {
	f := newFile(t, t.TempDir(), blockdev.FileOptions{Direct: true})
	defer f.Close()
	if f.Info().MemAlign < 2 {
		return // this disk takes any
	}
	odd := blockdev.AlignedBuf(8192)[1:4097]
	if err := blockdev.WriteAt(f, odd, 0); !errors.Is(err, blockdev.ErrAlignment) {
		t.Errorf("got %v, want ErrAlignment", err)
	}
}

func TestCreateFile(t *testing.T) {
	for _, c := range []struct {
		dir    string
		create func(string, int64) error
	}{
		{t.TempDir(), blockdev.CreateFile}, {shm(t), blockdev.CreateFile},
		{t.TempDir(), blockdev.CreateFileNamed}, {shm(t), blockdev.CreateFileNamed},
	} {
		dir := c.dir
		path := filepath.Join(dir, "disk.raw")
		for _, size := range []int64{-512, 0, 1000} {
			if err := c.create(path, size); !errors.Is(err, blockdev.ErrAlignment) {
				t.Errorf("%d bytes: got %v, want ErrAlignment", size, err)
			}
		}
		if err := c.create(path, 1<<62); err == nil {
			os.Remove(path) // tmpfs takes any size
		} else if !errors.Is(err, syscall.EFBIG) && !errors.Is(err, syscall.EINVAL) {
			t.Errorf("2^62 bytes: %v", err)
		}
		if err := c.create(filepath.Join(dir, "none", "disk.raw"), 512); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("no such directory: %v", err)
		}
		if names, _ := os.ReadDir(dir); len(names) != 0 {
			t.Fatalf("failures left %v behind", names)
		}
		if err := c.create(path, 1<<30); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Size != 1<<30 || st.Blocks > 8 {
			t.Errorf("%v: %d bytes, %d sectors taken", err, st.Size, st.Blocks)
		}
		if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.create(path, 512); !errors.Is(err, fs.ErrExist) {
			t.Errorf("over a file: got %v, want fs.ErrExist", err)
		}
		if err := os.Symlink("nowhere", path+".link"); err != nil {
			t.Fatal(err)
		}
		if err := c.create(path+".link", 512); !errors.Is(err, fs.ErrExist) {
			t.Errorf("over a symbolic link: got %v, want fs.ErrExist", err)
		}
		if p, _ := os.ReadFile(path); string(p) != "mine" {
			t.Errorf("the file was overwritten: %q", p)
		}
		if names, _ := os.ReadDir(dir); len(names) != 2 {
			t.Errorf("left behind: %v", names)
		}
	}
}

// TestCutShort: an image that somebody cuts short while it is open gives
// errors, not zeroes.
func TestCutShort(t *testing.T) {
	path := image(t)
	f := open(t, path, blockdev.FileOptions{})
	p := make([]byte, testSize)
	for i := range p {
		p[i] = 1
	}
	if err := blockdev.WriteAt(f, p, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, testSize/2); err != nil {
		t.Fatal(err)
	}
	reqs := []*blockdev.Request{
		{Op: blockdev.OpRead, Off: testSize/2 - 4096, Len: 4096, Buf: make([]byte, 4096)},
		{Op: blockdev.OpRead, Off: testSize / 2, Len: 4096, Buf: make([]byte, 4096)},
		{Op: blockdev.OpRead, Off: testSize/2 + 4096, Len: 4096, Buf: make([]byte, 4096)},
	}
	f.Do(reqs)
	if reqs[0].Err != nil || reqs[0].Buf[0] != 1 {
		t.Errorf("before the new end: %v", reqs[0].Err)
	}
	for _, r := range reqs[1:] {
		if !errors.Is(r.Err, io.ErrUnexpectedEOF) {
			t.Errorf("beyond the new end: got %v, want io.ErrUnexpectedEOF", r.Err)
		}
	}
	if err := f.Extents(0, testSize, func(blockdev.Run) bool { return true }); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("extents: got %v, want io.ErrUnexpectedEOF", err)
	}
}

// TestHolesAreHoles: zeroing and trimming give their space back, zeroing
// without holes does not, and Extents sees both.
func TestHolesAreHoles(t *testing.T) {
	for _, dir := range []string{t.TempDir(), shm(t)} {
		f := newFile(t, dir, blockdev.FileOptions{})
		defer f.Close()
		blocks := func() int64 {
			t.Helper()
			var st unix.Stat_t
			if err := unix.Stat(f.Info().Name, &st); err != nil {
				t.Fatal(err)
			}
			return st.Blocks * 512
		}
		p := bytes.Repeat([]byte{1}, testSize)
		if err := blockdev.WriteAt(f, p, 0); err != nil {
			t.Fatal(err)
		}
		full := blocks()
		r := &blockdev.Request{Op: blockdev.OpWriteZeroes, Flags: blockdev.FlagNoHole, Len: testSize / 4}
		if err := blockdev.Do1(f, r); err != nil {
			t.Fatal(err)
		}
		if got := blocks(); got < full {
			t.Errorf("zeroing without a hole gave up %d bytes", full-got)
		}
		if err := blockdev.WriteZeroes(f, blockdev.Extent{Off: testSize / 4, Len: testSize / 4}); err != nil {
			t.Fatal(err)
		}
		if done, err := blockdev.Trim(f, blockdev.Extent{Off: testSize / 2, Len: testSize / 4}); err != nil || done != (blockdev.Extent{Off: testSize / 2, Len: testSize / 4}) {
			t.Fatal(done, err)
		}
		if got := blocks(); got > full-testSize/2 {
			t.Errorf("%d bytes taken, %d before half of it was punched", got, full)
		}
		var holes int64
		if err := f.Extents(0, testSize, func(r blockdev.Run) bool {
			if r.Hole {
				holes += r.Len
			}
			return true
		}); err != nil || holes < testSize/2 {
			t.Errorf("%d bytes of holes seen, %v", holes, err)
		}
	}
}

// TestExtentsOfAChangingFile: whatever is punched and written meanwhile, the
// runs cover the range in order.
func TestExtentsOfAChangingFile(t *testing.T) {
	f := newFile(t, shm(t), blockdev.FileOptions{})
	defer f.Close()
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		p := bytes.Repeat([]byte{1}, 4096)
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			off := i * 7 % (testSize / 4096) * 4096
			if err := blockdev.WriteAt(f, p, off); err != nil {
				t.Error(err)
			}
			if err := blockdev.WriteZeroes(f, blockdev.Extent{Off: (off + testSize/2) % testSize, Len: 4096}); err != nil {
				t.Error(err)
			}
		}
	})
	for range 300 {
		at := int64(0)
		err := f.Extents(0, testSize, func(r blockdev.Run) bool {
			if r.Off != at || r.Len <= 0 || r.Hole != r.Zero {
				t.Errorf("run %+v follows %d", r, at)
			}
			at = r.End()
			return true
		})
		if err != nil || at != testSize {
			t.Fatalf("the runs end at %d, %v", at, err)
		}
	}
	close(stop)
	wg.Wait()
}

// TestRootNoSpace: what the disk of the image says reaches the caller, with the
// range, and each request of a batch has its own outcome.
func TestRootNoSpace(t *testing.T) {
	testenv.NeedRoot(t)
	dir := t.TempDir()
	if out, err := run(t, "mount", "-t", "tmpfs", "-o", "size=256k", "none", dir); err != nil {
		t.Fatal(out)
	}
	defer run(t, "umount", dir)
	f := newFile(t, dir, blockdev.FileOptions{})
	defer f.Close()
	reqs := make([]*blockdev.Request, 64)
	for i := range reqs {
		reqs[i] = &blockdev.Request{Op: blockdev.OpWrite, Off: int64(i) * 8192, Len: 8192, Buf: bytes.Repeat([]byte{byte(i + 1)}, 8192)}
	}
	f.Do(reqs)
	failed := 0
	got := make([]byte, 8192)
	for i, r := range reqs {
		if r.Err == nil {
			if err := blockdev.ReadAt(f, got, r.Off); err != nil || !bytes.Equal(got, r.Buf) {
				t.Errorf("write %d claims success: %v", i, err)
			}
			continue
		}
		failed++
		var e *blockdev.IOError
		if !errors.Is(r.Err, syscall.ENOSPC) || !errors.As(r.Err, &e) || e.Extent != r.Extent() || !strings.Contains(r.Err.Error(), f.Info().Name) {
			t.Errorf("write %d: %v", i, r.Err)
		}
	}
	if failed == 0 || failed == len(reqs) {
		t.Errorf("%d of %d writes failed", failed, len(reqs))
	}
	// A trim makes room again.
	if _, err := blockdev.Trim(f, blockdev.Extent{Len: testSize}); err != nil {
		t.Fatal(err)
	}
	if err := blockdev.WriteAt(f, got, 0); err != nil {
		t.Error(err)
	}
}

// TestCloseUnderLoad closes a disk while requests run, and opens others that
// would get the same descriptor number: no write may reach them.
func TestCloseUnderLoad(t *testing.T) {
	dir := shm(t)
	other := filepath.Join(dir, "other")
	clean := make([]byte, 64<<10)
	if err := os.WriteFile(other, clean, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		f := newFile(t, dir, blockdev.FileOptions{})
		var wg sync.WaitGroup
		var writes atomic.Int64
		for w := range 4 {
			wg.Go(func() {
				p := bytes.Repeat([]byte{0xff}, 4096)
				for {
					err := blockdev.WriteAt(f, p, int64(w)*4096)
					writes.Add(1)
					if errors.Is(err, blockdev.ErrClosed) {
						return
					}
					if err != nil {
						t.Errorf("write: %v", err)
						return
					}
				}
			})
		}
		testenv.Until(t, "writes under way", func() bool { return writes.Load() > 100 })
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		var files []*os.File
		for range 8 {
			o, err := os.OpenFile(other, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, o)
		}
		wg.Wait()
		for _, o := range files {
			o.Close()
		}
	}
	if p, err := os.ReadFile(other); err != nil || !bytes.Equal(p, clean) {
		t.Errorf("a write went to a file that was opened later: %v", err)
	}
}

// batch returns n requests of 4 KiB, side by side.
func batch(op blockdev.Op, n int) []*blockdev.Request {
	reqs := make([]*blockdev.Request, n)
	for i := range reqs {
		reqs[i] = &blockdev.Request{Op: op, Off: int64(i) * 4096, Len: 4096, Buf: blockdev.AlignedBuf(4096)}
	}
	return reqs
}

func TestDoDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		return // the race detector drops pooled memory at random
	}
	f := newFile(t, t.TempDir(), blockdev.FileOptions{})
	defer f.Close()
	for _, op := range []blockdev.Op{blockdev.OpWrite, blockdev.OpRead, blockdev.OpTrim, blockdev.OpWriteZeroes} {
		for _, n := range []int{1, 16, 64} {
			reqs := batch(op, n)
			if op == blockdev.OpTrim || op == blockdev.OpWriteZeroes {
				for _, r := range reqs {
					r.Buf = nil
				}
			}
			if got := testing.AllocsPerRun(100, func() { f.Do(reqs) }); got != 0 {
				t.Errorf("a batch of %d %ss allocates %v times", n, op, got)
			}
			for _, r := range reqs {
				if r.Err != nil {
					t.Fatal(r.Err)
				}
			}
		}
	}
}

func BenchmarkFileDo(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk.raw")
	if dir, err := os.MkdirTemp("/dev/shm", "blockdev"); err == nil {
		defer os.RemoveAll(dir)
		path = filepath.Join(dir, "disk.raw")
	}
	if err := blockdev.CreateFile(path, testSize); err != nil {
		b.Fatal(err)
	}
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for _, c := range []struct {
		name string
		op   blockdev.Op
		n    int
	}{
		{"write/1", blockdev.OpWrite, 1}, {"write/16", blockdev.OpWrite, 16},
		{"read/1", blockdev.OpRead, 1}, {"read/16", blockdev.OpRead, 16},
	} {
		reqs := batch(c.op, c.n)
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(c.n) * 4096)
			for b.Loop() {
				f.Do(reqs)
			}
			if reqs[0].Err != nil {
				b.Fatal(reqs[0].Err)
			}
		})
	}
	// What the same write costs without this package.
	b.Run("pwrite/1", func(b *testing.B) {
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer file.Close()
		p := make([]byte, 4096)
		b.SetBytes(4096)
		for b.Loop() {
			if _, err := unix.Pwrite(int(file.Fd()), p, 0); err != nil {
				b.Fatal(err)
			}
		}
	})
}
