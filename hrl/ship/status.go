package ship

import (
	"errors"
	"fmt"
	"time"

	"afterimage/hrl/wire"
)

// seen is what Status tells, as the loop has left it. It is guarded by Shipper.mu.
type seen struct {
	state    state
	role     wire.Role
	err      error     // why the last cycle failed
	since    time.Time // when it began to fail
	cut      time.Time // of the last cut
	caughtUp time.Time // up to when the replica has everything
	logged   int64     // bytes the log had appended by the last cut
	acked    int64     // and by the last one that was acknowledged
	sent     int64     // bytes of layers that left, repeated ones too
	damaged  string    // why the newest point cannot be relied on over there

	copying   bool
	copyStart time.Time
	copyBase  int64 // of copied, then
	copied    int64 // bytes of disks, by this Shipper
	pace      pace
}

func (s *Shipper) setRole(r wire.Role) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.role = r
}

func (s *Shipper) noteSent(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.sent += n
}

func (s *Shipper) noteCut(at time.Time) {
	logged := s.opt.VM.Log().Stats().Bytes
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.cut, s.seen.logged = at, logged
}

// noteCaughtUp: nothing had changed by the last cut.
func (s *Shipper) noteCaughtUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.caughtUp, s.seen.acked = s.seen.cut, s.seen.logged
}

func (s *Shipper) noteAcked(point time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.caughtUp, s.seen.acked = point, s.seen.logged
	s.seen.pace = pace{}
}

func (s *Shipper) noteDamaged(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.damaged = why
}

func (s *Shipper) noteCopying() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.copying, s.seen.copyStart, s.seen.copyBase = true, time.Now(), s.seen.copied
}

func (s *Shipper) noteBlock(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.copied += n
}

func (s *Shipper) noteCopied() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.copying = false
}

// States of a replication.
const (
	StateInitial     = "initial" // the first copy is under way
	StateReplicating = "replicating"
	StatePaused      = "paused"
	StateGap         = "gap"         // the replica lacks what the log does not have
	StateFailedOver  = "failed_over" // the peer runs the VM
)

// Healths of a replication.
const (
	HealthNormal   = "normal"
	HealthWarning  = "warning"
	HealthCritical = "critical"
)

// A Status says how a replication is. Sizes are bytes.
type Status struct {
	State      string   `json:"state"`
	Health     string   `json:"health"`
	Reasons    []string `json:"reasons"` // for a health that is not normal
	Generation uint64   `json:"generation"`
	// LastPoint is the newest point that is known to be listed; nil: none.
	LastPoint *wire.PointInfo `json:"last_point"`
	// Lag is what would be lost if this host died now: how old the oldest change
	// may be that the replica does not have, and how much was logged since.
	LagSeconds float64 `json:"lag_seconds"`
	LagBytes   int64   `json:"lag_bytes"`
	// CutEpoch is the newest cut, OfferedEpoch that of the newest point offered, and
	// AckedEpoch that of the newest listed, all of this log or zero.
	CutEpoch     uint64 `json:"cut_epoch"`
	OfferedEpoch uint64 `json:"offered_epoch"`
	AckedEpoch   uint64 `json:"acked_epoch"`
	LogBytes     int64  `json:"log_bytes"` // of segments
	GapBytes     int64  `json:"gap_bytes"`
	// HotBytes is how much of the disks is compared at least after a power cut.
	HotBytes int64 `json:"hot_bytes"`
	// Unreadable says what of the newest point this host's disks could not give, empty:
	// nothing. Replication goes on all the same.
	Unreadable string `json:"unreadable,omitempty"`
	// Initial tells of copying, first or repeated, while it is under way: of all
	// that has to be copied, how much was, also before a restart.
	InitialDone  int64   `json:"initial_done"`
	InitialTotal int64   `json:"initial_total"`
	ETASeconds   float64 `json:"eta_seconds"` // 0: not known
	Totals       Totals  `json:"totals"`
}

// lateFactor and lateMin say how old what the replica lacks may be, in intervals and
// at least, before it is worth a warning; criticalFactor times that is critical.
const (
	lateFactor     = 3
	lateMin        = 10 * time.Second
	criticalFactor = 10
)

// Status returns how the replication is.
func (s *Shipper) Status() Status {
	var gap, open, hot int64
	for _, d := range s.opt.VM.Disks() {
		all, still := d.GapBytes()
		gap, open = gap+all, open+still
		if h := d.Tracked().Hot; h != nil {
			hot += h.Stats().HotBytes
		}
	}
	var logBytes, logged int64
	if log := s.opt.VM.Log(); log != nil {
		st := log.Stats()
		logBytes, logged = st.SegmentBytes, st.Bytes
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v := &s.seen
	out := Status{
		State: StateReplicating, Health: HealthNormal, Reasons: []string{},
		Generation: v.state.Generation, AckedEpoch: v.state.Acked.ID.Epoch, OfferedEpoch: v.state.Acked.ID.Epoch,
		LogBytes: logBytes, GapBytes: gap, HotBytes: hot, Totals: v.state.Totals,
	}
	if !v.state.Acked.ID.IsZero() {
		p := v.state.Acked
		out.LastPoint, out.Unreadable = &p, p.Unread()
	}
	if n := len(v.state.Offers); n > 0 {
		out.OfferedEpoch = v.state.Offers[n-1].Point.ID.Epoch
	}
	if from := v.caughtUp; logged > v.acked || gap > 0 {
		if from.IsZero() {
			from = v.state.Acked.Time
		}
		out.LagBytes = max(0, logged-v.acked)
		if !from.IsZero() {
			out.LagSeconds = time.Since(from).Seconds()
		}
	}
	switch {
	case v.role == wire.RoleFailedOver || v.role == wire.RolePrimary:
		out.State = StateFailedOver
	case s.paused:
		out.State = StatePaused
	case v.state.Acked.ID.IsZero():
		out.State = StateInitial
	case gap > 0:
		out.State = StateGap
	}
	if v.copying {
		out.InitialDone, out.InitialTotal = gap-open, gap
		if spent := time.Since(v.copyStart).Seconds(); v.copied > v.copyBase && spent > 0 {
			out.ETASeconds = float64(open) / (float64(v.copied-v.copyBase) / spent)
		}
	}
	s.judgeLocked(&out)
	return out
}

// judgeLocked finds what is wrong.
func (s *Shipper) judgeLocked(out *Status) {
	say := func(health, format string, args ...any) {
		if out.Health != HealthCritical {
			out.Health = health
		}
		out.Reasons = append(out.Reasons, fmt.Sprintf(format, args...))
	}
	late := max(lateFactor*s.opt.Every, lateMin).Seconds()
	switch {
	case out.State == StateFailedOver:
		say(HealthCritical, "%v", errOr(s.seen.err, "the peer runs the VM"))
	case s.paused:
		say(HealthWarning, "the replication is paused")
	case s.seen.err != nil:
		var refused *wire.Error
		health := HealthWarning
		if errors.As(s.seen.err, &refused) || time.Since(s.seen.since).Seconds() > late {
			health = HealthCritical
		}
		say(health, "%v", s.seen.err)
	}
	if s.seen.damaged != "" {
		say(HealthCritical, "the newest point cannot be started: %s", s.seen.damaged)
	}
	if why := s.seen.pace.judge(); why != "" {
		say(HealthWarning, "%s", why)
	}
	switch {
	case out.State == StateInitial || s.seen.copying:
	case out.LagSeconds > late*criticalFactor:
		say(HealthCritical, "the replica is %v behind", time.Duration(out.LagSeconds*float64(time.Second)).Round(time.Second))
	case out.LagSeconds > late:
		say(HealthWarning, "the replica is %v behind", time.Duration(out.LagSeconds*float64(time.Second)).Round(time.Second))
	}
}

func errOr(err error, otherwise string) string {
	if err != nil {
		return err.Error()
	}
	return otherwise
}
