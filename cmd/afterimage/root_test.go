package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"afterimage/internal/testenv"
)

// TestRootBlockDevice copies onto a block device of the host, serves it and
// compares it.
func TestRootBlockDevice(t *testing.T) {
	testenv.NeedRoot(t)
	disk := image(t, 8<<20)
	peer(t, "qemu-io", "-f", "raw", "-c", "write -P 7 1M 1M", disk)
	backing := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(backing, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	loop := strings.TrimSpace(peer(t, "losetup", "--find", "--show", backing))
	defer peer(t, "losetup", "--detach", loop)

	afterimage := func(want int, args ...string) {
		t.Helper()
		p := start(t, args...)
		io.Copy(io.Discard, p.stdout)
		if status := p.wait(); status != want {
			t.Errorf("%q: exit status %d, want %d: %s", args, status, want, &p.stderr)
		}
	}
	afterimage(statusDone, "disk", "copy", disk, loop)
	afterimage(statusDone, "disk", "compare", disk, loop)
	p := start(t, "serve", loop, "-U", disk+".sock")
	uri := p.line()
	if want := uriOf(disk+".sock", filepath.Base(loop)); uri != want {
		t.Errorf("URI %s, want %s", uri, want)
	}
	afterimage(statusDone, "disk", "compare", disk, uri)
	useDisk(t, dial(t, uri), 0, 5)
	afterimage(statusRefused, "serve", loop, "-U", disk+"2.sock")
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
	afterimage(statusDamaged, "disk", "compare", disk, loop)
}
