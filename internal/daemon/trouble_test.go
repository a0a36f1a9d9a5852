package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"afterimage/internal/admin"
	"afterimage/internal/pki"
	"afterimage/internal/testenv"
)

// TestEnableRefused: what cannot be replicated is refused, and nothing is left of
// the attempt.
func TestEnableRefused(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	enable := func(vm string, e admin.Enable) error {
		_, err := a.Enable(ctx, vm, e)
		return err
	}
	good := admin.Enable{To: b.listen, EverySeconds: 3600}
	refused(t, "no VM", enable("none", good), admin.StatusNotFound, "no VM none")
	refused(t, "not allowed", enable("web", good), admin.StatusUnreachable, "does not let host-a")
	tested, err := a.TestPeer(ctx, b.listen)
	if err != nil || tested.Allowed || tested.Name != "host-b" || tested.You != "host-a" {
		t.Errorf("peer test: %+v, %v", tested, err)
	}
	if _, err := b.AllowPeer(ctx, admin.AllowPeer{Pattern: "host-?"}); err != nil {
		t.Fatal(err)
	}
	for _, e := range []admin.Enable{
		{To: "", EverySeconds: 1}, {To: "h", EverySeconds: 1}, {To: ":1", EverySeconds: 1}, {To: b.listen}, {To: b.listen, EverySeconds: 0.5},
		{To: b.listen, EverySeconds: -1}, {To: b.listen, EverySeconds: 1e12}, {To: b.listen, EverySeconds: 1, Keep: -1}, {To: b.listen, EverySeconds: 1, Limit: -1},
	} {
		refused(t, "impossible", enable("web", e), admin.StatusUsage, "")
	}
	refused(t, "nobody there", enable("web", admin.Enable{To: "127.0.0.1:1", EverySeconds: 1}), admin.StatusUnreachable, "127.0.0.1:1")
	refused(t, "itself", enable("web", admin.Enable{To: a.listen, EverySeconds: 1}), admin.StatusRefused, "this host")
	localhost := strings.Replace(b.listen, "127.0.0.1", "localhost", 1)
	refused(t, "another name", enable("web", admin.Enable{To: localhost, EverySeconds: 1}), admin.StatusUnreachable, "localhost")
	_, err = a.TestPeer(ctx, localhost)
	refused(t, "a test by another name", err, admin.StatusUnreachable, "localhost")

	// A VM over there has the name.
	b.add("web", diskSize, "root")
	refused(t, "a name that is taken", enable("web", good), admin.StatusRefused, "already")
	if err := b.RemoveVM(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	if err := b.RemovePeer(ctx, "host-?"); err != nil {
		t.Fatal(err)
	}
	refused(t, "removing a rule again", b.RemovePeer(ctx, "host-?"), admin.StatusNotFound, "host-?")
	refused(t, "no longer allowed", enable("web", good), admin.StatusUnreachable, "does not let")
	if shown, err := a.VM(ctx, "web"); err != nil || shown.Disks[0].LogDir != "" {
		t.Errorf("after all this: %+v, %v", shown, err)
	}
	if logs, err := filepath.Glob(filepath.Join(a.state(), "logs", "*")); err != nil || len(logs) > 0 {
		t.Errorf("logs are left: %v, %v", logs, err)
	}
	a.replicate(b, "web")
	refused(t, "a second time", enable("web", good), admin.StatusRefused, "already")
	scribble(t, vm.Disks[0].URI, 1)
	a.sync("web")
	b.testEqual(vm, "")
	before, err := b.Points(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	// The rule goes, and what was stored stays.
	if err := b.RemovePeer(ctx, "host-a"); err != nil {
		t.Fatal(err)
	}
	scribble(t, vm.Disks[0].URI, 2)
	_, err = a.Sync(ctx, "web", nil)
	refused(t, "no longer allowed", err, admin.StatusUnreachable, "does not let")
	b.restart()
	if points, err := b.Points(ctx, "web"); err != nil || len(points) != len(before) {
		t.Errorf("points: %+v, %v; before %+v", points, err, before)
	}
}

// TestHungPeer: a peer that takes connections and says nothing keeps nobody
// waiting but who asked for it.
func TestHungPeer(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	a.replicate(b, "web")
	a.add("hung", diskSize, "root")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	short, cancel := context.WithCancel(ctx)
	asked := make(chan error, 1)
	go func() {
		_, err := a.Enable(short, "hung", admin.Enable{To: ln.Addr().String(), EverySeconds: 1})
		asked <- err
	}()
	conn, err := ln.Accept() // the question is under way
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = a.Enable(ctx, "hung", admin.Enable{To: b.listen, EverySeconds: 1})
	refused(t, "the VM meanwhile", err, admin.StatusRefused, "is being enabled")
	if shown, err := a.VM(ctx, "hung"); err != nil || shown.Disks[0].URI == "" {
		t.Errorf("shown meanwhile: %+v, %v", shown, err)
	}
	scribble(t, vm.Disks[0].URI, 1)
	a.sync("web")
	b.testEqual(vm, "")
	a.add("other", diskSize, "root")
	cancel()
	if err := <-asked; !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	a.replicate(b, "hung")
	a.sync("hung")
}

// TestCertificates: a host with certificates of another CA is a stranger; without
// any, the VM is served and logged all the same.
func TestCertificates(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	a.replicate(b, "web")
	a.sync("web")
	a.stop()
	away := a.tls() + ".away"
	if err := os.Rename(a.tls(), away); err != nil {
		t.Fatal(err)
	}
	a.listen = ""
	o := a.options()
	o.Listen = ""
	d, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	a.d, a.Client = d, admin.NewClient(d.Info().Admin)
	scribble(t, vm.Disks[0].URI, 1)
	_, err = a.TestPeer(ctx, b.listen)
	refused(t, "a peer test without certificates", err, admin.StatusNotFound, "tls")
	_, err = a.Sync(ctx, "web", nil)
	refused(t, "a sync without certificates", err, admin.StatusUnreachable, "")
	if err := pki.Init(a.tls(), []string{"host-a", "127.0.0.1"}, pki.Options{}); err != nil {
		t.Fatal(err)
	}
	_, err = a.TestPeer(ctx, b.listen)
	refused(t, "another CA", err, admin.StatusUnreachable, "")
	if err := os.RemoveAll(a.tls()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(away, a.tls()); err != nil {
		t.Fatal(err)
	}
	testenv.Until(t, "a sync with the certificates back", func() bool {
		_, err := a.Sync(ctx, "web", nil)
		return err == nil
	})
	b.testEqual(vm, "")
	if r, err := a.Replication(ctx, "web"); err != nil || r.Generation != 1 {
		t.Errorf("the log was not trusted any more: %+v, %v", r, err)
	}
}

// TestQuota: a replica that is full refuses with its own words; more room, and all
// goes on.
func TestQuota(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", 16<<20, "root")
	for i := range uint64(6) {
		scribble(t, vm.Disks[0].URI, i)
	}
	if _, err := b.AllowPeer(ctx, admin.AllowPeer{Pattern: "host-a", Quota: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Enable(ctx, "web", admin.Enable{To: b.listen, EverySeconds: 3600}); err != nil {
		t.Fatal(err)
	}
	_, err := a.Sync(ctx, "web", nil)
	refused(t, "a full replica", err, admin.StatusRefused, "quota")
	if r, err := a.Replication(ctx, "web"); err != nil || r.Health != admin.HealthCritical || len(r.Reasons) == 0 {
		t.Errorf("the state: %+v, %v", r, err)
	}
	scribble(t, vm.Disks[0].URI, 9) // no concern of the guest
	if _, err := b.AllowPeer(ctx, admin.AllowPeer{Pattern: "host-a", Quota: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	a.sync("web")
	b.testEqual(vm, "")
}

// TestLogTrouble: a log that cannot be opened is no concern of the guest; the disk
// is compared when it can be again.
func TestLogTrouble(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	a.replicate(b, "web")
	first := a.sync("web")
	shown, err := a.VM(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	dir := shown.Disks[0].LogDir
	a.stop()
	// In the place of the log's directory there is a file.
	if err := os.Rename(filepath.Dir(dir), filepath.Dir(dir)+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Dir(dir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	scribble(t, vm.Disks[0].URI, 1) // logged nowhere
	r, err := a.Replication(ctx, "web")
	if err != nil || r.Health != admin.HealthCritical || len(r.Reasons) == 0 {
		t.Errorf("without a log: %+v, %v", r, err)
	}
	_, err = a.Sync(ctx, "web", nil)
	if err == nil {
		t.Error("a point was cut without a log")
	}
	if err := os.Remove(filepath.Dir(dir)); err != nil {
		t.Fatal(err)
	}
	// The old log comes back, too, and is not believed.
	if err := os.Rename(filepath.Dir(dir)+".away", filepath.Dir(dir)); err != nil {
		t.Fatal(err)
	}
	testenv.Until(t, "the log is opened again", func() bool {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		_, err := a.Sync(ctx, "web", nil)
		return err == nil
	})
	b.testEqual(vm, "")
	points, err := b.Points(ctx, "web")
	if err != nil || points[0].ID != first.ID {
		t.Errorf("points: %+v, %v", points, err)
	}
	a.restart()
	scribble(t, vm.Disks[0].URI, 2)
	a.sync("web")
	b.testEqual(vm, "")
}

// TestStateLost: the state directory is gone, and the VM is added again: it has the
// UUID that it had, and its replica goes on.
func TestStateLost(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root", "data")
	scribble(t, vm.Disks[0].URI, 1)
	a.replicate(b, "web")
	first := a.sync("web")
	a.stop()
	if err := os.RemoveAll(a.state()); err != nil {
		t.Fatal(err)
	}
	a.start()
	if vms, err := a.VMs(ctx); err != nil || len(vms) != 0 {
		t.Fatal(vms, err)
	}
	_, err := a.AddVM(ctx, admin.AddVM{Name: "web", Disks: []admin.AddDisk{{Name: "other", Image: vm.Disks[0].Image}}})
	refused(t, "added by another disk's name", err, admin.StatusRefused, "as disk root before")
	again, err := a.AddVM(ctx, admin.AddVM{Name: "web", Disks: []admin.AddDisk{{Name: "root", Image: vm.Disks[0].Image}, {Name: "data", Image: vm.Disks[1].Image}}})
	if err != nil || again.ID != vm.ID {
		t.Fatalf("added again: %+v, %v", again, err)
	}
	scribble(t, vm.Disks[1].URI, 2)
	a.replicate(b, "web")
	a.sync("web")
	b.testEqual(vm, "")
	points, err := b.Points(ctx, "web")
	if err != nil || len(points) < 2 || points[0].ID != first.ID {
		t.Errorf("points: %+v, %v", points, err)
	}
	if _, err := b.Test(ctx, "web", admin.StartRun{Point: first.ID}, nil); err != nil {
		t.Error(err)
	}
	if err := b.EndTest(ctx, "web-test"); err != nil {
		t.Error(err)
	}
}

// TestDamagedLayer: a byte of a stored layer rots, and no failover starts from it
// unseen.
func TestDamagedLayer(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root")
	scribble(t, vm.Disks[0].URI, 1)
	a.replicate(b, "web")
	first := a.sync("web")
	old, err := filepath.Glob(filepath.Join(b.state(), "replicas", "*", "layers", "*"))
	if err != nil {
		t.Fatal(err)
	}
	scribble(t, vm.Disks[0].URI, 2)
	a.sync("web")
	layers, err := filepath.Glob(filepath.Join(b.state(), "replicas", "*", "layers", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var layer string
	for _, path := range layers {
		if !strings.Contains(strings.Join(old, "\n"), path) {
			layer = path
		}
	}
	f, err := os.OpenFile(layer, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	c := make([]byte, 1)
	if _, err := f.ReadAt(c, st.Size()/2); err != nil {
		t.Fatal(err)
	}
	c[0] ^= 1
	if _, err := f.WriteAt(c, st.Size()/2); err != nil {
		t.Fatal(err)
	}
	f.Close()
	digest := strings.TrimSuffix(filepath.Base(layer), ".layer")
	_, err = b.Failover(ctx, "web", admin.StartRun{Unplanned: true}, nil)
	refused(t, "a failover from a damaged point", err, admin.StatusDamaged, digest)
	_, err = b.Test(ctx, "web", admin.StartRun{}, nil)
	refused(t, "a test of a damaged point", err, admin.StatusDamaged, digest)
	if runs, err := b.Runs(ctx); err != nil || len(runs) != 0 {
		t.Errorf("started all the same: %+v, %v", runs, err)
	}
	if r, err := b.Replication(ctx, "web"); err != nil || r.Role != admin.RoleReplica {
		t.Errorf("the role: %+v, %v", r, err)
	}
	run, err := b.Test(ctx, "web", admin.StartRun{Point: first.ID}, nil)
	if err != nil {
		t.Fatalf("the point before: %v", err)
	}
	if err := b.EndTest(ctx, run.Name); err != nil {
		t.Error(err)
	}
}

// TestDamagedJournal: a replica whose journal rots is told apart, and the others
// are as they were.
func TestDamagedJournal(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	bad, good := a.add("bad", diskSize, "d"), a.add("good", diskSize, "d")
	a.replicate(b, "bad")
	a.replicate(b, "good")
	a.sync("bad")
	a.sync("good")
	b.stop()
	path := filepath.Join(b.state(), "replicas", bad.ID.String(), "journal")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text[1060] ^= 0x55 // in the first record
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	b.start()
	vms, err := b.VMs(ctx)
	if err != nil || len(vms) != 2 {
		t.Fatal(vms, err)
	}
	var broken string
	for _, vm := range vms {
		if vm.ID == bad.ID {
			broken = vm.Name
			if vm.Error == "" {
				t.Errorf("the damaged one: %+v", vm)
			}
		}
	}
	_, err = b.Points(ctx, broken)
	refused(t, "the points of a damaged journal", err, admin.StatusDamaged, "journal")
	scribble(t, bad.Disks[0].URI, 1)
	_, err = a.Sync(ctx, "bad", nil)
	if err == nil {
		t.Error("a point was listed in a damaged journal")
	}
	scribble(t, good.Disks[0].URI, 1)
	a.sync("good")
	b.testEqual(good, "")
}
