package sim

import (
	"encoding/binary"
	"fmt"
	"time"
)

const sector = 512

// A write is a change that a guest asked for, or what was found on a disk at some
// moment, as if it had been written then. The numbers are of the model's clock; 0:
// it has not ended.
type write struct {
	val        uint32 // what the sectors hold then; 0: zeroes
	disk       int
	off, n     int64    // sectors
	asked      [2]int64 // of a trim, off and n that were asked
	begin, end uint64
	began      time.Time
	ended      time.Time
	ok         bool // it was answered without an error
	fua        bool
	zero       bool // a zeroing or trim: it may be torn
	failed     bool // so it was answered: it may be torn for good
	what       string
}

func (w *write) String() string {
	return fmt.Sprintf("%s #%d of disk %d [%d,+%d) %d-%d ok=%v", w.what, w.val, w.disk, w.off, w.n, w.begin, w.end, w.ok)
}

// before reports whether w was answered before o began, so that it lies under it.
func (w *write) before(o *write) bool { return w.end != 0 && w.end < o.begin }

// A model knows what the disks of a VM may hold.
type model struct {
	clock uint64
	val   uint32
	disks []*diskModel
	all   []*write
	// adopted is what was found on all disks at moments when nothing was under way.
	adopted []snapshot
}

type snapshot struct {
	clock uint64
	at    time.Time
	disks [][]uint32
}

type diskModel struct {
	// cells have, of each sector, all that may be there after a power cut: what is
	// durable, and what was written since, in the order of beginning.
	cells [][]*write
	// latched is when it was answered that a sync had failed; 0: none has.
	latched uint64
}

func newModel(sectors []int64) *model {
	m := &model{}
	for _, n := range sectors {
		m.disks = append(m.disks, &diskModel{cells: make([][]*write, n)})
	}
	return m
}

func (m *model) tick() uint64 {
	m.clock++
	return m.clock
}

// begin begins a change.
func (m *model) begin(w *write) {
	w.begin, w.began, w.asked = m.tick(), time.Now(), [2]int64{w.off, w.n}
	m.all = append(m.all, w)
	cells := m.disks[w.disk].cells
	for s := w.off; s < w.off+w.n; s++ {
		cells[s] = append(cells[s], w)
	}
}

// finish ends it. With ok it covers the sectors [off, off+n), which for a trim are
// fewer than were asked.
func (m *model) finish(w *write, ok bool, off, n int64) {
	w.end, w.ended, w.ok, w.failed = m.tick(), time.Now(), ok, !ok
	d := m.disks[w.disk]
	if ok && (off != w.off || n != w.n) {
		for s := w.off; s < w.off+w.n; s++ {
			if s < off || s >= off+n {
				d.drop(s, func(o *write) bool { return o == w })
			}
		}
		w.off, w.n = off, n
	}
	if ok && w.fua {
		for s := w.off; s < w.off+w.n; s++ {
			d.drop(s, func(o *write) bool { return o.before(w) })
		}
	}
}

func (d *diskModel) drop(s int64, gone func(*write) bool) {
	keep := d.cells[s][:0:0]
	for _, w := range d.cells[s] {
		if !gone(w) {
			keep = append(keep, w)
		}
	}
	d.cells[s] = keep
}

// flushed says that a flush that began at the clock has succeeded.
func (m *model) flushed(disk int, begin uint64) {
	d := m.disks[disk]
	for s, c := range d.cells {
		if len(c) < 2 {
			continue
		}
		for _, w := range c {
			if w.ok && w.end < begin {
				d.drop(int64(s), func(o *write) bool { return o.before(w) })
			}
		}
	}
}

// visible reports whether a read between the two moments may have seen the value;
// was is what the cell had at its beginning.
func visible(was, now []*write, val uint32, begin, end uint64) bool {
	for _, c := range [][]*write{was, now} {
		for _, w := range c {
			if w.val != val || w.begin > end {
				continue
			}
			hidden := false
			for _, o := range was {
				hidden = hidden || o.ok && o.end != 0 && o.end < begin && w.before(o)
			}
			if !hidden {
				return true
			}
		}
	}
	return false
}

// since reports whether the value was written to the sector after that moment.
func (m *model) since(disk int, s int64, val uint32, begin uint64) bool {
	for _, w := range m.all {
		if w.disk == disk && w.val == val && w.begin > begin && s >= w.asked[0] && s < w.asked[0]+w.asked[1] {
			return true
		}
	}
	return false
}

// crashed ends all that is under way.
func (m *model) crashed() {
	for _, w := range m.all {
		if w.end == 0 {
			w.end, w.ended = m.tick(), time.Now()
		}
	}
}

// adopt takes what is found on the disks, with nothing under way, for what they
// hold; durable says that it is durable too. It fails where it must not be there:
// after a power cut, what was flushed is gone; else, what was answered.
func (m *model) adopt(found [][]uint32, power, durable bool) error {
	begin := m.tick()
	for i, d := range m.disks {
		for s, v := range found[i] {
			c := d.cells[s]
			ok := false
			for _, w := range c {
				ok = ok || w.val == v && (power || visible(c, nil, v, begin, begin))
			}
			if !ok {
				return fmt.Errorf("disk %d, sector %d has #%d; it may have %v", i, s, v, c)
			}
		}
	}
	m.begun(found, durable)
	return nil
}

// begun begins with these disks, whatever was known.
func (m *model) begun(found [][]uint32, durable bool) {
	at := snapshot{clock: m.tick(), at: time.Now(), disks: found}
	m.adopted = append(m.adopted, at)
	for i, d := range m.disks {
		same := map[uint32]*write{}
		for s, v := range found[i] {
			c := d.cells[s]
			if len(c) == 1 && c[0].val == v && c[0].ok {
				continue // as it was
			}
			w := same[v]
			if w == nil {
				w = &write{val: v, disk: i, begin: at.clock, end: at.clock, began: at.at, ended: at.at, ok: true, what: "found"}
				same[v] = w
			}
			if durable {
				d.cells[s] = []*write{w}
			} else {
				d.cells[s] = append(c[:len(c):len(c)], w)
			}
		}
	}
}

// fill makes the content of a sector.
func fill(p []byte, val uint32, disk int, s int64) {
	if val == 0 {
		clear(p)
		return
	}
	x := uint64(val)*0x9e3779b97f4a7c15 ^ uint64(s)<<8 ^ uint64(disk)
	binary.LittleEndian.PutUint32(p, val)
	binary.LittleEndian.PutUint32(p[4:], uint32(disk)<<24|uint32(s))
	for i := 8; i < sector; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

// values says what the sectors of p hold, of which the first is s.
func values(p []byte, disk int, s int64) ([]uint32, error) {
	out := make([]uint32, len(p)/sector)
	var want [sector]byte
	for i := range out {
		b := p[i*sector : (i+1)*sector]
		out[i] = binary.LittleEndian.Uint32(b)
		fill(want[:], out[i], disk, s+int64(i))
		if string(want[:]) != string(b) {
			return nil, fmt.Errorf("disk %d, sector %d has bytes that nobody wrote: %x", disk, s+int64(i), b[:24])
		}
	}
	return out, nil
}
