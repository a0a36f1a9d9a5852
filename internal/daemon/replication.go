package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
)

// enable begins to replicate a VM. A crash after step
//
//  1. the peer has accepted: leaves an empty replica over there
//  2. record kept: leaves a replication that begins at the next start
//  3. log opened, tee on: leaves a replication
func (d *Daemon) enable(ctx context.Context, name string, e admin.Enable) (admin.Replication, error) {
	v, err := d.primaryOf(name, "it is replicated from the host that runs it")
	if err != nil {
		return admin.Replication{}, err
	}
	if err := checkEnable(&e); err != nil {
		return admin.Replication{}, err
	}
	release, err := d.claim(ctx, name, "enabled for replication")
	if err != nil {
		return admin.Replication{}, err
	}
	defer release()
	switch {
	case !d.has(v):
		return admin.Replication{}, noVM(name)
	case v.rep != nil:
		return admin.Replication{}, refusef("see `afterimage replica status "+name+"`; to change it, disable it and enable it again", "VM %s is replicated to %s already", name, v.rep.To)
	case v.shim == nil:
		return admin.Replication{}, v.notServed()
	}
	rep := &replicationRecord{To: e.To, EverySeconds: e.EverySeconds, Keep: e.Keep, Limit: e.Limit, Enabled: time.Now().UTC().Truncate(time.Second)}
	if _, err := d.certs.open(); err != nil {
		return admin.Replication{}, err
	}
	client, err := d.dial(rep.To)
	if err != nil {
		return admin.Replication{}, err
	}
	if err := d.greet(ctx, client, name, rep); err != nil {
		client.Close()
		return admin.Replication{}, err
	}
	if err := ship.Enable(ctx, v.shipOptions(rep, client, nil)); err != nil {
		client.Close()
		return admin.Replication{}, err
	}
	if err := v.begin(ctx, rep, client); err != nil {
		client.Close()
		return admin.Replication{}, err
	}
	return v.status(), nil
}

// checkEnable says what is impossible about a replication.
func checkEnable(e *admin.Enable) error {
	if _, err := checkAddress(e.To); err != nil {
		return err
	}
	switch {
	case !(e.EverySeconds >= 1):
		return usagef("a point every %v seconds: every second is the most", e.EverySeconds)
	case e.EverySeconds > maxEvery.Seconds():
		return usagef("a point every %v seconds: %v is the longest interval", e.EverySeconds, maxEvery)
	case e.Keep < 0 || e.Limit < 0:
		return usagef("less than nothing is kept, or sent")
	}
	return nil
}

// maxEvery is the longest interval between two points.
const maxEvery = 366 * 24 * time.Hour

// greet sees that the peer is another host, and lets this one replicate to it.
func (d *Daemon) greet(ctx context.Context, client *ship.Client, name string, rep *replicationRecord) error {
	h, err := client.Hello(ctx)
	if err != nil {
		return err
	}
	if h.Name == h.You {
		return refusef("name another host with --to", "VM %s cannot be replicated to %s: that is this host, %s", name, rep.To, h.You)
	}
	if !h.Allowed {
		return &admin.Error{Status: admin.StatusUnreachable, Message: fmt.Sprintf("host %s does not let %s replicate to it", h.Name, h.You),
			Advice: fmt.Sprintf("on %s: afterimage peer allow %s", h.Name, h.You)}
	}
	return nil
}

// begin records the replication and turns it on. The peer has accepted it.
func (v *vm) begin(ctx context.Context, rep *replicationRecord, client *ship.Client) error {
	// A log that another replication has left knows nothing of what was
	// written since.
	if err := os.RemoveAll(v.rec.LogDir); err != nil {
		return fmt.Errorf("remove the log of an earlier replication: %w", err)
	}
	if err := v.keepReplication(rep, Change{v.shipKey(), nil}); err != nil {
		return err
	}
	v.mu.Lock()
	v.rep, v.kept, v.client = rep, nil, client
	v.mu.Unlock()
	err := v.startShipper(ctx)
	if err != nil {
		// It was never on: as if it had not been asked for.
		v.mu.Lock()
		v.rep, v.kept, v.client = nil, nil, nil
		v.mu.Unlock()
		return errors.Join(err, v.dropReplication())
	}
	return nil
}

func (v *vm) repKey() string  { return keyReplication + v.rec.ID.String() }
func (v *vm) shipKey() string { return keyShip + v.rec.ID.String() }

// keepReplication makes the record durable, with other changes if there are any.
func (v *vm) keepReplication(rep *replicationRecord, more ...Change) error {
	c, err := put(v.repKey(), rep)
	if err != nil {
		return err
	}
	return v.d.store.Apply(append(more, c)...)
}

// dropReplication forgets the replication, then its log. A crash in between
// leaves a log that the next start removes.
func (v *vm) dropReplication() error {
	if err := v.d.store.Apply(Change{v.repKey(), nil}, Change{v.shipKey(), nil}); err != nil {
		return err
	}
	err := os.RemoveAll(v.rec.LogDir)
	if v.shim != nil {
		err = errors.Join(err, v.shim.ForgetTracking())
	}
	return err
}

// distrustLog records that the VM is written to without its log: neither the log
// nor what the shipper has kept is looked at any more, and the whole disk is
// compared when the log can be opened again.
func (v *vm) distrustLog() error {
	rep := *v.rep
	rep.LogStale = true
	if err := v.keepReplication(&rep, Change{v.shipKey(), nil}); err != nil {
		return err
	}
	v.mu.Lock()
	v.rep, v.kept = &rep, nil
	v.mu.Unlock()
	return nil
}

// startShipper opens the log, turns the tee on and begins to ship. It does not
// need the peer for that.
func (v *vm) startShipper(ctx context.Context) error {
	rep := v.rep
	if rep.LogStale {
		if err := os.RemoveAll(v.rec.LogDir); err != nil {
			return fmt.Errorf("remove the log, which is not trusted any more: %w", err)
		}
		v.mu.Lock()
		v.kept = nil // a start that was killed may have saved something
		v.mu.Unlock()
	}
	client := v.client
	if client == nil {
		var err error
		if client, err = v.d.dial(rep.To); err != nil {
			return err
		}
	}
	s, err := ship.Start(ctx, v.shipOptions(rep, client, v.kept))
	if err != nil {
		if v.client == nil {
			client.Close()
		}
		return fmt.Errorf("replication to %s: %w", rep.To, err)
	}
	v.mu.Lock()
	v.client, v.shipper = client, s
	v.mu.Unlock()
	if rep.LogStale {
		fresh := *rep
		fresh.LogStale = false
		if err := v.keepReplication(&fresh); err != nil {
			// The log is trusted once more than it need be distrusted.
			v.d.log.Warn("the log of a VM will be begun anew at the next start", "vm", v.rec.Name, "err", err)
			return nil
		}
		v.mu.Lock()
		v.rep = &fresh
		v.mu.Unlock()
	}
	return nil
}

func (v *vm) shipOptions(rep *replicationRecord, client *ship.Client, kept json.RawMessage) ship.Options {
	return ship.Options{
		VM: v.shim, ID: v.rec.ID, Name: v.rec.Name, Client: client,
		LogDir: v.rec.LogDir, LogQuota: v.rec.LogQuota,
		Every: rep.every(), Keep: rep.Keep, Limit: rep.Limit,
		State: kept, Save: v.keepShip, Paused: rep.Paused, Warn: v.d.log.With("vm", v.rec.Name),
	}
}

// keepShip makes durable what the shipper must find again.
func (v *vm) keepShip(state json.RawMessage) error {
	if err := v.d.store.Apply(Change{v.shipKey(), state}); err != nil {
		return err
	}
	v.mu.Lock()
	v.kept = state
	v.mu.Unlock()
	return nil
}

// disable ends the replication: the tee is off and the log gone; the replica
// keeps its points. A crash after step
//
//  1. record deleted: leaves a VM that is not replicated, and a log that the next
//     start removes
//  2. tee off, log removed: leaves nothing of it
//
// In the other order a crash could leave a log that looks whole, of a disk that was
// written without it.
func (d *Daemon) disable(ctx context.Context, name string) error {
	v, err := d.primaryOf(name, "its replication is ended there")
	if err != nil {
		return err
	}
	release, err := d.claim(ctx, name, "disabled for replication")
	if err != nil {
		return err
	}
	defer release()
	if v.rep == nil {
		return v.notReplicated()
	}
	if err := d.store.Apply(Change{v.repKey(), nil}, Change{v.shipKey(), nil}); err != nil {
		return err
	}
	v.mu.Lock()
	shipper, client := v.shipper, v.client
	v.shipper, v.client, v.rep, v.kept, v.failure = nil, nil, nil, nil, nil
	v.points, v.gaps = 0, nil
	v.mu.Unlock()
	var errs []error
	if shipper != nil {
		errs = append(errs, shipper.Close())
	}
	if client != nil {
		client.Close()
	}
	if v.shim != nil {
		errs = append(errs, v.shim.StopLog(), v.shim.ForgetTracking())
	}
	errs = append(errs, os.RemoveAll(v.rec.LogDir))
	if v.shim == nil {
		v.wake()
	}
	return errors.Join(errs...)
}

// pause stops or resumes cutting and shipping. The log goes on.
func (d *Daemon) pause(ctx context.Context, name string, on bool) error {
	v, err := d.primaryOf(name, "its replication is paused there")
	if err != nil {
		return err
	}
	what := "resumed"
	if on {
		what = "paused"
	}
	release, err := d.claim(ctx, name, what)
	if err != nil {
		return err
	}
	defer release()
	if v.rep == nil {
		return v.notReplicated()
	}
	if v.rep.Paused == on {
		return nil
	}
	rep := *v.rep
	rep.Paused = on
	if err := v.keepReplication(&rep); err != nil {
		return err
	}
	v.mu.Lock()
	v.rep = &rep
	shipper := v.shipper
	v.mu.Unlock()
	switch {
	case shipper == nil:
	case on:
		shipper.Pause()
	default:
		shipper.Resume()
	}
	return nil
}

// progressEvery is how often a command is told how far it is.
const progressEvery = 500 * time.Millisecond

// sync cuts a point and waits until it is listed over there.
func (d *Daemon) sync(ctx context.Context, name string, progress func(admin.Progress)) (admin.Point, error) {
	v, err := d.primaryOf(name, "points are cut there")
	if err != nil {
		return admin.Point{}, err
	}
	shipper, err := v.shipping()
	if err != nil {
		return admin.Point{}, err
	}
	told, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-told.Done():
				return
			case <-tick.C:
				if st := shipper.Status(); st.InitialTotal > 0 {
					progress(admin.Progress{What: "copied", DoneBytes: st.InitialDone, TotalBytes: st.InitialTotal})
				}
			}
		}
	}()
	id, err := shipper.Sync(ctx)
	stop()
	<-ended
	if err != nil {
		return admin.Point{}, err
	}
	if p := shipper.Status().LastPoint; p != nil && p.ID == id {
		return pointInfo(*p), nil
	}
	return admin.Point{ID: id.String(), Epoch: id.Epoch, Disks: v.diskNames()}, nil
}

// replication is the record and the shipper, either of which may be nil.
func (v *vm) replication() (*replicationRecord, *ship.Shipper) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rep, v.shipper
}

// shipping is the shipper of a VM that is replicated.
func (v *vm) shipping() (*ship.Shipper, error) {
	v.mu.Lock()
	rep, shipper, failure := v.rep, v.shipper, v.failure
	v.mu.Unlock()
	switch {
	case rep == nil:
		return nil, v.notReplicated()
	case shipper != nil:
		return shipper, nil
	case failure != nil:
		return nil, fmt.Errorf("VM %s is not replicated: %w", v.rec.Name, failure)
	}
	return nil, v.notServed()
}

// peer is a client of the peer of a VM that is replicated.
func (v *vm) peer() (*ship.Client, error) {
	v.mu.Lock()
	rep, client := v.rep, v.client
	v.mu.Unlock()
	switch {
	case rep == nil:
		return nil, v.notReplicated()
	case client == nil:
		_, err := v.shipping()
		return nil, err
	}
	return client, nil
}

func (v *vm) notReplicated() error {
	return refusef("`afterimage replica enable "+v.rec.Name+" --to HOST:PORT` begins that", "VM %s is not replicated", v.rec.Name)
}

// notServed says why the VM is not open.
func (v *vm) notServed() error {
	v.mu.Lock()
	failure := v.failure
	v.mu.Unlock()
	if failure == nil {
		return refusef("try again in a moment", "VM %s is being opened", v.rec.Name)
	}
	return fmt.Errorf("VM %s is not served: %w", v.rec.Name, failure)
}

// primaryOf finds a VM whose primary this host is; of a replica it says why not.
func (d *Daemon) primaryOf(name, why string) (*vm, error) {
	d.mu.Lock()
	v := d.vms[name]
	d.mu.Unlock()
	if v != nil {
		return v, nil
	}
	r, err := d.replicaNamed(name)
	if err != nil {
		return nil, err
	}
	if r.Broken() == nil && r.State().Role == wire.RolePrimary {
		return nil, refusef("`afterimage disk copy` takes its disks to images of their own, which can be added as a VM", "VM %s was failed over to this host for good: from there it cannot be replicated", name)
	}
	return nil, refusef("run it on "+r.Sender(), "this host has the replica of VM %s: %s", name, why)
}
