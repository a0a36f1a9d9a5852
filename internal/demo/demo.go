// Package demo loses a host on purpose and shows that its disk survives: two
// hosts as two daemons on loopback, a disk that is written while it is
// replicated, the primary killed in the middle of that, and a failover whose disk
// is compared with a model of what was written.
//
//	demo.go    the story, step by step
//	hosts.go   the two daemons: processes of this very program
//	disk.go    the disk: a file system, and an area that the writer stamps
//	writer.go  the guest: one write in flight, each with its number
//	judge.go   is what is served the model after exactly n writes?
//	report.go  the table at the end
//
// # What is claimed, and how it is checked
//
// The writer writes one block at a time and stamps each with its number, so the
// disk after n writes is known exactly. The served disk must equal the model after
// n writes for one n: every block, those never written too. And n must be at
// least the number of the last write that had been acknowledged before the newest
// recovery point was cut; both times are of one clock. The rest of the disk holds
// a file system, which must be byte for byte what it was, and pass e2fsck.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"

	"afterimage/internal/admin"
)

// Options say how the demo is run.
type Options struct {
	// Program is the afterimage binary that becomes the two daemons.
	Program string
	// Dir holds everything; empty: /dev/shm if there is room, else the directory
	// for temporary files. What is in it is removed at the end.
	Dir string
	// Sabotage flips a byte of a stored layer before the failover.
	Sabotage bool
	// Say is told what happens, a line at a time.
	Say io.Writer
	// WriteFor is how long the guest writes; 0: 9 s.
	WriteFor time.Duration
}

const (
	vmName   = "vm1"
	diskName = "root"
	// every is the interval between two points.
	every = 2 * time.Second
	// settle bounds how long anything of the demo's own setting up may take.
	settle = 60 * time.Second
)

// ErrDifferent says that the disk that is served is not what it must be.
var ErrDifferent = errors.New("the disk that the replica serves is not the disk that was written")

// A SabotageError says that a sabotaged demo found no damage.
type SabotageError struct{ Layer string }

func (e *SabotageError) Error() string {
	return fmt.Sprintf("a byte of layer %s was changed, and the failover did not notice", e.Layer)
}

// Run runs the demo. The report is complete only without an error; with
// ErrDifferent it has a verdict all the same.
func Run(ctx context.Context, o Options) (r *Report, err error) {
	if o.WriteFor == 0 {
		o.WriteFor = 9 * time.Second
	}
	dir, err := workDir(o.Dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s := &story{o: o, dir: dir, report: &Report{EverySeconds: every.Seconds(), DiskBytes: diskBytes}}
	defer func() { err = errors.Join(err, s.end()) }()
	err = s.tell(ctx)
	return s.report, err
}

// A story is one run.
type story struct {
	o      Options
	dir    string
	report *Report

	primary, replica *host
	image            string
	writer           *writer
}

func (s *story) say(format string, args ...any) { fmt.Fprintf(s.o.Say, format+"\n", args...) }

func (s *story) tell(ctx context.Context) error {
	s.say("two hosts, in %s", s.dir)
	if err := s.setUp(ctx); err != nil {
		return err
	}
	if err := s.replicate(ctx); err != nil {
		return err
	}
	if err := s.write(ctx); err != nil {
		return err
	}
	if s.o.Sabotage {
		return s.sabotage(ctx)
	}
	return s.failOver(ctx)
}

// end stops what still runs.
func (s *story) end() error {
	if s.writer != nil {
		s.writer.stop()
	}
	var err error
	for _, h := range []*host{s.primary, s.replica} {
		if h != nil {
			err = errors.Join(err, h.stop())
		}
	}
	return err
}

// setUp makes certificates, daemons and the disk.
func (s *story) setUp(ctx context.Context) (err error) {
	if err := makeCertificates(s.dir); err != nil {
		return err
	}
	if s.replica, err = startHost(ctx, s.o.Program, s.dir, "replica"); err != nil {
		return err
	}
	if s.primary, err = startHost(ctx, s.o.Program, s.dir, "primary"); err != nil {
		return err
	}
	s.image = filepath.Join(s.dir, "disk.raw")
	s.report.FileSystem, err = makeDisk(ctx, s.image)
	if err != nil {
		return err
	}
	what := "without a file system, for there is no mkfs.ext4"
	if s.report.FileSystem {
		what = "with an ext4 file system"
	}
	s.say("a disk of %s, %s", humanize.IBytes(diskBytes), what)
	vm, err := s.primary.admin.AddVM(ctx, admin.AddVM{Name: vmName, Disks: []admin.AddDisk{{Name: diskName, Image: s.image}}})
	if err != nil {
		return err
	}
	s.writer = newWriter(vm.Disks[0].URI)
	return nil
}

// replicate begins to, and waits for the first point; nobody asks for one.
func (s *story) replicate(ctx context.Context) error {
	if _, err := s.replica.admin.AllowPeer(ctx, admin.AllowPeer{Pattern: "primary.example"}); err != nil {
		return err
	}
	if _, err := s.primary.admin.Enable(ctx, vmName, admin.Enable{To: s.replica.listen, EverySeconds: every.Seconds()}); err != nil {
		return err
	}
	s.say("replicated every %v, over TLS with certificates on both sides", every)
	began := time.Now()
	for {
		r, err := s.primary.admin.Replication(ctx, vmName)
		if err != nil {
			return err
		}
		if r.LastPoint != nil {
			s.say("the first copy took %.1f s", time.Since(began).Seconds())
			return nil
		}
		if time.Since(began) > settle {
			return fmt.Errorf("the first copy is not there after %v: %s", settle, r.Reasons)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// write lets the guest write, and kills the primary while it does, at a moment
// when writes have been acknowledged that no point holds.
func (s *story) write(ctx context.Context) error {
	if err := s.writer.start(ctx); err != nil {
		return err
	}
	s.say("the guest writes, one block at a time, each with its number; nothing asks for a sync from here on")
	end := time.Now().Add(s.o.WriteFor)
	for {
		r, err := s.primary.admin.Replication(ctx, vmName)
		if err != nil {
			return err
		}
		s.report.take(&r)
		if err := s.writer.failed(); err != nil {
			return err
		}
		// Late enough in the interval that there is something to lose.
		if time.Now().After(end) && r.LastPoint != nil && time.Since(r.LastPoint.Time) > every/2 {
			break
		}
		if time.Since(end) > settle {
			return fmt.Errorf("no recovery point came for %v: %s", settle, r.Reasons)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	if err := s.primary.kill(); err != nil {
		return err
	}
	s.report.Killed = time.Now()
	s.writer.stop()
	s.report.WrittenBytes, s.report.Acked = s.writer.acked()*blockBytes, s.writer.acked()
	s.say("kill -9 of the primary's daemon while write %d was under way", s.writer.begun())
	return nil
}

// newest is the newest point the replica lists.
func (s *story) newest(ctx context.Context) (admin.Point, error) {
	points, err := s.replica.admin.Points(ctx, vmName)
	if err != nil {
		return admin.Point{}, err
	}
	if len(points) == 0 {
		return admin.Point{}, errors.New("the replica lists no point")
	}
	return points[len(points)-1], nil
}

// failOver starts the VM on the replica, and judges its disk.
func (s *story) failOver(ctx context.Context) error {
	p, err := s.newest(ctx)
	if err != nil {
		return err
	}
	s.report.Point, s.report.PointAge = p.ID, s.report.Killed.Sub(p.Time).Seconds()
	s.report.AckedBefore = s.writer.ackedBefore(p.Time)
	s.report.AckedAfter = s.report.Acked - s.report.AckedBefore
	s.say("%d writes were acknowledged after the newest point was cut: they are lost with the host", s.report.AckedAfter)
	run, err := s.replica.admin.Failover(ctx, vmName, admin.StartRun{Unplanned: true}, nil)
	if err != nil {
		return err
	}
	s.report.FirstRead = run.FirstReadSeconds
	s.say("failover to point %s: the disk was served, and its first bytes read, after %.3f s", p.ID, run.FirstReadSeconds)
	return s.judge(ctx, run.Disks[0].URI)
}

// sabotage changes a byte of the newest layer; the failover must name it.
func (s *story) sabotage(ctx context.Context) error {
	layer, err := newestLayer(s.replica.state)
	if err != nil {
		return err
	}
	if err := flipByte(layer); err != nil {
		return err
	}
	s.say("sabotage: one byte of %s was changed", filepath.Base(layer))
	_, err = s.replica.admin.Failover(ctx, vmName, admin.StartRun{Unplanned: true}, nil)
	if err == nil {
		return &SabotageError{layer}
	}
	return err
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
