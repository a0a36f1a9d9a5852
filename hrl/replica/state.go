package replica

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"afterimage/hrl/wire"
)

// keepDefault is how many points are kept where nobody says.
const keepDefault = 24

// A state is all that the journal says of a VM. It is the fold of apply over the
// journal's records, and a value of it never changes: apply makes the next one.
// Whoever has one may therefore look at it without a lock.
type state struct {
	VM         wire.VMID `json:"vm"`
	Name       string    `json:"name"`
	Sender     string    `json:"sender"` // identity of the host it comes from
	Term       uint64    `json:"term"`
	Generation uint64    `json:"generation"` // the highest known
	Keep       int       `json:"keep"`
	Every      float64   `json:"every_seconds,omitempty"`
	Quota      int64     `json:"quota,omitempty"` // bytes; 0: none

	// Disks are those offered last, then those offered earlier, with the size of the
	// offer or of the newest point, whichever came last. Each has a base.
	Disks []wire.Disk `json:"disks"`
	Role  wire.Role   `json:"role"`

	// Points is the chain above the base, the oldest first: the point that the
	// base is at, if that is still there, then the others, each over the one
	// before. The last one is the newest and never retired.
	Points []point `json:"points"`
	// Base is the point that the bases are at; zero: they are empty. It is that
	// of Points[0], or zero.
	Base wire.PointID `json:"base"`
	// Folds counts the folds that were finished; see sums.
	Folds uint32 `json:"folds"`

	Runs       []runRecord    `json:"runs,omitempty"` // that stand
	Branches   []branchRecord `json:"branches,omitempty"`
	LastBranch int            `json:"last_branch,omitempty"`
}

// A point is one that was listed.
type point struct {
	wire.PointInfo
	// Retired says that it can no longer be opened. Its layers stay where a
	// later point needs them, until they are folded into the base.
	Retired bool `json:"retired,omitempty"`
}

// A runRecord is a failover, or a test of one.
type runRecord struct {
	Name       string       `json:"name"`
	Test       bool         `json:"test,omitempty"`
	Point      wire.PointID `json:"point"`
	Generation uint64       `json:"generation,omitempty"` // of what is written there; 0 for a test
	Disks      []wire.Disk  `json:"disks"`
	Started    time.Time    `json:"started"`
}

// A branchRecord is the top of a failover that was cancelled.
type branchRecord struct {
	Branch string    `json:"branch"`
	Time   time.Time `json:"time"`
	Run    runRecord `json:"run"`
}

// A kind is what a record says.
type kind string

const (
	kindState         kind = "state"     // everything before it, as one state
	kindOffered       kind = "offered"   // the sender, and what it said of the VM
	kindListed        kind = "listed"    // a point
	kindRetired       kind = "retired"   // points that are not opened any more
	kindFolded        kind = "folded"    // the bases are at this point
	kindPinned        kind = "pinned"    // a point
	kindUnpinned      kind = "unpinned"  // a point
	kindDamaged       kind = "damaged"   // points that cannot be relied on; no reason: they can again
	kindKeep          kind = "keep"      // how many points to keep
	kindStarted       kind = "started"   // a failover or a test
	kindCancelled     kind = "cancelled" // the failover; its top is a branch
	kindCommitted     kind = "committed" // the failover
	kindEnded         kind = "ended"     // a test
	kindBranchRemoved kind = "branch removed"
)

// A record is one change, as it stands in the journal.
type record struct {
	Kind kind      `json:"kind"`
	Time time.Time `json:"time"` // a label

	State  *state          `json:"state,omitempty"`
	Offer  *wire.Offer     `json:"offer,omitempty"`
	Sender string          `json:"sender,omitempty"`
	Quota  int64           `json:"quota,omitempty"`
	Point  *wire.PointInfo `json:"point,omitempty"`
	Points []wire.PointID  `json:"points,omitempty"`
	Reason string          `json:"reason,omitempty"`
	Keep   int             `json:"keep,omitempty"`
	Run    *runRecord      `json:"run,omitempty"`
	Name   string          `json:"name,omitempty"`
}

var errRecord = errors.New("an impossible record")

// apply returns the state after the record. Records of the journal were checked
// when they were made; what cannot follow is refused all the same, so that
// nothing is ever built upon it.
func (s *state) apply(r *record) (*state, error) {
	next := *s
	var err error
	switch r.Kind {
	case kindState:
		if r.State == nil {
			return nil, errRecord
		}
		next = *r.State
	case kindOffered:
		err = next.offer(r)
	case kindListed:
		err = next.list(r)
	case kindRetired:
		err = next.retire(r.Points)
	case kindFolded:
		err = next.fold(r.Points)
	case kindPinned, kindUnpinned:
		err = next.change(r.Points, func(p *point) { p.Pinned = r.Kind == kindPinned })
	case kindDamaged:
		err = next.change(r.Points, func(p *point) { p.Damaged = r.Reason })
	case kindKeep:
		next.Keep = r.Keep
	case kindStarted:
		err = next.start(r.Run)
	case kindCancelled:
		err = next.cancel(r)
	case kindCommitted:
		next.Role = wire.RolePrimary
	case kindEnded:
		err = next.end(r.Name)
	case kindBranchRemoved:
		n := len(s.Branches)
		next.Branches = slices.DeleteFunc(slices.Clone(s.Branches), func(b branchRecord) bool { return b.Branch == r.Name })
		if len(next.Branches) != n-1 {
			err = errRecord
		}
	default:
		return nil, fmt.Errorf("a record of kind %.40q, which is unknown", r.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("%w of kind %q", err, r.Kind)
	}
	if err := next.check(r.Kind == kindState); err != nil {
		return nil, fmt.Errorf("after a record of kind %q: %w", r.Kind, err)
	}
	return &next, nil
}

// check says what is impossible about the state. Whole looks at every point;
// without, only at what the checks of single records do not see to.
func (s *state) check(whole bool) error {
	switch {
	case s.Role != wire.RoleReplica && s.Role != wire.RoleFailedOver && s.Role != wire.RolePrimary,
		s.Keep < 1, s.Quota < 0, s.Term == 0, s.Generation == 0, s.LastBranch < 0:
		return errRecord
	case s.Role != wire.RoleReplica && s.failover() == nil, s.Role == wire.RoleReplica && s.failover() != nil:
		return errRecord
	case !s.Base.IsZero() && (len(s.Points) == 0 || s.Points[0].ID != s.Base):
		return errRecord
	case len(s.Points) > 0 && s.Points[len(s.Points)-1].Retired:
		return errRecord
	}
	if !whole {
		return nil
	}
	if err := s.checkNames(); err != nil {
		return err
	}
	return s.checkPoints()
}

func (s *state) checkNames() error {
	if err := wire.CheckName("VM", s.Name); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, d := range s.Disks {
		if wire.CheckName("disk", d.Name) != nil || d.Size < 0 || seen[d.Name] {
			return errRecord
		}
		seen[d.Name] = true
	}
	names, failovers := map[string]bool{}, 0
	use := func(r *runRecord) bool {
		ok := r.check() == nil && !names[r.dir()] && s.find(r.Point) >= 0
		names[r.dir()] = true
		return ok
	}
	for i := range s.Runs {
		if !s.Runs[i].Test {
			failovers++
		}
		if !use(&s.Runs[i]) {
			return errRecord
		}
	}
	for i := range s.Branches {
		if s.Branches[i].Branch == "" || !use(&s.Branches[i].Run) {
			return errRecord
		}
	}
	if failovers > 1 {
		return errRecord
	}
	return nil
}

func (s *state) checkPoints() error {
	parent := wire.PointID{}
	if len(s.Points) > 0 && !s.Base.IsZero() {
		parent = s.Points[0].Parent
	}
	digests := map[string]bool{}
	for i := range s.Points {
		p := &s.Points[i]
		if err := p.Check(); err != nil {
			return err
		}
		if p.Parent != parent {
			return errRecord
		}
		for _, d := range p.Disks {
			if !slices.ContainsFunc(s.Disks, func(have wire.Disk) bool { return have.Name == d.Name }) {
				return errRecord
			}
			for _, l := range d.Layers {
				if digests[l] {
					return errRecord
				}
				digests[l] = true
			}
		}
		parent = p.ID
	}
	return nil
}

func (r *runRecord) check() error {
	if wire.CheckName("failover", r.Name) != nil || r.Test != (r.Generation == 0) || r.Point.IsZero() || len(r.Disks) == 0 {
		return errRecord
	}
	for _, d := range r.Disks {
		if wire.CheckName("disk", d.Name) != nil || d.Size < 0 {
			return errRecord
		}
	}
	return nil
}

func (s *state) offer(r *record) error {
	if r.Offer == nil || r.Sender == "" || r.Offer.Check() != nil {
		return errRecord
	}
	o := r.Offer
	disks := slices.Clone(o.Disks)
	for _, d := range s.Disks {
		if !slices.ContainsFunc(o.Disks, func(have wire.Disk) bool { return have.Name == d.Name }) {
			disks = append(disks, d)
		}
	}
	s.Name, s.Disks, s.Sender, s.Term, s.Every, s.Quota = o.Name, disks, r.Sender, o.Term, o.EverySeconds, r.Quota
	s.Generation = max(s.Generation, o.Generation)
	if o.Keep > 0 {
		s.Keep = o.Keep
	}
	return nil
}

func (s *state) list(r *record) error {
	if r.Point == nil || r.Point.Check() != nil || r.Point.Parent != s.newest() {
		return errRecord
	}
	digests := s.digests()
	disks := slices.Clone(s.Disks)
	for _, d := range r.Point.Disks {
		i := slices.IndexFunc(disks, func(have wire.Disk) bool { return have.Name == d.Name })
		if i < 0 {
			return errRecord
		}
		disks[i].Size = d.Size // it may have been resized since the offer
		for _, l := range d.Layers {
			if _, twice := digests[l]; twice {
				return errRecord
			}
			digests[l] = r.Point.ID
		}
	}
	s.Disks = disks
	s.Points = append(slices.Clone(s.Points), point{PointInfo: *r.Point})
	s.Generation = max(s.Generation, r.Point.ID.Generation)
	return nil
}

func (s *state) retire(ids []wire.PointID) error {
	return s.change(ids, func(p *point) { p.Retired = true })
}

// change changes points that are not retired.
func (s *state) change(ids []wire.PointID, f func(*point)) error {
	s.Points = slices.Clone(s.Points)
	for _, id := range ids {
		i := s.find(id)
		if i < 0 {
			return errRecord
		}
		f(&s.Points[i])
	}
	return nil
}

func (s *state) fold(ids []wire.PointID) error {
	t := s.oldest()
	if len(ids) != 1 || t < 0 || s.Points[t].ID != ids[0] || s.Base == ids[0] {
		return errRecord
	}
	s.Base = ids[0]
	s.Points = slices.Clone(s.Points[t:])
	s.Folds++
	return nil
}

func (s *state) start(r *runRecord) error {
	if r == nil || r.check() != nil || s.find(r.Point) < 0 ||
		slices.ContainsFunc(s.Runs, func(have runRecord) bool { return have.Name == r.Name }) {
		return errRecord
	}
	s.Runs = append(slices.Clone(s.Runs), *r)
	if r.Test {
		return nil
	}
	if s.Role != wire.RoleReplica || r.Generation <= s.Generation {
		return errRecord
	}
	s.Role, s.Generation = wire.RoleFailedOver, r.Generation
	return nil
}

func (s *state) cancel(r *record) error {
	run := s.failover()
	if run == nil || s.Role != wire.RoleFailedOver || r.Name == "" ||
		slices.ContainsFunc(s.Branches, func(b branchRecord) bool { return b.Branch == r.Name }) {
		return errRecord
	}
	s.Branches = append(slices.Clone(s.Branches), branchRecord{Branch: r.Name, Time: r.Time, Run: *run})
	s.LastBranch++
	s.Runs = slices.DeleteFunc(slices.Clone(s.Runs), func(r runRecord) bool { return !r.Test })
	s.Role = wire.RoleReplica
	return nil
}

func (s *state) end(name string) error {
	n := len(s.Runs)
	s.Runs = slices.DeleteFunc(slices.Clone(s.Runs), func(r runRecord) bool { return r.Test && r.Name == name })
	if len(s.Runs) != n-1 {
		return errRecord
	}
	return nil
}
