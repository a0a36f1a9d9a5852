package filter

import (
	"errors"
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
// The file has what is in any of the sets. The states themselves do not outlive the
// process, but for one thing: a second file, pending, lacks the blocks whose copies
// the replica has, durably. What is in file and not in pending is copied when the
// session in which that was done goes on (restore). So whatever is damaged, torn or
// missing of pending, and every removal from it that a crash loses, costs a copy. A
// block that becomes a gap is stored in pending as it is in file: in the page cache
// before the guest is answered, and durable before its mark is cleared.
type gapMap struct {
	// mu is held while the files are written, but not while they are synced.
	mu      sync.Mutex
	size    int64        // of the disk
	file    *gap.Map     // nil: there is none
	pending *gap.Map     // nil: what was copied is forgotten with the process
	maybe   *gap.Map     // of which older copies may lie at the replica; nil: sent has it
	sent    hrl.BlockSet // in place of maybe
	open    hrl.BlockSet // to be copied
	copied  hrl.BlockSet // a copy entry is in the log (rule R5)
	sealed  hrl.BlockSet // and the cut that is being shipped has it

	data [2]int64 // a range that had no hole when it was last looked at, and is being copied
}

func (g *gapMap) add(off, length int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open.Add(0, off, length)
	g.copied.Remove(0, off, length)
	// If they fail the maps say so when they are next opened, or try to. Here,
	// and in the log if that still takes something, the gap is known.
	if g.file != nil {
		_ = g.file.Add(off, length)
	}
	if g.pending != nil {
		_ = g.pending.Add(off, length)
	}
}

// keepIn makes gaps of what the file has, and keeps them there from now on.
func (g *gapMap) keepIn(t *Tracking) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.file, g.pending, g.maybe = t.Gaps, t.Pending, t.Sent
	g.open.AddSet(&g.copied)
	g.open.AddSet(&g.sealed)
	g.copied, g.sealed = hrl.BlockSet{}, hrl.BlockSet{}
	if g.file != nil {
		g.file.AppendTo(&g.open)
	}
}

// restore says that the session in which copies were delivered goes on.
func (g *gapMap) restore() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pending == nil {
		return
	}
	had := g.open
	g.open = hrl.BlockSet{}
	g.copied.AddSet(&had)
	g.pending.Runs(func(off, length int64) {
		for end := off + length; ; {
			start, n, ok := had.Next(0, off)
			if !ok || max(start, off) >= end { // the disk may end within a block
				return
			}
			start, n = max(start, off), min(start+n, end)-max(start, off)
			g.open.Add(0, start, n)
			g.copied.Remove(0, start, n)
			off = start + n
		}
	})
}

// begin forgets what was delivered in an earlier session, durably.
func (g *gapMap) begin(size int64) error {
	g.mu.Lock()
	pending, maybe := g.pending, g.maybe
	g.sent = hrl.BlockSet{}
	var err error
	if pending != nil {
		err = pending.Add(0, size)
	}
	g.mu.Unlock()
	if pending != nil && err == nil {
		err = pending.Sync()
	}
	if maybe != nil && err == nil {
		if err = maybe.Remove(0, size); err == nil {
			err = maybe.Sync()
		}
	}
	return err
}

// deliver says that the replica has, durably, the newest copies of blocks. What has
// become a gap again since is left as it is.
func (g *gapMap) deliver(s *hrl.BlockSet) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pending == nil {
		return
	}
	for off, n, ok := s.Next(0, 0); ok; off, n, ok = s.Next(0, off+n) {
		for at, end := off, off+n; at < end; {
			start, n, ok := g.copied.Next(0, at)
			if !ok || max(start, off) >= end { // the disk may end within a block
				break
			}
			start, n = max(start, at), min(start+n, end)-max(start, at)
			_ = g.pending.Remove(start, n) // one too many costs a copy
			at = start + n
		}
	}
}

func (g *gapMap) noteData(off, end int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.data = [2]int64{off, end}
}

func (g *gapMap) isData(off int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.data[0] <= off && off < g.data[1]
}

func (g *gapMap) kept() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pending != nil && g.maybe != nil && g.pending.Broken() == nil && g.maybe.Broken() == nil
}

// isCopied reports whether every block that the range touches is copied.
func (g *gapMap) isCopied(off, length int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for b := off &^ (hrl.BlockBytes - 1); b < off+length; b += hrl.BlockBytes {
		if !g.copied.Has(0, b) {
			return false
		}
	}
	return true
}

// send notes, durably, of which blocks copies will lie at the replica.
func (g *gapMap) send(s *hrl.BlockSet, size int64) error {
	g.mu.Lock()
	maybe := g.maybe
	if maybe == nil {
		g.sent.AddSet(s)
	}
	g.mu.Unlock()
	if maybe == nil {
		return nil
	}
	var err error
	s.Runs(func(_ hrl.DiskID, off, length int64) {
		// The last block may reach beyond the disk's end, which says nothing.
		if !maybe.Has(off, length) {
			err = errors.Join(err, maybe.Add(off, min(length, size-off)))
		}
	})
	if err != nil {
		return err
	}
	return maybe.Sync()
}

func (g *gapMap) wasSent(off int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.maybe != nil {
		return g.maybe.Has(off, 1)
	}
	return g.sent.Has(0, off)
}

func (g *gapMap) sync() error {
	g.mu.Lock()
	file, pending := g.file, g.pending
	g.mu.Unlock()
	for _, m := range []*gap.Map{file, pending} {
		if m == nil {
			continue
		}
		if err := m.Sync(); err != nil {
			return err
		}
	}
	return nil
}

func (g *gapMap) resize(size int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range []*gap.Map{g.file, g.pending} {
		if m == nil {
			continue
		}
		if err := m.Resize(size); err != nil {
			return err
		}
	}
	was := g.size
	g.size = size
	if g.maybe != nil {
		if err := g.maybe.Resize(size); err != nil {
			return err
		}
	}
	if size <= was {
		return nil
	}
	// Of what comes anew the replica may have older copies, if the disk was as large once
	// before in the same session.
	return g.maySentLocked(was, size-was)
}

// maySent says that older copies of a range may lie at the replica.
func (g *gapMap) maySent(off, length int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.maySentLocked(off, length)
}

func (g *gapMap) maySentLocked(off, length int64) error {
	if g.maybe == nil {
		g.sent.Add(0, off, length)
		return nil
	}
	if err := g.maybe.Add(off, length); err != nil {
		return err
	}
	return g.maybe.Sync()
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
	if g.pending != nil {
		for _, s := range []*hrl.BlockSet{&g.copied, &g.sealed} {
			for off, n, ok := s.Next(0, 0); ok; off, n, ok = s.Next(0, off+n) {
				_ = g.pending.Add(off, n) // likewise
			}
		}
	}
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
