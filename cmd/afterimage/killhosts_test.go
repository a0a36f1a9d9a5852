package main

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/internal/admin"
)

// writeUntilDead writes to disks until their server dies, or stop is closed.
func writeUntilDead(t *testing.T, uris []string, seed uint64, stop <-chan struct{}) (wait func()) {
	t.Helper()
	var wg sync.WaitGroup
	for i, uri := range uris {
		c, err := nbd.Dial(t.Context(), uri, nbd.Options{})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer c.Close()
			odd(c, rand.New(rand.NewPCG(seed, uint64(i))), stop)
		})
	}
	return wg.Wait
}

// TestKillPrimary kills the primary's daemon under writes, again and again, while
// points are cut: after each restart the replica gets what the disks are.
func TestKillPrimary(t *testing.T) {
	const rounds = 6
	a, b := twoHosts(t)
	uris := a.add("web", 16<<20, "root", "data")
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1s", "--keep", "last=4")
	r := rand.New(rand.NewPCG(21, 22))
	for range rounds {
		stop := make(chan struct{})
		wait := writeUntilDead(t, uris, r.Uint64(), stop)
		time.Sleep(time.Duration(200+r.IntN(2000)) * time.Millisecond)
		a.kill()
		close(stop)
		wait()
		a.start()
		a.do("replica", "sync", "web")
		b.sameAs("web", uris)
	}
	a.end()
	b.end()
}

// TestKillReplica kills the replica's daemon under what it receives: no point that
// was listed is lost, and the primary goes on by itself.
func TestKillReplica(t *testing.T) {
	const rounds = 6
	a, b := twoHosts(t)
	uris := a.add("web", 16<<20, "root", "data")
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1s", "--keep", "last=100")
	a.do("replica", "sync", "web")
	stop := make(chan struct{})
	wait := writeUntilDead(t, uris, 5, stop)
	r := rand.New(rand.NewPCG(23, 24))
	for range rounds {
		time.Sleep(time.Duration(200+r.IntN(2000)) * time.Millisecond)
		var before, after []admin.Point
		b.decode(&before, "point", "list", "web")
		b.kill()
		b.start()
		b.decode(&after, "point", "list", "web")
		if newest := before[len(before)-1].ID; !slices.ContainsFunc(after, func(p admin.Point) bool { return p.ID == newest }) {
			t.Errorf("point %s is gone: %+v", newest, after)
		}
		b.do("failover", "test", "web")
		b.do("failover", "end-test", "web-test")
	}
	close(stop)
	wait()
	a.do("replica", "sync", "web")
	b.sameAs("web", uris)
	a.end()
	b.end()
}

// TestKillFailover kills the daemon that a VM was failed over to: what it was told
// is durable is there, and the failover stands.
func TestKillFailover(t *testing.T) {
	a, b := twoHosts(t)
	uris := a.add("web", 16<<20, "root")
	useDisk(t, dial(t, uris[0]), 0, 1)
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h")
	a.do("replica", "sync", "web")
	a.kill()
	here := b.do("failover", "start", "web", "--unplanned")
	lab := b.do("failover", "test", "web", "--as", "lab")
	for i := range byte(4) {
		c := dial(t, here[0])
		useDisk(t, c, int64(i)<<20, 10+i)
		useDisk(t, dial(t, lab[0]), int64(i)<<20, 20+i)
		b.kill()
		b.start()
	}
	for i := range byte(4) {
		for uri, fill := range map[string]byte{here[0]: 10 + i, lab[0]: 20 + i} {
			p := make([]byte, 4096)
			if err := blockdev.ReadAt(dial(t, uri), p, int64(i)<<20); err != nil || p[0] != fill || p[4095] != fill {
				t.Errorf("%s at %d MiB: %d, %v; want %d", uri, i, p[0], err, fill)
			}
		}
	}
	// The primary comes back, and nothing of it is taken.
	a.start()
	useDisk(t, dial(t, uris[0]), 0, 99)
	a.fails(statusRefused, "", "replica", "sync", "web")
	b.do("failover", "end-test", "lab")
	b.end()
	a.end()
}

// TestKillStateLost: state directory and log are deleted while the daemon runs,
// or does not: the guest's disk is untouched, the points stay, and the replica gets
// what the disk is when the VM is added again.
func TestKillStateLost(t *testing.T) {
	for name, running := range map[string]bool{"running": true, "stopped": false} {
		t.Run(name, func(t *testing.T) {
			a, b := twoHosts(t)
			image := filepath.Join(a.dir, "web-root.raw")
			uris := a.add("web", 16<<20, "root")
			c := dial(t, uris[0])
			useDisk(t, c, 0, 1)
			a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h")
			first := a.do("replica", "sync", "web")[0]
			useDisk(t, c, 1<<20, 2)
			if !running {
				c.Close()
				a.kill()
			}
			if err := os.RemoveAll(filepath.Join(a.dir, "state")); err != nil {
				t.Fatal(err)
			}
			if running {
				useDisk(t, c, 2<<20, 3)
				c.Close()
				a.p.end(syscall.SIGKILL)
			}
			fileHas(t, image, 1<<20, 2)
			a.start()
			again := a.do("vm", "add", "web", "root="+image)
			if again[0] != uris[0] {
				t.Errorf("added again: %q", again)
			}
			useDisk(t, dial(t, uris[0]), 3<<20, 4)
			a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h")
			a.do("replica", "sync", "web")
			b.sameAs("web", uris)
			b.do("failover", "test", "web", "--point", first)
			b.do("failover", "end-test", "web-test")
			fileHas(t, image, 0, 1)
			a.end()
			b.end()
		})
	}
}
