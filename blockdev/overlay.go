package blockdev

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
)

// overlay is a disk of a base, layers over it, and perhaps a writable top.
type overlay struct {
	base   Device
	layers []Layered // oldest first
	top    *Top      // nil: read-only
	size   int64
	info   Info
	closed atomic.Bool
}

// NewOverlay returns the disk that the layers, oldest first, make of base: every
// byte is that of the newest layer that has it, else that of base, and zero
// beyond the end of base. Its size is that of the newest layer's disk, or of
// base without layers.
//
// With a top it is writable, and every change goes there; base and layers are
// never written. The top must have been made for a disk of that size. Closing
// the overlay closes neither base nor layers, which others may use at the same
// time, nor the top.
func NewOverlay(base Device, layers []Layered, top *Top) (Device, error) {
	o := &overlay{base: base, layers: slices.Clone(layers), top: top, size: base.Size()}
	if n := len(layers); n > 0 {
		o.size = layers[n-1].DiskSize()
	}
	o.info = Info{
		Name: fmt.Sprintf("%s under %d layers", base.Info().Name, len(layers)), ReadOnly: true,
		BlockSize: SectorSize, MemAlign: 1, Preferred: topBlock, Slow: true,
		Rotational: base.Info().Rotational,
	}
	if top != nil {
		if top.size != o.size {
			return nil, fmt.Errorf("%s is of a disk of %d bytes, %s has %d: %w", top.Name(), top.size, o.info.Name, o.size, ErrNotSupported)
		}
		in := top.data.Info()
		o.info.Name = fmt.Sprintf("%s over %s", top.Name(), o.info.Name)
		o.info.ReadOnly, o.info.CheapZero, o.info.CheapTrim = false, in.CheapZero, in.CheapTrim
		o.info.Rotational = in.Rotational
	}
	return o, nil
}

// Info implements Device.
func (o *overlay) Info() Info { return o.info }

// Size implements Device.
func (o *overlay) Size() int64 { return o.size }

// Do implements Device.
func (o *overlay) Do(reqs []*Request) {
	for _, r := range reqs {
		r.Done = Extent{}
		if err := o.do(r); err != nil {
			r.Err = fmt.Errorf("%s: %w", o.info.Name, err)
			continue
		}
		r.Err = nil
	}
}

func (o *overlay) do(r *Request) error {
	if o.closed.Load() {
		return ErrClosed
	}
	if err := r.Check(&o.info, o.size); err != nil {
		return err
	}
	switch {
	case r.Op == OpFlush && o.top == nil:
		return nil
	case r.Op == OpFlush:
		return o.top.flush()
	case r.Len == 0:
		return nil
	case r.Op == OpRead && r.Flags&FlagNoWait != 0:
		return ErrWouldBlock // where the bytes lie is known only after looking
	case r.Op == OpRead:
		return o.read(r.Buf, r.Off)
	}
	var err error
	switch r.Op {
	case OpWrite:
		err = o.top.write(r.Buf, r.Off, o.below)
	case OpWriteZeroes:
		err = o.top.zero(r.Extent(), r.Flags, o.below)
	case OpTrim:
		r.Done, err = o.top.trim(r.Extent())
	}
	if err == nil && r.Flags&FlagFUA != 0 {
		err = o.top.flush()
	}
	if err != nil {
		r.Done = Extent{}
	}
	return err
}

// read fills p with what is at off.
func (o *overlay) read(p []byte, off int64) error {
	if o.top == nil {
		return o.below(p, off)
	}
	for len(p) > 0 {
		n, present := o.top.run(off, int64(len(p)))
		var err error
		if present {
			err = ReadAt(o.top.data, p[:n], off)
		} else {
			err = o.below(p[:n], off)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// below fills p with what is at off under the top.
func (o *overlay) below(p []byte, off int64) error { return o.readLayers(p, off, len(o.layers)) }

// readLayers fills p with what the oldest n layers and the base have at off.
func (o *overlay) readLayers(p []byte, off int64, n int) error {
	if n == 0 {
		return o.readBase(p, off)
	}
	l := o.layers[n-1]
	for len(p) > 0 {
		run, ok, err := l.Lookup(off, int64(len(p)))
		if err != nil {
			return err
		}
		gap := int64(len(p))
		if ok {
			gap = run.Off - off
		}
		if gap > 0 {
			if err := o.readLayers(p[:gap], off, n-1); err != nil {
				return err
			}
			p, off = p[gap:], off+gap
		}
		if !ok {
			continue
		}
		if run.Zero {
			clear(p[:run.Len])
		} else if _, err := l.ReadAt(p[:run.Len], run.Off); err != nil {
			return err
		}
		p, off = p[run.Len:], off+run.Len
	}
	return nil
}

// readBase fills p from the base, which may have less bytes and may want more
// alignment than the overlay.
func (o *overlay) readBase(p []byte, off int64) error {
	size := o.base.Size()
	if off >= size {
		clear(p)
		return nil
	}
	if have := size - off; int64(len(p)) > have {
		clear(p[have:])
		p = p[:have]
	}
	info := o.base.Info()
	n := int64(len(p))
	if b := info.BlockSize; off%b != 0 || n%b != 0 || !aligned(p, info.MemAlign) {
		lo, hi := off/b*b, (off+n+b-1)/b*b
		wide := AlignedBuf(int(hi - lo))
		if err := ReadAt(o.base, wide, lo); err != nil {
			return err
		}
		copy(p, wide[off-lo:])
		return nil
	}
	return ReadAt(o.base, p, off)
}

// Extents implements Device.
func (o *overlay) Extents(off, length int64, visit func(Run) bool) error {
	if o.closed.Load() {
		return fmt.Errorf("%s: %w", o.info.Name, ErrClosed)
	}
	if err := checkRange(&o.info, off, length, o.size); err != nil {
		return err
	}
	err := o.extents(off, length, visit)
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

// errStop ends a walk because the visitor has had enough.
var errStop = errors.New("stop")

func (o *overlay) extents(off, length int64, visit func(Run) bool) error {
	for length > 0 {
		n, present := length, false
		if o.top != nil {
			n, present = o.top.run(off, length)
		}
		var err error
		if present {
			err = runs(o.top.data, off, n, visit)
		} else {
			err = o.extentsBelow(off, n, len(o.layers), visit)
		}
		if err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// extentsBelow is readLayers for extents.
func (o *overlay) extentsBelow(off, length int64, n int, visit func(Run) bool) error {
	if n == 0 {
		return o.extentsBase(off, length, visit)
	}
	for length > 0 {
		run, ok, err := o.layers[n-1].Lookup(off, length)
		if err != nil {
			return err
		}
		gap := length
		if ok {
			gap = run.Off - off
		}
		if gap > 0 {
			if err := o.extentsBelow(off, gap, n-1, visit); err != nil {
				return err
			}
		}
		off, length = off+gap, length-gap
		if !ok {
			continue
		}
		if !visit(run) {
			return errStop
		}
		off, length = off+run.Len, length-run.Len
	}
	return nil
}

func (o *overlay) extentsBase(off, length int64, visit func(Run) bool) error {
	have := max(0, min(length, o.base.Size()-off))
	if have > 0 {
		if err := runs(o.base, off, have, visit); err != nil {
			return err
		}
	}
	if have < length && !visit(Run{Extent: Extent{off + have, length - have}, Hole: true, Zero: true}) {
		return errStop
	}
	return nil
}

// runs is d.Extents with errStop where the visitor has had enough.
func runs(d Device, off, length int64, visit func(Run) bool) error {
	more := true
	err := d.Extents(off, length, func(r Run) bool {
		more = visit(r)
		return more
	})
	if err == nil && !more {
		return errStop
	}
	return err
}

// Resize implements Device: a point in the past has the size it had.
func (o *overlay) Resize(int64) error {
	err := ErrNotSupported
	if o.closed.Load() {
		err = ErrClosed
	}
	return fmt.Errorf("%s: resize: %w", o.info.Name, err)
}

// Close implements Device.
func (o *overlay) Close() error {
	if o.closed.Swap(true) {
		return fmt.Errorf("%s: %w", o.info.Name, ErrClosed)
	}
	return nil
}
