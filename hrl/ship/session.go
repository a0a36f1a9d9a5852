package ship

import (
	"slices"

	"afterimage/filter"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// A session is what has been copied since the newest point, and not been
// acknowledged. It is the loop's, and part of the state: see the package's comment.
type session struct {
	// Label is a cut before all copies: layers of copies are named after it.
	Label hrl.Position `json:"label"`
	// From, if set, is a cut before which nothing in the log counts: all that it has
	// there is a gap. Mark is a place that is no later than From in the log and before
	// which all is a gap, durably; after a power cut it comes before there is a From.
	From hrl.Position `json:"from"`
	Mark hrl.Mark     `json:"mark"`
	// Copies are by disk the digests of layers of copies that the peer has: a block
	// that is in several has the newest bytes in the last of them.
	Copies map[string][]string `json:"copies"`
	// Sealed is the offer that has all that was copied; zero: none has.
	Sealed wire.PointID `json:"sealed"`
	Totals Totals       `json:"totals"`
}

// beginSession comes before newSession, and before all that is a gap only because of it:
// what was delivered in an earlier one is forgotten.
func (s *Shipper) beginSession() {
	s.keep = true
	for _, d := range s.opt.VM.Disks() {
		if err := d.BeginCopies(); err != nil {
			s.volatile("what is copied cannot be noted", err)
		}
		s.keep = s.keep && d.CopiesKept()
	}
}

// newSession begins one in which nothing has been copied.
func (s *Shipper) newSession(cut *hrl.CutInfo) {
	s.session = &session{Label: hrl.Position{Incarnation: cut.Incarnation, Epoch: cut.Epoch}, Copies: map[string][]string{}}
}

// readFrom has the session read the log only from the cut on: what was logged before is
// a gap. It is on record when it returns, and the log may forget that.
func (s *Shipper) readFrom(cut *hrl.CutInfo) error {
	for _, d := range s.opt.VM.Disks() {
		if err := d.SyncGaps(); err != nil {
			s.volatile("gaps cannot be made durable", err)
		}
	}
	s.session.From, s.session.Mark = hrl.Position{Incarnation: cut.Incarnation, Epoch: cut.Epoch}, cut.Mark()
	if err := s.save(); err != nil {
		return err
	}
	if s.keep {
		s.opt.VM.Log().Release(cut.Mark())
	}
	return nil
}

// volatile: a restart will copy again what this session has copied.
func (s *Shipper) volatile(what string, why error) {
	if s.keep {
		s.keep = false
		s.warn.Warn(what+": after a restart copying begins again", "why", why)
	}
}

// loadSession makes the session of the state the one under way, if the state has one.
func (s *Shipper) loadSession() {
	s.session, s.state.Session = s.state.Session, nil
	s.keep = s.session != nil
}

// resumeSession makes of the session what follows from what was found of a disk: when
// it returns for the last one, all that was a gap of old, or is one now, is so durably.
func (s *Shipper) resumeSession(log *hrl.Log, disk int, found *filter.Recovered) {
	switch {
	case s.session == nil:
	case found.Whole != nil:
		s.session = nil
	case !s.opt.VM.Disks()[disk].CopiesKept():
		// Who has moved the disk has not moved what lay beside it.
		s.session, s.state.Whole = nil, true
	case found.Evidence:
		// What the log had is no content, and what it touched is a gap now.
		s.session.From, s.session.Mark = hrl.Position{}, hrl.Mark{Incarnation: log.Incarnation()}
	}
}

// resealSession says which of the session's copies belong to an offer.
func (s *Shipper) resealSession() {
	o := s.pending()
	if s.session == nil || o == nil || s.session.Sealed != o.Point.ID {
		return
	}
	for _, d := range s.opt.VM.Disks() {
		d.SealGaps()
	}
	s.sealed = o.Point.ID
}

// keptSession is what of the session goes on record.
func (s *Shipper) keptSession() *session {
	if !s.keep {
		return nil
	}
	return s.session
}

// need says what has to come before the next cut.
func (s *Shipper) need() {
	s.needWhole = s.state.Whole && s.session == nil
	s.needCollapse = s.state.Evidence && (s.session == nil || s.session.From == hrl.Position{})
}

// resetSession gives up what was copied: it is to be copied again. That there is no
// session any more need not be on record yet.
func (s *Shipper) resetSession() {
	s.session, s.sealed = nil, wire.PointID{}
	s.dropWaiting()
	for _, d := range s.opt.VM.Disks() {
		d.ReopenGaps()
	}
	s.need()
}

// delivered notes that the peer has a layer of copies: of these blocks, by now. The
// steps are in the package's comment.
func (s *Shipper) delivered(d *filter.Disk, l *copyLayer) error {
	s.removeFiles([]spooled{l.file})
	if err := d.SendCopies(&l.held); err != nil {
		s.volatile("what is sent cannot be noted", err)
	}
	ses := s.session
	// The same blocks with the same bytes, copied twice, are one file. It covers all
	// that it covered before, so it counts where it came last.
	before := ses.Copies[l.disk]
	mine := slices.DeleteFunc(slices.Clone(before), func(have string) bool { return have == l.file.Digest })
	ses.Copies[l.disk] = append(mine, l.file.Digest)
	ses.Totals.ShippedBytes += l.file.Bytes
	ses.Totals.ShippedRawBytes += l.file.Raw
	if err := s.save(); err != nil {
		return err
	}
	whole := l.held
	l.lost.Runs(whole.Remove) // what is unreadable is in the log alone
	s.counts(d, &whole)
	return nil
}

// counts notes that blocks need not be copied again after a restart.
func (s *Shipper) counts(d *filter.Disk, blocks *hrl.BlockSet) {
	if !s.keep || blocks.Empty() {
		return
	}
	d.CopiesDelivered(blocks)
	if err := d.SyncGaps(); err != nil {
		s.volatile("what is copied cannot be noted", err)
	}
}

// dropWaiting forgets layers of copies that have not got to the peer.
func (s *Shipper) dropWaiting() {
	for _, l := range s.waitingCopies {
		s.removeFiles([]spooled{l.file})
	}
	s.waitingCopies = nil
}
