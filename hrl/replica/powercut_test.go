package replica

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
	"afterimage/internal/testenv"
)

// An acknowledged is what a primary, or an operator, was told so far.
type acknowledged struct {
	points   []wire.PointID
	pinned   []wire.PointID
	failover wire.PointID // that stands; zero: none
	branches int
}

// A cut is what a power cut has left, and what must be in it.
type cut struct {
	dir      string
	acked    acknowledged
	sending  *wire.PointInfo // that may be listed
	starting wire.PointID    // a failover that may stand
	ending   bool            // the one that stands may be cancelled
}

// TestPowerCut cuts the power before operations of any kind: in the middle of
// receiving, listing, folding, and of failovers. What was acknowledged is there
// afterwards, what is listed is right, and the store goes on from there.
func TestPowerCut(t *testing.T) {
	for seed := range uint64(testenv.Rounds(6, 2)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { cutPower(t, seed) })
	}
}

const cutKeep = 3

func cutPower(t *testing.T, seed uint64) {
	p := newPrimary(t, seed, "root", "data")
	fsys := newVolatileFS(tempDir(t))
	s, err := open(fsys.root, Options{FS: fsys}, fsys.device)
	must(t, err)
	defer s.Close()
	o := p.offer()
	o.Keep = cutKeep
	v, err := s.Accept(p.id, o, testSender, 0)
	must(t, err)

	var mu sync.Mutex
	var now cut
	var cuts []cut
	set := func(f func(c *cut)) {
		mu.Lock()
		defer mu.Unlock()
		f(&now)
	}
	ops := uint64(0)
	fsys.mu.Lock()
	fsys.tick = func() {
		if ops++; (ops*7919+seed*31)%37 != 0 {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		c := now
		c.acked.points, c.acked.pinned = slices.Clone(c.acked.points), slices.Clone(c.acked.pinned)
		c.dir = fsys.cutLocked(t, ops)
		cuts = append(cuts, c)
	}
	fsys.mu.Unlock()
	for i := range 14 {
		for _, d := range p.order {
			p.write(d)
		}
		if i%5 == 4 {
			p.resize("data")
		}
		info := p.point()
		set(func(c *cut) { c.sending = &info })
		must(t, p.send(v, info))
		set(func(c *cut) { c.acked.points, c.sending = append(c.acked.points, info.ID), nil })
		switch i % 4 {
		case 1:
			settle(t, v)
		case 2:
			if i == 2 {
				must(t, v.Pin(info.ID, true))
				set(func(c *cut) { c.acked.pinned = append(c.acked.pinned, info.ID) })
			}
		case 3:
			set(func(c *cut) { c.starting = info.ID })
			r, err := v.Start(info.ID)
			must(t, err)
			set(func(c *cut) { c.acked.failover, c.starting = info.ID, wire.PointID{} })
			must(t, blockdev.WriteAt(r.Device("root"), make([]byte, 512), 0))
			must(t, blockdev.Flush(r.Device("root")))
			must(t, r.Close())
			set(func(c *cut) { c.ending = true })
			name, err := v.Cancel()
			must(t, err)
			set(func(c *cut) { c.acked.failover, c.ending = wire.PointID{}, false; c.acked.branches++ })
			must(t, v.RemoveBranch(name)) // so that folding goes on
			set(func(c *cut) { c.acked.branches-- })
		}
	}
	fsys.mu.Lock()
	fsys.tick = nil
	fsys.mu.Unlock()
	if len(cuts) < 10 {
		t.Fatalf("only %d cuts", len(cuts))
	}
	for i := range cuts {
		cuts[i].check(t, p)
	}
}

func (c *cut) check(t *testing.T, from *primary) {
	t.Helper()
	s := openStore(t, c.dir, Options{})
	defer func() { must(t, s.Close()) }()
	v, err := s.VM(from.id)
	must(t, err)
	must(t, v.Broken())
	listed := ids(v.Points())
	need := append(c.acked.points[max(0, len(c.acked.points)-cutKeep+1):], c.acked.pinned...)
	if r := v.State().FailedOverTo; r != c.acked.failover && r != c.starting && !(c.ending && r.IsZero()) {
		t.Fatalf("a failover stands from %v; there was one from %v, or perhaps %v", r, c.acked.failover, c.starting)
	}
	for _, id := range need {
		if !slices.Contains(listed, id) {
			t.Fatalf("point %v was acknowledged, and only %v are there", id, listed)
		}
	}
	for _, id := range listed {
		if !slices.Contains(c.acked.points, id) && (c.sending == nil || c.sending.ID != id) {
			t.Fatalf("point %v was never sent", id)
		}
	}
	// It goes on from there.
	p := *from
	p.t, p.was, p.files, p.times = t, maps.Clone(from.was), maps.Clone(from.files), maps.Clone(from.times)
	p.check(v)
	for _, r := range v.Runs() {
		must(t, r.Err())
		must(t, r.Close())
		_, err := v.Cancel()
		must(t, err)
	}
	if c.sending != nil {
		must(t, p.send(v, *c.sending))
	}
	settle(t, v)
	p.check(v)
	p.at = v.State().Newest
	p.disks = map[string][]byte{}
	for _, d := range p.order {
		p.disks[d] = make([]byte, 64<<10)
		p.write(d)
	}
	must(t, p.send(v, p.point()))
	settle(t, v)
	p.check(v)
	for _, id := range ids(v.Points()) {
		must(t, v.Verify(t.Context(), id, nil))
	}
}
