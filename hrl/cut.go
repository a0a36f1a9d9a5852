package hrl

import (
	"fmt"
	"time"
)

// A CutInfo describes a cut.
type CutInfo struct {
	Incarnation uint64
	Epoch       uint64 // the one that the cut ended
	Seq         uint64 // of the cut frame
	Time        time.Time
	// Touched is what the epoch changed, in 64 KiB blocks.
	Touched *BlockSet
}

// Cut ends the open epoch: everything appended before is in it, nothing
// appended after is. It is one small append; nobody waits for a disk (RULES
// B3). Cuts must not be made concurrently. An error means that the epoch goes
// on, under the next number: the frame of a cut that failed may be found in the
// log after all, and no number is given twice (rule R8).
func (l *Log) Cut(kind CutKind) (CutInfo, error) {
	l.mu.Lock()
	epoch := l.epoch
	l.mu.Unlock()
	now := time.Now()
	var p [cutPayloadBytes]byte
	(&cutPayload{epoch: epoch, time: now.UnixNano(), kind: kind}).encode(&p)

	g := NewGroup()
	g.Add(Entry{Kind: KindCut, Disk: noDisk, Data: p[:]})
	if err := l.append(g); err != nil {
		l.mu.Lock()
		l.epoch++
		l.mu.Unlock()
		return CutInfo{}, fmt.Errorf("cut epoch %d: %w", epoch, err)
	}
	info := CutInfo{Incarnation: l.Incarnation(), Epoch: epoch, Seq: g.Entries[0].Seq, Time: now, Touched: &BlockSet{}}
	l.mu.Lock()
	l.epoch++
	l.stats.Cuts++
	g.seg.noted = append(g.seg.noted, g.section.set.Append(nil))
	g.seg.notePlace(g.place)
	l.mu.Unlock()
	l.Finished(g) // only now: until it is noted the segment must not be reclaimed
	info.Touched.AddSet(&g.epochSet)
	info.Touched.AddSet(&g.section.set)
	l.note(g.section)
	return info, nil
}

// note appends a section's set, so that a reader that cannot read the frames
// still knows what they touched (RULES C5), and keeps the section for the next
// cut. It does not matter whether that succeeds: without the note, that reader
// has to take the whole disk as touched.
func (l *Log) note(s *section) {
	if s.frames > 1 { // more than the cut itself
		g := NewGroup()
		g.Add(Entry{Kind: KindTouched, Disk: noDisk, Data: boundedSet(&s.set, groupSpanMax/2)})
		if l.append(g) == nil {
			l.Finished(g)
		}
	}
	l.mu.Lock()
	l.giveSectionLocked(s)
	l.mu.Unlock()
}
