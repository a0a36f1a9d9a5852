package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
)

// logQuota is how much the log of a VM may have if nobody said otherwise, in
// bytes: a peer that is away for long must not fill this host's disk.
const logQuota = 16 << 30

// addVM takes a VM into care. A crash after step
//
//  1. identity files written: leaves images that only this daemon opens; adding
//     the VM again takes them up, with the UUID that is in them
//  2. record kept: leaves the VM, which is opened at the next start
//
// If it fails otherwise, what was made is taken back.
func (d *Daemon) addVM(ctx context.Context, a admin.AddVM) (admin.VM, error) {
	if err := checkAdd(&a); err != nil {
		return admin.VM{}, err
	}
	release, err := d.claim(ctx, a.Name, "added")
	if err != nil {
		return admin.VM{}, err
	}
	defer release()
	if err := d.nameFree(a.Name); err != nil {
		return admin.VM{}, err
	}
	rec := vmRecord{Name: a.Name, LogDir: a.LogDir, LogQuota: a.LogQuota, Added: time.Now().UTC().Truncate(time.Second)}
	for _, disk := range a.Disks {
		rec.Disks = append(rec.Disks, diskRecord{disk.Name, disk.Image})
	}
	fresh, err := d.adoptID(&rec)
	if err != nil {
		return admin.VM{}, err
	}
	if rec.LogDir == "" {
		rec.LogDir = filepath.Join(d.opt.State, "logs")
	}
	rec.LogDir = filepath.Join(rec.LogDir, rec.ID.String())
	if rec.LogQuota == 0 {
		rec.LogQuota = logQuota
	}
	v := d.newVM(rec)
	if err := v.open(ctx); err != nil {
		return admin.VM{}, errors.Join(err, disown(fresh))
	}
	change, err := put(keyVM+rec.ID.String(), rec)
	if err == nil {
		err = d.store.Apply(change)
	}
	if err != nil {
		v.unexport(ctx)
		return admin.VM{}, errors.Join(err, v.close(), disown(fresh))
	}
	d.mu.Lock()
	d.vms[rec.Name] = v
	d.mu.Unlock()
	d.work.Go(func() { v.keep(d.ctx, func() {}) })
	return v.info(), nil
}

// checkAdd says what is impossible about a VM, before anything is opened.
func checkAdd(a *admin.AddVM) error {
	if err := wire.CheckName("VM", a.Name); err != nil {
		return withStatus(err, admin.StatusUsage)
	}
	if len(a.Disks) == 0 || len(a.Disks) > wire.DisksMax {
		return usagef("VM %s with %d disks: 1 to %d are possible", a.Name, len(a.Disks), wire.DisksMax)
	}
	if a.LogDir != "" && !filepath.IsAbs(a.LogDir) {
		return usagef("log directory %s: its path must be absolute", a.LogDir)
	}
	if a.LogQuota < 0 {
		return usagef("a log quota of %d bytes", a.LogQuota)
	}
	seen := map[string]bool{}
	var images []os.FileInfo
	for _, disk := range a.Disks {
		if err := wire.CheckName("disk", disk.Name); err != nil {
			return withStatus(err, admin.StatusUsage)
		}
		if seen[disk.Name] {
			return usagef("disk %s is named twice", disk.Name)
		}
		seen[disk.Name] = true
		if !filepath.IsAbs(disk.Image) {
			return usagef("image %q of disk %s: its path must be absolute", disk.Image, disk.Name)
		}
		st, err := os.Stat(disk.Image)
		if err != nil {
			continue // opening it says more
		}
		for i, other := range images {
			if os.SameFile(st, other) {
				return usagef("disks %s and %s are the same image, %s", a.Disks[i].Name, disk.Name, disk.Image)
			}
		}
		images = append(images, st)
	}
	return nil
}

// nameFree says whether a VM or a test of that name can be made. The caller has
// claimed the name.
func (d *Daemon) nameFree(name string) error {
	d.mu.Lock()
	_, primary := d.vms[name]
	_, running := d.runs[name]
	d.mu.Unlock()
	var what string
	switch replica, _ := d.replicaNamed(name); {
	case primary:
		what = "VM"
	case running:
		what = "test"
	case replica != nil:
		what = "replica"
	default:
		return nil
	}
	return &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("there is a %s %s already", what, name), Advice: "choose another name, or see `afterimage vm list`"}
}

// adoptID gives the VM the UUID that its images were given before, or a new one.
// Fresh are the images that have no identity yet.
func (d *Daemon) adoptID(rec *vmRecord) (fresh []string, err error) {
	var from string
	for _, disk := range rec.Disks {
		// Before what lies beside it: that it is there, and a disk.
		dev, err := blockdev.OpenFile(disk.Image, blockdev.FileOptions{ReadOnly: true, Share: true})
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", disk.Name, err)
		}
		dev.Close()
		have, err := d.identity(disk.Image)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", disk.Name, err)
		}
		switch {
		case have == nil:
			fresh = append(fresh, disk.Image)
		case d.vmWithID(have.VM) != "":
			return nil, &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("image %s is disk %s of VM %s already", disk.Image, have.Disk, d.vmWithID(have.VM)),
				Advice: "give each VM images of its own, or `afterimage vm remove` the other one first"}
		case from != "" && have.VM != rec.ID:
			return nil, &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("images %s and %s belong to different VMs (%v, %v)", from, disk.Image, rec.ID, have.VM),
				Advice: "add together the disks that were together"}
		case have.Disk != disk.Name:
			return nil, &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("image %s was added as disk %s before, not as %s", disk.Image, have.Disk, disk.Name),
				Advice: fmt.Sprintf("name it %s=%s: the replica knows it by that name", have.Disk, disk.Image)}
		default:
			rec.ID, from = have.VM, disk.Image
		}
	}
	if from == "" {
		rec.ID = wire.NewVMID()
	}
	return fresh, nil
}

// vmWithID is the name of the VM with that UUID, of any role; empty if there is none.
func (d *Daemon) vmWithID(id wire.VMID) string {
	d.mu.Lock()
	for name, v := range d.vms {
		if v.rec.ID == id {
			d.mu.Unlock()
			return name
		}
	}
	d.mu.Unlock()
	if r, err := d.replicaWithID(id); err == nil {
		return r.Name()
	}
	return ""
}

// disown removes identity files that this call made.
func disown(images []string) error {
	var errs []error
	for _, image := range images {
		if err := owner.Remove(image); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeVM lets go of a VM; its images stay as they are. A crash after step
//
//  1. disks closed: leaves the VM, which is opened at the next start
//  2. identity files removed: the same; they are made again then
//  3. record deleted: leaves images that are nobody's
func (d *Daemon) removeVM(ctx context.Context, v *vm) error {
	release, err := d.claim(ctx, v.rec.Name, "removed")
	if err != nil {
		return err
	}
	defer release()
	if !d.has(v) {
		return noVM(v.rec.Name)
	}
	if v.rep != nil {
		return &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("VM %s is replicated to %s", v.rec.Name, v.rep.To),
			Advice: "end that first: afterimage replica disable " + v.rec.Name}
	}
	if v.shim != nil {
		if err := d.notInUse(v.rec.Name, v.diskNames()); err != nil {
			return err
		}
		v.unexport(ctx)
		if err := v.close(); err != nil {
			v.wake() // it is still in care
			return err
		}
	}
	if err := disown(v.owned()); err != nil {
		v.wake()
		return err
	}
	if err := d.store.Apply(Change{keyVM + v.rec.ID.String(), nil}); err != nil {
		v.wake()
		return err
	}
	d.mu.Lock()
	delete(d.vms, v.rec.Name)
	d.mu.Unlock()
	v.wake() // so that its keeper ends
	return nil
}

// owned are the images that this VM's identity stands beside. Another's may stand
// there by now.
func (v *vm) owned() []string {
	var images []string
	for _, disk := range v.rec.Disks {
		if have, err := owner.Read(disk.Image); err == nil && have != nil && have.VM == v.rec.ID && have.Owner == v.d.opt.State {
			images = append(images, disk.Image)
		}
	}
	return images
}

func (v *vm) diskNames() []string {
	names := make([]string, 0, len(v.rec.Disks))
	for _, disk := range v.rec.Disks {
		names = append(names, disk.Name)
	}
	return names
}

// wake makes the keeper look again.
func (v *vm) wake() {
	select {
	case v.again <- struct{}{}:
	default:
	}
}

// unexport takes the disks from clients.
func (v *vm) unexport(ctx context.Context) {
	for _, name := range v.diskNames() {
		_ = v.d.nbd.Remove(ctx, exportName(v.rec.Name, name)) // it says only that there is none
	}
}

// notInUse refuses what would take a disk from a running guest.
func (d *Daemon) notInUse(name string, disks []string) error {
	for _, disk := range disks {
		if n := d.nbd.Clients(exportName(name, disk)); n > 0 {
			return &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("disk %s of %s is in use: %d connections", disk, name, n),
				Advice: "shut the VM down first, or close what reads its disk"}
		}
	}
	return nil
}
