package daemon

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/admin"
)

const diskSize = 4 << 20

// TestReplication goes the usual way: two disks, a first copy, points, restarts of
// either side, tests of points.
func TestReplication(t *testing.T) {
	a, b := newHosts(t)
	vm := a.add("web", diskSize, "root", "data")
	for i, disk := range vm.Disks {
		scribble(t, disk.URI, uint64(i))
	}
	a.replicate(b, "web")
	first := a.sync("web")
	b.testEqual(vm, "")
	scribble(t, vm.Disks[0].URI, 10)
	scribble(t, vm.Disks[1].URI, 11)
	second := a.sync("web")
	if second.ID == first.ID || second.Kind != "crash" || len(second.Disks) != 2 {
		t.Errorf("points %+v and %+v", first, second)
	}
	b.testEqual(vm, "")
	b.testEqual(vm, second.ID)

	a.restart()
	scribble(t, vm.Disks[0].URI, 12)
	a.sync("web")
	b.testEqual(vm, "")
	b.restart()
	scribble(t, vm.Disks[1].URI, 13)
	last := a.sync("web")
	b.testEqual(vm, last.ID)

	points, err := b.Points(t.Context(), "web")
	if err != nil || len(points) < 4 || points[0].ID != first.ID || points[len(points)-1].ID != last.ID {
		t.Fatalf("points at the replica: %+v, %v", points, err)
	}
	same, err := a.Points(t.Context(), "web")
	if err != nil || len(same) != len(points) || same[0].ID != points[0].ID {
		t.Errorf("points asked for at the primary: %+v, %v", same, err)
	}

	r, err := a.Replication(t.Context(), "web")
	if err != nil || r.Role != admin.RolePrimary || r.State != admin.StateReplicating || r.Health != admin.HealthNormal ||
		r.LastPoint == nil || r.LastPoint.ID.String() != last.ID || r.ShippedBytes == 0 || r.EverySeconds != 3600 || r.Points != len(points) {
		t.Errorf("at the primary: %+v, %v", r, err)
	}
	r, err = b.Replication(t.Context(), "web")
	if err != nil || r.Role != admin.RoleReplica || r.Peer != "host-a" || r.LastPoint == nil || r.LastPoint.ID.String() != last.ID || r.Points != len(points) {
		t.Errorf("at the replica: %+v, %v", r, err)
	}
	if vms, err := b.VMs(t.Context()); err != nil || len(vms) != 1 || vms[0].ID != vm.ID || vms[0].Sender != "host-a" || len(vms[0].Disks) != 2 {
		t.Errorf("the replica's VMs: %+v, %v", vms, err)
	}
}

// TestFailover starts a VM on the other side, takes that back, and makes it final.
func TestFailover(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	scribble(t, vm.Disks[0].URI, 1)
	a.replicate(b, "web")
	a.sync("web")
	run, err := b.Failover(ctx, "web", admin.StartRun{Unplanned: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if run.Test || run.Name != "web" || len(run.Disks) != 1 || run.FirstReadSeconds <= 0 {
		t.Errorf("the failover: %+v", run)
	}
	uri := run.Disks[0].URI
	equal(t, vm.Disks[0].URI, uri)

	// The primary lives after all, and learns of it.
	scribble(t, vm.Disks[0].URI, 7)
	_, err = a.Sync(ctx, "web", nil)
	refused(t, "a sync after the failover", err, admin.StatusRefused, "")
	a.until("web", "the primary knows of the failover", func(r admin.Replication) bool {
		return r.State == admin.StateFailedOver && r.Health == admin.HealthCritical
	})
	_, err = b.Failover(ctx, "web", admin.StartRun{Unplanned: true}, nil)
	refused(t, "a second failover", err, admin.StatusRefused, "runs on this host already")
	refused(t, "removing what runs", b.RemoveVM(ctx, "web"), admin.StatusRefused, "runs on this host")

	// What is written is there after a restart.
	scribble(t, uri, 2)
	c := dial(t, uri)
	if err := blockdev.Flush(c); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, diskSize)
	if err := blockdev.ReadAt(c, want, 0); err != nil {
		t.Fatal(err)
	}
	_, err = b.Cancel(ctx, "web")
	refused(t, "a cancel under a client", err, admin.StatusRefused, "in use")
	c.Close()
	b.restart()
	got := make([]byte, diskSize)
	if err := blockdev.ReadAt(dial(t, uri), got, 0); err != nil || string(got) != string(want) {
		t.Errorf("after a restart the disk has changed: %v", err)
	}
	if shown, err := b.VM(ctx, "web"); err != nil || shown.Role != admin.RoleFailedOver || shown.Disks[0].URI != uri {
		t.Errorf("the failover after a restart: %+v, %v", shown, err)
	}
	b.restart() // which ends the client's connection

	cancelled, err := b.Cancel(ctx, "web")
	if err != nil || cancelled.Branch == "" {
		t.Fatal(cancelled, err)
	}
	refused(t, "a second cancel", cancelAgain(ctx, b), admin.StatusRefused, "no failover")
	scribble(t, vm.Disks[0].URI, 3)
	a.sync("web")
	b.testEqual(vm, "")
	served := servePoint(t, b, "web", cancelled.Branch, "root")
	branch := make([]byte, diskSize)
	if err := blockdev.ReadAt(dial(t, served.URI), branch, 0); err != nil || string(branch) != string(want) {
		t.Errorf("the branch is not what was written: %v", err)
	}

	if _, err := b.Failover(ctx, "web", admin.StartRun{Unplanned: true, NoVerify: true}, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	refused(t, "a cancel after the commit", cancelAgain(ctx, b), admin.StatusRefused, "committed")
	refused(t, "removing it then", b.RemoveVM(ctx, "web"), admin.StatusRefused, "for good")
	b.restart()
	equal(t, vm.Disks[0].URI, uri)
	if shown, err := b.VM(ctx, "web"); err != nil || shown.Role != admin.RolePrimary {
		t.Errorf("after the commit: %+v, %v", shown, err)
	}
	_, err = b.Enable(ctx, "web", admin.Enable{To: a.listen, EverySeconds: 1})
	refused(t, "replicating it from there", err, admin.StatusRefused, "for good")
}

func cancelAgain(ctx context.Context, b *host) error {
	_, err := b.Cancel(ctx, "web")
	return err
}

// servePoint serves a disk of a point until the test ends.
func servePoint(t *testing.T, h *host, vm, point, disk string) admin.Served {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan admin.Served, 1), make(chan error, 1)
	s := admin.ServePoint{Point: point, Disk: disk, Socket: filepath.Join(h.dir, "p.sock")}
	go func() {
		ended <- h.ServePoint(ctx, vm, s, func(info admin.Served) error {
			ready <- info
			return nil
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve a point: %v", err)
		}
	})
	select {
	case info := <-ready:
		return info
	case err := <-ended:
		ended <- nil
		t.Fatalf("serve a point: %v", err)
	}
	panic("unreachable")
}

// TestRuns: tests of a failover stand beside one another and the replication, over
// restarts, and leave nothing.
func TestRuns(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	scribble(t, vm.Disks[0].URI, 1)
	a.replicate(b, "web")
	first := a.sync("web")
	one, err := b.Test(ctx, "web", admin.StartRun{As: "one"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	scribble(t, one.Disks[0].URI, 2)
	scribble(t, vm.Disks[0].URI, 3)
	a.sync("web")
	two, err := b.Test(ctx, "web", admin.StartRun{As: "two", Point: first.ID}, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Test(ctx, "web", admin.StartRun{As: "two"}, nil)
	refused(t, "a second test of a name", err, admin.StatusRefused, "already")
	_, err = b.Test(ctx, "web", admin.StartRun{As: "web"}, nil)
	refused(t, "a test by the VM's name", err, admin.StatusRefused, "already")
	_, err = b.Test(ctx, "web", admin.StartRun{As: "a/b"}, nil)
	refused(t, "a test with a slash", err, admin.StatusUsage, "")
	_, err = b.Test(ctx, "web", admin.StartRun{Point: "9.9.9"}, nil)
	refused(t, "a test of no point", err, admin.StatusNotFound, "9.9.9")
	refused(t, "erasing the VM", b.RemoveVM(ctx, "web"), admin.StatusRefused, "stands")

	content := func(uri string) string {
		c := dial(t, uri)
		defer c.Close()
		p := make([]byte, diskSize)
		if err := blockdev.ReadAt(c, p, 0); err != nil {
			t.Fatal(err)
		}
		return string(p)
	}
	before := content(one.Disks[0].URI)
	if before == content(two.Disks[0].URI) {
		t.Error("a test sees what another one has written")
	}
	b.restart()
	if content(one.Disks[0].URI) != before {
		t.Error("a test is not what it was before the restart")
	}
	shown, err := b.VM(ctx, "web")
	if err != nil || len(shown.Tests) != 2 || shown.Role != admin.RoleReplica {
		t.Errorf("with two tests: %+v, %v", shown, err)
	}
	for _, name := range []string{"one", "two"} {
		if err := b.EndTest(ctx, name); err != nil {
			t.Error(err)
		}
	}
	refused(t, "ending a test again", b.EndTest(ctx, "one"), admin.StatusNotFound, "no test one")
	if runs, err := b.Runs(ctx); err != nil || len(runs) != 0 {
		t.Errorf("left: %+v, %v", runs, err)
	}
	err = filepath.WalkDir(b.state(), func(path string, d os.DirEntry, err error) error {
		if err == nil && (d.Name() == "one" || d.Name() == "two") {
			t.Errorf("left: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	a.sync("web")
	b.testEqual(vm, "")
}

// TestPoints pins, removes and serves.
func TestPoints(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	a.replicate(b, "web")
	var ids []string
	for i := range 3 {
		scribble(t, vm.Disks[0].URI, uint64(i))
		ids = append(ids, a.sync("web").ID)
	}
	if err := b.Pin(ctx, "web", ids[0], true); err != nil {
		t.Fatal(err)
	}
	refused(t, "removing a pinned point", b.RemovePoint(ctx, "web", ids[0]), admin.StatusRefused, "")
	refused(t, "removing the newest point", b.RemovePoint(ctx, "web", "latest"), admin.StatusRefused, "")
	refused(t, "pinning on the primary", a.Pin(ctx, "web", ids[0], true), admin.StatusRefused, "primary")
	served := servePoint(t, b, "web", ids[1], "root")
	if served.Size != diskSize {
		t.Errorf("served: %+v", served)
	}
	c := dial(t, served.URI)
	if err := blockdev.WriteAt(c, make([]byte, 512), 0); err == nil {
		t.Error("a point was written")
	}
	refused(t, "removing a point that is served", b.RemovePoint(ctx, "web", ids[1]), admin.StatusRefused, "")
	if err := b.Pin(ctx, "web", ids[0], false); err != nil {
		t.Fatal(err)
	}
	if err := b.RemovePoint(ctx, "web", ids[0]); err != nil {
		t.Error(err)
	}
	points, err := b.Points(ctx, "web")
	if err != nil || slices.ContainsFunc(points, func(p admin.Point) bool { return p.ID == ids[0] }) || points[len(points)-1].ID != ids[2] {
		t.Errorf("left: %+v, %v", points, err)
	}
	b.testEqual(vm, ids[2])
	if err := b.RemoveVM(ctx, "none"); err == nil {
		t.Error("a VM that there is not was removed")
	}
}

// TestPause: paused, nothing is shipped, also over a restart.
func TestPause(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	a.replicate(b, "web")
	a.sync("web")
	before := newestOf(t, b, "web")
	if err := a.Pause(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	scribble(t, vm.Disks[0].URI, 4)
	_, err := a.Sync(ctx, "web", nil)
	refused(t, "a sync while paused", err, admin.StatusRefused, "paused")
	a.restart()
	if r, err := a.Replication(ctx, "web"); err != nil || r.State != admin.StatePaused {
		t.Errorf("after a restart: %+v, %v", r, err)
	}
	if now := newestOf(t, b, "web"); now != before {
		t.Errorf("paused, point %v came", now)
	}
	if err := a.Resume(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	a.sync("web")
	b.testEqual(vm, "")
}

// TestDisable ends a replication, and begins it again: the points stay.
func TestDisable(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	logs := filepath.Join(a.dir, "logs")
	vm, err := a.AddVM(ctx, admin.AddVM{Name: "web", LogDir: logs, Disks: []admin.AddDisk{{Name: "root", Image: a.image("web.raw", diskSize)}}})
	if err != nil {
		t.Fatal(err)
	}
	scribble(t, vm.Disks[0].URI, 1)
	a.replicate(b, "web")
	first := a.sync("web")
	if err := os.WriteFile(filepath.Join(logs, "another's"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, "removing a replicated VM", a.RemoveVM(ctx, "web"), admin.StatusRefused, "replicated to")
	shown, err := a.VM(ctx, "web")
	if err != nil || shown.Disks[0].LogDir != filepath.Join(logs, vm.ID.String()) {
		t.Fatal(shown, err)
	}
	if err := a.Disable(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(shown.Disks[0].LogDir); !os.IsNotExist(err) {
		t.Errorf("the log is left: %v", err)
	}
	if _, err := os.Stat(filepath.Join(logs, "another's")); err != nil {
		t.Errorf("with the log went another's file: %v", err)
	}
	refused(t, "a second disable", a.Disable(ctx, "web"), admin.StatusRefused, "not replicated")
	_, err = a.Sync(ctx, "web", nil)
	refused(t, "a sync", err, admin.StatusRefused, "not replicated")
	_, err = a.Replication(ctx, "web")
	refused(t, "the status", err, admin.StatusRefused, "not replicated")
	scribble(t, vm.Disks[0].URI, 2) // which no log has
	a.restart()
	scribble(t, vm.Disks[0].URI, 3)
	a.replicate(b, "web")
	second := a.sync("web")
	b.testEqual(vm, second.ID)
	points, err := b.Points(ctx, "web")
	if err != nil || len(points) < 2 || points[0].ID != first.ID {
		t.Errorf("points: %+v, %v", points, err)
	}
}

// TestEveryCycle replicates by itself.
func TestEveryCycle(t *testing.T) {
	a, b := newHosts(t)
	vm := a.add("web", diskSize, "root")
	if _, err := b.AllowPeer(t.Context(), admin.AllowPeer{Pattern: "host-*"}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Enable(t.Context(), "web", admin.Enable{To: b.listen, EverySeconds: 1, Keep: 3}); err != nil {
		t.Fatal(err)
	}
	for i := range 6 {
		scribble(t, vm.Disks[0].URI, uint64(i))
		before := uint64(0)
		if r, err := b.Replication(t.Context(), "web"); err == nil && r.LastPoint != nil {
			before = r.LastPoint.Epoch
		}
		b.until("web", "another point", func(r admin.Replication) bool { return r.LastPoint != nil && r.LastPoint.Epoch > before })
	}
	// Retention is at work behind it.
	deadline := time.Now().Add(20 * time.Second)
	for {
		points, err := b.Points(t.Context(), "web")
		if err != nil {
			t.Fatal(err)
		}
		if len(points) <= 4 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d points are kept, 3 were asked for", len(points))
		}
		time.Sleep(50 * time.Millisecond)
	}
	a.sync("web")
	b.testEqual(vm, "")
}
