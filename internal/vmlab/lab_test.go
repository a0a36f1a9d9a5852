package vmlab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"afterimage/internal/testenv"
	"afterimage/internal/vmlab/guest"
	"afterimage/internal/vmlab/kernel"
)

func TestLabPrograms(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("from outside"), 0o640); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	for name, text := range map[string]string{disk: "disk", disk + ".2": "more"} {
		if err := os.WriteFile(name, bytes.Repeat([]byte(text), 1024), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	vm := New(t, Options{
		Drives:   []Drive{{Name: "b", Source: disk, Cache: "writethrough"}, {Name: "a", Source: disk + ".2", ReadOnly: true}},
		Programs: []string{"sh", "cat", "head", "sleep", "mkfs.ext4", "fsck.ext4"},
		Files:    map[string]string{"/data/file": file},
		CPUs:     2,
		Append:   "vmlab.test=1",
	}).Boot()
	for _, tt := range []struct {
		script string
		want   Result
	}{
		{"echo out; echo err >&2; exit 3", Result{Stdout: "out\n", Stderr: "err\n", Status: 3}},
		{"cat /data/file", Result{Stdout: "from outside"}},
		{"echo $HOME $0; kill -9 $$", Result{Stdout: "/ sh\n", Status: 128 + 9}},
		{"sleep 1000 & echo left", Result{Stdout: "left\n"}},
		{"head -c 4 /dev/vmlab/b; head -c 4 /dev/vmlab/a", Result{Stdout: "diskmore"}},
		{`for n in b a; do for d in /sys/block/vd*; do
			read s <$d/serial; if [ $s = $n ]; then cat $d/ro $d/queue/write_cache; fi
		done; done`, Result{Stdout: "0\nwrite through\n1\nwrite back\n"}},
		{"exec 3>&-; echo closed", Result{Stdout: "closed\n"}},
	} {
		if got := vm.Run("sh", "-c", tt.script); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.script, got, tt.want)
		}
	}
	if r := vm.Run("nosuch"); r.Status != 127 || !strings.Contains(r.Stderr, "nosuch") {
		t.Errorf("a program that is not there: %+v", r)
	}
	if r := vm.Start(Command{Args: []string{"sh", "-c", "echo $X; pwd"}, Env: []string{"X=y"}, Dir: "/tmp"}).Wait(); r.Stdout != "y\n/tmp\n" {
		t.Errorf("environment and directory: %+v", r)
	}
	if line := vm.Must("cat", "/proc/cmdline"); !strings.Contains(line, "vmlab.test=1") {
		t.Errorf("the kernel's command line is %s", line)
	}
	if out := vm.Must("head", "-c", "3000000", "/dev/zero"); len(out) != 3000000 {
		t.Errorf("of 3000000 bytes %d have come out", len(out))
	}
	vm.Must("sh", "-c", "mkfs.ext4 -q /tmp/disk 8M && fsck.ext4 -fn /tmp/disk")
}

func TestLabEvents(t *testing.T) {
	vm := New(t, Options{Programs: []string{"sh", "cat"}}).Boot()
	p := vm.Go("sh", "-c", "echo one >&3; while ! [ -e /tmp/go ]; do :; done; echo two >&3; printf three >&3; kill $$")
	for e := range p.Events() { // while it runs
		if e != "one" {
			t.Errorf("the first event is %q", e)
		}
		break
	}
	vm.Must("sh", "-c", ": >/tmp/go")
	if rest := slices.Collect(p.Events()); !slices.Equal(rest, []string{"two", "three"}) {
		t.Errorf("then came %q", rest)
	}
	if r := p.Wait(); r.Status != 128+15 || r.Lost {
		t.Errorf("its end: %+v", r)
	}
	p = vm.Go("sh", "-c", "echo up >&3; cat")
	for range p.Events() {
		p.Kill(syscall.SIGTERM)
	}
	if r := p.Wait(); r.Status != 0 && r.Status != 128+15 {
		t.Errorf("killed: %+v", r)
	}
}

// Everything that later tests need of a kernel is in Debian's.
func TestLabModules(t *testing.T) {
	if !Inside(t, Options{Modules: []string{
		"nbd nbds_max=3", "fcoe", "tcm_fc", "target_core_mod", "scsi_transport_fc", "sd_mod", "sg", "veth",
		"dm_mod", "dm_thin_pool", "dm_flakey", "dm_log_writes", "dm_delay", "dm_snapshot", "dm_multipath",
		"ext4", "xfs", "fuse", "loop", "virtio_net",
	}}) {
		return
	}
	for _, path := range []string{
		"/dev/nbd2", "/sys/bus/fcoe/ctlr_create", "/sys/class/fc_host", "/sys/kernel/config/target/core",
		"/dev/mapper/control", "/dev/fuse", "/dev/loop-control", "/sys/module/tcm_fc", "/sys/module/libfc", "/sys/module/libfcoe",
		"/sys/module/dm_thin_pool", "/sys/module/dm_flakey", "/sys/module/dm_log_writes",
	} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat("/dev/nbd3"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nbd has not taken its parameter: /dev/nbd3: %v", err)
	}
	text, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ext4", "xfs", "fuse"} {
		if !slices.Contains(strings.Fields(string(text)), name) {
			t.Errorf("the kernel has no %s", name)
		}
	}
	t.Run("inside", func(t *testing.T) {
		if !guest.Inside() {
			t.Error("this is outside")
		}
	})
}

// outside runs a test of testdata/outside, and returns how it has ended.
func outside(t *testing.T, program, run string, env ...string) (out string, failed bool) {
	t.Helper()
	cmd := exec.Command(program, "-test.v", "-test.run=^"+run+"$")
	cmd.Dir = "testdata/outside"
	cmd.Env = append(os.Environ(), env...)
	text, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(text), err != nil
}

func compileOutside(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "outside.test")
	if err := goBuild("test", "-c", "-o", program, "./testdata/outside"); err != nil {
		t.Fatal(err)
	}
	return program
}

// What is wrong in the guest, and with the guest, is a failed test out here,
// and its log says why.
func TestLabFailures(t *testing.T) {
	program := compileOutside(t)
	for _, tt := range []struct {
		run    string
		fails  bool
		env    []string
		has    []string
		hasNot string
	}{
		{run: "TestGood", has: []string{"--- PASS: TestGood/TestGood/part", "a good part", "booted Linux"}, hasNot: "console"},
		{run: "TestBad", fails: true, has: []string{
			"--- PASS: TestBad/TestGood/part", "--- FAIL: TestBad/TestBad/bad", "--- PASS: TestBad/TestBad/good",
			"fails on purpose", "the guest's console"}},
		{run: "TestDies", fails: true, has: []string{"--- FAIL: TestDies/TestDies", "panic: dies on purpose"}},
		{run: "TestNone", fails: true, has: []string{"no test that matches TestNobody"}},
		{run: "TestPanics", fails: true, has: []string{
			"its kernel said:", "Kernel panic - not syncing: sysrq triggered crash", "Call Trace:", "the guest has ended while"}},
		{run: "TestOverdue", fails: true, has: []string{"it still ran after 8s"}},
		{run: "TestNoModule", fails: true, has: []string{"no module nosuch"}},
		{run: "TestBadParameter", fails: true, has: []string{"load module nbd.ko nbds_max=many: invalid argument", "the guest's console"}},
		{run: "TestNoModule", fails: true, env: []string{kernel.DirVariable + "=" + t.TempDir()}, has: []string{"run `make deps`"}},
	} {
		t.Run(tt.run, func(t *testing.T) {
			out, failed := outside(t, program, tt.run, tt.env...)
			if failed != tt.fails {
				t.Errorf("failed is %v", failed)
			}
			for _, s := range tt.has {
				if !strings.Contains(out, s) {
					t.Errorf("it has not said %q", s)
				}
			}
			if tt.hasNot != "" && strings.Contains(out, tt.hasNot) {
				t.Errorf("it has said %q", tt.hasNot)
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// No guest outlives the process of its test, whatever that dies of.
func TestLabDiesWithItsTest(t *testing.T) {
	cmd := exec.Command(compileOutside(t), "-test.run=^TestKilled$")
	cmd.Dir = "testdata/outside"
	// As the environment is inherited, it marks the guest's QEMU.
	mark := fmt.Sprintf("VMLAB_TEST_MARK=%d-%s", os.Getpid(), t.Name())
	cmd.Env = append(os.Environ(), mark)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	up := make([]byte, 3)
	if _, err := stderr.Read(up); err != nil || string(up) != "up\n" {
		t.Errorf("%q, %v", up, err)
	}
	if n := len(marked(t, mark)); n != 2 {
		t.Errorf("%d processes, want the test and QEMU", n)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	testenv.Until(t, "QEMU has ended", func() bool { return len(marked(t, mark)) == 0 })
}

// marked lists the processes that have this in their environment.
func marked(t *testing.T, mark string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(files, func(f string) bool {
		text, err := os.ReadFile(f)
		return err != nil || !slices.ContainsFunc(bytes.Split(text, []byte{0}), func(e []byte) bool { return string(e) == mark })
	})
}
