package vmlab

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"afterimage/internal/testenv"
	"afterimage/internal/vmlab/kernel"
)

// Options say what the guests of a lab are to be. The zero value is a guest
// that can do nothing but run static programs.
type Options struct {
	// Modules of the kernel to load, in this order, each with parameters behind
	// it if it has any ("nbd nbds_max=4"). What they need is loaded before.
	Modules []string
	// Programs of this host to have inside, at the same path and with their
	// libraries: "mkfs.ext4".
	Programs []string
	// Files to have inside: the path inside, and the file or directory here.
	Files map[string]string
	// Tests are packages whose tests are to be run inside, as the go command
	// has them: "./testdata/inside". See [VM.Test].
	Tests []string
	// Drives are the guest's disks.
	Drives []Drive
	// MemoryMB is the guest's memory in MiB; 0 for 256 and what the files need.
	MemoryMB int
	// CPUs is how many processors the guest has; 0 for 1. More make it no faster
	// than the cores of this host, and slower to come up.
	CPUs int
	// Append is added to the kernel's command line.
	Append string
	// Timeout is how long each guest may run; 0 for 5 minutes. After it the test
	// fails.
	Timeout time.Duration
}

// A Drive is a disk of the guest, /dev/vmlab/NAME inside.
type Drive struct {
	Name string // at most 20 of a-z, 0-9, "-" and "_"
	// Source is the raw file beneath, or the URI of an NBD export.
	Source string
	// Volatile is the disk beneath, in place of a Source.
	Volatile *VolatileDisk
	// Cache is QEMU's cache mode: "none" bypasses this host's page cache,
	// "writethrough" is a disk without a cache of its own, which never needs a
	// flush. Empty for "writeback".
	Cache    string
	ReadOnly bool
}

// driveName is what the serial number of a virtio disk can hold, safe in a path.
var driveName = regexp.MustCompile(`^[a-z0-9_-]{1,20}$`)

func (d *Drive) check() error {
	switch {
	case !driveName.MatchString(d.Name):
		return fmt.Errorf("drive %q: its name must be 1 to 20 of a-z, 0-9, - and _", d.Name)
	case (d.Source == "") == (d.Volatile == nil):
		return fmt.Errorf("drive %s: it needs a Source or a Volatile, and not both", d.Name)
	}
	return nil
}

// A Lab boots guests that are alike, one at a time.
type Lab struct {
	t       testing.TB
	o       Options
	kernel  kernel.Kernel
	qemu    string // the program
	initrd  string // the guest's first file system
	tests   map[string]testProgram
	running *VM // the one that was booted last
}

const (
	defaultTimeout = 5 * time.Minute
	// bootLimit bounds the time from QEMU's start until the guest takes orders.
	// It takes three seconds on a host that has nothing else to do, and twenty on
	// a busy one.
	bootLimit = 2 * time.Minute
)

// New makes a lab, or fails the test: where no kernel is there, the message
// says how to get one. The lab's guests end with the test.
func New(t testing.TB, o Options) *Lab {
	t.Helper()
	l := &Lab{t: t, o: o, tests: map[string]testProgram{}}
	if l.o.CPUs == 0 {
		l.o.CPUs = 1
	}
	if l.o.Timeout == 0 {
		l.o.Timeout = defaultTimeout
	}
	l.qemu = testenv.Need(t, "qemu-system-x86_64")
	dir, err := kernel.Dir()
	if err == nil {
		l.kernel, err = kernel.Find(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	for i := range o.Drives {
		if err := o.Drives[i].check(); err != nil {
			t.Fatal(err)
		}
	}
	for _, pkg := range o.Tests {
		l.compile(pkg)
	}
	l.initrd = filepath.Join(t.TempDir(), "initrd")
	if err := l.writeImage(l.initrd); err != nil {
		t.Fatalf("make the guest's first file system: %v", err)
	}
	if l.o.MemoryMB == 0 {
		st, err := os.Stat(l.initrd)
		if err != nil {
			t.Fatal(err)
		}
		// While it is unpacked it is there twice, and half of the memory is all
		// that a file system in memory may take.
		l.o.MemoryMB = 256 + 3*int(st.Size()>>20)
	}
	return l
}
