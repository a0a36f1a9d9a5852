package ship

import (
	"context"
	"fmt"
	"time"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// A RoleError says that the peer is no replica of the VM any more.
type RoleError struct {
	Addr string
	Role wire.Role
	At   wire.PointID // where a failover began
}

func (e *RoleError) Error() string {
	if e.Role == wire.RoleFailedOver {
		return fmt.Sprintf("a failover to point %v was started on peer %s: it takes no more points", e.At, e.Addr)
	}
	return fmt.Sprintf("peer %s serves the VM itself now, from point %v on", e.Addr, e.At)
}

// Hint says what to do.
func (e *RoleError) Hint() string {
	if e.Role == wire.RoleFailedOver {
		return "`failover cancel` over there lets replication go on; after `failover commit` this host's copy is out of date"
	}
	return "two hosts may have written to copies of this VM: keep one of them running"
}

// meet hears from the peer what it has, and makes of it where to go on. Whoever
// has met it may offer points until something fails.
func (s *Shipper) meet(ctx context.Context) error {
	st, err := s.opt.Client.Offer(ctx, s.opt.ID, offerOf(&s.opt, &s.state))
	if err != nil {
		return err
	}
	if st.Role != wire.RoleReplica {
		s.setRole(st.Role)
		return &RoleError{s.opt.Client.Addr(), st.Role, st.FailedOverTo}
	}
	s.setRole(wire.RoleReplica)
	if err := s.agree(ctx, &st); err != nil {
		return err
	}
	keep, err := s.staged(&st)
	if err != nil {
		return err
	}
	if err := s.opt.Client.Discard(ctx, s.opt.ID, keep); err != nil {
		return err
	}
	s.met, s.heard = true, time.Now()
	return nil
}

// agree finds out which of the points offered the peer has listed.
func (s *Shipper) agree(ctx context.Context, st *wire.VMState) error {
	is := func(p *wire.PointInfo) bool { return st.Newest == p.ID && st.NewestTime.Equal(p.Time) }
	if is(&s.state.Acked) {
		return nil
	}
	for i := range s.state.Offers {
		if o := s.state.Offers[i]; is(&o.Point) {
			if err := s.askUnreadable(ctx, &o.Point); err != nil {
				return err
			}
			return s.acknowledge(&o)
		}
	}
	// It was never offered from here: the peer went back, or this host did
	// (RULES E7). Whatever it has is the parent of what comes; nothing is
	// taken from it.
	parent := wire.PointInfo{}
	if !st.Newest.IsZero() {
		points, err := s.opt.Client.Points(ctx, s.opt.ID)
		if err != nil {
			return err
		}
		for _, p := range points {
			if p.ID == st.Newest {
				parent = p
			}
		}
		if parent.ID != st.Newest {
			return fmt.Errorf("peer %s names point %v as its newest and does not list it", s.opt.Client.Addr(), st.Newest)
		}
	}
	if s.state.Acked.ID != parent.ID && !s.state.Acked.ID.IsZero() || !parent.ID.IsZero() {
		s.warn.Warn("the replica has another newest point than this host remembers: the whole disk is compared",
			"remembered", s.state.Acked.ID, "replica", st.Newest)
	}
	s.state.Acked, s.state.AckedMark = parent, hrl.Mark{}
	s.state.Generation = max(s.state.Generation, st.Generation, parent.ID.Generation) + 1
	s.state.Whole, s.state.Offers = true, nil
	s.state.Gap = ""
	s.noteGap(wire.GapCompared)
	s.dirty = true
	s.resetSession()
	return s.save()
}

// askUnreadable fills in what the answer would have said that did not arrive.
func (s *Shipper) askUnreadable(ctx context.Context, p *wire.PointInfo) error {
	points, err := s.opt.Client.Points(ctx, s.opt.ID)
	if err != nil {
		return err
	}
	for i := range points {
		if points[i].ID == p.ID {
			*p = withUnreadable(*p, &points[i])
		}
	}
	return nil
}

// staged sees to it that what was copied in the session, and what the newest
// offer needs besides its files, is still over there, and returns what the peer
// has to keep.
func (s *Shipper) staged(st *wire.VMState) (keep []string, err error) {
	there := map[string]bool{}
	for _, l := range st.Layers {
		there[l.Digest] = l.Complete
	}
	lost := false
	if s.session != nil {
		for _, digests := range s.session.Copies {
			for _, d := range digests {
				if !there[d] {
					lost = true
				}
			}
		}
	}
	if lost {
		s.resetSession()
		if err := s.save(); err != nil {
			return nil, err
		}
	}
	if o := s.pending(); o != nil {
		here := map[string]bool{}
		for _, f := range o.Files {
			here[f.Digest] = true
		}
		for _, d := range o.Point.Disks {
			for _, l := range d.Layers {
				if !here[l] && !there[l] {
					if err := s.giveUp(o); err != nil {
						return nil, err
					}
					break
				}
				keep = append(keep, l)
			}
		}
	}
	if s.session != nil {
		for _, digests := range s.session.Copies {
			keep = append(keep, digests...)
		}
	}
	for _, l := range s.waitingCopies {
		keep = append(keep, l.file.Digest)
	}
	return keep, nil
}

// pending is the offer that is to be delivered, or nil.
func (s *Shipper) pending() *offer {
	if n := len(s.state.Offers); n > 0 && !s.state.Offers[n-1].Dropped {
		return &s.state.Offers[n-1]
	}
	return nil
}

// giveUp drops an offer that cannot be delivered. What it had is in the log and
// in the session still, and goes into the next one.
func (s *Shipper) giveUp(o *offer) error {
	files := o.Files
	o.Dropped, o.Files = true, nil
	s.dirty = true
	if s.session != nil {
		s.session.Sealed = wire.PointID{} // more may be copied before the next offer
	}
	if err := s.save(); err != nil {
		return err
	}
	s.removeFiles(files)
	return nil
}

// removeFiles removes what waits to be sent no more. What stays is swept by the
// next start.
func (s *Shipper) removeFiles(files []spooled) {
	for _, f := range files {
		_ = s.opt.FS.Remove(s.spoolPath(f.Digest))
	}
}
