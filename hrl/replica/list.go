package replica

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"afterimage/hrl/wire"
)

// List makes a point of layers that are here, complete, and of their parent, the
// newest listed point. It is the acknowledgement (RULES H6): the layers were
// durable before, their directory and the record of the point are when it
// returns. A point that is listed already is answered as the first time. Over a
// point that is marked as damaged the new one is marked too, until Verify finds it
// whole.
//
// A crash before the record is durable leaves the layers staged; after it the
// point is listed, whether or not anybody heard of it.
func (v *VM) List(p wire.PointInfo) (wire.PointInfo, error) {
	if err := p.Check(); err != nil {
		return wire.PointInfo{}, fmt.Errorf("%w: %w", err, ErrBad)
	}
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.mayList(); err != nil {
		return wire.PointInfo{}, err
	}
	st := v.current()
	if i := slices.IndexFunc(st.Points, func(have point) bool { return have.ID == p.ID }); i >= 0 {
		if !sameContent(&st.Points[i].PointInfo, &p) {
			return wire.PointInfo{}, fmt.Errorf("point %v of VM %s is listed with another content: %w", p.ID, st.Name, ErrExists)
		}
		return st.Points[i].info(), nil
	}
	p.Received, p.Pinned, p.Damaged = time.Now().UTC(), false, ""
	if n := len(st.Points); n > 0 {
		p.Damaged = st.Points[n-1].Damaged
	}
	p.Disks = slices.Clone(p.Disks) // the caller's stay as they are
	var err error
	p.Bytes, err = v.checkPoint(st, &p)
	if err == nil {
		err = v.findUnreadable(st, &p)
	}
	if err == nil {
		err = v.fs.SyncDir(filepath.Join(v.dir, layersDir))
	}
	if err != nil {
		what := fmt.Sprintf("point %v of VM %s", p.ID, st.Name)
		return wire.PointInfo{}, noRoom(what, fmt.Errorf("%s: %w", what, err))
	}
	listed := point{PointInfo: p}
	p = listed.info() // the caller may change his
	if err := v.commitLocked(record{Kind: kindListed, Point: &p}); err != nil {
		return wire.PointInfo{}, err
	}
	v.mu.Lock()
	for _, d := range p.Disks {
		for _, l := range d.Layers {
			delete(v.staged, l)
		}
	}
	v.mu.Unlock()
	// Digests are asked of the newest point, which is another one now.
	v.dropDigester(wire.PointID{})
	v.store.kick()
	return listed.info(), nil
}

func (v *VM) mayList() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.receivingLocked()
}

// sameContent reports whether a primary that sends b means a.
func sameContent(a, b *wire.PointInfo) bool {
	return a.Parent == b.Parent && a.ParentTime.Equal(b.ParentTime) && a.Kind == b.Kind && a.Gap == b.Gap && a.Time.Equal(b.Time) && slices.EqualFunc(a.Disks, b.Disks, func(x, y wire.PointDisk) bool {
		return x.Disk == y.Disk && slices.Equal(x.Layers, y.Layers)
	})
}

// checkPoint says whether the point can be listed, and returns the bytes of its
// layers' files. All its layers are opened, so that none is missing.
func (v *VM) checkPoint(st *state, p *wire.PointInfo) (int64, error) {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), ErrBad)
	}
	if newest := st.newest(); p.Parent != newest {
		return 0, &ParentError{p.ID, p.Parent, newest}
	}
	var parent *point
	if n := len(st.Points); n > 0 {
		parent = &st.Points[n-1]
		// Two points can have one name where both sides had lost their memory,
		// and one of them got an old one back (RULES E6).
		if !p.ParentTime.Equal(parent.Time) {
			return 0, &ParentError{p.ID, p.Parent, parent.ID}
		}
		for _, d := range parent.Disks {
			if !slices.ContainsFunc(p.Disks, func(have wire.PointDisk) bool { return have.Name == d.Name }) {
				return 0, bad("disk %s is missing, which its parent has", d.Name)
			}
		}
	}
	taken := st.digests()
	total := int64(0)
	for i := range p.Disks {
		d := &p.Disks[i]
		if !slices.ContainsFunc(st.Disks, func(have wire.Disk) bool { return have.Name == d.Name }) {
			return 0, bad("disk %s was not offered", d.Name)
		}
		var before *wire.PointDisk
		if parent != nil {
			before = parent.disk(d.Name)
		}
		if len(d.Layers) == 0 && (before == nil && d.Size != 0 || before != nil && before.Size != d.Size) {
			return 0, bad("disk %s has another size than before, and no layer", d.Name)
		}
		for k, digest := range d.Layers {
			if at, ok := taken[digest]; ok {
				return 0, bad("layer %s is in point %v already", digest, at)
			}
			taken[digest] = p.ID
			n, err := v.checkPointLayer(p, d, before == nil, digest, k == len(d.Layers)-1)
			if err != nil {
				return 0, err
			}
			total += n
		}
	}
	return total, nil
}

// checkPointLayer says whether a layer belongs where the point has it.
func (v *VM) checkPointLayer(p *wire.PointInfo, d *wire.PointDisk, anew bool, digest string, last bool) (size int64, err error) {
	v.mu.Lock()
	s := v.staged[digest]
	complete := s != nil && s.complete
	if complete {
		size = s.size
	}
	v.mu.Unlock()
	bad := func(format string, args ...any) error {
		return fmt.Errorf("layer %s of disk %s: %w: %w", digest, d.Name, fmt.Errorf(format, args...), ErrBad)
	}
	if !complete {
		return 0, bad("it is not here, or not all of it")
	}
	l, err := v.openLayer(v.layerPath(digest))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	from, to := parentOf(l), pointID(l.Generation, l.Q)
	switch {
	case l.VM != v.id || l.Disk != d.Name:
		return 0, bad("it is one of disk %s of VM %v", l.Disk, wire.VMID(l.VM))
	case l.Generation != p.ID.Generation:
		return 0, bad("it is of generation %d", l.Generation)
	case from != p.Parent && !(anew && from.IsZero()):
		return 0, bad("it lies over point %v", from)
	case last && to != p.ID, p.ID.Before(to):
		return 0, bad("it leads to %v", to)
	case last && l.Size != d.Size:
		return 0, bad("its disk has %d bytes, the point's %d", l.Size, d.Size)
	}
	return size, nil
}

// SetKeep says how many points to keep; older ones go, unless something needs
// them.
func (v *VM) SetKeep(n int) error {
	if n < 1 {
		return fmt.Errorf("%d points cannot be kept: 1 is the least", n)
	}
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.usable(); err != nil {
		return err
	}
	if v.current().Keep == n {
		return nil
	}
	if err := v.commitLocked(record{Kind: kindKeep, Keep: n}); err != nil {
		return err
	}
	v.store.kick()
	return nil
}

// Pin keeps a point beyond retention, and what is younger, until it is unpinned.
func (v *VM) Pin(id wire.PointID, on bool) error {
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.usable(); err != nil {
		return err
	}
	st := v.current()
	i := st.find(id)
	if i < 0 {
		return st.noPoint(id)
	}
	if st.Points[i].Pinned == on {
		return nil
	}
	k := kindPinned
	if !on {
		k = kindUnpinned
	}
	if err := v.commitLocked(record{Kind: k, Points: []wire.PointID{id}}); err != nil {
		return err
	}
	v.store.kick()
	return nil
}

// Remove takes a point out of the list: one that is not the newest, not pinned,
// and not in use. Layers of it that later points need stay.
func (v *VM) Remove(id wire.PointID) error {
	v.dropDigester(wire.PointID{})
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.beginRemove(id); err != nil {
		return err
	}
	defer v.endRetiring([]wire.PointID{id})
	if err := v.commitLocked(record{Kind: kindRetired, Points: []wire.PointID{id}}); err != nil {
		return err
	}
	v.store.kick()
	return nil
}

func (v *VM) beginRemove(id wire.PointID) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.usableLocked(); err != nil {
		return err
	}
	i := v.state.find(id)
	why := ""
	switch {
	case i < 0:
		return v.state.noPoint(id)
	case id == v.state.newest():
		why = "it is the newest one"
	case v.state.Points[i].Pinned:
		why = "it is pinned: unpin it first"
	case v.state.needs(id):
		why = "a failover, or the branch of one, lies over it"
	case v.uses[id] > 0:
		why = "it is open"
	default:
		v.retiring[id] = true
		return nil
	}
	return fmt.Errorf("point %v of VM %s cannot be removed: %s: %w", id, v.state.Name, why, ErrInUse)
}

func (v *VM) endRetiring(ids []wire.PointID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, id := range ids {
		delete(v.retiring, id)
	}
}
