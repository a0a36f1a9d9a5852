package sim

import (
	"strings"
	"syscall"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/sim/simfs"
)

// troubles are what may befall the hosts.
func (w *world) troubles() []step {
	pri := func(f func(*primary)) func() {
		return func() {
			if w.pri != nil {
				f(w.pri)
			}
		}
	}
	sec := func(f func(*secondary)) func() {
		return func() {
			if w.sec != nil {
				f(w.sec)
			}
		}
	}
	return []step{
		{"kill the primary", 3, pri(func(*primary) { w.crashPrimary(false) })},
		{"cut the primary's power", 3, pri(func(*primary) { w.crashPrimary(true) })},
		{"the primary ends in some operation", 5, pri(func(p *primary) { p.proc.DieAfter(1 + w.rng.IntN(80)) })},
		{"restart the primary", 2, pri(func(*primary) { w.stopPrimary() })},
		{"kill the replica", 2, sec(func(*secondary) { w.crashReplica(false) })},
		{"cut the replica's power", 2, sec(func(*secondary) { w.crashReplica(true) })},
		{"the replica ends in some operation", 5, sec(func(s *secondary) { s.proc.DieAfter(1 + w.rng.IntN(120)) })},
		{"restart the replica", 1, sec(func(*secondary) { w.stopReplica() })},
		{"cut the line", 3, w.line.cutNow},
		{"cut the line after some bytes", 6, func() { w.line.cutAfter(w.rng.IntN(2), 1+w.rng.Int64N(1<<(4+w.rng.IntN(14)))) }},
		{"the next acknowledgement is lost", 4, func() { w.setCutAt(cutAfterList) }},
		{"the next point is not listed", 3, func() { w.setCutAt(cutBeforeList) }},
		{"the line is down", 2, func() { w.line.set(true, false) }},
		{"the line is silent", 1, func() { w.line.set(false, true) }},
		{"the line is back", 5, w.line.heal},
		{"the log fails", 2, pri(w.failLog)},
		{"the log is slow", 1, func() { w.slow.Store(!w.slow.Load()) }},
		{"a disk fails", 2, pri(w.failDisk)},
		{"the replica's files fail", 2, sec(w.failReplica)},
		{"files are well", 4, func() {
			if w.pri != nil && !w.pri.proc.Gone() {
				w.pri.proc.Heal()
			}
			if w.sec != nil && !w.sec.proc.Gone() {
				w.sec.proc.Heal()
			}
		}},
		{"gap", 1, pri(func(p *primary) {
			d := w.rng.IntN(len(w.specs))
			p.vm.Disks()[d].AddGap(w.rng.Int64N(w.specs[d].size), 512)
		})},
		{"all is a gap", 1, pri(func(p *primary) { p.vm.Disks()[w.rng.IntN(len(w.specs))].GapAll() })},
		{"the replica forgets what is staged", 2, func() {
			if v := w.replicaVM(); v != nil {
				if err := v.Discard(nil); err != nil {
					w.note("  %v", err)
				}
			}
		}},
		{"busy, and the power goes", 1, pri(func(*primary) { w.busyThenPower() })},
		{"pin", 1, w.pin},
		{"verify a point", 1, w.verify},
		{"test failover", 1, w.testFailover},
		{"the state is lost", 1, func() { w.forget(false) }},
		{"state and log are lost", 1, func() { w.forget(true) }},
		{"the replica is restored", 1, w.restore},
		{"failover", 1, sec(func(*secondary) { w.failover() })},
		{"the failover ends", 2, sec(func(*secondary) { w.endFailover() })},
		{"the log is damaged", 1, w.damageLog},
	}
}

// failLog lets operations on the log or the spool fail, once or for some time.
func (w *world) failLog(p *primary) {
	errs := []error{syscall.EIO, syscall.ENOSPC}
	ops := [][]simfs.Op{
		{simfs.OpWrite}, {simfs.OpWrite, simfs.OpAllocate, simfs.OpCreate}, {simfs.OpSync}, {simfs.OpRead},
		{simfs.OpSyncDir, simfs.OpRename}, {simfs.OpRemove}, {simfs.OpSave},
	}
	f := simfs.Fault{
		Ops: ops[w.rng.IntN(len(ops))], Under: logDir, After: w.rng.IntN(20), Times: 1 + w.rng.IntN(3), Err: errs[w.rng.IntN(2)],
	}
	if f.Ops[0] == simfs.OpSave {
		f.Under, f.After = statePath, w.rng.IntN(4)
	}
	p.proc.Inject(f)
	w.note("  %v under %s after %d, %d times", f.Ops, f.Under, f.After, f.Times)
}

func (w *world) failDisk(p *primary) {
	i := w.rng.IntN(len(w.specs))
	ops := [][]simfs.Op{{simfs.OpSync}, {simfs.OpSync}, {simfs.OpWrite}, {simfs.OpRead}}
	f := simfs.Fault{Ops: ops[w.rng.IntN(len(ops))], Under: image(i), After: w.rng.IntN(4), Times: 1, Err: syscall.EIO}
	w.mu.Lock()
	w.badDisk = true
	if f.Ops[0] == simfs.OpSync {
		w.badSync = true
	}
	w.noteLocked("  %v of disk %d after %d", f.Ops, i, f.After)
	w.mu.Unlock()
	p.proc.Inject(f)
}

func (w *world) failReplica(s *secondary) {
	errs := []error{syscall.EIO, syscall.ENOSPC}
	all := []simfs.Op{
		simfs.OpWrite, simfs.OpSync, simfs.OpSyncDir, simfs.OpCreate, simfs.OpRename, simfs.OpRemove, simfs.OpRead, simfs.OpOpen,
	}
	f := simfs.Fault{
		Ops: []simfs.Op{all[w.rng.IntN(len(all))]}, Under: w.replicaDir, After: w.rng.IntN(30), Times: 1 + w.rng.IntN(2), Err: errs[w.rng.IntN(2)],
	}
	s.faulty = true
	w.note("  %v after %d, %d times", f.Ops, f.After, f.Times)
	s.proc.Inject(f)
}

// damageLog flips a bit in a segment, of a log that runs or of one that does not.
func (w *world) damageLog() {
	paths := w.phost.Paths(func(p string) bool { return strings.HasPrefix(p, logDir+"/log/") && strings.HasSuffix(p, ".hrl") })
	if len(paths) == 0 {
		return
	}
	path := paths[w.rng.IntN(len(paths))]
	if w.phost.Flip(path, w.rng.Int64N(64<<10)) {
		w.note("  in %s", path)
	}
}

// failover starts a failover of the newest point. Nothing is listed until it ends.
func (w *world) failover() {
	v := w.replicaVM()
	if v == nil || v.Broken() != nil {
		return
	}
	points := v.Points()
	if len(points) == 0 {
		return
	}
	w.checkPoints(false)
	id := points[w.rng.IntN(len(points))].ID
	run, err := v.Start(id)
	if err != nil {
		w.note("  %v", err)
		return
	}
	w.note("  of %v", id)
	before := v.State().Newest
	if w.rng.IntN(2) == 0 && w.pri != nil {
		w.goAsk(0, w.request(0, 0))
		_, _ = w.sync(20 * time.Second)
	}
	if now := v.State().Newest; now != before && !w.sec.proc.Gone() {
		w.wrong("point %v was listed after a failover had begun at %v", now, before)
	}
	if d := run.Device("disk0"); d != nil {
		if err := blockdev.WriteAt(d, make([]byte, 4096), 0); err != nil {
			w.note("  %v", err)
		}
	}
	_ = run.Close()
}

// endFailover cancels what stands.
func (w *world) endFailover() {
	v := w.replicaVM()
	if v == nil || v.Broken() != nil || v.State().FailedOverTo.IsZero() {
		return
	}
	branch, err := v.Cancel()
	if err == nil {
		err = v.RemoveBranch(branch)
	}
	if err != nil {
		w.note("  %v", err)
	}
}

func (w *world) setCutAt(where int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cutAt = where
}
