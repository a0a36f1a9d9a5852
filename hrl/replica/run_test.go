package replica

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
	"afterimage/hrl/wire"
)

func writeRun(t testing.TB, r *Run, want []byte, off int, p []byte) {
	t.Helper()
	must(t, blockdev.WriteAt(r.Device("root"), p, int64(off)))
	must(t, blockdev.Flush(r.Device("root")))
	copy(want[off:], p)
}

// TestFailover is the life of an unplanned failover: it stands over restarts,
// what was written is there, cancelling keeps it as a branch, and committing is
// final.
func TestFailover(t *testing.T) {
	p := newPrimary(t, 1, "root", "data")
	s, v := accepted(t, p, Options{})
	points := p.points(v, 4)
	p.disks["root"][0]++
	half := p.point() // half-sent layers stay as they are
	l := half.Disks[0].Layers
	if len(l) == 0 {
		t.Fatal("no layer")
	}
	body := p.files[l[0]]
	_, err := v.StageLayer(l[0], int64(len(body)), 0, bytes.NewReader(body[:100]))
	must(t, err)

	r, err := v.Start(points[2])
	must(t, err)
	if r.Name != "web" || r.Test || r.Point != points[2] || r.Generation <= points[3].Generation || !slices.Equal(r.Disks(), p.order) || r.Device("none") != nil {
		t.Fatalf("%+v", r)
	}
	if st := v.State(); st.Role != wire.RoleFailedOver || st.FailedOverTo != points[2] || st.Generation != r.Generation {
		t.Fatalf("%+v", st)
	}
	want := bytes.Clone(p.was[points[2]]["root"])
	writeRun(t, r, want, 8192, bytes.Repeat([]byte{7}, 1024))
	refused := func() {
		t.Helper()
		var re *RoleError
		for name, err := range map[string]error{
			"list": func() error { _, err := v.List(half); return err }(),
			"stage": func() error {
				_, err := v.StageLayer(l[0], int64(len(body)), 100, bytes.NewReader(body[100:]))
				return err
			}(),
			"discard": v.Discard(nil),
			"start":   func() error { _, err := v.Start(points[3]); return err }(),
			"erase":   v.Erase(),
		} {
			if !errors.As(err, &re) || !errors.Is(err, ErrRole) || re.Hint() == "" {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	refused()
	if _, err := s.Accept(p.id, p.offer(), testSender, 0); err != nil {
		t.Fatalf("the old primary must hear of it: %v", err)
	}
	if err := owner.Check(filepath.Join(v.dir, runsDir, "failover-2", "root.top"), ""); err == nil {
		t.Error("anybody may write to the top")
	}
	// After a restart it stands; its content is there.
	s, v = reopened(t, s, p.id)
	refused()
	runs := v.Runs()
	if len(runs) != 1 || runs[0].Err() != nil || runs[0].Generation != r.Generation || !runs[0].Started.Equal(r.Started) {
		t.Fatalf("%+v", runs)
	}
	if again := v.Runs(); again[0] != runs[0] {
		t.Fatal("a run is opened twice")
	}
	p.same(runs[0].Device("root"), points[2], "root", want)
	p.same(runs[0].Device("data"), points[2], "data", p.was[points[2]]["data"])
	writeRun(t, runs[0], want, 0, bytes.Repeat([]byte{9}, 512))
	must(t, runs[0].Close())
	if runs[0].Device("root") != nil {
		t.Fatal("a closed run has a device")
	}
	p.same(v.Runs()[0].Device("root"), points[2], "root", want)
	must(t, v.SetKeep(1))
	settle(t, v)
	if got := ids(v.Points()); !slices.Contains(got, points[2]) || !slices.Contains(got, points[3]) {
		t.Fatalf("%v are left", got)
	}

	branch, err := v.Cancel()
	must(t, err)
	if branch != "branch-1" || v.State().Role != wire.RoleReplica || len(v.Runs()) != 0 {
		t.Fatalf("%s, %+v", branch, v.State())
	}
	if _, err := v.Cancel(); !errors.Is(err, ErrRole) {
		t.Fatal(err)
	}
	must(t, p.send(v, half))
	more := p.points(v, 3)
	settle(t, v)
	s, v = reopened(t, s, p.id)
	checkBranch := func(name string, want []byte) {
		t.Helper()
		b := v.Branches()
		i := slices.IndexFunc(b, func(b Branch) bool { return b.Name == name })
		if i < 0 || b[i].Generation == 0 || !slices.Equal(b[i].Disks, p.order) {
			t.Fatalf("%+v", b)
		}
		d, err := v.OpenBranch(name, "root")
		must(t, err)
		p.same(d, b[i].Point, "root", want)
		if err := blockdev.WriteAt(d, make([]byte, 512), 0); !errors.Is(err, blockdev.ErrReadOnly) {
			t.Fatal(err)
		}
		must(t, errors.Join(blockdev.Flush(d), d.Close()))
	}
	checkBranch(branch, want)
	if err := v.Erase(); !errors.Is(err, ErrInUse) {
		t.Fatalf("erased with a branch: %v", err)
	}
	if err := v.Remove(points[2]); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}

	// Once more, for good.
	newest := more[len(more)-1]
	r2, err := v.Start(newest)
	must(t, err)
	if r2.Generation <= r.Generation {
		t.Fatalf("generation %d again", r2.Generation)
	}
	want2 := bytes.Clone(p.was[newest]["root"])
	writeRun(t, r2, want2, 4096, bytes.Repeat([]byte{3}, 4096))
	must(t, v.Commit())
	if v.State().Role != wire.RolePrimary {
		t.Fatalf("%+v", v.State())
	}
	for name, err := range map[string]error{"commit": v.Commit(), "cancel": func() error { _, err := v.Cancel(); return err }()} {
		if !errors.Is(err, ErrRole) {
			t.Errorf("%s after commit: %v", name, err)
		}
	}
	_, v = reopened(t, s, p.id)
	p.same(v.Runs()[0].Device("root"), newest, "root", want2)
	checkBranch(branch, want)
	must(t, v.RemoveBranch(branch))
	if err := v.RemoveBranch(branch); !errors.Is(err, ErrNoRun) {
		t.Fatal(err)
	}
	settle(t, v)
	if got := ids(v.Points()); !slices.Equal(got, []wire.PointID{newest}) {
		t.Fatalf("%v are left", got)
	}
	p.same(v.Runs()[0].Device("root"), newest, "root", want2)
	if _, err := os.Stat(filepath.Join(v.dir, runsDir, "failover-2")); !os.IsNotExist(err) {
		t.Fatalf("the branch is there still: %v", err)
	}
	if err := v.Erase(); !errors.Is(err, ErrRole) {
		t.Fatalf("the disk of a running VM was erased: %v", err)
	}
}

// TestTestFailover: any number at once, while replication goes on, and nothing is
// left of them.
func TestTestFailover(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	points := p.points(v, 2)
	a, err := v.Test("try-a", points[0])
	must(t, err)
	b, err := v.Test("try-b", points[1])
	must(t, err)
	if !a.Test || a.Generation != 0 {
		t.Fatalf("%+v", a)
	}
	wantA, wantB := bytes.Clone(p.was[points[0]]["root"]), bytes.Clone(p.was[points[1]]["root"])
	writeRun(t, a, wantA, 0, bytes.Repeat([]byte{1}, 512))
	writeRun(t, b, wantB, 0, bytes.Repeat([]byte{2}, 512))
	for name, want := range map[string]error{"try-a": ErrExists, "web": ErrExists, "../x": ErrBad} {
		if _, err := v.Test(name, points[1]); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := newPrimary(t, 2, "root")
	for name, want := range map[string]error{"try-a": ErrExists, "web": ErrExists, "other": nil} {
		other.name = name
		if _, err := s.Accept(other.id, other.offer(), testSender, 0); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := v.Test("other", points[1]); !errors.Is(err, ErrExists) {
		t.Fatal(err)
	}
	must(t, v.SetKeep(1))
	more := p.points(v, 4)
	settle(t, v)
	s, v = reopened(t, s, p.id)
	if n := len(v.Runs()); n != 2 {
		t.Fatalf("%d runs", n)
	}
	for _, r := range v.Runs() {
		want := wantA
		if r.Name == "try-b" {
			want = wantB
		}
		p.same(r.Device("root"), r.Point, "root", want)
	}
	if err := v.EndTest("web"); !errors.Is(err, ErrNoRun) {
		t.Fatal(err)
	}
	must(t, v.EndTest("try-a"))
	must(t, v.EndTest("try-b"))
	if err := v.EndTest("try-b"); !errors.Is(err, ErrNoRun) {
		t.Fatal(err)
	}
	settle(t, v)
	if got := ids(v.Points()); !slices.Equal(got, more[3:]) {
		t.Fatalf("%v are left", got)
	}
	names, err := os.ReadDir(filepath.Join(v.dir, runsDir))
	if err != nil || len(names) != 0 {
		t.Fatalf("%v, %v", names, err)
	}
	must(t, s.Close())
}

// TestRunsLeftOver: a test's top that nothing names is removed, what a guest may
// have written in a failover never.
func TestRunsLeftOver(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	at := p.points(v, 1)[0]
	r, err := v.Start(at)
	must(t, err)
	want := bytes.Clone(p.was[at]["root"])
	writeRun(t, r, want, 0, bytes.Repeat([]byte{5}, 512))
	must(t, r.Close())
	_, err = v.Cancel()
	must(t, err)
	runs := filepath.Join(v.dir, runsDir)
	must(t, os.CopyFS(filepath.Join(runs, "test-x"), os.DirFS(filepath.Join(runs, "failover-2"))))
	must(t, os.CopyFS(filepath.Join(runs, "failover-3"), os.DirFS(filepath.Join(runs, "failover-2"))))
	must(t, os.Mkdir(filepath.Join(runs, "failover-4"), 0o700))
	s, v = reopened(t, s, p.id)
	names, err := s.o.FS.ReadDir(runs)
	if err != nil || !slices.Equal(names, []string{"failover-2", "failover-3"}) {
		t.Fatalf("%v, %v", names, err)
	}
	// Nor is it written over, or in the way.
	if r, err = v.Start(at); err != nil || r.Generation != 4 {
		t.Fatalf("%+v, %v", r, err)
	}
	if written, err := topWritten(s.o.FS, filepath.Join(runs, "failover-3", "root.top.map")); !written || err != nil {
		t.Fatalf("%v, %v", written, err)
	}
}

// TestLifeEnds: after a power cut a top has what was flushed.
func TestLifeEnds(t *testing.T) {
	p := newPrimary(t, 1, "root")
	boot := byte(1)
	o := Options{Life: func(string) ([32]byte, error) { return [32]byte{boot}, nil }}
	s, v := accepted(t, p, o)
	at := p.points(v, 1)[0]
	r, err := v.Start(at)
	must(t, err)
	want := bytes.Clone(p.was[at]["root"])
	writeRun(t, r, want, 4096, bytes.Repeat([]byte{5}, 4096))
	must(t, blockdev.WriteAt(r.Device("root"), bytes.Repeat([]byte{6}, 4096), 65536))
	must(t, s.Close())
	boot++
	s = openStore(t, s.Dir(), o)
	v, err = s.VM(p.id)
	must(t, err)
	p.same(v.Runs()[0].Device("root"), at, "root", want)
}
