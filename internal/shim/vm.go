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
	v := &VM{opt: o}
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
	// Acked is the place up to which a replica has acknowledged the log.
	Acked hrl.Mark
	// Opened is called when the log is open and recovered, before anything
	// new is logged; what it says must be on record by then is made durable
	// in it. With an error the VM is not logged. May be nil.
	Opened func(log *hrl.Log, found hrl.Recovery) error
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
			s.Runs(func(id hrl.DiskID, off, length int64) {
				if int(id) < len(v.disks) {
					d := v.disks[id]
					d.AddGap(off, min(length, d.Size()-off))
				}
			})
			return nil
		}
	}
	var err error
	if opt.Life, err = v.opt.Life(o.Dir); err != nil {
		return nil, err
	}
	log, found, err := hrl.Open(o.Dir, opt)
	if err != nil {
		return nil, err
	}
	out, err := v.recover(ctx, log, found, &o)
	if err == nil && o.Opened != nil {
		err = o.Opened(log, found)
	}
	if err != nil {
		return nil, errors.Join(err, log.Abort())
	}
	for i, d := range v.disks {
		d.AttachLog(log, hrl.DiskID(i))
	}
	v.mu.Lock()
	v.log = log
	v.mu.Unlock()
	return out, nil
}

// OpenLog is StartLog as package ship asks for it: whole says that the log cannot
// vouch for a disk.
func (v *VM) OpenLog(ctx context.Context, dir string, quota int64, acked hrl.Mark, opened func(*hrl.Log, hrl.Recovery) error) (whole bool, err error) {
	found, err := v.StartLog(ctx, LogOptions{Dir: dir, Quota: quota, Acked: acked, Opened: opened})
	for i := range found {
		whole = whole || found[i].Whole != nil
	}
	return whole, err
}

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
	var out []filter.Recovered
	for i, d := range v.disks {
		r, err := d.Recover(log, hrl.DiskID(i), d.Name, found, o.Acked, progress)
		if err != nil {
			return nil, err
		}
		if why := r.Whole; why != nil {
			v.opt.Warn.Warn("the log cannot vouch for this disk: all of it counts as changed", "disk", d.Name, "why", why, "log", o.Dir)
		}
		out = append(out, r)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return out, log.Recovered()
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
	var err error
	for _, d := range v.disks {
		d.AttachLog(nil, 0)
		err = errors.Join(err, d.Flush())
	}
	v.mu.Lock()
	v.log = nil
	v.mu.Unlock()
	if err != nil {
		return errors.Join(err, log.Abort())
	}
	return log.Close()
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
		if err != nil {
			err = errors.Join(err, v.log.Abort())
		} else {
			err = v.log.Close()
		}
	}
	return errors.Join(err, v.closeDevices())
}

// Abort lets everything go as a killed process would.
func (v *VM) Abort() error {
	v.starting.Lock()
	defer v.starting.Unlock()
	var err error
	if v.log != nil {
		err = v.log.Abort()
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
	beside, err := besideImage(d.Image)
	if err != nil || beside != "" {
		return join(beside, latchName), err
	}
	return join(d.Meta, latchName), nil
}

func join(dir, name string) string {
	if dir == "" {
		return ""
	}
	return filepath.Join(dir, name)
}
