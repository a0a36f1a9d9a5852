package replica

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// oneLayer is a point of one layer that is not sent, and the layer.
func oneLayer(t testing.TB, p *primary) (info wire.PointInfo, digest string, body []byte) {
	t.Helper()
	for {
		for i := range p.disks["root"] {
			p.disks["root"][i] = byte(p.rng.Uint32())
		}
		at := p.at
		if info = p.point(); len(info.Disks[0].Layers) == 1 {
			digest = info.Disks[0].Layers[0]
			return info, digest, p.files[digest]
		}
		p.at = at
	}
}

// TestStage sends a layer in pieces that break off, over restarts.
func TestStage(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	info, digest, body := oneLayer(t, p)
	size := int64(len(body))
	stage := func(off int64, r io.Reader) (wire.LayerState, error) { return v.StageLayer(digest, size, off, r) }
	var oe *OffsetError
	if _, err := stage(100, bytes.NewReader(body[100:])); !errors.As(err, &oe) || oe.Synced != 0 || !errors.Is(err, ErrOffset) || oe.Hint() == "" {
		t.Fatal(err)
	}
	st, err := stage(0, bytes.NewReader(body[:1000]))
	if err != nil || st.Synced != 1000 || st.Complete {
		t.Fatalf("%+v, %v", st, err)
	}
	broke := errors.New("the line broke")
	st, err = stage(1000, io.MultiReader(bytes.NewReader(body[1000:5000]), iotest.ErrReader(broke)))
	if !errors.Is(err, broke) || st.Synced != 5000 {
		t.Fatalf("%+v, %v", st, err)
	}
	if st, err = stage(0, bytes.NewReader(body)); !errors.As(err, &oe) || oe.Synced != 5000 || st.Synced != 5000 {
		t.Fatalf("%+v, %v", st, err)
	}
	if _, err := v.StageLayer(digest, size+8, 5000, bytes.NewReader(body)); !errors.Is(err, ErrBad) {
		t.Fatal(err)
	}
	if _, err := v.List(info); !errors.Is(err, ErrBad) {
		t.Fatalf("half a layer is listed: %v", err)
	}
	s, v = reopened(t, s, p.id)
	if l := v.State().Layers; len(l) != 1 || l[0] != (wire.LayerState{Digest: digest, Synced: 5000}) {
		t.Fatalf("%+v", l)
	}
	// What is behind the durable part counts for nothing (RULES H4).
	part := v.stagingPath(digest, partSuffix)
	f, err := os.OpenFile(part, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(make([]byte, 9000), 5000)
	must(t, errors.Join(err, f.Close()))
	_, v = reopened(t, s, p.id)
	s = v.store
	if st, err = stage(5000, bytes.NewReader(body[5000:])); err != nil || !st.Complete || st.Synced != size {
		t.Fatalf("%+v, %v", st, err)
	}
	for range 2 { // asked again it says the same
		if st, err = stage(7, bytes.NewReader(nil)); err != nil || !st.Complete {
			t.Fatalf("%+v, %v", st, err)
		}
		_, v = reopened(t, s, p.id)
		s = v.store
	}
	names, err := hrl.OS.ReadDir(filepath.Join(v.dir, stagingDir))
	if err != nil || len(names) != 0 {
		t.Fatalf("%v are left, %v", names, err)
	}
	first, err := v.List(info)
	must(t, err)
	if first.Received.IsZero() || first.Bytes != size {
		t.Fatalf("%+v", first)
	}
	if st, err = stage(0, bytes.NewReader(nil)); err != nil || !st.Complete {
		t.Fatalf("of a listed point: %+v, %v", st, err)
	}
	again, err := v.List(info)
	if err != nil || !again.Received.Equal(first.Received) {
		t.Fatalf("%+v, %v", again, err)
	}
	p.check(v)
}

// TestStageDamaged: a layer that is not what it is called, or is of somebody
// else, is forgotten, and can be sent again.
func TestStageDamaged(t *testing.T) {
	p := newPrimary(t, 1, "root")
	_, v := accepted(t, p, Options{})
	_, digest, body := oneLayer(t, p)
	stranger := newPrimary(t, 2, "root")
	_, theirs, their := oneLayer(t, stranger)
	stranger.id, stranger.order = p.id, nil
	stranger.addDisk("data", 4096)
	other := stranger.layer("data", wire.PointID{}, wire.PointID{Generation: 1, Incarnation: 1, Epoch: 1}, nil, make([]byte, 4096))
	bad := bytes.Clone(body)
	bad[len(bad)/2] ^= 1
	junk := bytes.Repeat([]byte("junk"), 1000)
	sum := sha256.Sum256(junk)
	for name, c := range map[string]struct {
		digest string
		body   []byte
		want   error
	}{
		"a byte is wrong":      {digest, bad, hrl.ErrDamaged},
		"another VM's":         {theirs, their, ErrBad},
		"another disk's":       {other, stranger.files[other], ErrBad},
		"no layer":             {hex.EncodeToString(sum[:]), junk, hrl.ErrDamaged},
		"too short":            {digest, body[:100], hrl.ErrDamaged},
		"a whole one too long": {digest, append(bytes.Clone(body), 0), hrl.ErrDamaged},
	} {
		size := int64(len(c.body))
		if st, err := v.StageLayer(c.digest, size, 0, bytes.NewReader(c.body)); !errors.Is(err, c.want) || st.Complete || st.Synced != 0 {
			t.Errorf("%s: %+v, %v", name, st, err)
		}
		if l := v.State().Layers; len(l) != 0 {
			t.Errorf("%s: %+v", name, l)
		}
		for _, dir := range []string{stagingDir, layersDir} {
			if names, err := hrl.OS.ReadDir(filepath.Join(v.dir, dir)); err != nil || len(names) != 0 {
				t.Errorf("%s: %v are left, %v", name, names, err)
			}
		}
	}
	for name, call := range map[string]func() error{
		"no digest": func() error { _, err := v.StageLayer("../../etc/passwd", 1000, 0, bytes.NewReader(nil)); return err },
		"empty":     func() error { _, err := v.StageLayer(digest, 0, 0, bytes.NewReader(nil)); return err },
		"huge":      func() error { _, err := v.StageLayer(digest, 1<<60, 0, bytes.NewReader(nil)); return err },
		"negative":  func() error { _, err := v.StageLayer(digest, 1000, -1, bytes.NewReader(nil)); return err },
		"behind":    func() error { _, err := v.StageLayer(digest, 1000, 1001, bytes.NewReader(nil)); return err },
		"more": func() error {
			_, err := v.StageLayer(digest, int64(len(body)), 0, bytes.NewReader(append(bytes.Clone(body), 0)))
			return err
		},
	} {
		if err := call(); !errors.Is(err, ErrBad) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, v.Discard(nil))
	must(t, p.put(v, digest))
}

// TestStageBusy: two cannot send the same layer at once.
func TestStageBusy(t *testing.T) {
	p := newPrimary(t, 1, "root")
	_, v := accepted(t, p, Options{})
	_, digest, body := oneLayer(t, p)
	r, w := io.Pipe()
	done := make(chan error)
	go func() {
		_, err := v.StageLayer(digest, int64(len(body)), 0, r)
		done <- err
	}()
	_, err := w.Write(body[:1])
	must(t, err)
	if _, err := v.StageLayer(digest, int64(len(body)), 0, bytes.NewReader(body)); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	if err := v.Erase(); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	must(t, v.Discard(nil)) // it stays
	_, err = w.Write(body[1:])
	must(t, errors.Join(err, w.Close(), <-done))
	if l := v.State().Layers; len(l) != 1 || !l[0].Complete {
		t.Fatalf("%+v", l)
	}
	must(t, v.Discard([]string{digest}))
	if l := v.State().Layers; len(l) != 1 {
		t.Fatalf("%+v", l)
	}
	must(t, v.Discard([]string{digestOf("a")}))
	if names, err := hrl.OS.ReadDir(filepath.Join(v.dir, layersDir)); err != nil || len(names) != 0 || len(v.State().Layers) != 0 {
		t.Fatalf("%v, %v", names, err)
	}
}

// TestQuota: what does not fit is refused with what is missing, before it comes.
func TestQuota(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	info, digest, body := oneLayer(t, p)
	size := int64(len(body))
	accept := func(quota int64) {
		t.Helper()
		_, err := s.Accept(p.id, p.offer(), testSender, quota)
		must(t, err)
	}
	used := v.Used()
	accept(used + size - 1)
	var re *RoomError
	_, err := v.StageLayer(digest, size, 0, bytes.NewReader(body))
	if !errors.As(err, &re) || !errors.Is(err, ErrNoRoom) || re.Missing != 1 || !strings.Contains(err.Error(), "missing") {
		t.Fatal(err)
	}
	accept(used + size)
	_, err = v.StageLayer(digest, size, 0, bytes.NewReader(body[:10]))
	must(t, err)
	if got := v.Used(); got != used+size {
		t.Fatalf("%d bytes are used by a layer of %d that was announced", got-used, size)
	}
	must(t, p.put(v, digest))
	_, err = v.List(info)
	must(t, err)
	settle(t, v)
	if got := v.Used(); got < size/2 || got > 2*size {
		t.Fatalf("%d bytes are used after folding %d", got, size)
	}
}

// TestNoRoom: a full disk is told apart, and what comes later is taken.
func TestNoRoom(t *testing.T) {
	p := newPrimary(t, 1, "root")
	full := newFaultFS(0, true, syscall.ENOSPC)
	_, v := accepted(t, p, Options{FS: full})
	info, digest, body := oneLayer(t, p)
	full.mu.Lock()
	full.failAt, full.ops = 1, 0
	full.mu.Unlock()
	if _, err := v.StageLayer(digest, int64(len(body)), 0, bytes.NewReader(body)); !errors.Is(err, ErrNoRoom) {
		t.Fatal(err)
	}
	if err := v.Pin(info.ID, true); !errors.Is(err, ErrNoPoint) {
		t.Fatal(err)
	}
	if err := v.SetKeep(3); !errors.Is(err, ErrNoRoom) {
		t.Fatal(err)
	}
	full.calm()
	must(t, p.send(v, info))
	must(t, v.SetKeep(2))
	p.check(v)
}

// TestListRefuses: a point whose layers do not fit is not listed.
func TestListRefuses(t *testing.T) {
	p := newPrimary(t, 1, "root", "data")
	_, v := accepted(t, p, Options{})
	first := p.points(v, 2)[1]
	at := p.at
	info, _, _ := oneLayer(t, p)
	next := info.ID
	other := next
	other.Epoch += 10
	now := p.disks["root"]
	var pe *ParentError
	for name, c := range map[string]struct {
		change func(i *wire.PointInfo)
		want   error
	}{
		"parent":           {func(i *wire.PointInfo) { i.Parent = wire.PointID{} }, ErrParent},
		"parent's time":    {func(i *wire.PointInfo) { i.ParentTime = i.Time }, ErrParent},
		"before":           {func(i *wire.PointInfo) { i.ID = at; i.Parent = p.was0(at) }, ErrExists},
		"another position": {func(i *wire.PointInfo) { i.ID = other }, ErrBad},
		"another generation": {func(i *wire.PointInfo) {
			i.ID = wire.PointID{Generation: next.Generation + 1, Incarnation: next.Incarnation, Epoch: next.Epoch}
		}, ErrBad},
		"another size":    {func(i *wire.PointInfo) { i.Disks[0].Size += 512 }, ErrBad},
		"size, no layer":  {func(i *wire.PointInfo) { i.Disks[1].Layers, i.Disks[1].Size = nil, i.Disks[1].Size+512 }, ErrBad},
		"a disk is gone":  {func(i *wire.PointInfo) { i.Disks = i.Disks[:1] }, ErrBad},
		"not offered":     {func(i *wire.PointInfo) { i.Disks = append(i.Disks, wire.PointDisk{Disk: wire.Disk{Name: "new"}}) }, ErrBad},
		"of another disk": {func(i *wire.PointInfo) { i.Disks[1].Layers = i.Disks[0].Layers; i.Disks[0].Layers = nil }, ErrBad},
		"twice":           {func(i *wire.PointInfo) { i.Disks[0].Layers = append(i.Disks[0].Layers, i.Disks[0].Layers[0]) }, ErrBad},
		"missing":         {func(i *wire.PointInfo) { i.Disks[0].Layers = []string{digestOf("a")} }, ErrBad},
		"kind":            {func(i *wire.PointInfo) { i.Kind = "perfect" }, ErrBad},
		"leads elsewhere": {func(i *wire.PointInfo) { i.Disks[0].Layers = []string{p.layer("root", at, other, now, now)} }, ErrBad},
		"comes from elsewhere": {func(i *wire.PointInfo) {
			from := wire.PointID{Generation: 1, Incarnation: 1, Epoch: 1}
			if from == at {
				from = wire.PointID{}
			}
			i.Disks[0].Layers = []string{p.layer("root", from, next, now, now)}
		}, ErrBad},
	} {
		bad := (&point{PointInfo: info}).info()
		c.change(&bad)
		for _, d := range bad.Disks {
			for _, l := range d.Layers {
				if p.files[l] != nil {
					_ = p.put(v, l)
				}
			}
		}
		if _, err := v.List(bad); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		} else if c.want == ErrParent && (!errors.As(err, &pe) || pe.Newest != first || pe.Hint() == "") {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, p.send(v, info))
	twice := (&point{PointInfo: info}).info()
	twice.Kind = wire.KindApp
	if _, err := v.List(twice); !errors.Is(err, ErrExists) {
		t.Fatal(err)
	}
	p.check(v)
}

// was0 is some point other than id, or zero.
func (p *primary) was0(id wire.PointID) wire.PointID {
	for at := range p.was {
		if at.Before(id) {
			return at
		}
	}
	return wire.PointID{}
}

func TestStagedLen(t *testing.T) {
	b := append((&stagedLen{3, 1 << 40, 12345}).encode(), (&stagedLen{4, 1 << 40, 99999}).encode()...)
	if !bytes.Equal(b, golden(t, "len", b)) {
		t.Error("the format was changed: raise lenVersion")
	}
	for at := range lenSlotBytes {
		bad := bytes.Clone(b[:lenSlotBytes])
		bad[at] ^= 1
		var l stagedLen
		if l.decode(bad) {
			t.Errorf("byte %d does not matter", at)
		}
	}
	path := filepath.Join(tempDir(t), "len")
	f, err := hrl.OS.Create(path)
	must(t, err)
	defer f.Close()
	if _, ok, err := readLen(hrl.OS, path); ok || err != nil {
		t.Fatalf("%v, %v", ok, err)
	}
	for n := uint64(1); n < 6; n++ {
		want := stagedLen{n, 1000, int64(100 * n)}
		must(t, writeLen(f, want))
		if got, ok, err := readLen(hrl.OS, path); !ok || err != nil || got != want {
			t.Fatalf("%+v, %v, %v", got, ok, err)
		}
		// The next write is torn.
		half := want
		half.number++
		_, err = f.WriteAt(half.encode()[:20], int64(half.number%2)*lenSlotAt)
		must(t, err)
		if got, ok, err := readLen(hrl.OS, path); !ok || err != nil || got != want {
			t.Fatalf("torn: %+v, %v, %v", got, ok, err)
		}
	}
}

// TestUnfinishedCheck: a layer that was whole and not yet checked when the power
// failed is asked for again from its last piece on.
func TestUnfinishedCheck(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	_, digest, body := oneLayer(t, p)
	_, err := v.StageLayer(digest, int64(len(body)), 0, bytes.NewReader(body[:len(body)-1]))
	must(t, err)
	part := v.stagingPath(digest, partSuffix)
	must(t, s.Close())
	f, err := hrl.OS.Edit(v.stagingPath(digest, lenSuffix))
	must(t, err)
	must(t, errors.Join(writeLen(f, stagedLen{9, int64(len(body)), int64(len(body))}), f.Close()))
	must(t, os.WriteFile(part, body, 0o600))
	must(t, os.Rename(part, v.stagingPath(digest, layerSuffix)))
	s = openStore(t, s.Dir(), Options{})
	v, err = s.VM(p.id)
	must(t, err)
	l := v.State().Layers
	if len(l) != 1 || l[0].Complete || l[0].Synced >= int64(len(body)) {
		t.Fatalf("%+v", l)
	}
	must(t, p.put(v, digest))
	if l = v.State().Layers; len(l) != 1 || !l[0].Complete {
		t.Fatalf("%+v", l)
	}
	if !slices.Contains(mustNames(t, filepath.Join(v.dir, layersDir)), digest+layerSuffix) {
		t.Fatal("it is not in its place")
	}
}

// TestLayersLeftOver: layers that were folded, and those of points that will never
// come, are not taken for staged ones.
func TestLayersLeftOver(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	must(t, v.SetKeep(1))
	points := p.whole(v, "root", 2)
	settle(t, v)
	dead := p.layer("root", points[0], wire.PointID{Generation: 9, Incarnation: 9, Epoch: 9}, nil, make([]byte, 512))
	alive := p.layer("root", points[1], wire.PointID{Generation: 9, Incarnation: 9, Epoch: 9}, nil, make([]byte, 512))
	folded := v.Points()[0].Disks[0].Layers[0]
	dir := filepath.Join(v.dir, layersDir)
	for _, d := range []string{dead, alive, folded} {
		must(t, os.WriteFile(filepath.Join(dir, d+layerSuffix), p.files[d], 0o600))
	}
	must(t, os.WriteFile(filepath.Join(dir, digestOf("a")+layerSuffix), []byte("junk"), 0o600))
	_, v = reopened(t, s, p.id)
	if names := mustNames(t, dir); !slices.Equal(names, []string{alive + layerSuffix}) {
		t.Fatalf("%v are left", names)
	}
	if l := v.State().Layers; len(l) != 1 || l[0].Digest != alive || !l[0].Complete {
		t.Fatalf("%+v", l)
	}
	p.check(v)
}

func mustNames(t testing.TB, dir string) []string {
	t.Helper()
	names, err := hrl.OS.ReadDir(dir)
	must(t, err)
	return names
}
