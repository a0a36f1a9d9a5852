package replica

import (
	"context"
	"fmt"
	"math"

	"afterimage/blockdev"
)

// A stack is several layers of a disk as one: what the newest of them has.
// Folding it writes each block once, however often it changed meanwhile, and
// gives the base the size it has at the end, not those in between. It is for one
// goroutine.
type stack struct {
	ctx    context.Context    // ends a fold; what is half done is done again
	layers []blockdev.Layered // the oldest first, at least one
	seen   []ahead            // of each layer
}

// ahead is what was found in a layer last. A first copy comes in thousands of
// layers, one behind the other on the disk: whoever goes over the disk must not
// search all of them for each of its blocks.
type ahead struct {
	from int64        // the layer has nothing in [from, run.Off)
	run  blockdev.Run // nor behind from, if it is empty
}

func newStack(ctx context.Context, held []*heldLayer) *stack {
	s := &stack{ctx: ctx, seen: make([]ahead, len(held))}
	for i, h := range held {
		s.layers = append(s.layers, h)
		s.seen[i].from = math.MaxInt64
	}
	return s
}

// Name implements blockdev.Layered.
func (s *stack) Name() string {
	return fmt.Sprintf("%d layers up to %s", len(s.layers), s.layers[len(s.layers)-1].Name())
}

// DiskSize implements blockdev.Layered.
func (s *stack) DiskSize() int64 { return s.layers[len(s.layers)-1].DiskSize() }

// next returns the first run of [off, end) that layer i has.
func (s *stack) next(i int, off, end int64) (blockdev.Run, bool, error) {
	a := &s.seen[i]
	if off < a.from || a.run.Len > 0 && off >= a.run.End() {
		run, ok, err := s.layers[i].Lookup(off, math.MaxInt64-off)
		if err != nil {
			return blockdev.Run{}, false, err
		}
		if !ok {
			run = blockdev.Run{}
		}
		*a = ahead{off, run}
	}
	run := a.run
	if run.Len == 0 || run.Off >= end {
		return blockdev.Run{}, false, nil
	}
	from, to := max(run.Off, off), min(run.End(), end)
	run.Off, run.Len = from, to-from
	return run, true, nil
}

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
		r, has, err := s.next(i, off, end)
		if err != nil {
			return run, 0, false, err
		}
		if !has || ok && r.Off >= run.Off {
			continue
		}
		// What is newer begins at run.Off, or nowhere.
		if ok {
			r.Len = min(r.End(), run.Off) - r.Off
		}
		run, of, ok = r, i, true
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
