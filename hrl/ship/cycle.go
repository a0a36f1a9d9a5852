package ship

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// errAgain says that no point could be made of a cut, for a reason that copying
// again mends.
var errAgain = errors.New("the log has gaps again")

// idleMax is how long the peer is not asked while nothing changes.
const idleMax = time.Minute

// cycle brings what has changed to the replica. asked says that somebody waits:
// where nothing has changed, the peer says itself that it has everything.
func (s *Shipper) cycle(ctx context.Context, asked bool) error {
	if s.opt.VM.Log() == nil {
		// It was gone, and no new one could be begun then.
		if err := s.openLog(ctx); err != nil {
			return err
		}
	}
	for {
		if !s.met {
			if err := s.meet(ctx); err != nil {
				return err
			}
		}
		fresh := time.Since(s.heard) < idleMax && !asked
		caughtUp, err := s.round(ctx)
		if err != nil {
			return err
		}
		if !caughtUp {
			s.heard = time.Now()
			return nil
		}
		if fresh {
			return nil
		}
		asked, s.met = false, false
	}
}

// round makes a point and delivers it, or finds that there is nothing to deliver.
func (s *Shipper) round(ctx context.Context) (caughtUp bool, err error) {
	if o := s.pending(); o != nil {
		if err := s.deliver(ctx, o); err != nil {
			return false, err
		}
	}
	for {
		switch {
		case s.needWhole:
			if err := s.gapAll(); err != nil {
				return false, err
			}
		case s.needCollapse:
			if err := s.collapse(); err != nil {
				return false, err
			}
		}
		s.retryUnreadable()
		if err := s.copyGaps(ctx); err != nil {
			return false, err
		}
		o, err := s.cut(ctx)
		switch {
		case errors.Is(err, errAgain):
			if err := ctx.Err(); err != nil {
				return false, err
			}
		case err != nil || o == nil:
			return err == nil, err
		default:
			return false, s.deliver(ctx, o)
		}
	}
}

// gapAll makes a gap of every disk and begins a session that reads the log only
// from behind that: whatever changed before will have been copied.
func (s *Shipper) gapAll() error {
	s.resetSession()
	s.state.Whole = true
	if err := s.save(); err != nil {
		return err
	}
	s.beginSession()
	for _, d := range s.opt.VM.Disks() {
		if !d.GapAll() {
			return fmt.Errorf("disk %s has to be compared, and its log takes no note of that", d.Name)
		}
	}
	cut, err := s.opt.VM.Log().Cut(hrl.CutCrash)
	if err != nil {
		return err
	}
	s.newSession(&cut)
	if err := s.readFrom(&cut); err != nil {
		return err
	}
	s.needWhole, s.needCollapse = false, false
	return nil
}

// collapse makes gaps of all that the log has touched since the newest point, and begins
// a session that reads it only from a cut on: its content cannot be relied on (rule R7),
// or its oldest part was given up, and is a gap already. What was logged between the
// cut and the gaps is both, which costs a copy. What a session has copied stays so
// where nothing was written since, for its bytes are over there (RULES G4).
func (s *Shipper) collapse() error {
	if !s.state.Evidence {
		s.state.Evidence = true
		if err := s.save(); err != nil {
			return err
		}
	}
	log := s.opt.VM.Log()
	cut, err := log.Cut(hrl.CutCrash)
	if err != nil {
		return err
	}
	behind := s.state.AckedMark
	if s.session != nil && s.session.Mark != (hrl.Mark{}) {
		behind = s.session.Mark
	}
	touched, err := log.Evidence(behind)
	if err != nil {
		if !errors.Is(err, hrl.ErrDamaged) {
			return err
		}
		s.warn.Warn("the log does not have all that changed: the disks are compared", "log", s.logDir(), "why", err)
		s.noteGap(wire.GapLogLost)
		return s.gapAll()
	}
	disks := s.opt.VM.Disks()
	touched.Runs(func(id hrl.DiskID, off, length int64) {
		if d := disks[id]; off < d.Size() {
			d.AddGap(off, min(length, d.Size()-off))
		}
	})
	if s.session == nil {
		s.beginSession()
		s.newSession(&cut)
	}
	if err := s.readFrom(&cut); err != nil {
		return err
	}
	s.needCollapse = false
	return nil
}

// cut makes a cut and its layers, and records the offer; nil: nothing has changed
// since the newest point. It fails with errAgain where something has to be copied
// before a point can be made.
func (s *Shipper) cut(ctx context.Context) (*offer, error) {
	for _, d := range s.opt.VM.Disks() {
		d.SealGaps()
	}
	info, err := s.opt.VM.Log().Cut(hrl.CutCrash)
	if err != nil {
		return nil, err
	}
	s.dirty = s.dirty || !info.Touched.Empty()
	s.noteCut(info.Time)
	for _, d := range s.opt.VM.Disks() {
		if _, open := d.GapBytes(); open > 0 {
			return nil, errAgain // rather one copy too many
		}
	}
	if !s.dirty && s.session == nil && !s.state.Acked.ID.IsZero() {
		s.noteCaughtUp()
		return nil, nil
	}
	stats := s.opt.VM.Log().Stats()
	if failures := stats.Failed + stats.Late; failures > s.failures {
		s.failures = failures
		if s.session != nil {
			s.noteGap(wire.GapLogFailed)
		}
	}
	o := &offer{Mark: info.Mark(), Point: wire.PointInfo{
		ID:     wire.PointID{Generation: s.state.Generation, Incarnation: info.Incarnation, Epoch: info.Epoch},
		Parent: s.state.Acked.ID, ParentTime: s.state.Acked.Time, Time: info.Time, Kind: wire.KindCrash, Gap: s.state.Gap,
	}}
	if err := s.build(ctx, o); err != nil {
		s.removeFiles(o.Files)
		return nil, s.explain(ctx, err)
	}
	s.state.Offers = append(s.state.Offers, *o)
	if s.session != nil {
		s.session.Sealed = o.Point.ID
	}
	// On record before its first byte leaves (RULES H2).
	if err := s.save(); err != nil {
		s.state.Offers = s.state.Offers[:len(s.state.Offers)-1]
		s.removeFiles(o.Files)
		return nil, err
	}
	s.dirty, s.sealed = false, o.Point.ID
	return s.pending(), nil
}

// build makes the layers of an offer.
func (s *Shipper) build(ctx context.Context, o *offer) error {
	if err := s.opt.FS.MkdirAll(s.spool); err != nil {
		return err
	}
	// Without Span.After: a log that does not have the cut p lacks something.
	span := hrl.Span{P: position(s.state.Acked.ID), Q: position(o.Point.ID)}
	behind := s.state.AckedMark
	if s.session != nil {
		o.Totals = s.session.Totals
		if s.session.From != (hrl.Position{}) {
			span.From, behind = s.session.From, s.session.Mark
		}
	}
	segs, err := s.opt.VM.Log().OpenBehind(behind)
	if err != nil {
		return err
	}
	defer segs.Close()
	var gaps error
	for _, d := range s.opt.VM.Disks() {
		if err := ctx.Err(); err != nil {
			return err
		}
		file, err := segs.WriteLayer(s.opt.FS, s.spool, hrl.LayerOptions{
			VM: s.opt.ID, Generation: s.state.Generation, PGeneration: s.state.Acked.ID.Generation,
			Disk: d.Name, Span: span, CopiesBelow: true,
		})
		var missing *hrl.IncompleteError
		if errors.As(err, &missing) {
			for _, e := range missing.Extents {
				d.AddGap(e.Off, e.Len)
			}
			gaps = err // of the other disks, too: all gaps are copied at once
			continue
		}
		if err != nil {
			return err
		}
		if err := s.addLayer(o, d.Name, &file); err != nil {
			return err
		}
	}
	o.Totals.Points = 1
	return gaps
}

// addLayer adds what the log had of a disk to an offer.
func (s *Shipper) addLayer(o *offer, disk string, file *hrl.LayerFile) error {
	layer, err := hrl.OpenLayer(s.opt.FS, file.Path)
	if err != nil {
		return err
	}
	size := layer.DiskSize()
	if err := layer.Close(); err != nil {
		return err
	}
	f := spooled{Digest: hex.EncodeToString(file.Digest[:]), Bytes: file.Bytes, Raw: file.Data}
	d := wire.PointDisk{Disk: wire.Disk{Name: disk, Size: size}, Layers: []string{}}
	if s.session != nil {
		d.Layers = append(d.Layers, s.session.Copies[disk]...)
	}
	o.Totals.LoggedBytes += file.Logged
	o.Totals.LatestBytes += file.Data + file.Zero
	if file.Data+file.Zero+file.Lost == 0 && len(d.Layers) == 0 && s.sizeOf(disk) == size {
		s.removeFiles([]spooled{f}) // the disk is what it was
	} else {
		d.Layers = append(d.Layers, f.Digest)
		o.Files = append(o.Files, f)
		o.Totals.ShippedRawBytes += f.Raw
		o.Totals.ShippedBytes += f.Bytes
	}
	o.Point.Disks = append(o.Point.Disks, d)
	return nil
}

// sizeOf is the size that the disk has in the newest point, -1 if it has none.
func (s *Shipper) sizeOf(disk string) int64 {
	for _, d := range s.state.Acked.Disks {
		if d.Name == disk {
			return d.Size
		}
	}
	return -1
}

// explain makes of an error of building layers what follows from it.
func (s *Shipper) explain(ctx context.Context, err error) error {
	var gaps *hrl.IncompleteError
	switch {
	case errors.As(err, &gaps):
		return errAgain
	case errors.Is(err, hrl.ErrTooOld) && !errors.Is(err, hrl.ErrDamaged):
		// Its oldest part was given up at the quota: what that touched is a gap. Should
		// it be missing for another reason, collapse finds out.
		s.warn.Warn("the log has given up its oldest part: what it touched is copied", "log", s.logDir(), "why", err)
		s.needCollapse = true
		s.noteGap(wire.GapLogFull)
		return errAgain
	case errors.Is(err, fs.ErrNotExist), s.session != nil && s.session.From != (hrl.Position{}) && unreadable(err):
		// Somebody has removed it under us, or its open segment is damaged, so that
		// not even what was logged a moment ago can be read. What is appended goes
		// nowhere; the guest has not noticed.
		s.warn.Warn("the log is gone or damaged: it is begun anew, and the disks are compared", "log", s.logDir(), "why", err)
		// On record first: what is written until there is a log again is nowhere.
		s.state.Whole = true
		s.resetSession()
		s.noteGap(wire.GapLogLost)
		s.dropOffers()
		if err := s.save(); err != nil {
			return err
		}
		_ = s.opt.VM.StopLog() // it cannot be closed cleanly, and need not
		if err := s.openLog(ctx); err != nil {
			return err
		}
		return errAgain
	case unreadable(err):
		s.warn.Warn("the log does not have all that changed: the disks are compared", "log", s.logDir(), "why", err)
		s.needWhole = true
		s.noteGap(wire.GapLogLost)
		return errAgain
	}
	return err
}

// unreadable reports whether the log does not have what it must have.
func unreadable(err error) bool {
	return errors.Is(err, hrl.ErrNoCut) || errors.Is(err, hrl.ErrDamaged)
}

// deliver brings an offer to the replica and has it listed.
func (s *Shipper) deliver(ctx context.Context, o *offer) error {
	for _, f := range o.Files {
		if err := s.put(ctx, &f); err != nil {
			var refused *wire.Error
			if errors.Is(err, fs.ErrNotExist) || errors.As(err, &refused) && refused.Code == wire.CodeDamaged {
				// It rotted, or went, while it waited; the log still has it.
				return errors.Join(err, s.giveUp(o))
			}
			return err
		}
	}
	listed, err := s.opt.Client.List(ctx, s.opt.ID, o.Point)
	if err != nil {
		return err
	}
	if listed.ID != o.Point.ID {
		return fmt.Errorf("peer %s listed %v instead of %v", s.opt.Client.Addr(), listed.ID, o.Point.ID)
	}
	s.noteDamaged(listed.Damaged)
	done := *o
	done.Point = withUnreadable(done.Point, &listed)
	return s.acknowledge(&done)
}

// withUnreadable is the point offered with what the peer says of it that only it knows.
func withUnreadable(p wire.PointInfo, listed *wire.PointInfo) wire.PointInfo {
	p.Disks = slices.Clone(p.Disks)
	for i := range p.Disks {
		for _, d := range listed.Disks {
			if d.Name == p.Disks[i].Name {
				p.Disks[i].Unreadable = d.Unreadable
			}
		}
	}
	return p
}

// retryEvery is how often it is tried whether what was unreadable can be read again.
const retryEvery = time.Hour

// retryUnreadable makes gaps again of what the newest point lacks because it could not be
// read, and can be read by now: what was wrong may have been the way to the disk.
func (s *Shipper) retryUnreadable() {
	if time.Since(s.retried) < retryEvery {
		return
	}
	s.retried = time.Now()
	for _, p := range s.state.Acked.Disks {
		for _, d := range s.opt.VM.Disks() {
			if d.Name != p.Name {
				continue
			}
			for _, r := range p.Unreadable {
				d.RetryUnreadable(blockdev.Extent{Off: r[0], Len: r[1]})
			}
		}
	}
}

// put sends a file of the spool.
func (s *Shipper) put(ctx context.Context, f *spooled) error {
	file, err := s.opt.FS.Open(s.spoolPath(f.Digest))
	if err != nil {
		return err
	}
	defer file.Close()
	return s.opt.Client.PutLayer(ctx, s.opt.ID, f.Digest, file, f.Bytes, PutOptions{Limit: s.limit, Sent: s.noteSent})
}

// acknowledge records that the replica has listed what was offered, and only then
// forgets what it stood for.
func (s *Shipper) acknowledge(o *offer) error {
	before, session := s.state, s.session
	s.session = nil
	s.state.Acked, s.state.AckedMark, s.state.Offers = o.Point, o.Mark, nil
	s.state.Totals.add(o.Totals)
	if !o.Dropped {
		s.state.Whole, s.state.Evidence, s.state.Gap = false, false, ""
	} else if s.state.Whole || s.state.Evidence {
		s.noteGap(wire.GapCompared) // where it was the first point, there was none before
	}
	if err := s.save(); err != nil {
		s.state, s.session = before, session
		return err
	}
	if s.sealed == o.Point.ID {
		for _, d := range s.opt.VM.Disks() {
			d.AckGaps()
		}
	} else {
		s.dirty = true
	}
	s.resetSession() // of what was copied later nothing is in the point
	if o.Mark != (hrl.Mark{}) {
		s.opt.VM.Log().Release(o.Mark)
	}
	s.removeFiles(o.Files)
	s.noteAcked(o.Point.Time)
	return nil
}
