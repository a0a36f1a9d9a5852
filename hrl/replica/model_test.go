package replica

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
	"afterimage/internal/testenv"
)

// An opened is a disk of a point that a test holds open.
type opened struct {
	blockdev.Device
	id   wire.PointID
	disk string
}

// A tested is a test failover and what its disks must hold.
type tested struct {
	name string
	id   wire.PointID
	want map[string][]byte
}

// model is a store, what was done to it, and what must therefore be in it.
type model struct {
	*primary
	s      *Store
	v      *VM
	dir    string
	keep   int
	listed []wire.PointID // that were listed and not removed by hand
	pinned map[wire.PointID]bool
	open   []opened
	tests  []tested
	n      int
}

// TestModel does at random what a replica is there for, and after each step
// compares every point that is listed with what the primary had then.
func TestModel(t *testing.T) {
	for seed := range uint64(testenv.Rounds(12, 3)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := &model{primary: newPrimary(t, seed, "root"), dir: tempDir(t), keep: 3, pinned: map[wire.PointID]bool{}}
			m.reopen()
			defer m.close()
			for range 60 {
				m.step()
				m.checkPoints()
			}
			settle(t, m.v)
			m.checkPoints()
			m.check(m.v)
		})
	}
}

func (m *model) close() {
	for _, o := range m.open {
		must(m.t, o.Close())
	}
	m.open = nil
	if m.s != nil {
		must(m.t, m.s.Close())
	}
}

func (m *model) reopen() {
	m.close()
	m.s = openStore(m.t, m.dir, Options{})
	if m.v == nil {
		o := m.offer()
		o.Keep = m.keep
		v, err := m.s.Accept(m.id, o, testSender, 0)
		must(m.t, err)
		m.v = v
		return
	}
	v, err := m.s.VM(m.id)
	must(m.t, err)
	m.v = v
	if r := v.Runs(); len(r) != len(m.tests) {
		m.t.Fatalf("%d runs stand, not %d", len(r), len(m.tests))
	}
}

func (m *model) pick() (wire.PointID, bool) {
	l := ids(m.v.Points())
	if len(l) == 0 {
		return wire.PointID{}, false
	}
	return l[m.rng.IntN(len(l))], true
}

func (m *model) step() {
	id, some := m.pick()
	switch k := m.rng.IntN(20); {
	case k < 8 || !some:
		m.listOne()
	case k == 8:
		if err := m.v.Pin(id, true); err == nil {
			m.pinned[id] = true
		} else if _, gone := m.v.Resolve(id.String()); gone == nil {
			m.t.Fatal(err)
		}
	case k == 9:
		for p := range m.pinned {
			must(m.t, m.v.Pin(p, false))
			delete(m.pinned, p)
			break
		}
	case k < 12:
		disk := m.order[m.rng.IntN(len(m.order))]
		if m.was[id][disk] == nil {
			return
		}
		d, err := m.v.OpenPoint(id, disk)
		if err != nil {
			return // it may just have been retired
		}
		m.open = append(m.open, opened{d, id, disk})
	case k == 12 && len(m.open) > 0:
		i := m.rng.IntN(len(m.open))
		must(m.t, m.open[i].Close())
		m.open = slices.Delete(m.open, i, i+1)
	case k == 13:
		if err := m.v.Remove(id); err == nil {
			if m.listed = ids(m.v.Points()); slices.Contains(m.listed, id) {
				m.t.Fatal("a point that was removed is listed")
			}
			if m.pinned[id] {
				m.t.Fatal("a pinned point was removed")
			}
		}
	case k == 14:
		settle(m.t, m.v)
	case k == 15:
		m.reopen()
	case k == 16:
		m.beginTest(id)
	case k == 17 && len(m.tests) > 0:
		must(m.t, m.v.EndTest(m.tests[0].name))
		m.tests = m.tests[1:]
	case k == 18:
		m.writeTests()
	case k == 19 && m.rng.IntN(3) == 0:
		m.keep = 1 + m.rng.IntN(5)
		must(m.t, m.v.SetKeep(m.keep))
		m.listed = ids(m.v.Points()) // what went before does not come back
	}
}

func (m *model) listOne() {
	for _, d := range m.order {
		m.write(d)
		if m.rng.IntN(8) == 0 {
			m.resize(d)
		}
	}
	if len(m.order) < 3 && m.rng.IntN(6) == 0 {
		m.addDisk(fmt.Sprintf("data%d", len(m.order)), 100<<10)
		_, err := m.s.Accept(m.id, m.offer(), testSender, 0)
		must(m.t, err)
	}
	info := m.point()
	must(m.t, m.send(m.v, info))
	m.listed = append(m.listed, info.ID)
}

func (m *model) beginTest(id wire.PointID) {
	m.n++
	name := fmt.Sprintf("test%d", m.n)
	r, err := m.v.Test(name, id)
	if err != nil {
		return // it may just have been retired
	}
	if !slices.Equal(r.Disks(), m.order[:len(r.Disks())]) {
		m.t.Fatalf("disks %v", r.Disks())
	}
	m.tests = append(m.tests, tested{name, id, clone(m.was[id])})
	m.writeTests()
}

// writeTests writes to the tops of all tests, and reads them.
func (m *model) writeTests() {
	for _, r := range m.v.Runs() {
		must(m.t, r.Err())
		i := slices.IndexFunc(m.tests, func(x tested) bool { return x.name == r.Name })
		for disk, want := range m.tests[i].want {
			if len(want) == 0 {
				continue
			}
			d := r.Device(disk)
			off := m.rng.IntN(len(want)/512) * 512
			p := bytes.Repeat([]byte{byte(m.n)}, min(len(want)-off, 3*512))
			must(m.t, blockdev.WriteAt(d, p, int64(off)))
			copy(want[off:], p)
			m.same(d, r.Point, disk, want)
		}
	}
}

// checkPoints compares the list with what must be in it, and everything that is
// open with what it was.
func (m *model) checkPoints() {
	m.t.Helper()
	got := ids(m.v.Points())
	last := m.listed[max(0, len(m.listed)-m.keep):]
	need := slices.Clone(last)
	for p := range m.pinned {
		need = append(need, p)
	}
	for _, o := range m.open {
		need = append(need, o.id)
		m.same(o, o.id, o.disk, m.was[o.id][o.disk])
	}
	for _, x := range m.tests {
		need = append(need, x.id)
	}
	for _, id := range need {
		if !slices.Contains(got, id) {
			m.t.Fatalf("point %v is not listed any more, only %v", id, got)
		}
	}
	for _, id := range got {
		if !slices.Contains(m.listed, id) {
			m.t.Fatalf("point %v is listed still", id)
		}
	}
	if id, ok := m.pick(); ok {
		// What is looked at may be retired in between.
		for disk, want := range m.was[id] {
			if d, err := m.v.OpenPoint(id, disk); err == nil {
				m.same(d, id, disk, want)
				must(m.t, d.Close())
			}
		}
	}
}
