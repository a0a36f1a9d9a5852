package shim

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"afterimage/filter"
	"afterimage/filter/gap"
	"afterimage/filter/hot"
	"afterimage/filter/stamp"
	"afterimage/hrl"
)

const (
	hotName   = "hot"
	gapsName  = "gaps"
	pendName  = "pending" // gaps that the replica has no copies of
	sentName  = "sent"    // blocks of which it may have copies
	stampName = "stamp"
)

// A track is what of the tracking of one disk is durable, while it is logged. A disk
// without a place for it has none: its fields are nil.
type track struct {
	hot   *hot.Map
	gaps  *gap.Map
	pend  *gap.Map // what of the gaps has to be copied
	sent  *gap.Map // of what older copies may be at the replica
	stamp *stamp.Stamp

	foundHot  *hot.Found
	foundGaps *gap.Found
	verdict   *stamp.Verdict
}

// openTracks opens what lies beside the images, and gives it to the filters. The log
// is open, and held by us. Nothing of it is forgotten before beginTracks.
func (v *VM) openTracks(found hrl.Recovery) error {
	v.tracks = nil
	for i := range v.opt.Disks {
		t := &track{}
		v.tracks = append(v.tracks, t)
		d, f := &v.opt.Disks[i], v.disks[i]
		dir, err := placeFor(d)
		if err != nil {
			return err
		}
		if dir != "" {
			err = t.open(v.opt, dir, d.Image, f.Size(), found == hrl.RecoverNew)
		}
		if err != nil {
			return fmt.Errorf("what is tracked of %s: %w", d.Name, err)
		}
		f.Track(filter.Tracking{Hot: t.hot, Gaps: t.gaps, Pending: t.pend, Sent: t.sent, Marked: v.kickCooler})
	}
	return nil
}

func (t *track) open(o VMOptions, dir, image string, size int64, fresh bool) error {
	fsys := o.FS
	var err error
	if image != "" && fsys == hrl.OS { // the simulator's images are changed by nobody else
		var verdict stamp.Verdict
		if t.stamp, verdict, err = stamp.Open(filepath.Join(dir, stampName), image); err != nil {
			return err
		}
		t.verdict = &verdict
	}
	var found hot.Found
	if t.hot, found, err = hot.Open(fsys, filepath.Join(dir, hotName), size, hot.Options{Warm: true, Cap: o.HotCap}); err != nil {
		return err
	}
	t.foundHot = &found
	var gaps gap.Found
	if t.gaps, gaps, err = gap.Open(fsys, filepath.Join(dir, gapsName), size, fresh); err != nil {
		return err
	}
	t.foundGaps = &gaps
	// Damage of these costs copying, and asks for nothing else.
	if t.pend, _, err = gap.Open(fsys, filepath.Join(dir, pendName), size, false); err != nil {
		return err
	}
	t.sent, _, err = gap.Open(fsys, filepath.Join(dir, sentName), size, false)
	return err
}

// beginTracks is called when what was found is durable elsewhere: as gaps, or, after a
// kill, as what is in the page cache still, which the first round of the cooler makes
// durable. From now on images may be written.
func (v *VM) beginTracks(found hrl.Recovery) error {
	for _, t := range v.tracks {
		if t.stamp != nil {
			if err := t.stamp.Begin(); err != nil {
				return err
			}
		}
		if t.hot != nil && found != hrl.RecoverKill {
			t.hot.Forget()
		}
	}
	return nil
}

// closeTracks closes what lies beside the images. clean says that disks, gaps and log
// are durable, and the log recorded as clean.
func (v *VM) closeTracks(clean bool) error {
	var err error
	for i, t := range v.tracks {
		if t.hot != nil {
			// A map that had failed, or was frozen, stays unclean; that was said then.
			if cerr := t.hot.Close(clean); cerr != nil && !errors.Is(cerr, hot.ErrUnclean) {
				err = errors.Join(err, cerr)
			}
		}
		for _, m := range []*gap.Map{t.gaps, t.pend, t.sent} {
			if m != nil {
				err = errors.Join(err, m.Close())
			}
		}
		if t.stamp != nil {
			err = errors.Join(err, t.stamp.Close(clean))
		}
		v.disks[i].Track(filter.Tracking{})
	}
	v.tracks = nil
	return err
}

// syncUntracked makes durable what was written before the disk was logged, by this process
// or another: no mark tells of it, and copies may be made of it from now on. Only where
// all writes since the last sync were marked there is nothing to do. A disk that cannot be made
// durable any more is compared whole whenever it is opened, so that it may go on.
func (v *VM) syncUntracked(d *filter.Disk, t *track, found *filter.Recovered) error {
	same := t.verdict != nil && t.verdict.Kind == stamp.Same
	marked := found.Found == hrl.RecoverKill || found.Found != hrl.RecoverNew && same
	if marked && found.Whole == nil && !d.Untracked() {
		return nil
	}
	err := d.Flush()
	var latched *filter.LatchedError
	if errors.As(err, &latched) {
		return nil
	}
	return err
}

// placeFor is the directory for what belongs to a disk, or empty.
func placeFor(d *VMDisk) (string, error) {
	beside, err := besideImage(d.Image)
	if err != nil || beside != "" {
		return beside, err
	}
	return d.Meta, nil
}

// tracked reports whether every disk has a place for what is tracked of it.
func (v *VM) tracked() (bool, error) {
	for i := range v.opt.Disks {
		if dir, err := placeFor(&v.opt.Disks[i]); err != nil || dir == "" {
			return false, err
		}
	}
	return true, nil
}

// ForgetTracking removes what is tracked of the disks beside their images, and the
// directories there if they have nothing else. Nothing is logged any more, and the log
// it belonged to is not used again. What stays after a crash is found by the next log of
// these disks, which is a new one and compares the disks in any case.
func (v *VM) ForgetTracking() error {
	v.starting.Lock()
	defer v.starting.Unlock()
	if v.Log() != nil {
		return fmt.Errorf("VM %s is being logged", v.opt.Name)
	}
	var errs []error
	for i := range v.opt.Disks {
		dir, err := placeFor(&v.opt.Disks[i])
		if err != nil || dir == "" {
			errs = append(errs, err)
			continue
		}
		for _, name := range []string{hotName, gapsName, pendName, sentName, stampName} {
			if err := v.opt.FS.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		_ = v.opt.FS.Remove(dir) // fails if something else lies there
	}
	return errors.Join(errs...)
}
