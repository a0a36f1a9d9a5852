package hrl

import "fmt"

// Evidence returns what the log's frames behind the mark changed, or name as lost: in
// blocks, with disks numbered as AddDisk did. It is what the log is good for when its
// content cannot be relied on (rule R7): after a power cut frames may be torn, or
// missing, and the disk may be older or newer than what they say.
//
// What a Sync has made durable must be there. If it is not, an error that wraps
// ErrDamaged says so: then nobody knows what changed. What is torn or missing behind
// that was appended to extents that are still marked.
//
// During the recovery it looks at what earlier incarnations have left, later at all.
func (l *Log) Evidence(acked Mark) (*BlockSet, error) {
	l.mu.Lock()
	recovering := l.tail == nil && l.seq == 0
	disks := append([]diskState(nil), l.disks...)
	l.mu.Unlock()
	var segs *Segments
	var err error
	if recovering {
		segs, err = l.Segments()
	} else {
		segs, err = l.OpenBehind(acked)
	}
	if err != nil {
		return nil, err
	}
	defer segs.Close()
	l.metaMu.Lock()
	m := l.meta
	l.metaMu.Unlock()
	if !recovering {
		m.oldest = 0 // older ones than the mark's were not opened
	}
	if err := segs.durable(&m); err != nil {
		return nil, err
	}
	set := &BlockSet{}
	for _, s := range segs.Segments {
		if s.Incarnation < acked.Incarnation || s.Incarnation == acked.Incarnation && s.Last < acked.Seq {
			continue
		}
		good := *s
		good.Damage = nil // what is torn is marked
		if err := segs.touched(&good, acked, disks, set); err != nil {
			return nil, err
		}
	}
	return set, nil
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
		case prev == nil && m.oldest > 0 && s.Ordinal > m.oldest && !s.AfterLoss:
			return missing("the first segment is number %d, not %d", s.Ordinal, m.oldest)
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
