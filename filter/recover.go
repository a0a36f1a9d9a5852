package filter

import (
	"bytes"
	"errors"
	"fmt"

	"afterimage/blockdev"
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
}

// Recover makes log and disk agree again after the log was opened, before it is
// attached and anything is exported; found is what hrl.Open said, and name the
// disk's in the log. The lock on the disk is held by the caller.
//
// After a kill the disk may lack the newest frames, or have them in part: their
// disk writes had not ended, and nobody was told that they had. So every range
// the log names is read, and where the disk differs from its newest frame, the
// disk's bytes are logged again (RULES E5). The disk is the truth and is never written.
//
// After anything else, if a segment is damaged, and if a sync of the disk failed,
// frames prove nothing about the disk (rules R7 and R9): all of it becomes a gap, which the log is told too.
//
// A disk whose size is not what the log says was resized meanwhile; that is
// logged.
//
// A crash during the recovery leaves the same log, perhaps with some ranges
// logged again; the next one does it all once more.
//
// What lies before acked has got to the replica: gaps and copies there are healed.
func (f *Filter) Recover(log *hrl.Log, disk hrl.DiskID, name string, found hrl.Recovery, acked hrl.Mark, progress func(bytes int64)) (Recovered, error) {
	out := Recovered{Found: found}
	if found == hrl.RecoverNew {
		return out, nil
	}
	a := &again{f: f, tee: &tee{log, disk}, out: &out, progress: progress}
	size := f.Size()
	old, known := knownSize(log, name)
	if known && old != size {
		a.resized(old, size)
	}
	latched := f.latch.err()
	switch {
	case latched != nil:
		out.Whole = latched
	case found == hrl.RecoverPowerCut:
		out.Whole = errors.New("the host stopped, or log or disk were mounted anew, while the log was open")
	case found == hrl.RecoverKill:
		segs, err := log.Segments()
		if err != nil {
			return out, err
		}
		defer segs.Close()
		_, err = segs.LatestUnhealed(name, acked, a.compare)
		switch {
		case err == nil, errors.Is(err, hrl.ErrNoDisk): // nothing was ever logged of it
		case errors.Is(err, hrl.ErrDamaged):
			out.Whole = err
		default:
			return out, fmt.Errorf("compare %s with its log: %w", f.info.Name, err)
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
	case known && size > old:
		// The log now says that what came anew is zero.
		if err := a.compare(&hrl.Version{Kind: hrl.KindZero, Off: old, Len: size - old}); err != nil {
			return out, fmt.Errorf("compare %s with its log: %w", f.info.Name, err)
		}
	}
	return out, nil
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
	if err := blockdev.ReadAt(a.f.dev, a.buf[:hi-lo], lo); err != nil {
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
