package filter

import (
	"sync"

	"afterimage/hrl"
)

// gapMap is the set of 64 KiB blocks of the disk that may have changed without
// a frame in the log. A bit is set before the guest is answered, and forgotten
// only when the replica has acknowledged a point that has the block (rule R3).
type gapMap struct {
	mu  sync.Mutex
	set hrl.BlockSet
}

func (g *gapMap) add(off, length int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set.Add(0, off, length)
}

func (g *gapMap) bytes() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.set.Bytes()
}

func (g *gapMap) runs(visit func(off, length int64)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set.Runs(func(_ hrl.DiskID, off, length int64) { visit(off, length) })
}
