package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/hrl/replica"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
	"afterimage/internal/shim"
)

// A run is a failover, or a test of one, with its disks behind the ordinary
// filter. Whoever opens or ends it holds the claim on its name.
type run struct {
	d    *Daemon
	name string // first part of its exports' names: the VM's, or that of the test
	vm   *replica.VM
	at   *replica.Run

	mu      sync.Mutex // guards what follows; held for moments
	shim    *shim.VM   // nil: not served
	failure error      // why not
}

// lent is a device that its user must not close.
type lent struct{ blockdev.Device }

// Close implements blockdev.Device: it does nothing.
func (lent) Close() error { return nil }

// serveRun opens a run's disks and exports them.
func (d *Daemon) serveRun(ctx context.Context, v *replica.VM, at *replica.Run) (*run, error) {
	r := &run{d: d, name: at.Name, vm: v, at: at}
	if !at.Test {
		r.name = v.Name()
	}
	err := r.open(ctx)
	r.failure = err
	d.mu.Lock()
	d.runs[r.name] = r
	d.mu.Unlock()
	return r, err
}

// resumeRun serves a run that stood when the daemon was started.
func (d *Daemon) resumeRun(v *replica.VM, at *replica.Run) {
	if r, err := d.serveRun(d.ctx, v, at); err != nil {
		d.log.Error("a failover or test that stands cannot be served", "name", r.name, "vm", v.Name(), "err", err)
	}
}

func (r *run) open(ctx context.Context) error {
	if err := r.at.Err(); err != nil {
		return err
	}
	o := shim.VMOptions{Name: r.name, Warn: r.d.log.With("run", r.name)}
	for _, disk := range r.at.Disks() {
		o.Disks = append(o.Disks, shim.VMDisk{Name: disk, Device: lent{r.at.Device(disk)}, Meta: r.metaDir(disk)})
	}
	s, err := shim.OpenVM(ctx, o)
	if err != nil {
		return err
	}
	for i, q := range s.Disks() {
		if err := r.d.nbd.Add(nbd.Export{Name: exportName(r.name, q.Name), Queue: q}); err != nil {
			for _, q := range s.Disks()[:i] {
				_ = r.d.nbd.Remove(ctx, exportName(r.name, q.Name))
			}
			return errors.Join(err, s.Close())
		}
	}
	r.mu.Lock()
	r.shim = s
	r.mu.Unlock()
	return nil
}

// metaDir is where the filter of a run's disk keeps its error latch.
func (r *run) metaDir(disk string) string {
	return filepath.Join(r.d.opt.State, "meta", r.vm.ID().String(), "runs", r.name, disk)
}

// close takes the disks from clients and makes them durable; the run stands.
func (r *run) close(ctx context.Context) error {
	r.mu.Lock()
	s := r.shim
	r.shim = nil
	r.mu.Unlock()
	if s == nil {
		return r.at.Close()
	}
	for _, disk := range r.at.Disks() {
		_ = r.d.nbd.Remove(ctx, exportName(r.name, disk)) // it says only that there is none
	}
	return errors.Join(s.Close(), r.at.Close())
}

// closeRuns closes all runs when the daemon ends.
func (d *Daemon) closeRuns() error {
	var errs []error
	for _, name := range sortedKeys(d.runs) {
		if err := d.runs[name].close(context.Background()); err != nil {
			errs = append(errs, fmt.Errorf("run %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// forget is the end of a run that was closed, and stands no more.
func (r *run) forget() error {
	r.d.mu.Lock()
	delete(r.d.runs, r.name)
	r.d.mu.Unlock()
	return os.RemoveAll(filepath.Dir(r.metaDir("any")))
}

func (r *run) info() admin.Run {
	r.mu.Lock()
	defer r.mu.Unlock()
	info := admin.Run{Name: r.name, VM: r.vm.Name(), Test: r.at.Test, Point: r.at.Point, Disks: []admin.Disk{}}
	if r.failure != nil {
		info.Error = r.failure.Error()
	}
	for _, p := range r.vm.Points() {
		if p.ID == r.at.Point {
			info.Unreadable = unreadableOf(p)
		}
	}
	if r.shim != nil {
		for _, q := range r.shim.Disks() {
			export := exportName(r.name, q.Name)
			info.Disks = append(info.Disks, admin.Disk{Name: q.Name, Size: q.Size(), Export: export, URI: r.d.uri(export)})
		}
	}
	return info
}

// runList lists failovers and tests, by name.
func (d *Daemon) runList() []admin.Run {
	d.mu.Lock()
	var runs []*run
	for _, name := range sortedKeys(d.runs) {
		runs = append(runs, d.runs[name])
	}
	d.mu.Unlock()
	list := []admin.Run{}
	for _, r := range runs {
		list = append(list, r.info())
	}
	return list
}

// startTest starts a throw-away copy of a VM. A crash leaves it, or nothing.
func (d *Daemon) startTest(ctx context.Context, name string, s admin.StartRun, progress func(admin.Progress)) (admin.Run, error) {
	v, err := d.replicaOf(name, "a failover is tested on the replica")
	if err != nil {
		return admin.Run{}, err
	}
	if s.As == "" {
		s.As = name + "-test"
	}
	if err := wire.CheckName("test", s.As); err != nil {
		return admin.Run{}, withStatus(err, admin.StatusUsage)
	}
	release, err := d.claim(ctx, s.As, "started as a test")
	if err != nil {
		return admin.Run{}, err
	}
	defer release()
	if err := d.nameFree(s.As); err != nil {
		return admin.Run{}, err
	}
	return d.startRun(ctx, v, s, progress, func(at wire.PointID) (*replica.Run, error) { return v.Test(s.As, at) })
}

// startFailover starts a VM on this host. The store records it, durably, before
// it returns, and so before the export opens (RULES J2). A crash after that leaves
// a failover that is served at the next start.
func (d *Daemon) startFailover(ctx context.Context, name string, s admin.StartRun, progress func(admin.Progress)) (admin.Run, error) {
	v, err := d.replicaOf(name, "an unplanned failover is started on the replica")
	if err != nil {
		return admin.Run{}, err
	}
	switch {
	case !s.Unplanned:
		return admin.Run{}, usagef("say that the primary is not asked: --unplanned")
	case s.As != "":
		return admin.Run{}, usagef("a failover has the name of its VM")
	}
	release, err := d.claim(ctx, name, "failed over")
	if err != nil {
		return admin.Run{}, err
	}
	defer release()
	if v.State().Role != wire.RoleReplica {
		return admin.Run{}, refusef("`afterimage vm show "+name+"` has its disks; `afterimage failover cancel` or `commit` ends it", "VM %s runs on this host already", name)
	}
	return d.startRun(ctx, v, s, progress, v.Start)
}

// startRun checks the point, starts and serves it, and reads from each disk.
func (d *Daemon) startRun(ctx context.Context, v *replica.VM, s admin.StartRun, progress func(admin.Progress), start func(wire.PointID) (*replica.Run, error)) (admin.Run, error) {
	at, err := v.Resolve(s.Point)
	if err != nil {
		return admin.Run{}, err
	}
	if !s.NoVerify {
		if err := verify(ctx, v, at, progress); err != nil {
			return admin.Run{}, err
		}
	}
	begun := time.Now()
	started, err := start(at)
	if err != nil {
		return admin.Run{}, err
	}
	r, err := d.serveRun(ctx, v, started)
	if err == nil {
		err = r.firstRead()
	}
	if err != nil {
		return admin.Run{}, r.giveUp(ctx, err)
	}
	info := r.info()
	info.FirstReadSeconds = time.Since(begun).Seconds()
	return info, nil
}

// verify checks all that a point is made of.
func verify(ctx context.Context, v *replica.VM, at wire.PointID, progress func(admin.Progress)) error {
	var done int64
	err := v.Verify(ctx, at, func(n int64) {
		done += n
		progress(admin.Progress{What: "verified", DoneBytes: done})
	})
	if err != nil && ctx.Err() == nil {
		var h interface{ Hint() string }
		hint := "start an older point (`afterimage point list`, --point), or start this one all the same with --no-verify"
		if errors.As(err, &h) && h.Hint() != "" {
			hint = h.Hint() + "; " + hint
		}
		return &admin.Error{Status: statusOf(err), Message: fmt.Sprintf("point %v cannot be relied on: %v", at, err), Advice: hint}
	}
	return err
}

// firstRead reads the beginning of every disk, as a guest's firmware does.
func (r *run) firstRead() error {
	for _, disk := range r.at.Disks() {
		dev := r.at.Device(disk)
		b := make([]byte, min(4096, dev.Size()))
		if err := blockdev.ReadAt(dev, b, 0); err != nil {
			return fmt.Errorf("disk %s: %w", disk, err)
		}
	}
	return nil
}

// giveUp is the end of a start that failed. A test leaves nothing. A failover was
// recorded, and it is the operator's to cancel it.
func (r *run) giveUp(ctx context.Context, why error) error {
	if r.at.Test {
		return errors.Join(why, r.close(ctx), r.vm.EndTest(r.at.Name), r.forget())
	}
	return &admin.Error{Status: statusOf(why), Message: fmt.Sprintf("the failover was started, but: %v", why),
		Advice: "try another point after `afterimage failover cancel " + r.name + "`"}
}

// endTest ends a test; nothing of it is left.
func (d *Daemon) endTest(ctx context.Context, name string) error {
	release, err := d.claim(ctx, name, "ended")
	if err != nil {
		return err
	}
	defer release()
	d.mu.Lock()
	r := d.runs[name]
	d.mu.Unlock()
	switch {
	case r == nil:
		return &admin.Error{Status: admin.StatusNotFound, Message: fmt.Sprintf("there is no test %s", name), Advice: "`afterimage vm show` of the VM names its tests"}
	case !r.at.Test:
		return refusef("`afterimage failover cancel "+name+"` takes it back, `commit` makes it final", "%s is no test but a failover", name)
	}
	if err := r.close(ctx); err != nil {
		d.log.Warn("a test that is being ended could not be closed", "test", name, "err", err)
	}
	if err := r.vm.EndTest(r.at.Name); err != nil {
		return err
	}
	return r.forget()
}

// cancelFailover takes a failover back: the host receives again, and what was
// written since is kept as a branch (RULES J8).
func (d *Daemon) cancelFailover(ctx context.Context, name string) (admin.Cancelled, error) {
	v, err := d.replicaOf(name, "a failover is cancelled on the host that it was started on")
	if err != nil {
		return admin.Cancelled{}, err
	}
	release, err := d.claim(ctx, name, "cancelled")
	if err != nil {
		return admin.Cancelled{}, err
	}
	defer release()
	if err := needFailedOver(v, "cancelled"); err != nil {
		return admin.Cancelled{}, err
	}
	d.mu.Lock()
	r := d.runs[name]
	d.mu.Unlock()
	if r != nil {
		if err := d.notInUse(name, r.at.Disks()); err != nil {
			return admin.Cancelled{}, err
		}
		// A disk that cannot be made durable is no reason to go on with it.
		if err := r.close(ctx); err != nil {
			d.log.Error("the disks of a cancelled failover could not be closed clean", "vm", name, "err", err)
		}
	}
	branch, err := v.Cancel()
	if err != nil {
		return admin.Cancelled{}, err
	}
	if r != nil {
		err = r.forget()
	}
	return admin.Cancelled{Branch: branch}, err
}

// commitFailover makes a failover final.
func (d *Daemon) commitFailover(ctx context.Context, name string) error {
	v, err := d.replicaOf(name, "a failover is committed on the host that it was started on")
	if err != nil {
		return err
	}
	release, err := d.claim(ctx, name, "committed")
	if err != nil {
		return err
	}
	defer release()
	if err := needFailedOver(v, "committed"); err != nil {
		return err
	}
	return v.Commit()
}

func needFailedOver(v *replica.VM, verb string) error {
	switch v.State().Role {
	case wire.RoleFailedOver:
		return nil
	case wire.RolePrimary:
		return refusef("", "the failover of VM %s was committed: it cannot be %s any more", v.Name(), verb)
	}
	return refusef("`afterimage failover start "+v.Name()+" --unplanned` starts one", "no failover of VM %s was started here that could be %s", v.Name(), verb)
}

// replicaOf finds a replica; of a VM whose primary this host is, it says why not.
func (d *Daemon) replicaOf(name, why string) (*replica.VM, error) {
	d.mu.Lock()
	v := d.vms[name]
	d.mu.Unlock()
	if v != nil {
		hint := "this host has no replica of it"
		if rep, _ := v.replication(); rep != nil {
			hint = "run it on the peer, " + rep.To
		}
		return nil, refusef(hint, "this host is the primary of VM %s: %s", name, why)
	}
	r, err := d.replicaNamed(name)
	if err != nil {
		return nil, err
	}
	return r, r.Broken()
}

// eraseReplica removes a replica with all its points.
func (d *Daemon) eraseReplica(ctx context.Context, name string) error {
	v, err := d.replicaNamed(name)
	if err != nil {
		return err
	}
	release, err := d.claim(ctx, name, "removed")
	if err != nil {
		return err
	}
	defer release()
	if v.Broken() == nil {
		switch v.State().Role {
		case wire.RoleFailedOver:
			return refusef("`afterimage failover cancel "+name+"` comes first", "VM %s runs on this host", name)
		case wire.RolePrimary:
			return refusef("copy its disks away first (`afterimage disk copy URI FILE`); what is in "+d.opt.State+" is all there is of them", "VM %s runs on this host for good", name)
		}
	}
	for _, r := range d.runList() {
		if r.VM == name {
			return refusef("`afterimage failover end-test "+r.Name+"` ends it", "test %s of VM %s stands", r.Name, name)
		}
	}
	return v.Erase()
}
