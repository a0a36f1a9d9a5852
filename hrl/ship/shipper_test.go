package ship_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/testenv"
)

// TestShip: points equal the disks, over changes, restarts and kills.
func TestShip(t *testing.T) {
	w := newWorld(t, 1, 4<<20, 2<<20+160<<10)
	w.keep = 40 // each start makes points by itself, too
	w.startPrimary()
	w.changes(30)
	first := w.sync()
	if again := w.sync(); again != first {
		t.Errorf("without a change another point was made: %v after %v", again, first)
	}
	for range 4 {
		w.changes(20)
		w.sync()
	}
	st := w.s.Status()
	if st.State != ship.StateReplicating || st.Health != ship.HealthNormal || st.LagSeconds != 0 || st.GapBytes != 0 {
		t.Errorf("at rest: %+v", st)
	}
	if st.Totals.Points != 5 || st.Totals.ShippedBytes == 0 || st.Totals.LatestBytes > st.Totals.LoggedBytes {
		t.Errorf("totals: %+v", st.Totals)
	}
	before := st.Totals
	for _, clean := range []bool{true, false} {
		w.changes(20)
		w.stopPrimary(clean)
		w.startPrimary()
		w.changes(5)
		w.sync()
	}
	st = w.s.Status()
	if st.Generation != 1 || st.Totals.Points <= before.Points {
		t.Errorf("after restarts: generation %d, totals %+v", st.Generation, st.Totals)
	}
	if st.Totals.CopiedBytes != before.CopiedBytes {
		t.Errorf("restarts copied %d bytes from the disk", st.Totals.CopiedBytes-before.CopiedBytes)
	}
	if n := w.checkHistory(); n < 7 {
		t.Errorf("only %d points are known", n)
	}
}

// troubleSeeds is how many histories TestShipTroubles plays, if SHIP_SEEDS does not say.
func troubleSeeds() uint64 {
	n, err := strconv.ParseUint(os.Getenv("SHIP_SEEDS"), 10, 32)
	if err != nil {
		return uint64(testenv.Rounds(3, 1))
	}
	return n
}

// TestShipTroubles does everything that may befall either side, in random order,
// between changes, and after each asks for a point that equals the disks.
func TestShipTroubles(t *testing.T) {
	for seed := uint64(1); seed <= troubleSeeds(); seed++ {
		w := newWorld(t, seed, 3<<20, 1<<20+96<<10)
		w.startPrimary()
		logDir := filepath.Join(w.dir, "log")
		replicaDir, old := filepath.Join(w.dir, "replica"), filepath.Join(w.dir, "old")
		troubles := []struct {
			name string
			do   func()
		}{
			{"kill", func() { w.stopPrimary(false); w.startPrimary() }},
			{"restart", func() { w.stopPrimary(true); w.startPrimary() }},
			{"line cut", func() {
				_ = w.host.Stop()
				w.changes(5)
				if _, err := w.s.Sync(context.Background()); err == nil {
					t.Error("a sync without a line succeeded")
				}
				w.changes(5)
				w.host.Start(w.ca)
			}},
			{"line cut and kill", func() {
				_ = w.host.Stop()
				_, _ = w.s.Sync(context.Background())
				w.stopPrimary(false)
				w.startPrimary()
				w.changes(5)
				w.host.Start(w.ca)
			}},
			{"replica restarted", func() {
				_ = w.host.Stop()
				w.store.Close()
				w.openStore()
				w.host.Start(w.ca)
			}},
			{"replica lost what was staged", func() {
				if err := w.replicaVM().Discard(nil); err != nil {
					t.Error(err)
				}
			}},
			{"log removed while it runs", func() { os.RemoveAll(logDir) }},
			{"log removed, and for a while no other can be made", func() {
				os.RemoveAll(logDir)
				if err := os.WriteFile(logDir, []byte("in the way"), 0o600); err != nil {
					t.Fatal(err)
				}
				w.changes(3)
				if _, err := w.s.Sync(context.Background()); err == nil {
					t.Error("a sync without a log succeeded")
				}
				w.changes(3)
				if _, err := w.s.Sync(context.Background()); err == nil {
					t.Error("a sync without a log succeeded")
				}
				os.Remove(logDir)
			}},
			{"segment removed while it runs", func() {
				segs, _ := filepath.Glob(filepath.Join(logDir, "log", "*.hrl"))
				for _, s := range segs {
					os.Remove(s)
				}
			}},
			{"log removed while it is down", func() {
				w.stopPrimary(false)
				os.RemoveAll(logDir)
				w.startPrimary()
			}},
			{"state removed", func() {
				w.stopPrimary(true)
				w.mu.Lock()
				w.saved = nil
				w.mu.Unlock()
				w.startPrimary()
			}},
			{"state and log removed", func() {
				w.stopPrimary(false)
				os.RemoveAll(logDir)
				w.mu.Lock()
				w.saved = nil
				w.mu.Unlock()
				w.startPrimary()
			}},
			{"gap", func() {
				for i, d := range w.vm.Disks() {
					d.AddGap(w.rng.Int64N(w.sizes[i]), 512)
				}
			}},
			{"whole gap", func() { w.vm.Disks()[0].GapAll() }},
			{"segment damaged", func() {
				w.changes(3)
				w.stopPrimary(false)
				segs, _ := filepath.Glob(filepath.Join(logDir, "log", "*.hrl"))
				for _, s := range segs {
					f, err := os.OpenFile(s, os.O_RDWR, 0)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := f.WriteAt([]byte("rot"), 4096+100); err != nil {
						t.Fatal(err)
					}
					f.Close()
				}
				w.startPrimary()
			}},
			{"open segments damaged", func() {
				w.changes(3)
				segs, _ := filepath.Glob(filepath.Join(logDir, "log", "*.hrl"))
				for _, s := range segs {
					if err := os.Truncate(s, 0); err != nil {
						t.Fatal(err)
					}
				}
			}},
			{"replica went back", func() {
				_ = w.host.Stop()
				w.store.Close()
				if _, err := os.Stat(old); err == nil {
					os.RemoveAll(replicaDir)
					w.copyTree(old, replicaDir)
				} else {
					w.copyTree(replicaDir, old)
				}
				w.openStore()
				w.host.Start(w.ca)
			}},
			{"all memory lost, and the replica restored", func() {
				// The names of points begin anew, and meet those of old.
				w.stopPrimary(false)
				_ = w.host.Stop()
				w.store.Close()
				os.RemoveAll(logDir)
				w.saved = nil
				clear(w.states)
				os.RemoveAll(old)
				if err := os.Rename(replicaDir, old); err != nil {
					t.Fatal(err)
				}
				w.openStore()
				w.host.Start(w.ca)
				w.startPrimary()
				w.changes(3)
				w.sync()
				_ = w.host.Stop()
				w.store.Close()
				os.RemoveAll(replicaDir)
				w.copyTree(old, replicaDir)
				w.openStore()
				w.host.Start(w.ca)
			}},
			{"replica lost everything", func() {
				_ = w.host.Stop()
				w.store.Close()
				os.RemoveAll(replicaDir)
				clear(w.states)
				w.openStore()
				w.host.Start(w.ca)
			}},
		}
		w.changes(20)
		w.sync()
		t.Logf("seed %d", seed)
		for range 20 {
			x := troubles[w.rng.IntN(len(troubles))]
			t.Logf("%s; the newest point was %v", x.name, w.s.Status().LastPoint.ID)
			w.changes(w.rng.IntN(8))
			x.do()
			w.changes(w.rng.IntN(8))
			w.sync()
			if t.Failed() {
				t.FailNow()
			}
		}
		w.checkHistory()
		w.stopPrimary(true)
	}
}

// TestShipQuota: a log that was given up in part costs a comparison, not a resync:
// only what differs is sent.
func TestShipQuota(t *testing.T) {
	w := newWorld(t, 3, 64<<20)
	w.quota = 40 << 20
	w.startPrimary()
	w.changes(50)
	w.sync()
	_ = w.host.Stop()
	before := w.s.Status().Totals
	buf := make([]byte, 1<<20)
	for round := range 80 { // 80 MiB over one MiB of disk
		w.fill(buf)
		buf[0] = byte(round)
		if err := ask(w.vm.Disks()[0], blockdev.Request{Op: blockdev.OpWrite, Off: 5 << 20, Len: 1 << 20, Buf: buf}); err != nil {
			t.Fatal(err)
		}
		copy(w.model[0][5<<20:], buf)
	}
	if n := w.vm.Log().Stats().Reclaimed; n == 0 {
		t.Fatal("nothing was given up")
	}
	w.host.Start(w.ca)
	w.sync()
	after := w.s.Status().Totals
	if n := after.ShippedRawBytes - before.ShippedRawBytes; n > 3<<20 {
		t.Errorf("%d bytes were sent for one MiB that differs", n)
	}
	w.checkHistory()
}

// TestShipCoalesces: what is rewritten is sent once.
func TestShipCoalesces(t *testing.T) {
	w := newWorld(t, 3, 16<<20)
	w.startPrimary()
	w.sync()
	buf := make([]byte, 64<<10)
	for range 200 {
		w.fill(buf)
		off := w.rng.Int64N(8) * (64 << 10)
		if err := ask(w.vm.Disks()[0], blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: int64(len(buf)), Buf: buf}); err != nil {
			t.Fatal(err)
		}
		copy(w.model[0][off:], buf)
	}
	before := w.s.Status().Totals
	w.sync()
	after := w.s.Status().Totals
	if n := after.LoggedBytes - before.LoggedBytes; n != 200*64<<10 {
		t.Errorf("%d bytes were logged", n)
	}
	if n := after.ShippedRawBytes - before.ShippedRawBytes; n > 512<<10 {
		t.Errorf("%d bytes were sent of a region of 512 KiB", n)
	}
}

// TestShipPause: a pause stops shipping and nothing else, also over a restart's
// option.
func TestShipPause(t *testing.T) {
	w := newWorld(t, 4, 1<<20)
	w.startPrimary()
	w.sync()
	w.s.Pause()
	w.changes(10)
	if _, err := w.s.Sync(context.Background()); !errors.Is(err, ship.ErrPaused) {
		t.Errorf("sync while paused: %v", err)
	}
	if st := w.s.Status(); st.State != ship.StatePaused || st.Health != ship.HealthWarning {
		t.Errorf("paused: %+v", st)
	}
	w.s.Resume()
	w.sync()
}

// TestShipByItself: points come without being asked for.
func TestShipByItself(t *testing.T) {
	w := newWorld(t, 5, 1<<20)
	w.every = 20 * time.Millisecond
	w.startPrimary()
	seen := map[wire.PointID]bool{}
	for deadline := time.Now().Add(time.Minute); len(seen) < 5; {
		w.changes(1)
		if p := w.s.Status().LastPoint; p != nil {
			seen[p.ID] = true
		}
		if time.Now().After(deadline) {
			t.Fatalf("only %d points: %+v", len(seen), w.s.Status())
		}
	}
	w.sync()
}

// TestShipFailover: while the replica serves, nothing is listed; when that is
// cancelled, replication goes on.
func TestShipFailover(t *testing.T) {
	w := newWorld(t, 6, 1<<20)
	w.startPrimary()
	w.changes(10)
	p := w.sync()
	run, err := w.replicaVM().Start(p)
	if err != nil {
		t.Fatal(err)
	}
	w.changes(10)
	var role *ship.RoleError
	if _, err := w.s.Sync(context.Background()); err == nil {
		t.Error("a point was listed after the failover began")
	}
	if _, err := w.s.Sync(context.Background()); !errors.As(err, &role) || role.At != p {
		t.Errorf("sync after the failover began: %v", err)
	}
	if st := w.s.Status(); st.State != ship.StateFailedOver || st.Health != ship.HealthCritical {
		t.Errorf("%+v", st)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.replicaVM().Cancel(); err != nil {
		t.Fatal(err)
	}
	w.sync()
	w.checkHistory()
}

// TestShipBaseCutOff: a base that lost its end, or is gone, is found when the store
// is opened; nothing is served from it.
func TestShipBaseCutOff(t *testing.T) {
	w := newWorld(t, 9, 4<<20)
	w.startPrimary()
	w.changes(40)
	w.sync()
	w.changes(10)
	p := w.sync()
	if err := w.replicaVM().Settle(context.Background()); err != nil {
		t.Fatal(err)
	}
	_ = w.host.Stop()
	w.store.Close()
	bases, err := filepath.Glob(filepath.Join(w.dir, "replica", "*", "disks", "disk0", "base.raw"))
	if err != nil || len(bases) != 1 {
		t.Fatal(bases, err)
	}
	for _, spoil := range []func() error{
		func() error { return os.Truncate(bases[0], 1<<20) },
		func() error { return os.Remove(bases[0]) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		w.openStore()
		why := w.replicaVM().Broken()
		if !errors.Is(why, hrl.ErrDamaged) || !strings.Contains(why.Error(), bases[0]) {
			t.Errorf("the VM is broken because of %v", why)
		}
		if _, err := w.replicaVM().OpenPoint(p, "disk0"); err == nil {
			t.Error("a point over it was opened")
		}
		w.store.Close()
	}
	w.openStore()
}
