package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/admin"
)

// TestDiskResize is a session of commands.
func TestDiskResize(t *testing.T) {
	a, b := twoHosts(t)
	uris := a.add("web", 8<<20, "root")
	useDisk(t, dial(t, uris[0]), 0, 1)
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h")
	a.do("replica", "sync", "web")
	if out := a.do("disk", "resize", "web/root", "16M"); len(out) != 1 || out[0] != "web/root: 16 MiB (16777216 bytes), was 8.0 MiB (8388608 bytes)" {
		t.Errorf("disk resize printed %q", out)
	}
	useDisk(t, dial(t, uris[0]), 12<<20, 2)
	a.do("replica", "sync", "web")
	b.sameAs("web", uris)
	a.fails(statusRefused, "its last 4194304 would be cut off", "disk", "resize", "web/root", "12MiB")
	var r admin.Resized
	a.decode(&r, "disk", "resize", "web/root", "12MiB", "--shrink")
	if r != (admin.Resized{VM: "web", Disk: "root", Size: 12 << 20, Was: 16 << 20}) {
		t.Errorf("%+v", r)
	}
	a.kill()
	a.start()
	a.do("replica", "sync", "web")
	b.sameAs("web", uris)
	b.fails(statusRefused, "replica", "disk", "resize", "web/root", "1G")
	a.fails(statusNotFound, "no disk data", "disk", "resize", "web/data", "1G")
	a.fails(statusUsage, "multiple of 4096", "disk", "resize", "web/root", "12582912.5K")
	a.end()
	b.end()
}

// TestRealResize: what other programs see of a disk that was resized.
func TestRealResize(t *testing.T) {
	a, b := twoHosts(t)
	uris := a.add("web", 8<<20, "root")
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h")
	a.do("replica", "sync", "web")
	for _, size := range []int64{24 << 20, 4 << 20, 12<<20 + 4096} {
		a.do("disk", "resize", "web/root", fmt.Sprint(size), "--shrink")
		if got := strings.TrimSpace(peer(t, "nbdinfo", "--size", uris[0])); got != fmt.Sprint(size) {
			t.Errorf("nbdinfo says %s bytes, not %d", got, size)
		}
		var info struct {
			Size int64 `json:"virtual-size"`
		}
		if err := json.Unmarshal([]byte(peer(t, "qemu-img", "info", "-f", "raw", "--output", "json", uris[0])), &info); err != nil || info.Size != size {
			t.Errorf("qemu-img says %d bytes, not %d: %v", info.Size, size, err)
		}
		peer(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P 7 %d 4k", size-4096), "-c", "flush", uris[0])
		a.do("replica", "sync", "web")
		served := start(t, "point", "serve", "web@latest/root", "-U", filepath.Join(b.dir, "p.sock"), "--admin", filepath.Join(b.dir, "state", "admin.sock"))
		peer(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", served.line(), uris[0])
		served.end(syscall.SIGINT)
	}
	if c := dial(t, uris[0]); c.Size() != 12<<20+4096 || blockdev.ReadAt(c, make([]byte, 4096), 12<<20) != nil {
		t.Errorf("the disk has %d bytes", c.Size())
	}
	a.end()
	b.end()
}
