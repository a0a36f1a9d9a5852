package hrl

import (
	"errors"
	"fmt"
	"slices"
)

// reclaim turns the oldest segments into spares if one more would be over the
// quota, or if there is no room for one more. Its frames count until its header is
// overwritten, which happens together with writing the gap frame that names what they
// changed; the caller's gaps are stored before. None without an error: make a new one.
//
// At the quota a bunch of them is given up at once, so that whoever copies what they
// touched is not soon told that there is more (RULES G4).
func (k *keeper) reclaim(noRoom bool) ([]*segment, error) {
	l := k.l
	for {
		s, err := k.reclaimable(noRoom)
		if s == nil || err != nil {
			return nil, err
		}
		if s.f != nil {
			// Rolled a moment ago. Its seal must be written before it is
			// used anew, not into its next use.
			k.seal()
			k.clearBroken()
			continue
		}
		bunch := []*segment{s}
		for int64(len(bunch)+1)*l.opt.SegmentBytes <= l.opt.Quota/bunchPart && !noRoom {
			if s, err = k.reclaimable(true); s == nil || err != nil || s.f != nil {
				break // it is still needed
			}
			bunch = append(bunch, s)
		}
		spares, err := k.reuse(bunch)
		if len(spares) > 0 {
			k.shrink(spares[0])
		}
		if len(spares) > 0 || err != nil {
			return spares, err
		}
	}
}

// bunchPart is which part of the quota a bunch is at most.
const bunchPart = 8

// shrink gives up more of the oldest segments, if there are too many even so:
// every start makes new spares, for the old ones may hold frames that count. The
// files go when the spare's gap frame, which names what they changed, is in the
// log; until then their frames count.
func (k *keeper) shrink(spare *segment) {
	l := k.l
	for {
		s, err := k.reclaimable(false)
		if s == nil || err != nil || s.f != nil {
			return // there will be another time
		}
		l.mu.Lock()
		disks := append([]diskState(nil), l.disks...)
		l.mu.Unlock()
		touched := s.touchedSet(l, disks)
		if k.giveUp([]*segment{s}, touched) != nil {
			return
		}
		spare.lost.AddSet(touched)
		spare.surplus = append(spare.surplus, s.path)
		l.mu.Lock()
		l.stats.Reclaimed++
		l.mu.Unlock()
	}
}

// reclaimable takes the oldest segment out of the log if the quota asks for it, or
// anyway, but leaves it there if it is not closed yet.
func (k *keeper) reclaimable(anyway bool) (*segment, error) {
	l := k.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.opt.Quota == 0 || l.readers > 0 {
		return nil, nil
	}
	used := 2 * l.opt.SegmentBytes // the tail and the new one
	for _, s := range l.sealed {
		used += s.size
	}
	for _, s := range l.spares {
		used += s.size
	}
	if used <= l.opt.Quota && (!anyway || len(l.sealed) == 0) {
		return nil, nil
	}
	if len(l.sealed) == 0 {
		return nil, errors.New("the log's quota is too small")
	}
	s := l.sealed[0]
	if s.unfinished.Load() > 0 || s.outstanding > 0 {
		return nil, fmt.Errorf("the log is at its quota and segment %s is %w", s.path, errNeeded)
	}
	if s.f != nil {
		return s, nil
	}
	n := copy(l.sealed, l.sealed[1:])
	l.sealed[n] = nil
	l.sealed = l.sealed[:n]
	return s, nil
}

// giveUp has what segments' frames touched stored as gaps, durably, and notes that
// they do not count any more. If that cannot be done they stay the oldest; the
// next try is in a moment.
func (k *keeper) giveUp(segs []*segment, touched *BlockSet) error {
	l := k.l
	err := l.opt.Reclaimed(touched)
	if err == nil {
		err = l.forgetBefore(k.oldest())
	}
	if err != nil {
		k.putBack(segs)
	}
	return err
}

// putBack makes segments the oldest ones again.
func (k *keeper) putBack(segs []*segment) {
	l := k.l
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sealed = slices.Insert(l.sealed, 0, segs...)
}

// oldest is the number of the oldest segment in the log, or of the next one.
func (k *keeper) oldest() uint64 {
	l := k.l
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range append(l.sealed[:len(l.sealed):len(l.sealed)], l.tail) {
		if s != nil && !s.empty && s.head.ordinal > 0 {
			return s.head.ordinal
		}
	}
	return l.ordinal
}

// reuse makes spares of reclaimed segments, to be used in this order, the oldest first. A
// file of an unfit size, left when the options were others or cut off by an accident, is
// removed instead.
func (k *keeper) reuse(segs []*segment) (spares []*segment, err error) {
	l := k.l
	l.mu.Lock()
	disks := append([]diskState(nil), l.disks...)
	l.mu.Unlock()
	touched := make([]*BlockSet, len(segs))
	all := &BlockSet{}
	for i, s := range segs {
		touched[i] = s.touchedSet(l, disks)
		all.AddSet(touched[i])
	}
	if err := k.giveUp(segs, all); err != nil {
		return nil, err
	}
	for i, s := range segs {
		spare, err := k.reuseOne(s, touched[i])
		if err != nil {
			k.putBack(segs[i:]) // the next try is in a moment
			if len(spares) > 0 {
				break
			}
			return nil, err
		}
		if spare != nil {
			spares = append(spares, spare)
		}
	}
	return spares, nil
}

// reuseOne makes a spare of a segment that was given up. Nil without an error: its file
// was unfit, and is removed.
func (k *keeper) reuseOne(s *segment, touched *BlockSet) (*segment, error) {
	l := k.l
	f, err := l.fs.Edit(s.path)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		f.Close()
		return nil, err
	}
	fit := size == l.opt.SegmentBytes
	if !fit {
		f.Close()
		if err := l.fs.Remove(s.path); err != nil {
			return nil, err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Reclaimed++
	if !fit {
		l.lost.AddSet(touched)
		l.lossy = true
		return nil, nil
	}
	return &segment{path: s.path, size: size, f: f, lost: *touched}, nil
}

// touchedSet is what the segment's frames touched; every block of every disk
// where that cannot be found out.
func (s *segment) touchedSet(l *Log, disks []diskState) *BlockSet {
	var set BlockSet
	if s.touched != nil {
		for _, b := range append(s.noted[:len(s.noted):len(s.noted)], s.touched) {
			_ = eachRun(b, set.Add) // made by BlockSet.Append, or checked by Entry.check
		}
		return &set
	}
	if r, err := openSegments(l.fs, []string{s.path}); err == nil {
		defer r.Close()
		r.copiesKept = l.opt.CopiesKept
		if len(r.Segments) == 1 && r.touched(r.Segments[0], Mark{}, disks, &set) == nil {
			return &set
		}
	}
	for id, d := range disks {
		set.Add(DiskID(id), 0, d.size)
	}
	return &set
}
