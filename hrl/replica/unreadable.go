package replica

import (
	"errors"
	"fmt"
	"slices"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
)

// What the primary could not read (RULES G5): a layer has nothing there, so that what is
// below it shows, and says so. From then on every point has those ranges as unreadable
// until a layer covers them. Nothing of it is damaged here, and nothing is refused: the
// primary's own disk does not have more.

// findUnreadable fills in what of the point's disks could not be read: what of its
// parent could not, as far as no layer has it since, and what its layers say.
func (v *VM) findUnreadable(st *state, p *wire.PointInfo) error {
	for i := range p.Disks {
		d := &p.Disks[i]
		var held []blockdev.Extent
		if n := len(st.Points); n > 0 {
			if before := st.Points[n-1].disk(d.Name); before != nil {
				for _, r := range before.Unreadable {
					held = append(held, blockdev.Extent{Off: r[0], Len: r[1]})
				}
			}
		}
		for _, digest := range d.Layers {
			var err error
			if held, err = v.unreadableOver(held, digest); err != nil {
				return fmt.Errorf("layer %s of disk %s: %w", digest, d.Name, err)
			}
		}
		d.Unreadable = unreadableRanges(held, d.Size)
	}
	return nil
}

// unreadableOver is what is unreadable with one layer more, in no order and perhaps twice.
func (v *VM) unreadableOver(below []blockdev.Extent, digest string) (out []blockdev.Extent, err error) {
	l, err := v.openLayer(v.layerPath(digest))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	for _, e := range below {
		// A disk that was smaller meanwhile had nothing there.
		for off, end := e.Off, min(e.End(), l.Size); off < end; {
			run, ok, err := l.Lookup(off, end-off)
			if err != nil {
				return nil, err
			}
			if !ok {
				run.Off, run.Len = end, 0
			}
			if run.Off > off {
				out = append(out, blockdev.Extent{Off: off, Len: run.Off - off})
			}
			off = run.End()
		}
	}
	err = l.Unreadable(func(e blockdev.Extent) bool {
		out = append(out, e)
		if len(out) >= unreadableHeld {
			out = joinExtents(out, unreadableHeld/2)
		}
		return true
	})
	return out, err
}

// unreadableHeld is how many ranges are in memory at the most.
const unreadableHeld = 1 << 16

// unreadableRanges are the extents as a point has them.
func unreadableRanges(ext []blockdev.Extent, size int64) [][2]int64 {
	var within []blockdev.Extent
	for _, e := range ext {
		if e.Off < size {
			within = append(within, blockdev.Extent{Off: e.Off, Len: min(e.Len, size-e.Off)})
		}
	}
	var out [][2]int64
	for _, e := range joinExtents(within, wire.UnreadableMax) {
		out = append(out, [2]int64{e.Off, e.Len})
	}
	return out
}

// joinExtents sorts the extents and joins those that touch, and as many of the nearest
// neighbours as it takes to be left with n at the most: too much is named rather than too
// little.
func joinExtents(ext []blockdev.Extent, n int) []blockdev.Extent {
	slices.SortFunc(ext, func(a, b blockdev.Extent) int {
		switch {
		case a.Off < b.Off:
			return -1
		case a.Off > b.Off:
			return 1
		}
		return 0
	})
	join := func(near int64) {
		out := ext[:0]
		for _, e := range ext {
			if k := len(out); k > 0 && e.Off-out[k-1].End() <= near {
				out[k-1].Len = max(out[k-1].End(), e.End()) - out[k-1].Off
				continue
			}
			out = append(out, e)
		}
		ext = out
	}
	join(0)
	if len(ext) > n {
		var between []int64
		for i := range ext[1:] {
			between = append(between, ext[i+1].Off-ext[i].End())
		}
		slices.Sort(between)
		join(between[len(between)-n])
	}
	return ext
}
