// Package shim puts together what stands between a guest and its disk: the
// image, the filter in front of it, and the log that the filter tees into.
//
//	shim.go  opening and closing, in the order that keeps data
//	life.go  is this still the boot and the mounts of the last time?
//	note.go  what lies beside an image
//
// # Opening
//
// The image comes locked. Then: the log is opened, which takes and makes durable
// a new incarnation; log and disk are made to agree (filter.Recover); only then
// is the log attached and may anybody write. A crash anywhere in between leaves
// the log unclosed, and the next opening begins again.
//
// # Closing
//
// The disk is made durable first, then the log, which is recorded as closed
// cleanly last of all. If the disk cannot be made durable the log is left open, so
// that the next opening does not trust it.
package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"afterimage/blockdev"
	"afterimage/filter"
	"afterimage/hrl"
)

// Options say how a disk is served.
type Options struct {
	Name string // of the disk in its log
	// Image is the path of the image, or empty if it is none of this host's.
	Image string
	// LogDir is where changes are logged; empty: they are not.
	LogDir string
	// LogQuota bounds the log, in bytes; 0: nothing is ever given up.
	LogQuota int64
	// AppendLimit is how long a guest's write may wait for the log; 0: the
	// usual time.
	AppendLimit time.Duration
	// SegmentBytes is the size of the log's segments; 0: the usual one.
	SegmentBytes int64
	// Reopen is the operator's word that a disk whose sync failed may be
	// called durable again.
	Reopen bool
	// Progress is called during the recovery with bytes compared; may be nil.
	Progress func(bytes int64)
	// Warn is told what an operator has to know; nil: slog.Default().
	Warn *slog.Logger
}

// A Disk is served: a Queue that exports can be given.
type Disk struct {
	*filter.Filter
	// Recovered says what the opening found; its zero value without a log.
	Recovered filter.Recovered

	dev blockdev.Device
	log *hrl.Log
	opt Options
}

// ErrOtherDisk says that a log directory belongs to another disk.
var ErrOtherDisk = errors.New("the log is another disk's")

// minSegments is how many segments a quota must have room for.
const minSegments = 5

// Open puts a disk together over dev, which it owns from then on, also if it
// fails. Errors wrap those of package hrl and ErrOtherDisk.
func Open(ctx context.Context, dev blockdev.Device, o Options) (*Disk, error) {
	if o.Warn == nil {
		o.Warn = slog.Default()
	}
	d := &Disk{dev: dev, opt: o}
	if err := d.open(ctx); err != nil {
		if d.log != nil {
			err = errors.Join(err, d.log.Abort())
		}
		return nil, errors.Join(err, dev.Close())
	}
	return d, nil
}

func (d *Disk) open(ctx context.Context) error {
	o := &d.opt
	latch, err := latchPath(o)
	if err != nil {
		return err
	}
	if d.Filter, err = filter.New(d.dev, filter.Options{Latch: latch, Warn: o.Warn}); err != nil {
		return err
	}
	if err := d.Latched(); err != nil && !o.Reopen {
		o.Warn.Warn("flushes of this disk will fail until it is reopened", "why", err)
	}
	if o.LogDir != "" {
		if err := d.openLog(ctx); err != nil {
			return err
		}
	}
	if o.Reopen {
		// Only now: the log had to hear of the failure first.
		if err := d.Filter.Reopen(); err != nil {
			return fmt.Errorf("reopen: %w", err)
		}
	}
	return nil
}

func (d *Disk) openLog(ctx context.Context) error {
	o := &d.opt
	opt := hrl.Options{SegmentBytes: o.SegmentBytes, Quota: o.LogQuota, AppendLimit: o.AppendLimit}
	if o.LogQuota > 0 {
		opt.SegmentBytes, opt.Prewrite = segmentFor(o.LogQuota, o.SegmentBytes), true
		opt.Reclaimed = func(s *hrl.BlockSet) {
			s.Runs(func(_ hrl.DiskID, off, length int64) { d.AddGap(off, min(length, d.Size()-off)) })
		}
	}
	var err error
	if opt.Life, err = life(o.Image, o.LogDir, d.dev.Info().Name); err != nil {
		return err
	}
	var found hrl.Recovery
	if d.log, found, err = hrl.Open(o.LogDir, opt); err != nil {
		return err
	}
	for _, k := range d.log.Known() {
		if k.Name != o.Name {
			return fmt.Errorf("%w: %s logs disk %q, this one is %q", ErrOtherDisk, o.LogDir, k.Name, o.Name)
		}
	}
	id, err := d.log.AddDisk(o.Name, d.Size())
	if err != nil {
		return err
	}
	// Whoever asks for a log wants to hear now that it cannot be kept.
	if err := d.log.Ready(); err != nil {
		return err
	}
	if d.Recovered, err = d.Recover(d.log, id, o.Name, found, func(n int64) {
		if o.Progress != nil {
			o.Progress(n)
		}
	}); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if why := d.Recovered.Whole; why != nil {
		o.Warn.Warn("the log cannot vouch for this disk: all of it counts as changed", "why", why, "log", o.LogDir)
	}
	if err := d.log.Recovered(); err != nil {
		return err
	}
	d.AttachLog(d.log, id)
	return nil
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

// Stats are what a disk has done since it was opened.
type Stats struct {
	Filter    filter.Stats     `json:"filter"`
	Log       *hrl.Stats       `json:"log,omitempty"`
	Recovered filter.Recovered `json:"recovered"`
}

// Stats returns them.
func (d *Disk) Stats() Stats {
	s := Stats{Filter: d.Filter.Stats(), Recovered: d.Recovered}
	if d.log != nil {
		l := d.log.Stats()
		s.Log = &l
	}
	return s
}

// Close makes disk and log durable and lets them go. Nothing must be submitted
// any more.
func (d *Disk) Close() error {
	err := d.Filter.Close()
	if err != nil {
		err = fmt.Errorf("make %s durable: %w", d.dev.Info().Name, err)
	}
	if d.log != nil {
		if err != nil {
			err = errors.Join(err, d.log.Abort())
		} else {
			err = d.log.Close()
		}
	}
	return errors.Join(err, d.dev.Close())
}

// latchPath is the file that keeps the error latch of the disk.
func latchPath(o *Options) (string, error) {
	beside, err := besideImage(o.Image)
	if err != nil || beside != "" {
		return join(beside, latchName), err
	}
	return join(o.LogDir, latchName), nil
}

func join(dir, name string) string {
	if dir == "" {
		return ""
	}
	return filepath.Join(dir, name)
}
