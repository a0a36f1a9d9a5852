package daemon

import (
	"context"
	"strings"
	"sync"
	"time"

	"afterimage/hrl/replica"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
	"afterimage/internal/pki"
)

// vmNamed describes a VM, of whatever role.
func (d *Daemon) vmNamed(name string) (admin.VM, error) {
	d.mu.Lock()
	v := d.vms[name]
	d.mu.Unlock()
	if v != nil {
		return v.info(), nil
	}
	r, err := d.replicaNamed(name)
	if err != nil {
		return admin.VM{}, err
	}
	return d.replicaInfo(r), nil
}

// vmList describes all VMs, by name.
func (d *Daemon) vmList() []admin.VM {
	byName := map[string]admin.VM{}
	for _, s := range d.stores() {
		for _, r := range s.VMs() {
			byName[r.Name()] = d.replicaInfo(r)
		}
	}
	for _, v := range d.primaries() {
		byName[v.rec.Name] = v.info()
	}
	list := []admin.VM{}
	for _, name := range sortedKeys(byName) {
		list = append(list, byName[name])
	}
	return list
}

// primaries are the VMs whose primary this host is, by name.
func (d *Daemon) primaries() []*vm {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []*vm
	for _, name := range sortedKeys(d.vms) {
		list = append(list, d.vms[name])
	}
	return list
}

// roleOf is the role of this host for a VM that it has a replica of.
func roleOf(r *replica.VM) string {
	switch r.State().Role {
	case wire.RoleFailedOver:
		return admin.RoleFailedOver
	case wire.RolePrimary:
		return admin.RolePrimary
	}
	return admin.RoleReplica
}

func (d *Daemon) replicaInfo(r *replica.VM) admin.VM {
	info := admin.VM{ID: r.ID(), Name: r.Name(), Role: admin.RoleReplica, Sender: r.Sender(), Disks: []admin.Disk{}, Tests: []string{}}
	if why := r.Broken(); why != nil {
		info.Error = why.Error()
		return info
	}
	info.Role = roleOf(r)
	exports := map[string]admin.Disk{}
	for _, run := range d.runList() {
		switch {
		case run.VM != info.Name:
		case run.Test:
			info.Tests = append(info.Tests, run.Name)
		default:
			info.Error = run.Error
			for _, disk := range run.Disks {
				exports[disk.Name] = disk
			}
		}
	}
	for _, disk := range r.Disks() {
		have := exports[disk.Name]
		info.Disks = append(info.Disks, admin.Disk{Name: disk.Name, Size: disk.Size, Export: have.Export, URI: have.URI})
	}
	return info
}

// statusNamed is the state of the replication of a VM.
func (d *Daemon) statusNamed(ctx context.Context, name string) (admin.Replication, error) {
	d.mu.Lock()
	v := d.vms[name]
	d.mu.Unlock()
	if v == nil {
		r, err := d.replicaNamed(name)
		if err != nil {
			return admin.Replication{}, err
		}
		return d.replicaStatus(r), nil
	}
	if rep, _ := v.replication(); rep == nil {
		return admin.Replication{}, v.notReplicated()
	}
	st := v.status()
	v.countPoints(ctx, &st)
	return st, nil
}

// statusList has all VMs that are replicated from here or to here, by name.
func (d *Daemon) statusList(ctx context.Context) []admin.Replication {
	byName := map[string]*admin.Replication{}
	for _, s := range d.stores() {
		for _, r := range s.VMs() {
			st := d.replicaStatus(r)
			byName[r.Name()] = &st
		}
	}
	var asking sync.WaitGroup
	for _, v := range d.primaries() {
		if rep, _ := v.replication(); rep == nil {
			continue
		}
		st := v.status()
		byName[v.rec.Name] = &st
		asking.Go(func() { v.countPoints(ctx, &st) })
	}
	asking.Wait()
	list := []admin.Replication{}
	for _, name := range sortedKeys(byName) {
		list = append(list, *byName[name])
	}
	return list
}

// countPatience bounds how long a peer is waited for that has to count.
const countPatience = 2 * time.Second

// countPoints asks the peer which points it lists. The rest of the state is
// known here, so one that has not answered lately is not asked: then it is what it
// had said before.
func (v *vm) countPoints(ctx context.Context, st *admin.Replication) {
	if st.LastPoint == nil {
		return
	}
	client, err := v.peer()
	if err == nil && st.Health == admin.HealthNormal {
		ctx, cancel := context.WithTimeout(ctx, countPatience)
		defer cancel()
		if points, err := client.Points(ctx, v.rec.ID); err == nil {
			v.mu.Lock()
			v.points, v.gaps = len(points), historyGaps(points)
			v.mu.Unlock()
		}
	}
	v.mu.Lock()
	st.Points = v.points
	st.HistoryGaps = append(st.HistoryGaps, v.gaps...)
	shipper := v.shipper
	v.mu.Unlock()
	if shipper != nil {
		judgeUnreadable(st, shipper.Status().Unreadable)
	}
}

// judgeUnreadable says in the state what of the newest point the primary could not read.
func judgeUnreadable(st *admin.Replication, what string) {
	if what == "" {
		return
	}
	if st.Health == admin.HealthNormal {
		st.Health = admin.HealthWarning
	}
	st.Reasons = append(st.Reasons, "point "+st.LastPoint.ID.String()+": "+what)
}

// judgeCertificate says in the state that this host's certificate expires soon, or
// has: then no peer listens to it any more.
func (d *Daemon) judgeCertificate(st *admin.Replication) {
	files, err := d.certs.open()
	if err != nil {
		return // what cannot be done without says so
	}
	expires := files.Expires()
	left := time.Until(expires)
	if left > pki.ExpirySoon {
		return
	}
	if st.Health == admin.HealthNormal {
		st.Health = admin.HealthWarning
	}
	what := "expires"
	if left <= 0 {
		st.Health, what = admin.HealthCritical, "expired"
	}
	st.Reasons = append(st.Reasons, "the certificate of this host "+what+" on "+expires.UTC().Format(time.DateOnly)+": afterimage cert rotate")
}

// status is the state of the replication, as the primary knows it. There is one.
func (v *vm) status() admin.Replication {
	v.mu.Lock()
	rep, shipper, failure := v.rep, v.shipper, v.failure
	v.mu.Unlock()
	if rep == nil { // it has just been ended
		rep = new(replicationRecord)
	}
	st := admin.Replication{VM: v.rec.Name, Role: admin.RolePrimary, Peer: rep.To, EverySeconds: rep.EverySeconds, Reasons: []string{}, HistoryGaps: []admin.HistoryGap{}}
	if shipper == nil {
		st.State, st.Health = admin.StateGap, admin.HealthCritical
		why := "the VM is being opened"
		if failure != nil {
			why = failure.Error()
		}
		st.Reasons = append(st.Reasons, strings.ReplaceAll(why, "\n", "; "))
		return st
	}
	shipped := shipper.Status()
	st.State, st.Health = shipped.State, shipped.Health
	st.Reasons = append(st.Reasons, shipped.Reasons...)
	st.Generation = shipped.Generation
	if p := shipped.LastPoint; p != nil {
		st.LastPoint = &admin.LastPoint{ID: p.ID, Time: p.Time, Epoch: p.ID.Epoch}
		st.ReceivedEpoch, st.DurableEpoch = p.ID.Epoch, p.ID.Epoch
	}
	st.LagSeconds, st.LagBytes = shipped.LagSeconds, shipped.LagBytes
	st.LogBytes, st.GapBytes, st.HotBytes = shipped.LogBytes, shipped.GapBytes, shipped.HotBytes
	st.ShippedBytes, st.ShippedRawBytes = shipped.Totals.ShippedBytes, shipped.Totals.ShippedRawBytes
	st.LoggedBytes, st.LatestBytes = shipped.Totals.LoggedBytes, shipped.Totals.LatestBytes
	if shipped.InitialTotal > 0 {
		st.Initial = &admin.Initial{DoneBytes: shipped.InitialDone, TotalBytes: shipped.InitialTotal, ETASeconds: shipped.ETASeconds}
	}
	v.d.judgeCertificate(&st)
	return st
}

// replicaStatus is the state of the replication, as the replica knows it.
func (d *Daemon) replicaStatus(r *replica.VM) admin.Replication {
	st := admin.Replication{VM: r.Name(), Role: admin.RoleReplica, Peer: r.Sender(), State: admin.StateReplicating,
		Health: admin.HealthNormal, Reasons: []string{}, HistoryGaps: []admin.HistoryGap{}}
	if why := r.Broken(); why != nil {
		st.Health, st.Reasons = admin.HealthCritical, append(st.Reasons, why.Error())
		return st
	}
	st.Role = roleOf(r)
	state := r.State()
	st.Generation, st.EverySeconds = state.Generation, r.Every().Seconds()
	if st.Role != admin.RoleReplica {
		st.State = admin.StateFailedOver
	}
	points := r.Points()
	st.Points, st.HistoryGaps = len(points), historyGaps(points)
	if len(points) == 0 {
		st.State = admin.StateInitial
		return st
	}
	newest := points[len(points)-1]
	st.LastPoint = &admin.LastPoint{ID: newest.ID, Time: newest.Time, Epoch: newest.ID.Epoch}
	st.ReceivedEpoch, st.DurableEpoch = newest.ID.Epoch, newest.ID.Epoch
	if st.State == admin.StateReplicating {
		st.LagSeconds = max(0, time.Since(newest.Time).Seconds())
	}
	judgeUnreadable(&st, newest.Unread())
	for _, p := range points {
		if p.Damaged != "" {
			st.Health = admin.HealthWarning
			st.Reasons = append(st.Reasons, "point "+p.ID.String()+" is damaged: "+p.Damaged)
		}
	}
	d.judgeCertificate(&st)
	return st
}
