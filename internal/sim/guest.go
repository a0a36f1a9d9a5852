package sim

import (
	"errors"
	"strings"

	"afterimage/blockdev"
	"afterimage/filter"
)

// A call is a batch of requests of a guest.
type call struct {
	w    *world
	pri  *primary
	disk int
	left int
	recs []*record
	done chan struct{}
}

// A record is what the model has to know of a request.
type record struct {
	write *write     // of a change
	was   [][]*write // of a read: what the sectors may have held when it began
	begin uint64
}

// Gone implements blockdev.Completer.
func (c *call) Gone() bool { return false }

// Complete implements blockdev.Completer.
func (c *call) Complete(reqs []*blockdev.Request) {
	w := c.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range reqs {
		if !c.pri.proc.Gone() {
			c.answered(r, c.recs[r.Cookie])
		}
		if c.left--; c.left == 0 {
			close(c.done)
		}
	}
}

// answered is one answer that the guest gets; world.mu is held.
func (c *call) answered(r *blockdev.Request, rec *record) {
	w, m, d := c.w, c.w.model, c.w.model.disks[c.disk]
	if r.Err != nil {
		if !w.badDisk && d.latched == 0 && !latchedErr(r.Err) {
			w.wrongLocked("a guest's %s of disk %d failed: %v", r.Op, c.disk, r.Err)
		}
		w.noteLocked("disk %d: %s fails: %v", c.disk, r.Op, r.Err)
	}
	switch r.Op {
	case blockdev.OpRead:
		c.read(r, rec)
	case blockdev.OpFlush:
		switch {
		case r.Err != nil:
			c.latch()
		case d.latched != 0 && rec.begin > d.latched:
			w.wrongLocked("a flush of disk %d succeeded after one had failed", c.disk)
		default:
			m.flushed(c.disk, rec.begin)
		}
	default:
		wr := rec.write
		off, n := wr.off, wr.n
		if r.Op == blockdev.OpTrim {
			off, n = r.Done.Off/sector, r.Done.Len/sector
		}
		if r.Err == nil && wr.fua && n > 0 && d.latched != 0 && wr.begin > d.latched {
			w.wrongLocked("a FUA write of disk %d succeeded after a sync had failed", c.disk)
		}
		m.finish(wr, r.Err == nil, off, n)
		// One that needed the rest of a block and could not read it wrote nothing.
		if r.Err != nil && wr.fua && !strings.Contains(r.Err.Error(), "read the rest") {
			c.latch()
		}
	}
}

func latchedErr(err error) bool {
	var l *filter.LatchedError
	return errors.As(err, &l)
}

func (c *call) latch() {
	c.w.badSync = true
	if d := c.w.model.disks[c.disk]; d.latched == 0 {
		d.latched = c.w.model.tick()
	}
}

func (c *call) read(r *blockdev.Request, rec *record) {
	w, m := c.w, c.w.model
	if r.Err != nil {
		return
	}
	first := r.Off / sector
	vals, err := values(r.Buf, c.disk, first)
	if err != nil {
		w.wrongLocked("a read: %w", err)
		return
	}
	end := m.tick()
	for i, v := range vals {
		now := m.disks[c.disk].cells[first+int64(i)]
		if !visible(rec.was[i], now, v, rec.begin, end) && !m.since(c.disk, first+int64(i), v, rec.begin) {
			w.wrongLocked("a read of disk %d, sector %d gave #%d; it may be %v", c.disk, first+int64(i), v, rec.was[i])
			return
		}
	}
}

// ask submits requests and returns when they are answered, or their host is gone.
func (w *world) ask(p *primary, disk int, reqs []*blockdev.Request) {
	c := &call{w: w, pri: p, disk: disk, left: len(reqs), done: make(chan struct{})}
	w.mu.Lock()
	w.stats.Requests += len(reqs)
	m := w.model
	for i, r := range reqs {
		r.Owner, r.Cookie = c, uint64(i)
		rec := &record{}
		c.recs = append(c.recs, rec)
		first, n := r.Off/sector, r.Len/sector
		switch r.Op {
		case blockdev.OpRead:
			rec.begin = m.tick()
			for s := first; s < first+n; s++ {
				rec.was = append(rec.was, m.disks[disk].cells[s])
			}
		case blockdev.OpFlush:
			rec.begin = m.tick()
		default:
			wr := &write{disk: disk, off: first, n: n, zero: r.Op != blockdev.OpWrite, fua: r.Flags&blockdev.FlagFUA != 0, what: r.Op.String()}
			if !wr.zero {
				m.val++
				wr.val = m.val
				if w.plain { // what is written again is the same
					wr.val = uint32(first) + 1
				}
				for s := first; s < first+n; s++ {
					fill(r.Buf[(s-first)*sector:], wr.val, disk, s)
				}
			}
			rec.write = wr
			m.begin(wr)
		}
	}
	w.mu.Unlock()
	p.vm.Disks()[disk].Submit(reqs)
	<-c.done
}

// goAsk asks on a goroutine of its own.
func (w *world) goAsk(disk int, reqs ...*blockdev.Request) {
	p := w.pri
	w.guests.Go(func() { w.ask(p, disk, reqs) })
}
