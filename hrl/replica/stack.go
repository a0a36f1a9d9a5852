package replica

import (
	"context"
	"fmt"

	"afterimage/blockdev"
)

// A stack is several layers of a disk as one: what the newest of them has.
// Folding it writes each block once, however often it changed meanwhile, and
// gives the base the size it has at the end, not those in between.
type stack struct {
	ctx    context.Context    // ends a fold; what is half done is done again
	layers []blockdev.Layered // the oldest first, at least one
}

// Name implements blockdev.Layered.
func (s *stack) Name() string {
	return fmt.Sprintf("%d layers up to %s", len(s.layers), s.layers[len(s.layers)-1].Name())
}

// DiskSize implements blockdev.Layered.
func (s *stack) DiskSize() int64 { return s.layers[len(s.layers)-1].DiskSize() }

// Lookup implements blockdev.Layered.
func (s *stack) Lookup(off, n int64) (blockdev.Run, bool, error) {
	if err := s.ctx.Err(); err != nil {
		return blockdev.Run{}, false, err
	}
	run, _, ok, err := s.lookup(off, n)
	return run, ok, err
}

// lookup is Lookup with the layer whose run it is. Of the layers that have
// something at the first place where any has, the newest wins, up to where a
// newer one begins.
func (s *stack) lookup(off, n int64) (run blockdev.Run, of int, ok bool, err error) {
	end := off + n
	for i := len(s.layers) - 1; i >= 0; i-- {
		r, has, err := s.layers[i].Lookup(off, n)
		if err != nil {
			return run, 0, false, err
		}
		switch {
		case !has:
		case !ok || r.Off < run.Off:
			// What is newer begins behind it, at run.Off or at end.
			if ok {
				end = min(end, run.Off)
			}
			r.Len = min(r.End(), end) - r.Off
			run, of, ok = r, i, true
		}
	}
	return run, of, ok, nil
}

// ReadAt implements blockdev.Layered.
func (s *stack) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		run, i, ok, err := s.lookup(off+int64(done), int64(len(p)-done))
		if err != nil {
			return done, err
		}
		if !ok || run.Off != off+int64(done) {
			return done, fmt.Errorf("%s has nothing at byte %d", s.Name(), off+int64(done))
		}
		part := p[done : done+int(run.Len)]
		if run.Zero {
			clear(part)
		} else if _, err := s.layers[i].ReadAt(part, run.Off); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// covers reports whether the layers have every byte of the extent.
func (s *stack) covers(e blockdev.Extent) (bool, error) {
	for off := e.Off; off < e.End(); {
		run, ok, err := s.Lookup(off, e.End()-off)
		if err != nil || !ok || run.Off != off {
			return false, err
		}
		off = run.End()
	}
	return true, nil
}
