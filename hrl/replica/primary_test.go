package replica

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// A primary is the other side of a replication, made up: disks that change, and
// the points and layers that come of it.
type primary struct {
	t     testing.TB
	rng   *rand.Rand
	piece int64  // the most bytes it sends at once
	dir   string // where its layers are made
	id    wire.VMID
	name  string
	term  uint64
	at    wire.PointID // the newest point, and the parent of the next
	order []string
	disks map[string][]byte
	// was is every disk at every point there ever was.
	was   map[wire.PointID]map[string][]byte
	times map[wire.PointID]time.Time // of the cuts
	// files has the bytes of every layer, by digest.
	files map[string][]byte
}

const testSender = "alpha"

// tempDir is in memory where that is possible: a test that cuts the power has a
// file system of its own.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "replica")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newPrimary(t testing.TB, seed uint64, disks ...string) *primary {
	p := &primary{
		t: t, piece: 200 << 10, rng: rand.New(rand.NewPCG(seed, 3)), dir: tempDir(t), id: wire.VMID{1, 2, 3, byte(seed)}, name: "web", term: 1,
		disks: map[string][]byte{}, was: map[wire.PointID]map[string][]byte{}, times: map[wire.PointID]time.Time{}, files: map[string][]byte{},
	}
	for _, d := range disks {
		p.addDisk(d, 300<<10+512)
	}
	return p
}

func (p *primary) addDisk(name string, size int) {
	p.order = append(p.order, name)
	p.disks[name] = make([]byte, size)
}

func (p *primary) offer() wire.Offer {
	o := wire.Offer{Name: p.name, Generation: max(1, p.at.Generation), Term: p.term}
	for _, d := range p.order {
		o.Disks = append(o.Disks, wire.Disk{Name: d, Size: int64(len(p.disks[d]))})
	}
	return o
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write changes some of a disk.
func (p *primary) write(disk string) {
	d := p.disks[disk]
	for range p.rng.IntN(4) {
		off := p.rng.IntN(len(d)/512) * 512
		n := min(len(d)-off, (1+p.rng.IntN(200))*512)
		switch p.rng.IntN(4) {
		case 0:
			clear(d[off : off+n])
		case 1: // compressible
			copy(d[off:off+n], bytes.Repeat([]byte{byte(p.rng.Uint32())}, n))
		default:
			for i := off; i < off+n; i++ {
				d[i] = byte(p.rng.Uint32())
			}
		}
	}
}

// resize gives a disk another size.
func (p *primary) resize(disk string) {
	n := (1 + p.rng.IntN(1200)) * 512
	d := p.disks[disk]
	p.disks[disk] = append(slices.Clone(d[:min(n, len(d))]), make([]byte, max(0, n-len(d)))...)
}

// layer makes the layer that leads from one content to another.
func (p *primary) layer(disk string, from, to wire.PointID, old, now []byte) string {
	p.t.Helper()
	w, err := hrl.NewLayerWriter(hrl.OS, p.dir, hrl.LayerInfo{
		VM: p.id, Generation: to.Generation, PGeneration: from.Generation, Disk: disk,
		P: hrl.Position{Incarnation: from.Incarnation, Epoch: from.Epoch}, Q: hrl.Position{Incarnation: to.Incarnation, Epoch: to.Epoch},
		Size: int64(len(now)), QTime: time.Unix(1700000000, 0), Kind: hrl.CutCrash,
	})
	must(p.t, err)
	before := append(slices.Clone(old[:min(len(old), len(now))]), make([]byte, max(0, len(now)-len(old)))...)
	if len(old) < len(now) {
		must(p.t, p.spans(w, before, now, int64(len(old))))
	} else {
		must(p.t, p.spans(w, before, now, int64(len(now))))
	}
	f, err := w.Commit()
	must(p.t, err)
	b, err := os.ReadFile(f.Path)
	must(p.t, err)
	digest := hex.EncodeToString(f.Digest[:])
	p.files[digest] = b
	return digest
}

// spans gives the writer all sectors that differ, perhaps some that do not, and
// all from byte grown on.
func (p *primary) spans(w *hrl.LayerWriter, old, now []byte, grown int64) error {
	more := p.rng.IntN(3) == 0
	for off := 0; off < len(now); off += 512 {
		part := now[off : off+512]
		if int64(off) < grown && bytes.Equal(part, old[off:off+512]) && !(more && p.rng.IntN(40) == 0) {
			continue
		}
		var err error
		if zeroes(part) {
			err = w.Zero(int64(off), 512)
		} else {
			err = w.Data(int64(off), part)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// point makes the next point, with its layers.
func (p *primary) point() wire.PointInfo {
	p.t.Helper()
	to := p.at
	switch {
	case to.IsZero():
		to = wire.PointID{Generation: 1, Incarnation: 1, Epoch: 1}
	case p.rng.IntN(12) == 0:
		to = wire.PointID{Generation: to.Generation + 1, Incarnation: 1, Epoch: 1}
	case p.rng.IntN(6) == 0:
		to = wire.PointID{Generation: to.Generation, Incarnation: to.Incarnation + 1, Epoch: 1}
	default:
		to.Epoch += 1 + uint64(p.rng.IntN(3))
	}
	info := wire.PointInfo{ID: to, Parent: p.at, ParentTime: p.times[p.at], Time: time.Unix(1700000000+int64(len(p.times)), 0), Kind: wire.KindCrash}
	p.times[to] = info.Time
	old := p.was[p.at]
	p.was[to] = map[string][]byte{}
	for _, disk := range p.order {
		now := slices.Clone(p.disks[disk])
		p.was[to][disk] = now
		d := wire.PointDisk{Disk: wire.Disk{Name: disk, Size: int64(len(now))}}
		if p.rng.IntN(4) == 0 { // in two, of which the first is overlaid in part
			half := slices.Clone(now)
			for i := range half {
				if p.rng.IntN(3) == 0 {
					half[i] = 0
				}
			}
			d.Layers = append(d.Layers, p.layer(disk, p.at, to, old[disk], half))
			d.Layers = append(d.Layers, p.layer(disk, p.at, to, half, now))
		} else if !bytes.Equal(old[disk], now) || len(now) == 0 || p.rng.IntN(2) == 0 {
			d.Layers = append(d.Layers, p.layer(disk, p.at, to, old[disk], now))
		}
		if len(d.Layers) == 2 && d.Layers[0] == d.Layers[1] {
			d.Layers = d.Layers[1:]
		}
		info.Disks = append(info.Disks, d)
	}
	p.at = to
	return info
}

// send stages all layers of a point, in pieces, and lists it.
func (p *primary) send(v *VM, info wire.PointInfo) error {
	for _, d := range info.Disks {
		for _, l := range d.Layers {
			if err := p.put(v, l); err != nil {
				return err
			}
		}
	}
	_, err := v.List(info)
	return err
}

func (p *primary) put(v *VM, digest string) error {
	b, off := p.files[digest], int64(0)
	for _, s := range v.State().Layers {
		if s.Digest == digest {
			off = s.Synced
		}
	}
	for {
		n := min(int64(len(b))-off, 1+p.rng.Int64N(p.piece))
		st, err := v.StageLayer(digest, int64(len(b)), off, bytes.NewReader(b[off:off+n]))
		if err != nil || st.Complete {
			return err
		}
		off = st.Synced
	}
}

func ids(points []wire.PointInfo) []wire.PointID {
	var out []wire.PointID
	for _, i := range points {
		out = append(out, i.ID)
	}
	return out
}

func readAll(t testing.TB, d blockdev.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	must(t, blockdev.ReadAt(d, b, 0))
	return b
}

// check opens every listed point and compares it with what it was.
func (p *primary) check(v *VM) {
	p.t.Helper()
	for _, id := range ids(v.Points()) {
		p.checkPoint(v, id)
	}
}

func (p *primary) checkPoint(v *VM, id wire.PointID) {
	p.t.Helper()
	for disk, want := range p.was[id] {
		d, err := v.OpenPoint(id, disk)
		if _, gone := v.Resolve(id.String()); gone != nil && errors.Is(err, ErrNoPoint) {
			return // retired just now
		}
		must(p.t, err)
		p.same(d, id, disk, want)
		must(p.t, d.Close())
	}
}

func (p *primary) same(d blockdev.Device, id wire.PointID, disk string, want []byte) {
	p.t.Helper()
	got := readAll(p.t, d)
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for i < len(got) && i < len(want) && got[i] == want[i] {
		i++
	}
	p.t.Fatalf("disk %s of point %v: %d bytes, not %d, or byte %d differs", disk, id, len(got), len(want), i)
}

func openStore(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func settle(t testing.TB, v *VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	must(t, v.Settle(ctx))
}

// accepted is a new store in a directory of the test, and the primary's VM in it.
func accepted(t testing.TB, p *primary, o Options) (*Store, *VM) {
	t.Helper()
	s := openStore(t, tempDir(t), o)
	v, err := s.Accept(p.id, p.offer(), testSender, 0)
	must(t, err)
	return s, v
}

// points sends n points.
func (p *primary) points(v *VM, n int) []wire.PointID {
	p.t.Helper()
	var out []wire.PointID
	for range n {
		for _, d := range p.order {
			p.write(d)
		}
		info := p.point()
		must(p.t, p.send(v, info))
		out = append(out, info.ID)
	}
	return out
}

func clone(m map[string][]byte) map[string][]byte {
	m = maps.Clone(m)
	for k, b := range m {
		m[k] = bytes.Clone(b)
	}
	return m
}
