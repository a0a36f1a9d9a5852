package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/blockdev/owner"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
	"afterimage/internal/shim"
)

// A vm is a VM of which this host is the primary. Its states:
//
//	closed ──open──▶ open, not replicated ◀──disable── ──enable──▶ replicated
//	   ▲  │ ▲             │                                   │
//	   │  └─┘ retried     └────────────── close ──────────────┘
//	   └──────────────────────────────────────┘
//
// Who changes the state holds the claim on the VM's name; it may then read the
// fields without mu, for nobody else writes them.
type vm struct {
	d   *Daemon
	rec vmRecord // does not change

	mu      sync.Mutex // guards what follows; held for moments
	shim    *shim.VM   // nil: not open
	sizes   []int64    // of the disks, once they were open
	failure error      // why it is not open, or not replicated as it should be
	rep     *replicationRecord
	kept    json.RawMessage // what the shipper had saved last
	client  *ship.Client
	shipper *ship.Shipper // nil: not replicated, or its log cannot be opened
	points  int           // that the replica listed when it was asked last
	gaps    []admin.HistoryGap

	again chan struct{} // room for one: something is to be opened
}

func (d *Daemon) newVM(rec vmRecord) *vm {
	return &vm{d: d, rec: rec, again: make(chan struct{}, 1)}
}

// exportName is the name under which a disk is exported.
func exportName(vm, disk string) string { return vm + "/" + disk }

// openVMs opens all VMs, each on its own, and waits for a while.
func (d *Daemon) openVMs(st *state) {
	for _, rec := range st.vms {
		v := d.newVM(rec)
		v.rep, v.kept = st.replications[rec.ID], st.ship[rec.ID]
		d.vms[rec.Name] = v
	}
	var tried sync.WaitGroup
	for _, v := range d.primaries() {
		tried.Add(1)
		d.work.Go(func() { v.keep(d.ctx, sync.OnceFunc(tried.Done)) })
	}
	waitSome(&tried, func() { d.log.Warn("some VMs take long to open; the others are served meanwhile") })
}

// keep opens the VM, and what could not be opened again and again, until ctx is
// done or the VM is removed. tried is called after the first time.
func (v *vm) keep(ctx context.Context, tried func()) {
	defer tried()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var said string
	for {
		select {
		case <-ctx.Done():
			return
		case <-v.again:
		case <-timer.C:
		}
		if !v.d.has(v) {
			return
		}
		err := v.revive(ctx)
		tried()
		switch {
		case err != nil && ctx.Err() == nil:
			if err.Error() != said {
				said = err.Error()
				v.d.log.Error("a VM is not as it should be; it is tried again", "vm", v.rec.Name, "err", err)
			}
			timer.Reset(v.d.opt.Retry)
		case err == nil && said != "":
			said = ""
			v.d.log.Info("a VM is as it should be again", "vm", v.rec.Name)
		}
	}
}

// revive opens what of the VM is not open.
func (v *vm) revive(ctx context.Context) error {
	if !v.lacks() {
		return nil
	}
	release, err := v.d.claim(ctx, v.rec.Name, "opened")
	if err != nil {
		return err
	}
	defer release()
	switch {
	case !v.d.has(v) || !v.lacks():
		return nil // somebody was faster
	case v.shim == nil:
		err = v.open(ctx)
	default:
		err = v.startShipper(ctx)
	}
	v.setFailure(err)
	return err
}

// lacks reports whether something of the VM is not open that should be.
func (v *vm) lacks() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.shim == nil || v.rep != nil && v.shipper == nil
}

func (v *vm) setFailure(err error) {
	v.mu.Lock()
	v.failure = err
	v.mu.Unlock()
}

// has reports whether v is still in the daemon's care.
func (d *Daemon) has(v *vm) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.vms[v.rec.Name] == v
}

// open opens the images, attaches the log if the VM is replicated, and exports
// the disks: all of them or none.
func (v *vm) open(ctx context.Context) error {
	disks, err := v.openImages()
	if err != nil {
		return err
	}
	s, err := shim.OpenVM(ctx, shim.VMOptions{Name: v.rec.Name, Disks: disks, Warn: v.d.log.With("vm", v.rec.Name)})
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.shim, v.sizes = s, nil
	for _, q := range s.Disks() {
		v.sizes = append(v.sizes, q.Size())
	}
	v.mu.Unlock()
	var notShipped error
	if v.rep == nil {
		// What a replication that was ended may have left: it knows nothing of
		// what is written from now on.
		if err := errors.Join(os.RemoveAll(v.rec.LogDir), s.ForgetTracking()); err != nil {
			v.d.log.Warn("the log of an ended replication cannot be removed", "vm", v.rec.Name, "err", err)
		}
	} else {
		if notShipped = v.startShipper(ctx); notShipped != nil {
			// The guest comes first: it gets its disk without the log, which
			// from then on proves nothing. That must be known before.
			if err := v.distrustLog(); err != nil {
				return errors.Join(notShipped, err, v.close())
			}
		}
	}
	if err := v.export(); err != nil {
		return errors.Join(err, v.close())
	}
	return notShipped
}

// openImages opens and locks the images, and sees to it that each is this VM's:
// its identity file says so, or it has none and gets one.
func (v *vm) openImages() (disks []shim.VMDisk, err error) {
	defer func() {
		if err != nil {
			for _, disk := range disks {
				err = errors.Join(err, disk.Device.Close())
			}
		}
	}()
	for _, disk := range v.rec.Disks {
		dev, err := blockdev.OpenFile(disk.Image, blockdev.FileOptions{})
		if err != nil {
			return disks, fmt.Errorf("disk %s: %w", disk.Name, err)
		}
		disks = append(disks, shim.VMDisk{Name: disk.Name, Image: disk.Image, Device: dev, Meta: v.d.metaDir(v.rec.ID, disk.Name)})
		if err := v.ownImage(disk); err != nil {
			return disks, fmt.Errorf("disk %s: %w", disk.Name, err)
		}
	}
	return disks, nil
}

// metaDir is where that is kept of a disk which cannot lie beside its image.
func (d *Daemon) metaDir(id wire.VMID, disk string) string {
	return filepath.Join(d.opt.State, "meta", id.String(), disk)
}

// ownImage checks, or makes, the identity file of an image that is locked.
func (v *vm) ownImage(disk diskRecord) error {
	want := owner.Identity{VM: v.rec.ID, Name: v.rec.Name, Disk: disk.Name, Role: owner.RolePrimary, Owner: v.d.opt.State}
	have, err := v.d.identity(disk.Image)
	if err != nil {
		return err
	}
	if have != nil {
		if have.VM != want.VM {
			return &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("image %s is disk %s of another VM, %s (%v)", disk.Image, have.Disk, have.Name, wire.VMID(have.VM)),
				Advice: "give this VM its own image"}
		}
		want.Generation = have.Generation
		if *have == want {
			return nil
		}
	}
	return owner.Write(disk.Image, want)
}

// identity reads whose an image is. Another's, or a replica's, is an error.
func (d *Daemon) identity(image string) (*owner.Identity, error) {
	if err := owner.Check(image, d.opt.State); err != nil {
		return nil, err
	}
	have, err := owner.Read(image)
	if err == nil && have != nil && have.Role != owner.RolePrimary {
		err = &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("image %s belongs to the replica of VM %s", image, have.Name),
			Advice: "open a point of it instead: `afterimage failover test`, or `afterimage point serve`"}
	}
	return have, err
}

// export offers the disks to clients.
func (v *vm) export() error {
	for i, q := range v.shim.Disks() {
		if err := v.d.nbd.Add(nbd.Export{Name: exportName(v.rec.Name, q.Name), Queue: q}); err != nil {
			for _, q := range v.shim.Disks()[:i] {
				_ = v.d.nbd.Remove(context.Background(), exportName(v.rec.Name, q.Name))
			}
			return err
		}
	}
	return nil
}

// close lets go of log and disks, which it makes durable. Nobody has them open
// any more.
func (v *vm) close() error {
	v.mu.Lock()
	s, shipper, client := v.shim, v.shipper, v.client
	v.shim, v.shipper, v.client = nil, nil, nil
	v.mu.Unlock()
	var errs []error
	if shipper != nil {
		errs = append(errs, shipper.Close())
	}
	if client != nil {
		client.Close()
	}
	if s != nil {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// closeVMs closes all VMs when the daemon ends.
func (d *Daemon) closeVMs() error {
	var wg sync.WaitGroup
	errs := make([]error, len(d.vms))
	for i, name := range sortedKeys(d.vms) {
		wg.Go(func() {
			if err := d.vms[name].close(); err != nil {
				errs[i] = fmt.Errorf("VM %s: %w", name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// info describes the VM.
func (v *vm) info() admin.VM {
	v.mu.Lock()
	defer v.mu.Unlock()
	info := admin.VM{ID: v.rec.ID, Name: v.rec.Name, Role: admin.RolePrimary, Disks: []admin.Disk{}}
	if v.failure != nil {
		info.Error = v.failure.Error()
	}
	for i, rec := range v.rec.Disks {
		disk := admin.Disk{Name: rec.Name, Image: rec.Image}
		if v.sizes != nil {
			disk.Size = v.sizes[i]
		}
		if v.rep != nil {
			disk.LogDir = v.rec.LogDir
		}
		if v.shim != nil {
			disk.Export = exportName(v.rec.Name, rec.Name)
			disk.URI = v.d.uri(disk.Export)
		}
		info.Disks = append(info.Disks, disk)
	}
	return info
}

// uri is where clients open an export.
func (d *Daemon) uri(export string) string {
	return nbd.URI{Socket: d.opt.NBD, Export: export}.String()
}
