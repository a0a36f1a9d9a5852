package replica

import (
	"encoding/hex"
	"os"
	"slices"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// TestUnreadable: where a layer says that the primary could not read, what was there
// before stays, and every point from then on says so until something is written there or
// it is cut off; also after folds, and after the store was opened again (RULES G5).
func TestUnreadable(t *testing.T) {
	p := newPrimary(t, 21, "root")
	s, v := accepted(t, p, Options{})
	must(t, v.SetKeep(3))
	lost := map[int]bool{} // sectors
	said := map[wire.PointID][][2]int64{}
	for round := range 40 {
		old := slices.Clone(p.disks["root"])
		if round%7 == 6 {
			p.resize("root")
		}
		p.write("root")
		now := p.disks["root"]
		to := wire.PointID{Generation: 1, Incarnation: 1, Epoch: uint64(round + 1)}
		w, err := hrl.NewLayerWriter(hrl.OS, p.dir, hrl.LayerInfo{
			VM: p.id, Generation: 1, PGeneration: p.at.Generation, Disk: "root",
			P: hrl.Position{Incarnation: p.at.Incarnation, Epoch: p.at.Epoch}, Q: hrl.Position{Incarnation: 1, Epoch: to.Epoch},
			Size: int64(len(now)), Kind: hrl.CutCrash,
		})
		must(t, err)
		from, n := p.rng.IntN(len(now)/512), p.rng.IntN(12) // what cannot be read this time
		for i := range len(now) / 512 {
			a, b := i*512, i*512+512
			grown := a >= len(old)
			switch {
			case i >= from && i < from+n:
				must(t, w.Unreadable(int64(a), 512))
				lost[i] = true
				clear(now[a:b])
				if !grown {
					copy(now[a:b], old[a:b])
				}
			case grown || !slices.Equal(old[a:b], now[a:b]) || p.rng.IntN(30) == 0:
				must(t, w.Data(int64(a), now[a:b]))
				delete(lost, i)
			}
		}
		for i := range lost {
			if i >= len(now)/512 {
				delete(lost, i)
			}
		}
		f, err := w.Commit()
		must(t, err)
		b, err := os.ReadFile(f.Path)
		must(t, err)
		digest := hex.EncodeToString(f.Digest[:])
		p.files[digest] = b
		info := wire.PointInfo{ID: to, Parent: p.at, ParentTime: p.times[p.at], Time: time.Unix(1700000000+int64(round), 0), Kind: wire.KindCrash,
			Disks: []wire.PointDisk{{Disk: wire.Disk{Name: "root", Size: int64(len(now))}, Layers: []string{digest}, Unreadable: [][2]int64{{0, 512}}}}}
		must(t, p.put(v, digest))
		listed, err := v.List(info)
		must(t, err)
		if again, err := v.List(info); err != nil || !slices.Equal(again.Disks[0].Unreadable, listed.Disks[0].Unreadable) {
			t.Fatalf("listed again: %+v, %v", again, err)
		}
		var want [][2]int64
		for i := range len(now) / 512 {
			if k := len(want) - 1; lost[i] && k >= 0 && want[k][0]+want[k][1] == int64(i)*512 {
				want[k][1] += 512
			} else if lost[i] {
				want = append(want, [2]int64{int64(i) * 512, 512})
			}
		}
		if got := listed.Disks[0].Unreadable; !slices.Equal(got, want) || (listed.Unread() == "") != (len(want) == 0) || listed.Damaged != "" {
			t.Fatalf("point %v: unreadable %v, not %v (%s)", to, got, want, listed.Unread())
		}
		p.at, p.times[to], said[to] = to, info.Time, want
		p.was[to] = map[string][]byte{"root": slices.Clone(now)}
		if round%5 == 4 {
			settle(t, v)
			p.check(v)
		} else {
			p.checkPoint(v, to)
		}
		if round%13 == 12 {
			s, v = reopened(t, s, p.id)
		}
		for _, have := range v.Points() {
			if !slices.Equal(have.Disks[0].Unreadable, said[have.ID]) {
				t.Fatalf("point %v has %v as unreadable, had %v", have.ID, have.Disks[0].Unreadable, said[have.ID])
			}
		}
	}
}

// TestJoinExtents: where there are more ranges than a point takes all of them are named,
// and some more.
func TestJoinExtents(t *testing.T) {
	var ext []blockdev.Extent
	for i := range int64(5000) {
		ext = append(ext, blockdev.Extent{Off: (4999 - i) * i << 12, Len: 4096}) // in no order, and some twice
	}
	got := unreadableRanges(slices.Clone(ext), 1<<40)
	if len(got) > wire.UnreadableMax || len(got) < 2 {
		t.Fatalf("%d ranges", len(got))
	}
	for _, e := range ext {
		if !slices.ContainsFunc(got, func(r [2]int64) bool { return r[0] <= e.Off && e.End() <= r[0]+r[1] }) {
			t.Fatalf("%v is not named", e)
		}
	}
	info := wire.PointInfo{ID: wire.PointID{Generation: 1, Incarnation: 1, Epoch: 1}, Kind: wire.KindCrash,
		Disks: []wire.PointDisk{{Disk: wire.Disk{Name: "root", Size: 1 << 40}, Unreadable: got}}}
	must(t, info.Check())
	info.Disks[0].Size = 4096
	if info.Check() == nil {
		t.Error("ranges beyond the disk's end pass")
	}
}
