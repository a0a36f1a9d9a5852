package filter

import (
	"bytes"
	"errors"
	"fmt"

	"afterimage/blockdev"
	"afterimage/filter/gap"
	"afterimage/filter/hot"
	"afterimage/filter/stamp"
	"afterimage/hrl"
)

// Recovered says what a recovery found and did.
type Recovered struct {
	Found      hrl.Recovery `json:"-"`
	ReadBytes  int64        `json:"read_bytes"`   // of the disk, compared with the log
	AgainBytes int64        `json:"logged_bytes"` // of those, that differed and were logged again
	GapBytes   int64        `json:"gap_bytes"`    // that the log does not know
	// Whole is why the log's frames could not be relied on, so that the whole
	// disk is a gap; nil if they could.
	Whole error `json:"-"`
	// Evidence says that what the log has is no content, and that all it touched
	// is a gap.
	Evidence bool `json:"evidence"`
}

// A Found is what there was when a disk and its log were opened.
type Found struct {
	Log hrl.Recovery
	// Acked is the place up to which a replica has acknowledged the log: gaps and
	// copies before it are healed.
	Acked hrl.Mark
	// Session, if not nil, says that the session goes on in which what was copied was
	// delivered: those gaps need not be copied again. All that was logged before its
	// mark, if it is not zero, is a gap in the map.
	Session *hrl.Mark
	// Evidence says that what the log holds is no content, whatever Log is: it
	// was so before, and no point has been acknowledged since.
	Evidence bool
	// Changed is what the log's frames behind Acked touched (hrl.Log.Evidence),
	// ChangedErr why that is not known. They are needed after a power cut, and
	// with Evidence.
	Changed    *hrl.BlockSet
	ChangedErr error

	Hot   *hot.Found     // nil: there is no map of hot extents
	Gaps  *gap.Found     // nil: there is no gap map
	Image *stamp.Verdict // nil: nobody has looked whether others changed the image
}

// Recover makes disk and log agree before the disk is exported. The log is open and
// knows the disk, which has been given its maps (Track) and is not attached to the log
// yet. The disk is the truth and is never written.
//
// After a kill, what the log's unrecycled frames touched is read and, where disk and
// log differ, the disk's bytes are logged again (RULES E5).
//
// After a power cut frames are evidence and no content (rule R7): hot extents, and
// whatever the frames touched, become gaps beside those there were.
//
// All of the disk becomes a gap where nothing tells what changed: a sync of it has
// failed (rule R9), somebody else has changed the image (RULES D8), a map or what the
// log had made durable is damaged or missing.
//
// A disk whose size is not what the log says was resized meanwhile; that is
// logged.
//
// Gaps are in the log as well when it returns, and durable when SyncGaps has. A crash
// before that leaves the same log and the same marks; the next recovery does it all
// once more.
func (f *Filter) Recover(log *hrl.Log, disk hrl.DiskID, name string, found Found, progress func(bytes int64)) (Recovered, error) {
	out := Recovered{Found: found.Log}
	if found.Log == hrl.RecoverNew {
		return out, nil
	}
	a := &again{f: f, tee: &tee{log: log, disk: disk}, out: &out, progress: progress}
	size := f.Size()
	old, known := knownSize(log, name)
	if known && old != size {
		a.resized(old, size)
	}
	evidence := found.Evidence || found.Log == hrl.RecoverPowerCut
	out.Whole = f.unknown(&found, evidence)
	if out.Whole == nil && found.Session != nil {
		f.gaps.restore()
	}
	if out.Whole == nil && !evidence && found.Log == hrl.RecoverKill {
		if err := a.reread(log, name, &found); err != nil {
			return out, err
		}
	}
	switch {
	case out.Whole != nil:
		out.GapBytes = size
		if !f.gap(a.tee, 0, size) {
			// Were it in memory alone, a kill would leave a log that looks
			// as if it could be relied on.
			return out, fmt.Errorf("%w, and the log takes no note of that", out.Whole)
		}
	case evidence:
		out.Evidence = true
		if known && size > old {
			f.gaps.add(old, size-old)
		}
		if err := a.evidence(&found); err != nil {
			return out, err
		}
	case known && size > old:
		// The log now says that what came anew is zero.
		if err := a.compare(&hrl.Version{Kind: hrl.KindZero, Off: old, Len: size - old}); err != nil {
			return out, fmt.Errorf("compare %s with its log: %w", f.info.Name, err)
		}
	}
	return out, nil
}

// unknown is why nothing tells what has changed on the disk, or nil.
func (f *Filter) unknown(found *Found, evidence bool) error {
	if err := f.latch.err(); err != nil {
		return err
	}
	if v := found.Image; v != nil && v.Compare {
		return errors.New(v.Reason)
	}
	switch g := found.Gaps; {
	case g == nil:
	case g.Kind == gap.New:
		return errors.New("the map of its gaps is gone")
	case g.All:
		return fmt.Errorf("the map of its gaps is damaged: %w", orUnknown(g.Why))
	}
	if found.Log == hrl.RecoverPowerCut {
		switch h := found.Hot; {
		case h == nil:
			return errors.New("the host stopped, or log or disk were mounted anew, while the log was open")
		case h.All:
			return fmt.Errorf("after a power cut, or that log or disk were mounted anew, its map of hot extents cannot be used: %w", orUnknown(h.Why))
		}
	}
	if evidence && found.ChangedErr != nil {
		return found.ChangedErr
	}
	return nil
}

func orUnknown(err error) error {
	if err == nil {
		return errors.New("it is gone")
	}
	return err
}

// reread compares the disk with the log of a process that was killed.
func (a *again) reread(log *hrl.Log, name string, found *Found) error {
	segs, err := log.Segments()
	if err != nil {
		return err
	}
	defer segs.Close()
	defer func(all []*hrl.Segment) { segs.Segments = all }(segs.Segments)
	acked := found.Acked
	if m := found.Session; m != nil && *m != (hrl.Mark{}) {
		acked = *m
		segs.Segments = after(segs.Segments, acked)
	}
	_, err = segs.LatestUnhealed(name, acked, a.compare)
	switch {
	case err == nil, errors.Is(err, hrl.ErrNoDisk): // nothing was ever logged of it
	case errors.Is(err, hrl.ErrDamaged):
		a.out.Whole = err
	default:
		return fmt.Errorf("compare %s with its log: %w", a.f.info.Name, err)
	}
	return nil
}

// after leaves out segments that lie wholly before the mark. All that they have is a gap,
// and they may be torn, for they may have seen a power cut. A write in them that had not
// ended on the disk is a gap that was not copied since, for it had its range locked. (Of
// what was acknowledged the same cannot be said: the disk may lack such a write.)
func after(segs []*hrl.Segment, mark hrl.Mark) []*hrl.Segment {
	for len(segs) > 0 {
		s := segs[0]
		unknown := s.Damage != nil && s.Incarnation == 0
		last := len(segs) == 1 || segs[1].Incarnation != s.Incarnation || segs[1].First > mark.Seq
		if unknown || s.Incarnation > mark.Incarnation || s.Incarnation == mark.Incarnation && last {
			break
		}
		segs = segs[1:]
	}
	return segs
}

// evidence makes gaps of all that may differ between disk, log and replica.
func (a *again) evidence(found *Found) error {
	var set hrl.BlockSet
	size := a.f.Size()
	add := func(off, length int64) { set.Add(a.tee.disk, off, min(length, size-off)) }
	if found.Changed != nil {
		found.Changed.Runs(func(d hrl.DiskID, off, length int64) {
			if d == a.tee.disk {
				add(off, length)
			}
		})
	}
	if found.Hot != nil && found.Log == hrl.RecoverPowerCut {
		for _, e := range found.Hot.Hot {
			add(e.Off, e.Len)
		}
	}
	a.f.gaps.mu.Lock()
	a.f.gaps.open.Runs(func(_ hrl.DiskID, off, length int64) { add(off, length) })
	a.f.gaps.mu.Unlock()
	set.Runs(func(_ hrl.DiskID, off, length int64) { a.f.gaps.add(off, length) })
	a.out.GapBytes += set.Bytes()
	if set.Empty() {
		return nil
	}
	g := a.tee.note(hrl.GapsEntry(&set))
	if g == nil {
		return fmt.Errorf("%s: the log takes no note of its gaps", a.f.info.Name)
	}
	a.tee.log.Finished(g)
	return nil
}

// knownSize is the size in bytes that the disk had in the log when it was last
// opened.
func knownSize(log *hrl.Log, name string) (size int64, ok bool) {
	for _, d := range log.Known() {
		if d.Name == name {
			return d.Size, true
		}
	}
	return 0, false
}

// again compares the disk with the log.
type again struct {
	f        *Filter
	tee      *tee
	out      *Recovered
	progress func(int64)
	buf      []byte
}

// resized logs that the disk's size changed while nobody logged it: what the
// log says of the bytes between must not come back (RULES L2).
func (a *again) resized(old, size int64) {
	// Of what came anew the replica may have older copies. If that cannot be noted the
	// map is broken, and no session goes on.
	if size > old {
		_ = a.f.gaps.maySent(old, size-old)
	}
	if g := a.tee.note(hrl.ResizeEntry(a.tee.disk, old, size)); g != nil {
		a.tee.log.Finished(g)
		return
	}
	lo, hi := min(old, size), max(old, size)
	a.f.gaps.add(lo, hi-lo)
	a.out.GapBytes += hi - lo
}

func (a *again) compare(v *hrl.Version) error {
	size := a.f.Size()
	n := min(v.Len, size-v.Off)
	if n <= 0 {
		return nil
	}
	switch v.Kind {
	case hrl.KindWrite:
		return a.span(v.Off, v.Data[:n])
	case hrl.KindZero:
		// What is a hole reads as zero; only the rest is looked at.
		var data []blockdev.Extent
		err := a.f.dev.Extents(v.Off, n, func(r blockdev.Run) bool {
			if !r.Zero {
				data = append(data, r.Extent)
			}
			return true
		})
		if err != nil {
			return err
		}
		for _, e := range data {
			for off := e.Off; off < e.End(); off += hrl.PayloadMax {
				if err := a.span(off, zeroes[:min(hrl.PayloadMax, e.End()-off)]); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if v.Kind == hrl.KindCopy && a.f.gaps.isCopied(v.Off, n) {
		return nil // and delivered: nothing newer is a gap
	}
	// A gap stays one; copies lie elsewhere and are a gap as far as this log
	// can tell.
	a.f.gaps.add(v.Off, n)
	a.out.GapBytes += n
	return nil
}

var zeroes = make([]byte, hrl.PayloadMax)

// span compares the disk from off on with what the log says it is, and logs
// again what differs.
func (a *again) span(off int64, want []byte) error {
	// The device's blocks may be larger than the range.
	lo, hi := a.f.alignOut(off, int64(len(want)))
	if int64(len(a.buf)) < hi-lo {
		a.buf = blockdev.AlignedBuf(int(hi - lo))
	}
	if err := blockdev.ReadAt(a.f.dev, a.buf[:hi-lo], lo); isUnreadable(err) {
		// CopyGap finds out what of it is (RULES G5).
		a.f.gaps.add(off, int64(len(want)))
		a.out.GapBytes += int64(len(want))
		return nil
	} else if err != nil {
		return err
	}
	have := a.buf[off-lo : off-lo+int64(len(want))]
	a.out.ReadBytes += int64(len(want))
	if a.progress != nil {
		a.progress(int64(len(want)))
	}
	const sector = blockdev.SectorSize
	for i := 0; i < len(want); {
		if bytes.Equal(have[i:i+sector], want[i:i+sector]) {
			i += sector
			continue
		}
		j := i + sector
		for j < len(want) && !bytes.Equal(have[j:j+sector], want[j:j+sector]) {
			j += sector
		}
		if err := a.logAgain(off+int64(i), have[i:j]); err != nil {
			return err
		}
		i = j
	}
	return nil
}

func (a *again) logAgain(off int64, p []byte) error {
	g := hrl.NewGroup()
	g.Add(hrl.Entry{Kind: hrl.KindWrite, Disk: a.tee.disk, Off: off, Len: int64(len(p)), Data: p})
	if err := a.tee.log.Append(g); err != nil {
		if errors.Is(err, hrl.ErrLate) {
			a.buf = nil // the append may still read it
		}
		a.f.gaps.add(off, int64(len(p)))
		a.out.GapBytes += int64(len(p))
		return nil
	}
	a.tee.log.Finished(g)
	a.out.AgainBytes += int64(len(p))
	return nil
}
