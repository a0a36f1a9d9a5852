package filter

import (
	"sync"

	"afterimage/blockdev"
	"afterimage/filter/gap"
	"afterimage/filter/hot"
)

// Tracking is what of the tracking of a disk is durable. Both maps lie on the file
// system of the image; the filter does not close them.
type Tracking struct {
	// Hot are the extents that may differ between disk and log after a power
	// cut; nil: it is the whole disk then.
	Hot *hot.Map
	// Gaps keeps the gaps over a kill, and, synced, over a power cut; nil: they
	// are kept in memory and in the log.
	Gaps *gap.Map
	// Pending, if there are Gaps, lacks those whose copies the replica has, durably,
	// so that a copy goes on after a crash; Sent has those of which older copies may
	// lie over there. Nil, both: it begins anew.
	Pending, Sent *gap.Map
	// Marked is called when an extent was marked, and must not block: somebody
	// may have to cool others. May be nil.
	Marked func()
}

// Track says where the disk's tracking is kept from the next AttachLog on; what Gaps
// has is a gap at once. It comes while nothing is logged.
func (f *Filter) Track(t Tracking) {
	if t.Marked == nil {
		t.Marked = func() {}
	}
	f.track.Store(&t)
	f.marking = sync.Once{}
	f.gaps.keepIn(&t)
}

// mark waits until the extents of a range are durably marked (rule R1). The caller is
// counted into them. It is the one thing of replication that a guest's write waits
// for, and it fails only if the file system of the image does (RULES D4). The write
// goes on in any case.
func (f *Filter) mark(h *hot.Map, off, length int64) {
	begin := blockdev.Monotonic()
	err := h.Mark(off, length)
	f.stats.Mark.record(blockdev.Monotonic() - begin)
	if err == nil {
		f.track.Load().Marked()
		return
	}
	// From now on nothing says which extents may differ after a power cut. The
	// map's file says that much, if it can still be written; otherwise this does.
	f.marking.Do(func() {
		f.warn.Warn("extents cannot be marked any more: after a power cut all of the disk will be compared",
			"disk", f.info.Name, "why", err)
		f.gap(f.locks.teeNow(), 0, f.Size())
		_ = f.SyncGaps() // there is no third place
	})
}

// Untracked reports whether the disk was written since New while nothing was logged.
func (f *Filter) Untracked() bool { return f.untracked.Load() }

// SyncGaps makes all gaps durable that were stored before it was called.
func (f *Filter) SyncGaps() error { return f.gaps.sync() }

// Tracked returns the disk's tracking.
func (f *Filter) Tracked() Tracking { return *f.track.Load() }
