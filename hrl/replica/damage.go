package replica

import (
	"context"
	"errors"
	"slices"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// A damage is what was found not to be as it was written: a layer, or a block of
// a disk's base.
type damage struct {
	layer  layerRef
	disk   string
	block  int64
	reason string
}

// notesMax is how many damages of a VM are looked at. Where there are more, the
// points that rely on the rest are marked only as far as these mark them; whoever
// reads there gets the error all the same.
const notesMax = 256

// note remembers damage until the keeper records which points it concerns, and
// that it did.
func (v *VM) note(d damage) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.notes[d]; !known && len(v.notes) < notesMax {
		v.notes[d] = true
		v.store.kick()
	}
}

// recordDamage marks the points that rely on what was found damaged.
func (v *VM) recordDamage() error {
	v.mu.Lock()
	var notes []damage
	for d, open := range v.notes {
		if open {
			notes = append(notes, d)
		}
	}
	v.mu.Unlock()
	for _, d := range notes {
		if err := v.recordOne(d); err != nil {
			return err
		}
		v.mu.Lock()
		v.notes[d] = false
		v.mu.Unlock()
	}
	return nil
}

func (v *VM) recordOne(d damage) error {
	v.change.Lock()
	defer v.change.Unlock()
	st := v.current()
	var ids []wire.PointID
	for i := range st.Points {
		p := &st.Points[i]
		if p.Retired || p.Damaged != "" {
			continue
		}
		hit, err := v.concerns(st, i, &d)
		if err != nil {
			return err
		}
		if hit {
			ids = append(ids, p.ID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	v.warn.Error("recovery points are damaged", "vm", st.Name, "first", ids[0], "count", len(ids), "problem", d.reason)
	return v.commitLocked(record{Kind: kindDamaged, Points: ids, Reason: d.reason})
}

// concerns reports whether Points[i] relies on what is damaged: all points from
// a layer's on, and of a base those that do not cover the block.
func (v *VM) concerns(st *state, i int, d *damage) (bool, error) {
	if d.disk == "" {
		k := slices.IndexFunc(st.Points, func(p point) bool { return p.ID == d.layer.point })
		return k >= st.above() && i >= k, nil
	}
	p := st.Points[i].disk(d.disk)
	if p == nil || d.block*sumBlock >= p.Size {
		return false, nil
	}
	v.mu.Lock()
	held := v.holdLayersLocked(st.layers(d.disk, i))
	v.mu.Unlock()
	defer v.releaseLayers(held)
	covered, err := coversBlock(held, d.block, p.Size)
	if errors.Is(err, hrl.ErrDamaged) {
		return true, nil
	}
	return !covered, err
}

// coversBlock reports whether the layers have all of a block of the base, as far
// as it lies within size.
func coversBlock(held []*heldLayer, block, size int64) (bool, error) {
	if len(held) == 0 {
		return false, nil
	}
	if err := openLayers(held); err != nil {
		return false, err
	}
	off := block * sumBlock
	return newStack(context.Background(), held).covers(blockdev.Extent{Off: off, Len: min(sumBlock, size-off)})
}
