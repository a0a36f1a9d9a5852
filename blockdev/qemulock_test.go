package blockdev_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// image makes a raw image of testSize.
func image(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := blockdev.CreateFile(path, testSize); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, o blockdev.FileOptions) *blockdev.File {
	t.Helper()
	f, err := blockdev.OpenFile(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestLockAgainstOurselves opens an image twice in one process.
func TestLockAgainstOurselves(t *testing.T) {
	rw := blockdev.FileOptions{}
	ro := blockdev.FileOptions{ReadOnly: true}
	share := blockdev.FileOptions{ReadOnly: true, Share: true}
	none := blockdev.FileOptions{NoLock: true}
	for _, c := range []struct {
		name          string
		first, second blockdev.FileOptions
		refused       bool
	}{
		{"two writers", rw, rw, true},
		{"a reader beside a writer", rw, ro, true},
		{"a writer beside a reader", ro, rw, true},
		{"two readers", ro, ro, false},
		{"a sharing reader beside a writer", rw, share, false},
		{"a writer beside a sharing reader", share, rw, false},
		{"without locks", rw, none, false},
		{"a writer after one without locks", none, rw, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := image(t)
			first := open(t, path, c.first)
			second, err := blockdev.OpenFile(path, c.second)
			if !c.refused {
				if err != nil {
					t.Fatal(err)
				}
				second.Close()
				return
			}
			if !errors.Is(err, blockdev.ErrInUse) {
				t.Fatalf("got %v, want ErrInUse", err)
			}
			var hint interface{ Hint() string }
			if !errors.As(err, &hint) || !strings.Contains(hint.Hint(), path) {
				t.Errorf("%v has no hint that names the image", err)
			}
			// The attempt left no lock behind, and closing lets go of ours.
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			open(t, path, c.second)
		})
	}
}

// TestLockRace: of many that open an image at the same moment, never two get it.
func TestLockRace(t *testing.T) {
	path := image(t)
	var holders, won atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
				if errors.Is(err, blockdev.ErrInUse) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d have it open", n)
				}
				won.Add(1)
				holders.Add(-1)
				f.Close()
			}
		})
	}
	wg.Wait()
	if won.Load() == 0 {
		t.Error("nobody ever got it")
	}
}

// holderEnv names the image that the test binary opens and holds instead of
// running tests.
const holderEnv = "BLOCKDEV_TEST_HOLD"

func TestMain(m *testing.M) {
	if path := os.Getenv(holderEnv); path != "" {
		f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
		if err != nil {
			os.Stdout.WriteString("refused\n")
			os.Exit(1)
		}
		os.Stdout.WriteString("held\n")
		io.Copy(io.Discard, os.Stdin)
		f.Close()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// start runs a program that has opened the image when it writes its first line,
// which is returned, and lets go of it when its input ends, which stop does.
func start(t *testing.T, cmd *exec.Cmd, input string) (line string, stop func()) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			in.Close()
			io.Copy(io.Discard, out)
			cmd.Wait()
		}
	}
	t.Cleanup(stop)
	if _, err := io.WriteString(in, input); err != nil {
		t.Fatal(err)
	}
	if line, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("%s: %v", cmd.Path, err)
	}
	return line, stop
}

func TestLockAcrossProcesses(t *testing.T) {
	path := image(t)
	hold := func() (string, func()) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), holderEnv+"="+path)
		return start(t, cmd, "")
	}
	line, stop := hold()
	if line != "held\n" {
		t.Fatalf("the other process says %q", line)
	}
	if _, err := blockdev.OpenFile(path, blockdev.FileOptions{}); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("got %v, want ErrInUse", err)
	}
	stop()
	open(t, path, blockdev.FileOptions{})
	if line, _ := hold(); line != "refused\n" {
		t.Errorf("the other process says %q of what is held here", line)
	}
}

func run(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command(testenv.Need(t, name), args...).CombinedOutput()
	return string(out), err
}

// TestRealQEMURefusesWhatWeHold: whoever writes with QEMU's tools is kept away. Its
// readers of raw images share writing (of other formats they do not), so they
// are let in, here as beside a VM.
func TestRealQEMURefusesWhatWeHold(t *testing.T) {
	path := image(t)
	commands := []struct {
		name    string
		writes  bool
		command []string
	}{
		{"qemu-io write", true, []string{"qemu-io", "-f", "raw", "-c", "write 0 512", path}},
		{"qemu-io read", false, []string{"qemu-io", "-r", "-f", "raw", "-c", "read 0 512", path}},
		{"qemu-img resize", true, []string{"qemu-img", "resize", "-f", "raw", path, "2M"}},
		{"qemu-img convert to it", true, []string{"qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", path + ".src", path}},
		{"qemu-img create over it", true, []string{"qemu-img", "create", "-f", "raw", path, "1M"}},
	}
	if err := blockdev.CreateFile(path+".src", testSize); err != nil {
		t.Fatal(err)
	}
	check := func(held string, keepsWritersOut bool) {
		t.Helper()
		for _, c := range commands {
			out, err := run(t, c.command[0], c.command[1:]...)
			if want := c.writes && keepsWritersOut; (err != nil) != want {
				t.Errorf("%s, %s: refused is %v, want %v: %s", held, c.name, err != nil, want, out)
			} else if want && !strings.Contains(out, "lock") {
				t.Errorf("%s, %s: refused for another reason: %s", held, c.name, out)
			}
		}
		if out, err := run(t, "qemu-img", "info", "-U", "-f", "raw", path); err != nil {
			t.Errorf("%s: qemu-img info -U: %s", held, out)
		}
	}
	f := open(t, path, blockdev.FileOptions{})
	if err := blockdev.WriteAt(f, []byte("ours"), 0); err != nil {
		t.Fatal(err)
	}
	check("held for writing", true)
	got := make([]byte, 4)
	if err := blockdev.ReadAt(f, got, 0); err != nil || string(got) != "ours" || f.Size() != testSize {
		t.Errorf("the image was changed: %q, %v", got, err)
	}
	f.Close()

	f = open(t, path, blockdev.FileOptions{ReadOnly: true})
	check("held for reading", true)
	f.Close()
	check("let go", false)
}

// TestRealQEMUHoldsWeRefuse is the other direction.
func TestRealQEMUHoldsWeRefuse(t *testing.T) {
	path := image(t)
	check := func(holder string, o blockdev.FileOptions, refused bool) {
		t.Helper()
		f, err := blockdev.OpenFile(path, o)
		if err == nil {
			f.Close()
		}
		if refused && !errors.Is(err, blockdev.ErrInUse) || !refused && err != nil {
			t.Errorf("held by %s, opened with %+v: %v", holder, o, err)
		}
	}
	qemuIO := testenv.Need(t, "qemu-io")
	for _, c := range []struct {
		name    string
		args    []string
		refused bool // a reader of a raw image shares it with writers
	}{
		{"a writing qemu-io", []string{"-f", "raw", path}, true},
		{"a reading qemu-io", []string{"-r", "-f", "raw", path}, false},
	} {
		_, stop := start(t, exec.Command(qemuIO, c.args...), "read 0 512\n")
		check(c.name, blockdev.FileOptions{}, c.refused)
		check(c.name, blockdev.FileOptions{ReadOnly: true}, c.refused)
		check(c.name, blockdev.FileOptions{ReadOnly: true, Share: true}, false)
		stop()
		check(c.name+" that has ended", blockdev.FileOptions{}, false)
	}

	socket := filepath.Join(t.TempDir(), "nbd.sock")
	nbd := exec.Command(testenv.Need(t, "qemu-nbd"), "-t", "-f", "raw", "-k", socket, path)
	if err := nbd.Start(); err != nil {
		t.Fatal(err)
	}
	defer nbd.Wait()
	defer nbd.Process.Kill()
	// Its socket is there before it has opened the image; its greeting is not.
	testenv.Until(t, "qemu-nbd greets", func() bool {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return false
		}
		defer c.Close()
		_, err = io.ReadFull(c, make([]byte, 8))
		return err == nil
	})
	check("qemu-nbd", blockdev.FileOptions{}, true)
	check("qemu-nbd", blockdev.FileOptions{ReadOnly: true}, true)
	check("qemu-nbd", blockdev.FileOptions{ReadOnly: true, Share: true}, false)
}

// TestRootLockBlockDevice: a block device has QEMU's locks and is claimed from
// the rest of the system too.
func TestRootLockBlockDevice(t *testing.T) {
	testenv.NeedRoot(t)
	dev := loop(t, t.TempDir())
	f := open(t, dev, blockdev.FileOptions{})
	if _, err := blockdev.OpenFile(dev, blockdev.FileOptions{}); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("a second open: got %v, want ErrInUse", err)
	}
	if _, err := blockdev.OpenFile(dev, blockdev.FileOptions{ReadOnly: true}); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("a reader: got %v, want ErrInUse", err)
	}
	open(t, dev, blockdev.FileOptions{ReadOnly: true, Share: true}).Close()
	if out, err := run(t, "qemu-io", "-f", "raw", "-c", "write 0 512", dev); err == nil || !strings.Contains(out, "lock") {
		t.Errorf("qemu-io wrote to a device that is held: %s", out)
	}
	f.Close()

	_, stop := start(t, exec.Command(testenv.Need(t, "qemu-io"), "-f", "raw", dev), "read 0 512\n")
	if _, err := blockdev.OpenFile(dev, blockdev.FileOptions{}); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("held by qemu-io: got %v, want ErrInUse", err)
	}
	stop()

	if out, err := run(t, "mkfs.ext4", "-q", dev); err != nil {
		t.Fatal(out)
	}
	dir := t.TempDir()
	if out, err := run(t, "mount", dev, dir); err != nil {
		t.Fatal(out)
	}
	defer run(t, "umount", dir)
	for _, o := range []blockdev.FileOptions{{}, {ReadOnly: true}} {
		if _, err := blockdev.OpenFile(dev, o); !errors.Is(err, blockdev.ErrInUse) {
			t.Errorf("mounted, opened with %+v: got %v, want ErrInUse", o, err)
		}
	}
}
