package hrl

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"
)

// An op is one system call that appends. Log.op points to it while it is under
// way; its id tells the watchdog whether it still is the same one.
type op struct {
	id        uint64
	groups    []*Group // groups[0] is the leader's
	bufs      [][]byte
	seg       *segment
	at        int64 // where in seg
	span      int64
	writing   bool   // in the system call; else waiting for a spare
	late      bool   // over the limit
	abandoned bool   // given up by the watchdog while writing
	prev      uint32 // seg's prev and last before it
	last      uint64
}

// opGroupsMax bounds the groups of one call, for their buffers must fit the
// kernel's limit: header, payload and padding of each entry.
const opGroupsMax = iovMax/(3*GroupMax) - 1

// stuckMax is how many abandoned appends may hang before others are refused
// at once: each holds a thread, a segment and its payloads.
const stuckMax = 4

var padding [frameAlign]byte

// Append appends the group's entries, in order, none between them, and sets
// their sequence numbers. When it returns nil they will survive a kill of the
// process, and Finished must be called when the disk's writes have ended. An
// error other than ErrAbandoned means that the log lacks the changes and knows
// it (but for ErrClosed and a malformed group: those it does not know); the
// caller stores its gap and goes on. It waits at most Options.AppendLimit.
//
// The ranges of the group must be locked by the caller: the order of sequence
// numbers is the order of the disk only because of that (RULES A1).
func (l *Log) Append(g *Group) error {
	for i := range g.Entries {
		if k := g.Entries[i].Kind; k > KindResize && k != KindGap {
			return fmt.Errorf("append of a %s frame: those are the log's own", k)
		}
	}
	return l.append(g)
}

// append is Append for the log's own frames, too.
func (l *Log) append(g *Group) error {
	if err := g.prepare(); err != nil {
		return err
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	for i := range g.Entries {
		if e := &g.Entries[i]; int(e.Disk) >= len(l.disks) && e.Kind <= KindResize {
			l.mu.Unlock()
			return fmt.Errorf("append of a %s of disk %d: the log has %d", e.Kind, e.Disk, len(l.disks))
		}
	}
	if l.stuck >= stuckMax {
		l.lostLocked(g)
		l.mu.Unlock()
		return ErrLate
	}
	l.queue = append(l.queue, g)
	if l.busy {
		l.mu.Unlock()
		<-g.wake
		if !g.lead {
			return g.err
		}
		g.lead = false
		l.mu.Lock()
	}
	l.busy = true
	return l.leadLocked(g)
}

// Finished says that the disk's writes of a group whose Append returned nil
// have ended, well or badly (then the caller has stored a gap).
func (l *Log) Finished(g *Group) {
	g.seg.unfinished.Add(-1)
	g.seg = nil
}

// leadLocked appends the leader's group, which is first in the queue, and what
// waits behind it, then passes the lead on. It is called with mu held and
// returns without.
func (l *Log) leadLocked(g *Group) error {
	o := l.takeOpLocked()
	entries := 0
	for _, q := range l.queue {
		if len(o.groups) == opGroupsMax || o.span+q.span > groupSpanMax && len(o.groups) > 0 {
			break
		}
		o.groups = append(o.groups, q)
		o.span += q.span
		entries += len(q.Entries)
	}
	l.queue = l.queue[:copy(l.queue, l.queue[len(o.groups):])]

	if err := l.makeRoomLocked(o, entries); err != nil {
		l.stats.Failed++
		return l.endOpLocked(o, g, err)
	}
	l.buildLocked(o)
	s := o.seg
	o.writing = true
	l.mu.Unlock()

	n, err := s.f.WritevAt(o.bufs, o.at)

	l.mu.Lock()
	if o.abandoned {
		// The watchdog has carried on without us; op, group and payloads
		// are garbage now.
		l.stuck--
		s.outstanding--
		l.keeper.kick()
		l.mu.Unlock()
		_ = l.release()
		if g.Abandoned == nil {
			return ErrLate
		}
		return ErrAbandoned
	}
	if err != nil {
		l.stats.Failed++
		l.failLocked(o, err)
		return l.endOpLocked(o, g, err)
	}
	l.stats.Appends++
	l.stats.Groups += int64(len(o.groups))
	l.stats.Frames += int64(entries)
	l.stats.Bytes += n
	s.end += n
	if s.pre != nil {
		s.pre = nil
		l.begun = max(l.begun, s.head.ordinal)
		l.keeper.kick() // to note it
	}
	if len(s.lost.disks) > 0 {
		s.lost = BlockSet{}
	}
	if len(s.surplus) > 0 {
		l.keeper.toRemove = append(l.keeper.toRemove, s.surplus...)
		s.surplus = nil
		l.keeper.kick()
	}
	if s.end-s.behind >= writeBehindStep {
		l.keeper.kick()
	}
	return l.endOpLocked(o, g, nil)
}

// makeRoomLocked sees to it that the tail has room for the op. It may release
// mu while it waits for a spare.
func (l *Log) makeRoomLocked(o *op, entries int) error {
	// What was lost since the tail was begun has to be said before anything
	// newer, and a new tail does that first.
	if l.tail != nil && l.lost.Empty() && l.tail.fits(o.span, entries) {
		return nil
	}
	if l.tail != nil {
		l.sealLocked()
	}
	for l.spareErr != nil || len(l.spares) == 0 {
		switch {
		case l.closed:
			return ErrClosed
		case l.spareErr != nil:
			return l.spareErr
		case o.late:
			// Nobody else waits for it: until there is one, appends are refused at once.
			l.stats.Late++
			l.spareErr = ErrNoSegment
			return ErrNoSegment
		}
		l.keeper.kick()
		l.room.Wait()
	}
	return l.beginTailLocked()
}

// buildLocked numbers the entries and lays out the op's buffers.
func (l *Log) buildLocked(o *op) {
	s := l.tail
	o.seg, o.at, o.prev, o.last = s, s.end, s.prev, s.last
	at := s.end + int64(len(s.pre))
	if s.pre != nil {
		o.bufs = append(o.bufs, s.pre)
	}
	for _, g := range o.groups {
		g.seg = s
		s.unfinished.Add(1)
		for i := range g.Entries {
			e := &g.Entries[i]
			if e.Kind.sequenced() {
				l.seq++
				s.last = l.seq
			}
			e.Seq = s.last
			h := frameHeader{
				kind: e.Kind, disk: e.Disk, payload: uint32(len(e.Data)), prev: s.prev,
				seq: s.last, off: e.Off, len: e.Len, sum: e.sum,
			}
			h.encode(&g.heads[i], s.seed)
			o.bufs = append(o.bufs, g.heads[i][:])
			if len(e.Data) > 0 {
				o.bufs = append(o.bufs, e.Data)
				if pad := int(h.span()) - frameBytes - len(e.Data); pad > 0 {
					o.bufs = append(o.bufs, padding[:pad])
				}
			}
			s.prev = uint32(h.span())
			s.sec.frames++
			switch e.Kind {
			case KindResize:
				l.disks[e.Disk].size = int64(binary.LittleEndian.Uint64(e.Data))
				fallthrough
			case KindWrite, KindZero:
				s.sec.set.Add(e.Disk, e.Off, e.Len)
			case KindCopy:
				// What was copied lies elsewhere; what could not be read does not.
				if bytes.Equal(e.Data, unreadableDigest[:]) {
					s.sec.set.Add(e.Disk, e.Off, e.Len)
				}
			case KindGap:
				s.noted = append(s.noted, bytes.Clone(e.Data))
				_ = eachRun(e.Data, l.touched.Add)
			case KindCut:
				g.section, g.epochSet = s.sec, l.touched
				s.sec, l.touched = l.takeSectionLocked(), BlockSet{}
				g.place = place{at: at, seq: s.last, prev: h.prev, sizes: l.sizesLocked()}
			}
			at += h.span()
		}
	}
}

func (l *Log) sizesLocked() []int64 {
	sizes := make([]int64, len(l.disks))
	for id, d := range l.disks {
		sizes[id] = d.size
	}
	return sizes
}

// failLocked ends the tail after an append that failed or was abandoned, and
// remembers what the op was to hold.
func (l *Log) failLocked(o *op, err error) {
	o.seg.prev, o.seg.last = o.prev, o.last
	l.endTailLocked()
	l.spareErr = fmt.Errorf("the log failed a moment ago: %w", err)
	for _, g := range o.groups {
		g.seg.unfinished.Add(-1)
		g.seg = nil
		if g.section != nil {
			// The cut did not happen: its section goes on.
			l.touched.AddSet(&g.epochSet)
			l.touched.AddSet(&g.section.set)
			o.seg.noted = append(o.seg.noted, g.section.set.Append(nil))
			l.giveSectionLocked(g.section)
			g.section, g.epochSet = nil, BlockSet{}
		}
	}
}

// endOpLocked tells the op's groups, passes the lead on and releases mu. It
// returns err, for the leader g.
func (l *Log) endOpLocked(o *op, g *Group, err error) error {
	for _, q := range o.groups {
		if err != nil {
			l.lostLocked(q)
		}
		if q != g {
			q.err = err
			q.wake <- struct{}{}
		}
	}
	l.giveOpLocked(o)
	l.passLeadLocked()
	l.mu.Unlock()
	return err
}

// passLeadLocked lets the next in the queue lead, or nobody.
func (l *Log) passLeadLocked() {
	l.op = nil
	l.busy = len(l.queue) > 0
	if l.busy {
		l.queue[0].lead = true
		l.queue[0].wake <- struct{}{}
	}
}

// lostLocked remembers that the log lacks the group's changes. They belong to
// the open epoch all the same.
func (l *Log) lostLocked(g *Group) {
	for i := range g.Entries {
		e := &g.Entries[i]
		switch e.Kind {
		case KindResize:
			l.disks[e.Disk].size = int64(binary.LittleEndian.Uint64(e.Data))
			fallthrough
		case KindWrite, KindZero, KindCopy:
			l.lost.Add(e.Disk, e.Off, e.Len)
			l.touched.Add(e.Disk, e.Off, e.Len)
			l.lossy = true
		case KindGap:
			_ = eachRun(e.Data, l.lost.Add)
			_ = eachRun(e.Data, l.touched.Add)
			l.lossy = true
		}
	}
}

func (l *Log) takeOpLocked() *op {
	o := l.opFree
	l.opFree = nil
	if o == nil {
		o = &op{bufs: make([][]byte, 0, 3*GroupMax+1)}
	}
	l.opID++
	o.id = l.opID
	l.op = o
	if !l.watching && l.opt.AppendLimit > 0 {
		l.watching = true
		l.keeper.watchers.Add(1)
		go l.watch()
	}
	return o
}

func (l *Log) giveOpLocked(o *op) {
	clear(o.groups)
	clear(o.bufs)
	*o = op{groups: o.groups[:0], bufs: o.bufs[:0]}
	l.opFree = o
}

const (
	watchTicks = 5   // ticks of the watchdog in AppendLimit
	watchIdle  = 200 // ticks without an append after which it ends
)

// watch is the watchdog. It runs while there are appends and looks at each
// only every tick, so that the appender never reads a clock.
func (l *Log) watch() {
	defer l.keeper.watchers.Done()
	t := time.NewTicker(max(l.opt.AppendLimit/watchTicks, time.Millisecond))
	defer t.Stop()
	var seen uint64
	ticks, idle := 0, 0
	for {
		select {
		case <-t.C:
		case <-l.keeper.quit:
			return
		}
		l.mu.Lock()
		o := l.op
		switch {
		case o == nil && seen == l.opID:
			if idle++; idle >= watchIdle {
				l.watching = false
				l.mu.Unlock()
				return
			}
		case o == nil || o.id != seen:
			seen, ticks, idle = l.opID, 0, 0
		default:
			// A leader that was told that it is late while it waited for a
			// spare may have got one at that very moment, and hang now.
			if ticks++; ticks >= watchTicks && (o.writing || !o.late) {
				l.lateLocked(o)
			}
		}
		l.mu.Unlock()
	}
}

// lateLocked lets go of an append that is over its limit.
func (l *Log) lateLocked(o *op) {
	o.late = true
	if !o.writing {
		l.room.Broadcast() // the leader waits for a spare and gives up by itself
		return
	}
	o.abandoned = true
	l.stuck++
	l.stats.Late++
	o.seg.outstanding++
	l.failLocked(o, ErrLate)
	for i, g := range o.groups {
		l.lostLocked(g)
		switch {
		case i > 0:
			g.err = ErrLate
			g.wake <- struct{}{}
		case g.Abandoned != nil:
			go g.Abandoned(ErrLate)
		}
	}
	l.passLeadLocked()
}
