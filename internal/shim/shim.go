// Package shim puts together what stands between a guest and its disk: the
// image, the filter in front of it, and the log that the filter tees into.
//
//	shim.go  one disk with a log of its own, as `serve` has it
//	vm.go    the disks of a VM with one log, opened and closed in the order that keeps data
//	track.go what is tracked beside the images: hot extents, gaps, the stamp
//	cool.go  the goroutine that clears marks by rule R4
//	room.go  what a log leaves to images on the same file system
//	life.go  is this still the boot and the mounts of the last time?
//	note.go  what lies beside an image
//
// # Opening
//
// The images come locked. A crash after each step leaves the log unclosed, and the next
// opening begins again with what it finds:
//
//  1. the log is opened, with a new incarnation: after a power cut it is in doubt, and
//     stays so until step 5
//  2. maps and stamps are opened; they forget nothing of what they found
//  3. log and disks are made to agree (filter.Recover): what is doubtful becomes gaps
//  4. the gaps are synced, then what the caller has to know is on record
//     (LogOptions.Opened)
//  5. the log is told that the doubt has ended: what is older than this incarnation
//     counts no more. From here on a kill is a kill again
//  6. the stamps say that the images are in use, and the marks that were found are
//     forgotten, but after a kill: then the cooler first makes durable what the killed
//     process had written
//  7. the log is attached. What was written without it is made durable, for no mark
//     tells of it; then anybody may write, and copy
//
// # Closing
//
// The disks are made durable first, then the gaps; then the log, which is recorded as
// closed cleanly; then the maps of hot extents are recorded as clean, and the stamps last.
// If anything of that fails the log is left open, so that the next opening does not
// trust it. A crash before the log's record leaves it as after a kill or power cut;
// after it, a log that vouches for everything, whatever the maps say.
package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	*filter.Disk
	// Recovered says what the opening found; its zero value without a log.
	Recovered filter.Recovered

	vm *VM
}

// ErrOtherDisk says that a log directory belongs to another disk.
var ErrOtherDisk = errors.New("the log is another disk's")

// minSegments is how many segments a quota must have room for.
const minSegments = 5

// Open puts a disk together over dev, which it owns from then on, also if it
// fails. Errors wrap those of package hrl and ErrOtherDisk.
func Open(ctx context.Context, dev blockdev.Device, o Options) (*Disk, error) {
	vm, err := OpenVM(ctx, VMOptions{
		Disks: []VMDisk{{Name: o.Name, Image: o.Image, Device: dev, Meta: o.LogDir}}, Warn: o.Warn, AppendLimit: o.AppendLimit,
		reopens: o.Reopen,
	})
	if err != nil {
		return nil, err
	}
	d := &Disk{Disk: vm.disks[0], vm: vm}
	if err := d.open(ctx, o); err != nil {
		return nil, errors.Join(err, vm.Abort())
	}
	return d, nil
}

func (d *Disk) open(ctx context.Context, o Options) error {
	if o.LogDir != "" {
		found, err := d.vm.StartLog(ctx, LogOptions{
			Dir: o.LogDir, Quota: o.LogQuota, SegmentBytes: o.SegmentBytes, Progress: o.Progress, alone: true,
		})
		if err != nil {
			return err
		}
		d.Recovered = found[0]
	}
	if o.Reopen {
		// Only now: the log had to hear of the failure first.
		if err := d.Reopen(); err != nil {
			return fmt.Errorf("reopen: %w", err)
		}
	}
	return nil
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
	if log := d.vm.Log(); log != nil {
		l := log.Stats()
		s.Log = &l
	}
	return s
}

// Close makes disk and log durable and lets them go. Nothing must be submitted
// any more.
func (d *Disk) Close() error { return d.vm.Close() }
