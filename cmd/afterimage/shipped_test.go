package main

import (
	"fmt"
	"math/rand/v2"
	"os/exec"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/admin"
	"afterimage/internal/testenv"
)

// TestKillPrimaryFio loads a replicated disk with fio, through the shim, while
// points come by themselves, and kills the primary's daemon 20 times: after each
// restart the replica gets what the disk is. How much was lost, in seconds of
// writing, is printed.
func TestKillPrimaryFio(t *testing.T) {
	testenv.Need(t, "fio")
	const rounds = 20
	a, b := twoHosts(t)
	uris := a.add("web", 32<<20, "root")
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1s", "--keep", "last=4")
	a.do("replica", "sync", "web")
	r := rand.New(rand.NewPCG(31, 32))
	worst := time.Duration(0)
	for round := range rounds {
		load := exec.Command("fio", "--name=load", "--ioengine=nbd", "--uri="+uris[0], "--rw=randwrite", "--bs=4k,64k",
			"--bssplit=4k/80:64k/20", "--iodepth=16", "--size=32M", "--time_based", "--runtime=60", fmt.Sprintf("--randseed=%d", round+1))
		if err := load.Start(); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		time.Sleep(time.Duration(500+r.IntN(1500)) * time.Millisecond)
		a.kill()
		killed := time.Now()
		_ = load.Wait() // its disk is gone
		var points []admin.Point
		b.decode(&points, "point", "list", "web")
		since := began // nothing was written between the newest point and that
		if at := points[len(points)-1].Time; at.After(since) {
			since = at
		}
		worst = max(worst, killed.Sub(since))
		a.start()
		a.do("replica", "sync", "web")
		b.sameAs("web", uris)
	}
	t.Logf("at an interval of 1 s at most the last %.2f s of writing were lost", worst.Seconds())
	var st admin.Replication
	a.decode(&st, "replica", "status", "web")
	if st.Generation != 1 || st.GapBytes != 0 {
		t.Errorf("kills took a new generation, or left gaps: %+v", st)
	}
	a.end()
	b.end()
}

// TestShipped: what is written over and over is shipped about once a cycle, and a
// small change is a small layer.
func TestShipped(t *testing.T) {
	const region, rewrites = 8 << 20, 50 // 400 MiB
	a, b := twoHosts(t)
	// All of it may be written within one cycle: a log that gave up its oldest part
	// would have the region copied as well.
	uris := a.addQuota("1G", "web", 64<<20, "root")
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1s")
	a.do("replica", "sync", "web")
	shipped := func() (n int64, points int) {
		var st admin.Replication
		a.decode(&st, "replica", "status", "web")
		var list []admin.Point
		b.decode(&list, "point", "list", "web")
		return st.ShippedBytes, len(list)
	}
	c := dial(t, uris[0])
	before, points := shipped()
	r := rand.NewChaCha8([32]byte{1}) // so that nothing can be compressed
	buf := make([]byte, 1<<20)
	for range rewrites {
		for off := int64(0); off < region; off += int64(len(buf)) {
			_, _ = r.Read(buf)
			if err := blockdev.WriteAt(c, buf, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	a.do("replica", "sync", "web")
	after, now := shipped()
	cycles := int64(now - points)
	t.Logf("400 MiB over one region of 8 MiB: %d points, %d bytes shipped", cycles, after-before)
	// On a loaded machine an append is late now and then, and what it had is copied
	// from the disk: the region can go twice.
	if most := 2*cycles*(region+region/50) + 1<<20; after-before > most || after-before < region {
		t.Errorf("%d bytes were shipped in %d cycles: %d are the most", after-before, cycles, most)
	}
	_, _ = r.Read(buf[:4096])
	if err := blockdev.WriteAt(c, buf[:4096], 40<<20); err != nil {
		t.Fatal(err)
	}
	a.do("replica", "sync", "web")
	small, _ := shipped()
	t.Logf("a write of 4 KiB: %d bytes shipped", small-after)
	if small-after > 200_000 || small == after {
		t.Errorf("%d bytes were shipped for a write of 4 KiB", small-after)
	}
	c.Close()
	b.sameAs("web", uris)
	a.end()
	b.end()
}
