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
// After anything else, and if a segment is damaged, frames prove nothing about
// the disk (rule R7): all of it becomes a gap, which the log is told too.
//
// A crash during the recovery leaves the same log, perhaps with some ranges
// logged again; the next one does it all once more.
func (f *Filter) Recover(log *hrl.Log, disk hrl.DiskID, name string, found hrl.Recovery, progress func(bytes int64)) (Recovered, error) {
	out := Recovered{Found: found}
	switch found {
	case hrl.RecoverNew, hrl.RecoverClean:
		return out, nil
	case hrl.RecoverPowerCut:
		out.Whole = errors.New("the host stopped, or log or disk were mounted anew, while the log was open")
	default:
		segs, err := log.Segments()
		if err != nil {
			return out, err
		}
		defer segs.Close()
		a := &again{f: f, log: log, disk: disk, out: &out, progress: progress}
		_, err = segs.Latest(name, a.compare)
		switch {
		case errors.Is(err, hrl.ErrNoDisk):
			return out, nil // nothing was ever logged of it
		case errors.Is(err, hrl.ErrDamaged):
			out.Whole = err
		case err != nil:
			return out, fmt.Errorf("compare %s with its log: %w", f.info.Name, err)
		}
	}
	if out.Whole != nil {
		out.GapBytes = f.Size()
		f.gap(&tee{log, disk}, 0, f.Size())
	}
	return out, nil
}

// again compares the disk with the log.
type again struct {
	f        *Filter
	log      *hrl.Log
	disk     hrl.DiskID
	out      *Recovered
	progress func(int64)
	buf      []byte
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
	g.Add(hrl.Entry{Kind: hrl.KindWrite, Disk: a.disk, Off: off, Len: int64(len(p)), Data: p})
	if err := a.log.Append(g); err != nil {
		if errors.Is(err, hrl.ErrLate) {
			a.buf = nil // the append may still read it
		}
		a.f.gaps.add(off, int64(len(p)))
		a.out.GapBytes += int64(len(p))
		return nil
	}
	a.log.Finished(g)
	a.out.AgainBytes += int64(len(p))
	return nil
}
