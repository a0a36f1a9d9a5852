package replica

import (
	"context"
	"errors"
	"fmt"

	"afterimage/hrl/wire"
)

// foldGroup is how many points must have been retired before they are folded
// into the base. Together they cost less: what was rewritten meanwhile is written
// once (RULES I5).
const foldGroup = 8

// retire records which points are not opened any more: the oldest ones beyond
// those that are kept, up to the first that is pinned, open, or under a run.
// Taking a point and retiring it are decided under one lock (RULES I1).
func (v *VM) retire() error {
	v.dropDigester(v.current().newest())
	v.change.Lock()
	defer v.change.Unlock()
	v.mu.Lock()
	ids := v.state.retirable(func(id wire.PointID) bool { return v.uses[id] > 0 })
	for _, id := range ids {
		v.retiring[id] = true
	}
	v.mu.Unlock()
	if len(ids) == 0 {
		return nil
	}
	defer v.endRetiring(ids)
	return v.commitLocked(record{Kind: kindRetired, Points: ids})
}

// fold brings the bases to the oldest point that is not retired, if enough is to
// be folded, or if it is forced.
//
// A crash after step
//
//  1. the points below are recorded as retired, synced (retire)
//  2. each base was folded and synced, with its checksums (base.fold)
//
// leaves points that nobody opens, and bases that may be anything between what
// they were and what they shall be: the fold is begun anew, and every layer it
// needs is still there. After step
//
//  3. the new place of the bases recorded, synced: leaves layers that nothing
//     needs; Open removes them
//  4. layers removed: leaves nothing to do
//
// A point that is open, or is opened meanwhile, lies above all layers that are
// being folded, and they cover whatever is half written.
func (v *VM) fold(ctx context.Context, force bool) error {
	st := v.current()
	t := st.oldest()
	if t < 0 || st.Points[t].ID == st.Base {
		return nil
	}
	if n := t + 1 - st.above(); n < foldGroup && !force && !st.Base.IsZero() {
		return nil
	}
	for _, d := range st.Disks {
		if refs := st.layers(d.Name, t); len(refs) > 0 {
			if err := v.foldDisk(ctx, refs, st.Folds+1); err != nil {
				return fmt.Errorf("fold disk %s up to point %v: %w", d.Name, st.Points[t].ID, err)
			}
		}
	}
	return v.endFold(st, t)
}

func (v *VM) foldDisk(ctx context.Context, refs []layerRef, number uint32) error {
	v.mu.Lock()
	b, held := v.bases[refs[0].disk], v.holdLayersLocked(refs)
	v.mu.Unlock()
	defer v.releaseLayers(held)
	if err := openLayers(held); err != nil {
		return err
	}
	return b.fold(newStack(ctx, held), number)
}

// endFold records that the bases are at Points[t] of the state st, and removes
// the layers that are in them.
func (v *VM) endFold(st *state, t int) error {
	if err := v.recordFold(st.Points[t].ID); err != nil {
		return err
	}
	// Nobody who looks for these layers now has seen the state before.
	v.files.Lock()
	defer v.files.Unlock()
	for _, p := range st.Points[st.above() : t+1] {
		for _, d := range p.Disks {
			for _, l := range d.Layers {
				if err := v.removeLayer(l); err != nil {
					v.warn.Warn("a layer that was folded cannot be removed", "vm", st.Name, "problem", err)
				}
			}
		}
	}
	return nil
}

func (v *VM) recordFold(id wire.PointID) error {
	v.change.Lock()
	defer v.change.Unlock()
	if st := v.current(); st.Points[st.oldest()].ID != id {
		return errMoved
	}
	if err := v.commitLocked(record{Kind: kindFolded, Points: []wire.PointID{id}}); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, b := range v.bases {
		b.mu.Lock()
		b.folds = v.state.Folds
		b.mu.Unlock()
	}
	return nil
}

// errMoved says that more has to be folded than was, since the point that it led
// to was removed meanwhile.
var errMoved = errors.New("the oldest point was removed meanwhile")
