package replica

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"afterimage/blockdev/owner"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

func TestStoreLocked(t *testing.T) {
	dir := filepath.Join(tempDir(t), "a", "b")
	s := openStore(t, dir, Options{})
	if _, err := Open(dir, Options{}); !errors.Is(err, hrl.ErrLocked) {
		t.Fatal(err)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 || s.Dir() != dir {
		t.Fatalf("%v, %v", st, err)
	}
	must(t, s.Close())
	must(t, s.Close())
	if _, err := s.Accept(wire.VMID{1}, newPrimary(t, 1, "root").offer(), testSender, 0); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	must(t, openStore(t, dir, Options{}).Close())
}

func TestAccept(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	base := filepath.Join(v.dir, disksDir, "root", baseName)
	var owned *owner.OwnedError
	if err := owner.Check(base, s.Dir()); !errors.As(err, &owned) || owned.Role != owner.RoleReplica || owned.Name != "web" {
		t.Fatal(err)
	}
	if v.Keep() != keepDefault || v.Sender() != testSender || v.Name() != "web" || v.ID() != p.id || v.Broken() != nil {
		t.Fatalf("%d, %s, %s", v.Keep(), v.Sender(), v.Name())
	}
	p.points(v, 1)
	st := v.State()
	if st.Role != wire.RoleReplica || st.Generation != 1 || st.Term != 1 || st.Newest != p.at || !st.FailedOverTo.IsZero() || st.Layers == nil {
		t.Fatalf("%+v", st)
	}
	offer := func(change func(o *wire.Offer)) wire.Offer {
		o := p.offer()
		change(&o)
		return o
	}
	for _, c := range []struct {
		name   string
		o      wire.Offer
		sender string
		want   error
	}{
		{"the same again", p.offer(), testSender, nil},
		{"another host", p.offer(), "beta", ErrSender},
		{"impossible", offer(func(o *wire.Offer) { o.Generation = 0 }), testSender, ErrBad},
		{"nobody", p.offer(), "", ErrBad},
		{"another host, higher term", offer(func(o *wire.Offer) { o.Term = 3 }), "beta", nil},
		{"the first host, lower term", offer(func(o *wire.Offer) { o.Term = 2 }), testSender, ErrSender},
		{"lower term", offer(func(o *wire.Offer) { o.Term = 2 }), "beta", ErrTerm},
		{"a new disk and name", offer(func(o *wire.Offer) {
			o.Term, o.Name, o.Keep, o.Generation = 3, "www", 7, 5
			o.Disks = append(o.Disks, wire.Disk{Name: "more", Size: 1024})
		}), "beta", nil},
		{"a disk less", offer(func(o *wire.Offer) { o.Term, o.Name = 3, "www" }), "beta", nil},
	} {
		w, err := s.Accept(p.id, c.o, c.sender, 77)
		if !errors.Is(err, c.want) || err == nil && w != v {
			t.Fatalf("%s: %v", c.name, err)
		}
	}
	check := func(v *VM) {
		t.Helper()
		if v.Keep() != 7 || v.Sender() != "beta" || v.Name() != "www" || v.Quota() != 77 || v.State().Generation != 5 || len(v.Disks()) != 2 {
			t.Fatalf("%d, %s, %s, %d, %v", v.Keep(), v.Sender(), v.Name(), v.Quota(), v.Disks())
		}
		if err := owner.Check(base, ""); !errors.As(err, &owned) || owned.Name != "www" {
			t.Fatal(err)
		}
		p.check(v)
	}
	check(v)
	s, v = reopened(t, s, p.id)
	check(v)
	if _, err := s.VM(wire.VMID{9}); !errors.Is(err, ErrNoVM) {
		t.Fatal(err)
	}
	if _, err := s.Named("web"); !errors.Is(err, ErrNoVM) {
		t.Fatal(err)
	}
	other := newPrimary(t, 2, "root")
	other.name = "www"
	if _, err := s.Accept(other.id, other.offer(), testSender, 0); !errors.Is(err, ErrExists) {
		t.Fatal(err)
	}
}

// TestErase: a VM goes with all its files, once nothing holds it.
func TestErase(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	at := p.points(v, 2)[0]
	d, err := v.OpenPoint(at, "root")
	must(t, err)
	if err := v.Erase(); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	must(t, d.Close())
	_, err = v.Test("try", at)
	must(t, err)
	if err := v.Erase(); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	must(t, v.EndTest("try"))
	p.check(v)
	must(t, v.Erase())
	if _, err := v.Resolve(""); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	names, err := hrl.OS.ReadDir(s.Dir())
	if err != nil || !slices.Equal(names, []string{lockName}) || len(s.VMs()) != 0 {
		t.Fatalf("%v, %v", names, err)
	}
	// What a crash in the middle leaves is removed.
	for _, suffix := range []string{".erased", ".new"} {
		must(t, os.MkdirAll(filepath.Join(s.Dir(), p.id.String()+suffix, "x"), 0o700))
	}
	must(t, s.Close())
	s = openStore(t, s.Dir(), Options{})
	if names, err := hrl.OS.ReadDir(s.Dir()); err != nil || len(names) != 1 {
		t.Fatalf("%v, %v", names, err)
	}
}

func TestResolve(t *testing.T) {
	p := newPrimary(t, 1, "root")
	_, v := accepted(t, p, Options{})
	if _, err := v.Resolve("latest"); !errors.Is(err, ErrNoPoint) {
		t.Fatal(err)
	}
	points := p.points(v, 2)
	for s, want := range map[string]wire.PointID{"": points[1], "latest": points[1], points[0].String(): points[0]} {
		if got, err := v.Resolve(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"none", "9.9.9", "x"} {
		if _, err := v.Resolve(s); !errors.Is(err, ErrNoPoint) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestPinRemove: what is pinned, open or the newest is not removed.
func TestPinRemove(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	points := p.points(v, 4)
	must(t, v.Pin(points[1], true))
	must(t, v.Pin(points[1], true))
	d, err := v.OpenPoint(points[2], "root")
	must(t, err)
	for i, want := range []error{nil, ErrInUse, ErrInUse, ErrInUse} {
		if err := v.Remove(points[i]); !errors.Is(err, want) {
			t.Errorf("point %d: %v", i, err)
		}
	}
	must(t, d.Close())
	if err := v.Remove(points[0]); !errors.Is(err, ErrNoPoint) {
		t.Fatal(err)
	}
	if _, err := v.OpenPoint(points[0], "root"); !errors.Is(err, ErrNoPoint) {
		t.Fatal(err)
	}
	if _, err := v.OpenPoint(points[1], "none"); !errors.Is(err, ErrNoPoint) {
		t.Fatal(err)
	}
	if err := v.Pin(points[0], true); !errors.Is(err, ErrNoPoint) {
		t.Fatal(err)
	}
	if err := v.SetKeep(0); err == nil {
		t.Fatal("no point is kept")
	}
	must(t, v.SetKeep(1))
	settle(t, v)
	s, v = reopened(t, s, p.id)
	info := v.Points()
	if !slices.Equal(ids(info), points[1:]) || !info[0].Pinned || info[1].Pinned {
		t.Fatalf("%+v", info)
	}
	// What is removed in the middle is needed by what comes after it.
	must(t, v.Remove(points[2]))
	p.check(v)
	must(t, v.Pin(points[1], false))
	settle(t, v)
	_, v = reopened(t, s, p.id)
	if got := ids(v.Points()); !slices.Equal(got, points[3:]) {
		t.Fatalf("%v", got)
	}
	names, err := hrl.OS.ReadDir(filepath.Join(v.dir, layersDir))
	if err != nil || len(names) != 0 {
		t.Fatalf("%v are left, %v", names, err)
	}
	p.check(v)
}

// TestVersions: what another version has written is refused, and left alone.
func TestVersions(t *testing.T) {
	for _, file := range []string{journalName, filepath.Join(disksDir, "root", sumsName)} {
		p := newPrimary(t, 1, "root")
		s, v := accepted(t, p, Options{})
		path := filepath.Join(v.dir, file)
		must(t, s.Close())
		flip(t, path, 7)
		before, err := os.ReadFile(path)
		must(t, err)
		s = openStore(t, s.Dir(), Options{})
		v, err = s.VM(p.id)
		must(t, err)
		if !errors.Is(v.Broken(), hrl.ErrVersion) {
			t.Errorf("%s: %v", file, v.Broken())
		}
		must(t, s.Close())
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s was changed: %v", file, err)
		}
	}
}
