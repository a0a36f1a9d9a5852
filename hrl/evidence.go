package hrl

import "fmt"

// Evidence returns what the log's frames behind the mark changed, or name as lost: in
// blocks, with disks numbered as AddDisk did. It is what the log is good for when its
// content cannot be relied on (rule R7), or its oldest part has been given up. It may
// name more, up to the whole of the segment that has the mark.
//
// During the recovery it reads what earlier incarnations have left. After a power cut
// frames may be torn, or missing; but what a Sync has made durable must be there. If it
// is not, an error that wraps ErrDamaged says so: then nobody knows what changed. What is
// torn or missing behind that was written to extents that are still marked. Copies
// change no disk, but count unless whoever made them remembers them (Options.CopiesKept).
//
// Later it knows without reading what this incarnation has logged; copies do not count.
func (l *Log) Evidence(behind Mark) (*BlockSet, error) {
	l.metaMu.Lock()
	m, lacks := l.meta, l.lacks
	l.metaMu.Unlock()
	if lacks != nil {
		return nil, lacks
	}
	l.mu.Lock()
	recovering := l.tail == nil && l.seq == 0
	disks := append([]diskState(nil), l.disks...)
	l.mu.Unlock()
	if !recovering {
		return l.touchedBehind(behind, disks), nil
	}
	segs, err := l.Segments()
	if err != nil {
		return nil, err
	}
	defer segs.Close()
	segs.copiesKept = l.opt.CopiesKept
	if err := segs.durable(&m); err != nil {
		return nil, err
	}
	set := &BlockSet{}
	for _, s := range segs.Segments {
		if s.Incarnation < behind.Incarnation || s.Incarnation == behind.Incarnation && s.Last < behind.Seq {
			continue
		}
		good := *s
		good.Damage = nil // what is torn is marked
		if err := segs.touched(&good, behind, disks, set); err != nil {
			return nil, err
		}
	}
	return set, nil
}

// touchedBehind is Evidence for a log in use.
func (l *Log) touchedBehind(behind Mark, disks []diskState) *BlockSet {
	set := &BlockSet{}
	var old []*segment // of earlier incarnations: they have to be read
	l.mu.Lock()
	l.readers++ // no segment is given up or released meanwhile
	set.AddSet(&l.lost)
	for i, s := range l.sealed {
		switch {
		case s.empty || l.coversLocked(behind, s, nextOf(l.sealed, i)):
		case s.touched == nil:
			old = append(old, s)
		default:
			s.addTouched(set)
		}
	}
	if l.tail != nil {
		l.tail.addTouched(set)
	}
	l.mu.Unlock()
	for _, s := range old {
		set.AddSet(s.touchedSet(l, disks))
	}
	l.mu.Lock()
	l.readers--
	l.mu.Unlock()
	l.keeper.kick()
	return set
}

// addTouched adds what the segment's frames touched, as far as that is known without
// reading it. Log.mu is held.
func (s *segment) addTouched(set *BlockSet) {
	if s.sec != nil {
		set.AddSet(&s.sec.set)
	}
	if s.touched != nil {
		_ = eachRun(s.touched, set.Add) // made by BlockSet.Append
	}
	for _, b := range s.noted {
		_ = eachRun(b, set.Add) // likewise, or checked by Entry.check
	}
}

// durable checks that what was made durable is there, from the oldest segment that
// counts on.
func (r *Segments) durable(m *meta) error {
	missing := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrDamaged}, args...)...)
	}
	var prev *Segment
	for _, s := range r.Segments {
		switch {
		case s.Damage != nil && s.head.state != segmentInUse:
			return s.Damage // its place is not known
		case s.Ordinal > m.synced:
			continue
		case s.Ordinal < m.oldest:
			continue
		case s.Damage != nil && (s.Ordinal < m.synced || s.Last < m.syncedSeq):
			return s.Damage
		case s.Ordinal == m.synced && s.Last < m.syncedSeq:
			return missing("segment %s ends with frame %d, %d was durable", s.Path, s.Last, m.syncedSeq)
		case prev != nil && s.Ordinal > prev.Ordinal+1 && !s.AfterLoss:
			return missing("%d segments before %s", s.Ordinal-prev.Ordinal-1, s.Path)
		case prev != nil && s.Incarnation == prev.Incarnation && !s.AfterLoss && s.First != prev.Last+1:
			return missing("frames between %d and %d", prev.Last, s.First)
		}
		prev = s
	}
	if m.synced >= max(m.oldest, 1) && (prev == nil || prev.Ordinal < m.synced) {
		return missing("segment number %d was durable", m.synced)
	}
	return nil
}
