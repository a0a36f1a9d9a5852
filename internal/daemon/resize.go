package daemon

import (
	"context"
	"fmt"
	"os"
	"slices"

	"afterimage/filter"
	"afterimage/internal/admin"
)

const (
	// resizeUnit is what a size is a multiple of, whatever blocks the disk has: a guest
	// may see blocks of 4 KiB.
	resizeUnit = 4096
	// diskMax is the largest disk, in bytes.
	diskMax = 1 << 50
)

// resize gives a disk of a VM another size. The log has it first, then the image, which
// is where the size is kept; a crash in between is noticed when the VM is opened
// (filter.Recover). Clients that have the disk open see it when they open it again: the
// NBD protocol does not tell them.
func (d *Daemon) resize(ctx context.Context, name, disk string, r admin.ResizeDisk) (admin.Resized, error) {
	v, err := d.primaryOf(name, "a disk is resized on the host that runs its VM")
	if err != nil {
		return admin.Resized{}, err
	}
	if r.Size <= 0 || r.Size%resizeUnit != 0 || r.Size > diskMax {
		return admin.Resized{}, usagef("a disk of %d bytes: a multiple of %d is possible, up to 1 PiB", r.Size, resizeUnit)
	}
	release, err := d.claim(ctx, name, "resized")
	if err != nil {
		return admin.Resized{}, err
	}
	defer release()
	switch {
	case !d.has(v):
		return admin.Resized{}, noVM(name)
	case v.shim == nil:
		return admin.Resized{}, v.notServed()
	}
	disks := v.shim.Disks()
	i := slices.IndexFunc(disks, func(q *filter.Disk) bool { return q.Name == disk })
	if i < 0 {
		return admin.Resized{}, &admin.Error{Status: admin.StatusNotFound, Message: fmt.Sprintf("VM %s has no disk %s", name, disk), Advice: "`afterimage vm show " + name + "` shows those it has"}
	}
	out := admin.Resized{VM: name, Disk: disk, Size: r.Size, Was: disks[i].Size()}
	if err := mayResize(v.rec.Disks[i].Image, &out, r.Shrink); err != nil {
		return admin.Resized{}, err
	}
	err = v.shim.Resize(disks[i], r.Size)
	v.mu.Lock()
	v.sizes[i] = disks[i].Size()
	v.mu.Unlock()
	if err != nil {
		return admin.Resized{}, err
	}
	d.log.Info("a disk was resized", "vm", name, "disk", disk, "bytes", out.Size, "was", out.Was)
	return out, nil
}

// mayResize says why the image cannot have that size, if it cannot.
func mayResize(image string, r *admin.Resized, shrink bool) error {
	st, err := os.Stat(image)
	switch {
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return refusef("make it larger or smaller where it comes from, while the VM is removed here; adding the VM again takes the new size", "disk %s of VM %s is the block device %s, which has the size it has", r.Disk, r.VM, image)
	case r.Size < r.Was && !shrink:
		return refusef("shrink the file systems in it first; then say that the rest is not needed: --shrink",
			"disk %s of VM %s has %d bytes: its last %d would be cut off", r.Disk, r.VM, r.Was, r.Was-r.Size)
	}
	return nil
}
