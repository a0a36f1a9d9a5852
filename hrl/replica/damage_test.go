package replica

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// flip changes a byte of a file.
func flip(t testing.TB, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(t, err)
	b[0] ^= 0x40
	_, err = f.WriteAt(b[:], at)
	must(t, err)
}

// marked are the points that are marked as damaged.
func marked(v *VM) (out []wire.PointID) {
	for _, p := range v.Points() {
		if p.Damaged != "" {
			out = append(out, p.ID)
		}
	}
	return out
}

// reopened closes the store and opens it again.
func reopened(t testing.TB, s *Store, id wire.VMID) (*Store, *VM) {
	t.Helper()
	must(t, s.Close())
	s = openStore(t, s.Dir(), Options{})
	v, err := s.VM(id)
	must(t, err)
	return s, v
}

func (p *primary) whole(v *VM, disk string, n int) (points []wire.PointID) {
	p.t.Helper()
	for range n {
		d := p.disks[disk]
		for i := range d {
			d[i] = byte(p.rng.Uint32())
		}
		info := p.point()
		must(p.t, p.send(v, info))
		points = append(points, info.ID)
	}
	return points
}

func layerOf(v *VM, id wire.PointID) string {
	st := v.current()
	l := st.Points[st.find(id)].Disks[0].Layers
	return v.layerPath(l[len(l)-1])
}

// TestLayerDamage: rot in a layer is found by reading it, and by Verify, before
// a failover relies on it; points before it are whole.
func TestLayerDamage(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	want := p.whole(v, "root", 5)
	settle(t, v)
	path := layerOf(v, want[3])
	flip(t, path, 2000)
	must(t, v.Verify(t.Context(), want[2], nil))
	read := int64(0)
	err := v.Verify(t.Context(), want[3], func(n int64) { read += n })
	var le *hrl.LayerError
	if !errors.As(err, &le) || le.Layer != path || !errors.Is(err, hrl.ErrDamaged) || read == 0 {
		t.Fatalf("%v after %d bytes", err, read)
	}
	if got := marked(v); !slices.Equal(got, want[3:]) {
		t.Fatalf("%v are marked", got)
	}
	for _, start := range []func() (*Run, error){
		func() (*Run, error) { return v.Start(want[4]) },
		func() (*Run, error) { return v.Test("try", want[3]) },
	} {
		var pe *PointError
		if _, err := start(); !errors.As(err, &pe) || !errors.Is(err, hrl.ErrDamaged) || pe.Hint() == "" {
			t.Fatalf("%v", err)
		}
	}
	s, v = reopened(t, s, p.id)
	if got := marked(v); !slices.Equal(got, want[3:]) {
		t.Fatalf("%v are marked", got)
	}
	p.checkPoint(v, want[2])
	d, err := v.OpenPoint(want[3], "root")
	must(t, err)
	if err := blockdev.ReadAt(d, make([]byte, d.Size()), 0); !errors.Is(err, hrl.ErrDamaged) || !strings.Contains(err.Error(), want[3].String()) {
		t.Fatal(err)
	}
	must(t, d.Close())

	// The newest point that is whole is not given up for ones that are not.
	must(t, v.SetKeep(1))
	settle(t, v)
	if got := ids(v.Points()); !slices.Equal(got, want[2:]) {
		t.Fatalf("%v are listed", got)
	}
	p.checkPoint(v, want[2])
	// Put right, it is found to be whole.
	flip(t, path, 2000)
	_, v = reopened(t, s, p.id)
	for _, id := range want[3:] {
		must(t, v.Verify(t.Context(), id, nil))
	}
	if got := marked(v); got != nil {
		t.Fatalf("%v are marked", got)
	}
	settle(t, v)
	if got := ids(v.Points()); !slices.Equal(got, want[4:]) {
		t.Fatalf("%v are listed", got)
	}
	p.check(v)
}

// TestLayerGone: a failover finds at once that a layer is missing, or has lost
// its header or its end.
func TestLayerGone(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, path string){
		"missing": func(t *testing.T, path string) { must(t, os.Remove(path)) },
		"short":   func(t *testing.T, path string) { must(t, os.Truncate(path, 700)) },
		"header":  func(t *testing.T, path string) { flip(t, path, 40) },
		"another": func(t *testing.T, path string) {
			other := newPrimary(t, 2, "data")
			other.id[3] = 1
			b := other.files[other.layer("data", wire.PointID{}, wire.PointID{Generation: 1, Incarnation: 1, Epoch: 1}, nil, make([]byte, 512))]
			must(t, os.WriteFile(path, b, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPrimary(t, 1, "root")
			s, v := accepted(t, p, Options{})
			want := p.whole(v, "root", 3)
			settle(t, v)
			path := layerOf(v, want[1])
			spoil(t, path)
			_, err := v.Start(want[2])
			var le *hrl.LayerError
			if !errors.As(err, &le) || le.Layer != path {
				t.Fatal(err)
			}
			if st := v.State(); st.Role != wire.RoleReplica || len(v.Runs()) != 0 {
				t.Fatalf("%+v", st)
			}
			settle(t, v)
			if got := marked(v); !slices.Equal(got, want[1:]) {
				t.Fatalf("%v are marked", got)
			}
			r, err := v.Start(want[0])
			must(t, err)
			p.same(r.Device("root"), want[0], "root", p.was[want[0]]["root"])
			must(t, r.Close())
			if name == "missing" { // also where nobody looks
				_, v = reopened(t, s, p.id)
				if got := marked(v); !slices.Equal(got, want[1:]) {
					t.Fatalf("%v are marked", got)
				}
			}
		})
	}
}

// TestBaseDamage: rot in the base is found, by reading and by Verify, marks the
// points that do not cover it, and never gets a checksum by being folded over in
// part.
func TestBaseDamage(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	want := p.whole(v, "root", 1)
	must(t, v.SetKeep(2))
	settle(t, v)
	// The second point has a part of the block, the third and last all of it.
	d := p.disks["root"]
	d[sumBlock+100]++
	second := p.point()
	must(t, p.send(v, second))
	settle(t, v)
	want = append(want, second.ID)
	_, v = reopened(t, s, p.id)
	s = v.store
	path := filepath.Join(v.dir, disksDir, "root", baseName)
	const at = sumBlock + 5000
	flip(t, path, at)
	dev, err := v.OpenPoint(want[0], "root")
	must(t, err)
	must(t, blockdev.ReadAt(dev, make([]byte, sumBlock), 0))
	err = blockdev.ReadAt(dev, make([]byte, 512), at/512*512)
	var be *BaseError
	if !errors.As(err, &be) || be.Path != path || be.Off != sumBlock || !errors.Is(err, hrl.ErrDamaged) || be.Hint() == "" {
		t.Fatal(err)
	}
	must(t, dev.Close())
	if err := v.Verify(t.Context(), want[0], nil); !errors.As(err, &be) || be.Path != path {
		t.Fatal(err)
	}
	if got := marked(v); !slices.Equal(got, want) {
		t.Fatalf("%v are marked", got)
	}
	third := p.whole(v, "root", 1)
	must(t, v.Verify(t.Context(), third[0], nil))
	d[0]++
	fourth := p.point()
	// Pinned before the keeper may retire it.
	must(t, v.Pin(second.ID, true))
	must(t, p.send(v, fourth))
	// Fold the second one into it: the block stays bad, for the second.
	settle(t, v)
	if got := v.current().Base; got != second.ID {
		t.Fatalf("the base is at %v", got)
	}
	_, v = reopened(t, s, p.id)
	if err := v.Verify(t.Context(), second.ID, nil); !errors.Is(err, hrl.ErrDamaged) {
		t.Fatalf("what was folded over in part is whole: %v", err)
	}
	must(t, v.Verify(t.Context(), third[0], nil))
	p.checkPoint(v, third[0])
	p.checkPoint(v, fourth.ID)
	must(t, v.Pin(second.ID, false))
	settle(t, v)
	if got := ids(v.Points()); !slices.Equal(got, []wire.PointID{third[0], fourth.ID}) || marked(v) != nil {
		t.Fatalf("%v are listed, %v marked", got, marked(v))
	}
	for _, id := range ids(v.Points()) {
		must(t, v.Verify(t.Context(), id, nil))
	}
	p.check(v)
}

// TestSumsDamage changes bytes of the checksums: what is read is right, or an
// error that says damage.
func TestSumsDamage(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	want := p.whole(v, "root", 1)[0]
	settle(t, v)
	path := filepath.Join(v.dir, disksDir, "root", sumsName)
	must(t, s.Close())
	whole, err := os.ReadFile(path)
	must(t, err)
	broken := 0
	for at := 0; at < len(whole); at++ {
		if at >= sumsHeadBytes && at < sumsFirst || at > sumsFirst+300 && at%sumPageBytes > 300 && at%197 != 0 {
			continue
		}
		b := bytes.Clone(whole)
		b[at] ^= 0x40
		must(t, os.WriteFile(path, b, 0o600))
		s = openStore(t, s.Dir(), Options{})
		v, err := s.VM(p.id)
		must(t, err)
		if err := v.Broken(); err != nil {
			if !errors.Is(err, hrl.ErrVersion) && !errors.Is(err, hrl.ErrDamaged) || at >= sumsHeadBytes {
				t.Fatalf("byte %d: %v", at, err)
			}
			broken++
		} else {
			d, err := v.OpenPoint(want, "root")
			must(t, err)
			got := make([]byte, d.Size())
			if err := blockdev.ReadAt(d, got, 0); err == nil && !bytes.Equal(got, p.was[want]["root"]) || err != nil && !errors.Is(err, hrl.ErrDamaged) {
				t.Fatalf("byte %d: %v", at, err)
			}
			must(t, d.Close())
		}
		must(t, s.Close())
	}
	if broken > 8 {
		t.Errorf("%d bytes of the header are fatal", broken)
	}
	// Without the last checksums of a page its blocks are not taken on faith.
	base := filepath.Join(filepath.Dir(path), baseName)
	b := bytes.Clone(whole)
	clear(b[sumsFirst+sumPageBytes:])
	must(t, os.WriteFile(path, b, 0o600))
	flip(t, base, 1000)
	s = openStore(t, s.Dir(), Options{})
	v, err = s.VM(p.id)
	must(t, err)
	var be *BaseError
	if err := v.Verify(t.Context(), want, nil); !errors.As(err, &be) || be.Path != path {
		t.Fatal(err)
	}
	must(t, s.Close())
	flip(t, base, 1000)
	// Data that has vanished from the base is no hole.
	must(t, os.WriteFile(path, whole, 0o600))
	st, err := os.Stat(base)
	must(t, err)
	must(t, os.Truncate(base, 0))
	must(t, os.Truncate(base, st.Size()))
	s = openStore(t, s.Dir(), Options{})
	v, err = s.VM(p.id)
	must(t, err)
	d, err := v.OpenPoint(want, "root")
	must(t, err)
	must(t, d.Extents(0, d.Size(), func(r blockdev.Run) bool {
		if r.Zero && r.Len >= sumBlock {
			t.Fatalf("%+v is lost, and said to be zero", r)
		}
		return true
	}))
	if err := v.Verify(t.Context(), want, nil); !errors.Is(err, hrl.ErrDamaged) {
		t.Fatal(err)
	}
	must(t, d.Close())
}

// TestDamageGoesOn: a point over a damaged one is marked from the beginning.
func TestDamageGoesOn(t *testing.T) {
	p := newPrimary(t, 1, "root")
	_, v := accepted(t, p, Options{})
	points := p.whole(v, "root", 2)
	settle(t, v)
	flip(t, layerOf(v, points[1]), 2000)
	if err := v.Verify(t.Context(), points[1], nil); !errors.Is(err, hrl.ErrDamaged) {
		t.Fatal(err)
	}
	points = append(points, p.whole(v, "root", 1)...)
	if got := marked(v); !slices.Equal(got, points[1:]) {
		t.Fatalf("%v are marked", got)
	}
}

// TestFoldFails: while nothing can be folded no point is given up, and
// afterwards it all happens at once.
func TestFoldFails(t *testing.T) {
	p := newPrimary(t, 1, "root")
	fs := newFaultFS(0, true, syscall.EIO)
	s, err := open(tempDir(t), Options{FS: hrl.OS}, fs.device)
	must(t, err)
	defer s.Close()
	o := p.offer()
	o.Keep = 1
	v, err := s.Accept(p.id, o, testSender, 0)
	must(t, err)
	p.points(v, 1)
	settle(t, v)
	fs.mu.Lock()
	fs.failAt, fs.ops = 1, 0
	fs.mu.Unlock()
	second := p.whole(v, "root", 1)
	if err := v.Settle(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	more := append(second, p.whole(v, "root", 3)...)
	if err := v.Settle(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if got := ids(v.Points()); !slices.Equal(got, more) || marked(v) != nil {
		t.Fatalf("%v are listed, %v marked", got, marked(v))
	}
	fs.calm()
	settle(t, v)
	if got := ids(v.Points()); !slices.Equal(got, more[3:]) || v.current().Base != more[3] {
		t.Fatalf("%v are listed", got)
	}
	p.check(v)
}

// TestShrinkGrow: what is cut off a base and comes back is zero, and no damage,
// also where nothing else of the block changes.
func TestShrinkGrow(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	must(t, v.SetKeep(1))
	p.whole(v, "root", 1)
	settle(t, v)
	for _, size := range []int{sumBlock + 512, 3 * sumBlock, sumBlock, 0, sumBlock - 512, 5 * sumBlock} {
		d := p.disks["root"]
		p.disks["root"] = append(slices.Clone(d[:min(size, len(d))]), make([]byte, max(0, size-len(d)))...)
		old, from, to := d, p.at, p.at
		to.Epoch++
		info := wire.PointInfo{ID: to, Parent: from, ParentTime: p.times[from], Time: p.times[from].Add(time.Second), Kind: wire.KindCrash}
		layer := p.layer("root", from, to, old[:min(size, len(old))], p.disks["root"])
		info.Disks = []wire.PointDisk{{Disk: wire.Disk{Name: "root", Size: int64(size)}, Layers: []string{layer}}}
		p.at, p.times[to], p.was[to] = to, info.Time, map[string][]byte{"root": p.disks["root"]}
		must(t, p.send(v, info))
		settle(t, v)
		s, v = reopened(t, s, p.id)
		if v.current().Base != to {
			t.Fatal("it was not folded")
		}
		must(t, v.Verify(t.Context(), to, nil))
		p.checkPoint(v, to)
	}
}

// TestJournalBroken: a VM whose journal is damaged is listed as broken, keeps
// what it has, and stands in nobody's way.
func TestJournalBroken(t *testing.T) {
	p, other := newPrimary(t, 1, "root"), newPrimary(t, 2, "root")
	other.name = "other"
	s, v := accepted(t, p, Options{})
	p.points(v, 2)
	w, err := s.Accept(other.id, other.offer(), testSender, 0)
	must(t, err)
	other.points(w, 2)
	settle(t, v)
	path := filepath.Join(v.dir, journalName)
	must(t, s.Close())
	flip(t, path, journalFirst+800)
	s = openStore(t, s.Dir(), Options{})
	if n := len(s.VMs()); n != 2 {
		t.Fatalf("%d VMs", n)
	}
	v, err = s.VM(p.id)
	must(t, err)
	var je *JournalError
	if !errors.As(v.Broken(), &je) || je.Path != path {
		t.Fatal(v.Broken())
	}
	if named, err := s.Named("web"); err != nil || named != v {
		t.Fatalf("%v, %v", named, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for name, err := range map[string]error{
		"accept":  func() error { _, err := s.Accept(p.id, p.offer(), testSender, 0); return err }(),
		"list":    func() error { _, err := v.List(p.point()); return err }(),
		"stage":   func() error { _, err := v.StageLayer(digestOf("a"), 1000, 0, bytes.NewReader(nil)); return err }(),
		"start":   func() error { _, err := v.Start(p.at); return err }(),
		"open":    func() error { _, err := v.OpenPoint(p.at, "root"); return err }(),
		"cancel":  func() error { _, err := v.Cancel(); return err }(),
		"resolve": func() error { _, err := v.Resolve(""); return err }(),
		"settle":  v.Settle(ctx),
		"discard": v.Discard(nil),
		"commit":  v.Commit(),
		"pin":     v.Pin(p.at, true),
		"remove":  v.Remove(p.at),
		"keep":    v.SetKeep(3),
		"verify":  v.Verify(ctx, p.at, nil),
	} {
		if !errors.Is(err, hrl.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if v.Points() == nil || v.Runs() != nil || len(v.State().Layers) != 0 || v.Used() != 0 && v.Used() < 0 {
		t.Error("a broken VM tells something")
	}
	w, err = s.VM(other.id)
	must(t, err)
	other.check(w)
	other.points(w, 1)
	must(t, v.Erase())
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	p.at, p.was = wire.PointID{}, map[wire.PointID]map[string][]byte{}
	v, err = s.Accept(p.id, p.offer(), testSender, 0)
	must(t, err)
	p.points(v, 1)
	p.check(v)
}
