package replica

import (
	"context"
	"errors"
	"fmt"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// Verify reads all that a point needs, every byte of its layers and of the bases
// below them, and compares it with the checksums. Progress, if not nil, is told
// how many more bytes were read. What is damaged gives an error that wraps
// hrl.ErrDamaged and names the file, and by the time it is returned the points
// concerned are marked. A point that was marked and is whole is unmarked.
func (v *VM) Verify(ctx context.Context, id wire.PointID, progress func(bytes int64)) error {
	if progress == nil {
		progress = func(int64) {}
	}
	if err := v.usable(); err != nil {
		return err
	}
	st := v.current()
	i := st.find(id)
	if i < 0 {
		return st.noPoint(id)
	}
	for _, d := range st.Points[i].Disks {
		if err := v.verifyDisk(ctx, id, d.Name, progress); err != nil {
			if errors.Is(err, hrl.ErrDamaged) {
				err = errors.Join(err, v.recordDamage())
			}
			return err
		}
	}
	return v.unmark(id)
}

func (v *VM) verifyDisk(ctx context.Context, id wire.PointID, disk string, progress func(bytes int64)) error {
	c, err := v.chain(id, disk)
	if err != nil {
		return err
	}
	defer c.release()
	for _, h := range c.layers {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := h.failed(h.l.Verify()); err != nil {
			return err
		}
		v.mu.Lock()
		n := v.stored[h.digest]
		v.mu.Unlock()
		progress(n)
	}
	return c.base.verify(ctx, func(block int64, err error) error {
		c.base.damaged(block, err)
		covered, cerr := coversBlock(c.layers, block, c.disk.Size)
		if cerr != nil {
			return cerr
		}
		if covered || block*sumBlock >= c.disk.Size {
			return nil
		}
		return fmt.Errorf("point %v of VM %s: %w", id, v.Name(), err)
	}, progress)
}

// unmark takes the mark from a point that has turned out to be whole.
func (v *VM) unmark(id wire.PointID) error {
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.usable(); err != nil {
		return err
	}
	st := v.current()
	if i := st.find(id); i < 0 || st.Points[i].Damaged == "" {
		return nil
	}
	v.mu.Lock()
	clear(v.notes) // what is still damaged is found again
	v.mu.Unlock()
	v.store.kick()
	return v.commitLocked(record{Kind: kindDamaged, Points: []wire.PointID{id}})
}
