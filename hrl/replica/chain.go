package replica

import (
	"slices"

	"afterimage/hrl/wire"
)

// What the rest of the package asks of a state.

// newest is the newest listed point, or zero.
func (s *state) newest() wire.PointID {
	if len(s.Points) == 0 {
		return wire.PointID{}
	}
	return s.Points[len(s.Points)-1].ID
}

// find is the index in Points of a point that is not retired, or -1.
func (s *state) find(id wire.PointID) int {
	i, ok := slices.BinarySearchFunc(s.Points, id, func(p point, id wire.PointID) int {
		switch {
		case p.ID == id:
			return 0
		case p.ID.Before(id):
			return -1
		}
		return 1
	})
	if !ok || s.Points[i].Retired {
		return -1
	}
	return i
}

// oldest is the index of the oldest point that is not retired, or -1: the one
// that the bases shall be at.
func (s *state) oldest() int {
	return slices.IndexFunc(s.Points, func(p point) bool { return !p.Retired })
}

// above is the index of the first point whose layers lie over the bases.
func (s *state) above() int {
	if s.Base.IsZero() {
		return 0
	}
	return 1
}

// digests are the layers of all points, each with its point; of the point that
// the bases are at too, though they are folded.
func (s *state) digests() map[string]wire.PointID {
	m := map[string]wire.PointID{}
	for i := range s.Points {
		for _, d := range s.Points[i].Disks {
			for _, l := range d.Layers {
				m[l] = s.Points[i].ID
			}
		}
	}
	return m
}

// disk is the disk of that name in a point, or nil.
func (p *point) disk(name string) *wire.PointDisk {
	for i := range p.Disks {
		if p.Disks[i].Name == name {
			return &p.Disks[i]
		}
	}
	return nil
}

// A layerRef names a layer and the point it came with.
type layerRef struct {
	digest, disk string
	point        wire.PointID
}

// layers are those of a disk that lie over its base up to Points[i], the oldest
// first.
func (s *state) layers(disk string, i int) []layerRef {
	var out []layerRef
	for k := s.above(); k <= i; k++ {
		if d := s.Points[k].disk(disk); d != nil {
			for _, l := range d.Layers {
				out = append(out, layerRef{l, disk, s.Points[k].ID})
			}
		}
	}
	return out
}

// allLayers are those of all disks that lie over the bases.
func (s *state) allLayers() []layerRef {
	var out []layerRef
	for _, p := range s.Points[min(s.above(), len(s.Points)):] {
		for _, d := range p.Disks {
			for _, l := range d.Layers {
				out = append(out, layerRef{l, d.Name, p.ID})
			}
		}
	}
	return out
}

// failover is the failover that stands, or nil.
func (s *state) failover() *runRecord {
	for i := range s.Runs {
		if !s.Runs[i].Test {
			return &s.Runs[i]
		}
	}
	return nil
}

// run is the run of that name, or nil.
func (s *state) run(name string) *runRecord {
	for i := range s.Runs {
		if s.Runs[i].Name == name {
			return &s.Runs[i]
		}
	}
	return nil
}

// retirable are the points that are too many: the oldest ones, up to the first
// that somebody needs. used says whether a point is open.
//
// If what is younger than some point is damaged, that point is the newest one
// that can be relied on, and stays.
func (s *state) retirable(used func(wire.PointID) bool) []wire.PointID {
	var listed []*point
	whole := -1
	for i := range s.Points {
		if p := &s.Points[i]; !p.Retired {
			if p.Damaged == "" {
				whole = len(listed)
			}
			listed = append(listed, p)
		}
	}
	n := len(listed) - s.Keep
	if whole >= 0 {
		n = min(n, whole)
	}
	var out []wire.PointID
	for i := 0; i < n && !listed[i].Pinned && !s.needs(listed[i].ID) && !used(listed[i].ID); i++ {
		out = append(out, listed[i].ID)
	}
	return out
}

// needs reports whether a run or a branch lies over the point.
func (s *state) needs(id wire.PointID) bool {
	return slices.ContainsFunc(s.Runs, func(r runRecord) bool { return r.Point == id }) ||
		slices.ContainsFunc(s.Branches, func(b branchRecord) bool { return b.Run.Point == id })
}
