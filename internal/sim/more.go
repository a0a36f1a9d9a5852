package sim

import (
	"context"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl/replica"
	"afterimage/hrl/wire"
)

// busyThenPower writes for some seconds without a flush, so that marks are cleared
// and points acknowledged meanwhile, and cuts the power.
func (w *world) busyThenPower() {
	for range 10 + w.rng.IntN(40) {
		disk := 0
		r := w.request(disk, 0)
		r.Op, r.Flags, r.Len = blockdev.OpWrite, 0, min(max(r.Len, sector), 16<<10)
		r.Buf = make([]byte, r.Len)
		w.goAsk(disk, r)
		time.Sleep(time.Duration(1+w.rng.IntN(100)) * time.Millisecond)
	}
	if w.rng.IntN(2) == 0 {
		_, _ = w.sync(20 * time.Second)
		w.checkSynced()
	}
	if w.pri != nil {
		w.crashPrimary(true)
	}
}

// anyPoint is one of the points that are listed.
func (w *world) anyPoint() (*replica.VM, wire.PointID, bool) {
	v := w.replicaVM()
	if v == nil || v.Broken() != nil {
		return nil, wire.PointID{}, false
	}
	points := v.Points()
	if len(points) == 0 {
		return nil, wire.PointID{}, false
	}
	w.checkPoints(false)
	return v, points[w.rng.IntN(len(points))].ID, true
}

func (w *world) pin() {
	if v, id, ok := w.anyPoint(); ok {
		if err := v.Pin(id, w.rng.IntN(3) == 0); err != nil {
			w.note("  %v", err)
		}
	}
}

func (w *world) verify() {
	v, id, ok := w.anyPoint()
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := v.Verify(ctx, id, nil); err != nil {
		if !w.sec.proc.Gone() && !w.sec.faulty && !w.rotten {
			w.wrong("point %v does not verify: %v", id, err)
		}
		w.note("  %v", err)
	}
}

// testFailover looks at a point through a test failover, and writes to it. The point
// stays what it is.
func (w *world) testFailover() {
	v, id, ok := w.anyPoint()
	if !ok {
		return
	}
	run, err := v.Test("test", id)
	if err != nil {
		w.note("  %v", err)
		return
	}
	d, k := run.Device("disk0"), w.known[id]
	b := make([]byte, w.specs[0].size)
	if err := blockdev.ReadAt(d, b, 0); err != nil {
		w.note("  %v", err)
	} else if vals, err := values(b, 0, 0); err != nil {
		w.wrong("test failover of %v: %v", id, err)
	} else if k != nil {
		for s, v := range vals {
			if v != k.disks[0][s] {
				w.wrong("test failover of %v: sector %d has #%d, the point #%d", id, s, v, k.disks[0][s])
				break
			}
		}
	}
	if err := blockdev.WriteAt(d, make([]byte, 8192), 4096); err != nil {
		w.note("  %v", err)
	}
	if err := v.EndTest("test"); err != nil {
		w.note("  %v", err)
	}
}

// forget ends the primary cleanly or not, and takes what it has stored.
func (w *world) forget(all bool) {
	if w.pri == nil {
		return
	}
	if w.rng.IntN(2) == 0 {
		w.stopPrimary()
	} else {
		w.crashPrimary(w.rng.IntN(2) == 0)
	}
	w.mu.Lock()
	w.saved = nil
	w.mu.Unlock()
	if all {
		w.phost.RemoveAll(logDir)
	}
}

// restore puts the replica's files back to what they were, or keeps a copy of them.
// Points that are gone thereby are not missed.
func (w *world) restore() {
	if w.sec == nil {
		return
	}
	w.stopReplica()
	if w.copied == nil || w.rng.IntN(2) == 0 {
		w.copied = w.rhost.Clone(w.replicaDir)
		return
	}
	w.rhost.Restore(w.replicaDir, w.copied)
	w.order, w.turned = nil, true
	w.note("  done")
	if w.pri != nil {
		w.mu.Lock()
		w.pri.synced = nil
		w.mu.Unlock()
	}
}
