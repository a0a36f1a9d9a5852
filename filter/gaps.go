package filter

import (
	"sync"

	"afterimage/hrl"
)

// gapMap is the set of 64 KiB blocks of the disk that may have changed without
// a frame in the log. A bit is set before the guest is answered, and forgotten
// only when the replica has acknowledged a point that has the block (rule R3).
//
//	        copied             a cut comes            acknowledged
//	open ───────────▶ copied ───────────────▶ sealed ──────────────▶ no gap
//	  ▲                  │                       │
//	  └──────────────────┴───────────────────────┘ what was copied is given up
//
// A block may be in several of the sets at once: one that becomes a gap again
// after the cut is open, and stays so when the cut is acknowledged.
type gapMap struct {
	mu     sync.Mutex
	open   hrl.BlockSet // to be copied
	copied hrl.BlockSet // a copy entry is in the log (rule R5)
	sealed hrl.BlockSet // and the cut that is being shipped has it
}

func (g *gapMap) add(off, length int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open.Add(0, off, length)
	g.copied.Remove(0, off, length)
}

// next returns the first open run that reaches behind byte off.
func (g *gapMap) next(off int64) (start, length int64, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open.Next(0, off)
}

// copy says that whole open blocks were copied. The caller holds their range.
func (g *gapMap) copy(off, length int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open.Remove(0, off, length)
	g.copied.Add(0, off, length)
}

// forget drops open blocks that are no part of the disk any more.
func (g *gapMap) forget(off, length int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open.Remove(0, off, length)
}

func (g *gapMap) seal() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sealed.AddSet(&g.copied)
	g.copied = hrl.BlockSet{}
}

func (g *gapMap) acknowledge() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sealed = hrl.BlockSet{}
}

func (g *gapMap) reopen() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open.AddSet(&g.copied)
	g.open.AddSet(&g.sealed)
	g.copied, g.sealed = hrl.BlockSet{}, hrl.BlockSet{}
}

// bytes is how much of the disk is a gap in any state; open, how much of it is
// still to be copied.
func (g *gapMap) bytes() (all, open int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var s hrl.BlockSet
	s.AddSet(&g.open)
	s.AddSet(&g.copied)
	s.AddSet(&g.sealed)
	return s.Bytes(), g.open.Bytes()
}

func (g *gapMap) runs(visit func(off, length int64)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open.Runs(func(_ hrl.DiskID, off, length int64) { visit(off, length) })
}
