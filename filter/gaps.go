package filter

import (
	"sync"

	"afterimage/filter/gap"
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
//
// The file has what is in any of the sets: the states themselves do not outlive the
// process, for what was copied then has to be copied again.
type gapMap struct {
	// mu is held while the file is written, but not while it is synced.
	mu     sync.Mutex
	file   *gap.Map     // nil: there is none
	open   hrl.BlockSet // to be copied
	copied hrl.BlockSet // a copy entry is in the log (rule R5)
	sealed hrl.BlockSet // and the cut that is being shipped has it
}

func (g *gapMap) add(off, length int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open.Add(0, off, length)
	g.copied.Remove(0, off, length)
	if g.file != nil {
		// If it fails the map says so when it is next opened, or tries to. Here,
		// and in the log if that still takes something, the gap is known.
		_ = g.file.Add(off, length)
	}
}

// keepIn makes gaps of what the file has, and keeps them there from now on.
func (g *gapMap) keepIn(file *gap.Map) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.file = file
	if file != nil {
		file.AppendTo(&g.open)
	}
}

func (g *gapMap) sync() error {
	g.mu.Lock()
	file := g.file
	g.mu.Unlock()
	if file == nil {
		return nil
	}
	return file.Sync()
}

func (g *gapMap) resize(size int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.file == nil {
		return nil
	}
	return g.file.Resize(size)
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
	if g.file != nil {
		_ = g.file.Remove(off, length) // one too many costs a copy
	}
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
	if g.file != nil {
		healed := g.sealed
		g.open.Runs(healed.Remove)
		g.copied.Runs(healed.Remove)
		_ = g.file.RemoveSet(&healed) // one too many costs a copy
	}
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
