// Package testenv says what a test needs of the machine it runs on, and waits
// for what nobody tells it of. What is missing fails the test by name: a skipped
// test would look like a passed one.
package testenv

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

// packages names the Debian package that has a program, where the two differ.
var packages = map[string]string{
	"blockdev":            "util-linux",
	"fusermount3":         "fuse3",
	"gcc":                 "gcc",
	"losetup":             "mount",
	"mkfs.ext4":           "e2fsprogs",
	"mkfs.xfs":            "xfsprogs",
	"mount":               "mount",
	"nbd-client":          "nbd-client",
	"nbdcopy":             "libnbd-bin",
	"nbdinfo":             "libnbd-bin",
	"nbdsh":               "python3-libnbd",
	"openssl":             "openssl",
	"qemu-img":            "qemu-utils",
	"qemu-io":             "qemu-utils",
	"qemu-nbd":            "qemu-utils",
	"qemu-storage-daemon": "qemu-system-common",
	"qemu-system-x86_64":  "qemu-system-x86",
	"umount":              "mount",
	"virsh":               "libvirt-clients",
}

// Need returns the path of a program and fails the test where it is not
// installed, naming the Debian package that has it.
func Need(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		pkg := packages[program]
		if pkg == "" {
			pkg = program
		}
		t.Fatalf("this test needs %s: apt-get install --no-install-recommends %s (or make deps)", program, pkg)
	}
	return path
}

// Until polls a condition until it holds, and fails the test after half a minute.
func Until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// NeedRoot fails a test that was not started as root. Such tests have names
// that begin with TestRoot, so that they can be run by themselves.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: run it through sudo, or leave it out with -skip '^TestRoot'")
	}
}
