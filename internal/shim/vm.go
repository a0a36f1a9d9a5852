package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"afterimage/blockdev"
	"afterimage/filter"
	"afterimage/hrl"
)

// A VMDisk is a disk of a VM, opened and locked.
type VMDisk struct {
	Name string // in the log
	// Image is the path of the image, or empty if it is none of this host's.
	Image  string
	Device blockdev.Device // the VM's from then on
	// Meta is a directory for what cannot lie beside the image, because that
	// is no file; empty: such things are kept in memory.
	Meta string
}

// VMOptions say how a VM's disks are put together.
type VMOptions struct {
	Name  string
	Disks []VMDisk
	// AppendLimit is how long a guest's write may wait for the log; 0: the
	// usual time.
	AppendLimit time.Duration
	// Warn is told what an operator has to know; nil: slog.Default().
	Warn *slog.Logger
	// FS is where logs, and what lies beside images, are; nil: hrl.OS.
	FS hrl.FS
	// Life tells one life of this host, and of what is mounted on it, from
	// another; nil: the kernel is asked. The simulator has lives of its own.
	Life func(logDir string) ([32]byte, error)
	// HotCap is how many bytes of a disk may be hot before marks are cleared; 0:
	// the usual number (see hot.Options).
	HotCap int64

	reopens bool // the operator has said that latched disks may be used again
}

// A VM is the disks of one VM, each behind its filter, and one log for all of
// them while they are logged (rule R2).
type VM struct {
	opt   VMOptions
	disks []*filter.Disk

	starting sync.Mutex // held by what changes log

	mu  sync.Mutex
	log *hrl.Log // nil: nothing is logged

	// tracks are of the disks in their order, and cooler clears their marks, while
	// there is a log. Both are guarded by starting.
	tracks []*track
	cooler *cooler
	marked chan struct{} // capacity 1; wakes the cooler
}

// OpenVM puts the disks together; nothing is logged yet. The devices are the VM's
// from then on, also if it fails.
func OpenVM(ctx context.Context, o VMOptions) (*VM, error) {
	if o.Warn == nil {
		o.Warn = slog.Default()
	}
	if o.FS == nil {
		o.FS = hrl.OS
	}
	if o.Life == nil {
		o.Life = func(logDir string) ([32]byte, error) { return life(logDir, o.Disks) }
	}
	v := &VM{opt: o, marked: make(chan struct{}, 1)}
	for _, d := range o.Disks {
		latch, err := latchPath(&d)
		if err == nil {
			var f *filter.Filter
			if f, err = filter.New(d.Device, filter.Options{Latch: latch, FS: o.FS, Warn: o.Warn}); err == nil {
				v.disks = append(v.disks, &filter.Disk{Filter: f, Name: d.Name})
				if why := f.Latched(); why != nil && !o.reopens {
					o.Warn.Warn("flushes of this disk will fail until it is reopened", "why", why)
				}
			}
		}
		if err != nil {
			return nil, errors.Join(err, v.closeDevices())
		}
	}
	return v, nil
}

// Disks returns the disks, in the order they were given.
func (v *VM) Disks() []*filter.Disk { return v.disks }

// Log returns the log, nil while nothing is logged.
func (v *VM) Log() *hrl.Log {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.log
}

// LogOptions say how a VM is logged.
type LogOptions struct {
	Dir string
	// Quota bounds the log, in bytes; 0: nothing is ever given up.
	Quota int64
	// SegmentBytes is the size of its segments; 0: the usual one.
	SegmentBytes int64
	// Acked is the place up to which a replica has acknowledged the log, and
	// Evidence says that what it holds behind that is no content (filter.Found).
	Acked    hrl.Mark
	Evidence bool
	// Session, if not nil, says that what has been delivered of the gaps counts
	// (filter.Found).
	Session *hrl.Mark
	// Opened is called when log and disks agree, before anything new is logged
	// and before anything doubtful is forgotten; what must be on record by then
	// is made durable in it. With an error the VM is not logged. May be nil.
	Opened func(log *hrl.Log, found []filter.Recovered) error
	// Progress is called during the recovery with bytes compared; may be nil.
	Progress func(bytes int64)

	alone bool // the log must be of this VM's disks and no others
}

// StartLog opens the log, makes log and disks agree (filter.Recover), and turns
// the tee on for all disks. What was found of each disk comes in their order. A
// crash anywhere leaves the log unclosed, and the next opening begins again.
func (v *VM) StartLog(ctx context.Context, o LogOptions) ([]filter.Recovered, error) {
	v.starting.Lock()
	defer v.starting.Unlock()
	if v.Log() != nil {
		return nil, fmt.Errorf("VM %s is being logged already", v.opt.Name)
	}
	opt := hrl.Options{FS: v.opt.FS, SegmentBytes: o.SegmentBytes, Quota: o.Quota, AppendLimit: v.opt.AppendLimit}
	if o.Quota > 0 {
		opt.SegmentBytes, opt.Prewrite = segmentFor(o.Quota, o.SegmentBytes), true
		opt.Reclaimed = func(s *hrl.BlockSet) error {
			v.gap(s)
			return v.syncGaps()
		}
	}
	if v.opt.FS == hrl.OS {
		opt.Room = func(bytes int64) bool { return v.room(o.Dir, bytes) }
	}
	var err error
	if opt.Life, err = v.opt.Life(o.Dir); err != nil {
		return nil, err
	}
	if opt.CopiesKept, err = v.tracked(); err != nil {
		return nil, err
	}
	log, found, err := hrl.Open(o.Dir, opt)
	if err != nil {
		return nil, err
	}
	out, err := v.startLog(ctx, log, found, &o)
	if err != nil {
		return nil, errors.Join(err, log.Abort(), v.closeTracks(false))
	}
	v.mu.Lock()
	v.log = log
	v.mu.Unlock()
	v.cooler = startCooler(v, log, found == hrl.RecoverKill)
	return out, nil
}

// startLog makes log and disks agree, and turns the tee on. The order of what is
// durable is in the comment of the package.
func (v *VM) startLog(ctx context.Context, log *hrl.Log, found hrl.Recovery, o *LogOptions) ([]filter.Recovered, error) {
	if err := v.openTracks(found); err != nil {
		return nil, err
	}
	out, err := v.recover(ctx, log, found, o)
	if err == nil {
		err = v.syncGaps()
	}
	if err == nil && o.Opened != nil {
		err = o.Opened(log, out)
	}
	if err == nil {
		err = log.Recovered()
	}
	if err == nil {
		err = v.beginTracks(found)
	}
	if err != nil {
		return nil, err
	}
	for i, d := range v.disks {
		d.AttachLog(log, hrl.DiskID(i))
	}
	for i, d := range v.disks {
		if err := v.syncUntracked(d, v.tracks[i], &out[i]); err != nil {
			for _, d := range v.disks {
				d.AttachLog(nil, 0)
			}
			return nil, fmt.Errorf("make %s durable: %w", d.Name, err)
		}
	}
	return out, nil
}

// OpenLog is StartLog as package ship asks for it.
func (v *VM) OpenLog(ctx context.Context, dir string, quota int64, acked hrl.Mark, evidence bool, session *hrl.Mark, opened func(*hrl.Log, []filter.Recovered) error) error {
	_, err := v.StartLog(ctx, LogOptions{Dir: dir, Quota: quota, Acked: acked, Evidence: evidence, Session: session, Opened: opened})
	return err
}

// recover makes log and disks agree.
func (v *VM) recover(ctx context.Context, log *hrl.Log, found hrl.Recovery, o *LogOptions) ([]filter.Recovered, error) {
	for _, k := range log.Known() {
		if o.alone && k.Name != v.disks[0].Name {
			return nil, fmt.Errorf("%w: %s logs disk %q, this one is %q", ErrOtherDisk, o.Dir, k.Name, v.disks[0].Name)
		}
	}
	for _, d := range v.disks {
		if _, err := log.AddDisk(d.Name, d.Size()); err != nil {
			return nil, err
		}
	}
	// Whoever asks for a log wants to hear now that it cannot be kept.
	if err := log.Ready(); err != nil {
		return nil, err
	}
	progress := o.Progress
	if progress == nil {
		progress = func(int64) {}
	}
	f := filter.Found{Log: found, Acked: o.Acked, Evidence: o.Evidence, Session: o.Session}
	if found != hrl.RecoverNew && (o.Evidence || found == hrl.RecoverPowerCut) {
		behind := o.Acked
		if o.Session != nil && *o.Session != (hrl.Mark{}) {
			behind = *o.Session
		}
		f.Changed, f.ChangedErr = log.Evidence(behind)
	}
	var out []filter.Recovered
	for i, d := range v.disks {
		t := v.tracks[i]
		f.Hot, f.Gaps, f.Image = t.foundHot, t.foundGaps, t.verdict
		r, err := d.Recover(log, hrl.DiskID(i), d.Name, f, progress)
		if err != nil {
			return nil, err
		}
		if why := r.Whole; why != nil {
			v.opt.Warn.Warn("the log cannot vouch for this disk: all of it counts as changed", "disk", d.Name, "why", why, "log", o.Dir)
		}
		out = append(out, r)
	}
	return out, ctx.Err()
}

// gap stores what a log's frames touched, with disks numbered as in it, as gaps.
func (v *VM) gap(s *hrl.BlockSet) {
	s.Runs(func(id hrl.DiskID, off, length int64) {
		if int(id) < len(v.disks) {
			d := v.disks[id]
			d.AddGap(off, min(length, d.Size()-off))
		}
	})
}

// syncGaps makes the gaps of all disks durable.
func (v *VM) syncGaps() error {
	for _, d := range v.disks {
		if err := d.SyncGaps(); err != nil {
			return fmt.Errorf("the gaps of %s: %w", d.Name, err)
		}
	}
	return nil
}

// Resize gives a disk another size, in bytes; it is durable when it returns. Nothing
// of the guest's is under way meanwhile, and a log has it before the image (RULES L2).
// A crash in between leaves a log with a size that the image does not have, which the
// next StartLog notices.
func (v *VM) Resize(disk *filter.Disk, size int64) error {
	v.starting.Lock() // an opening log asks for the sizes
	defer v.starting.Unlock()
	return disk.Resize(size)
}

// StopLog turns the tee off and closes the log, after the disks have been made
// durable: the next opening may trust it then.
func (v *VM) StopLog() error {
	v.starting.Lock()
	defer v.starting.Unlock()
	log := v.Log()
	if log == nil {
		return nil
	}
	v.cooler.stop()
	var err error
	for _, d := range v.disks {
		d.AttachLog(nil, 0)
		err = errors.Join(err, d.Flush())
	}
	v.mu.Lock()
	v.log = nil
	v.mu.Unlock()
	return v.endLog(log, err)
}

// endLog closes the log and what goes with it. failed is why the disks are not
// durable, or nil. The log is recorded as clean when everything that it stands for is
// durable, the marks after it, and the stamps last.
func (v *VM) endLog(log *hrl.Log, failed error) error {
	if failed == nil {
		failed = v.syncGaps()
	}
	var err error
	if failed == nil {
		failed = log.Close()
	} else {
		err = log.Abort()
	}
	return errors.Join(failed, err, v.closeTracks(failed == nil))
}

// Close makes disks and log durable and lets them go. Nothing must be submitted
// any more. If a disk cannot be made durable the log is left open, so that the
// next opening does not trust it.
func (v *VM) Close() error {
	v.starting.Lock()
	defer v.starting.Unlock()
	var err error
	for _, d := range v.disks {
		if ferr := d.Filter.Close(); ferr != nil {
			err = errors.Join(err, fmt.Errorf("make %s durable: %w", d.Info().Name, ferr))
		}
	}
	if v.log != nil {
		v.cooler.stop()
		err = v.endLog(v.log, err)
	}
	return errors.Join(err, v.closeDevices())
}

// Abort lets everything go as a killed process would.
func (v *VM) Abort() error {
	v.starting.Lock()
	defer v.starting.Unlock()
	var err error
	if v.log != nil {
		v.cooler.stop()
		err = errors.Join(v.log.Abort(), v.closeTracks(false))
	}
	return errors.Join(err, v.closeDevices())
}

func (v *VM) closeDevices() error {
	var err error
	for _, d := range v.opt.Disks {
		err = errors.Join(err, d.Device.Close())
	}
	return err
}

// segmentFor is a segment size of which the quota holds enough.
func segmentFor(quota, want int64) int64 {
	if want == 0 {
		want = 64 << 20
	}
	for want > 4<<20 && quota < 2*minSegments*want {
		want /= 2
	}
	return want
}

// latchPath is the file that keeps the error latch of a disk.
func latchPath(d *VMDisk) (string, error) {
	dir, err := placeFor(d)
	if err != nil || dir == "" {
		return "", err
	}
	return filepath.Join(dir, latchName), nil
}
