package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/hrl/replica"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
)

// pointWorkers is how many reads of a served point may wait at once.
const pointWorkers = 16

// points lists the recovery points of a VM, wherever they are.
func (d *Daemon) points(ctx context.Context, name string) ([]admin.Point, error) {
	d.mu.Lock()
	v := d.vms[name]
	d.mu.Unlock()
	list := []admin.Point{}
	if v != nil {
		client, err := v.peer()
		if err != nil {
			return nil, err
		}
		infos, err := client.Points(ctx, v.rec.ID)
		for _, p := range infos {
			list = append(list, pointInfo(p))
		}
		return list, err
	}
	r, err := d.replicaNamed(name)
	if err == nil {
		err = r.Broken()
	}
	if err != nil {
		return nil, err
	}
	for _, p := range r.Points() {
		list = append(list, pointInfo(p))
	}
	for _, b := range r.Branches() {
		list = append(list, admin.Point{ID: b.Name, Epoch: b.Point.Epoch, Time: b.Time, Kind: admin.KindBranch, Disks: b.Disks})
	}
	return list, nil
}

func pointInfo(p wire.PointInfo) admin.Point {
	info := admin.Point{ID: p.ID.String(), Epoch: p.ID.Epoch, Time: p.Time, Kind: p.Kind, Disks: []string{},
		Bytes: p.Bytes, Pinned: p.Pinned, Damaged: p.Damaged != "", Damage: p.Damaged}
	for _, disk := range p.Disks {
		info.Disks = append(info.Disks, disk.Name)
	}
	info.Unreadable = unreadableOf(p)
	if p.Gap != "" {
		gap := gapBefore(p)
		info.Gap = &gap
	}
	return info
}

// gapBefore describes the gap in the history before a point that has one.
func gapBefore(p wire.PointInfo) admin.HistoryGap {
	return admin.HistoryGap{From: p.ParentTime, To: p.Time, Reason: p.Gap, DurationSeconds: p.Time.Sub(p.ParentTime).Seconds()}
}

// historyGaps are those before points.
func historyGaps(points []wire.PointInfo) []admin.HistoryGap {
	gaps := []admin.HistoryGap{}
	for _, p := range points {
		if p.Gap != "" {
			gaps = append(gaps, gapBefore(p))
		}
	}
	return gaps
}

// unreadableOf are the ranges of a point that the primary could not read.
func unreadableOf(p wire.PointInfo) (list []admin.Unreadable) {
	for _, disk := range p.Disks {
		for _, r := range disk.Unreadable {
			list = append(list, admin.Unreadable{Disk: disk.Name, Offset: r[0], Bytes: r[1]})
		}
	}
	return list
}

// pinPoint keeps a point, or lets go of it.
func (d *Daemon) pinPoint(name, point string, on bool) error {
	v, err := d.replicaOf(name, "points are pinned where they are kept")
	if err != nil {
		return err
	}
	at, err := v.Resolve(point)
	if err != nil {
		return err
	}
	return v.Pin(at, on)
}

// removePoint removes a point, or a branch.
func (d *Daemon) removePoint(name, point string) error {
	v, err := d.replicaOf(name, "points are removed where they are kept")
	if err != nil {
		return err
	}
	if hasBranch(v, point) {
		return v.RemoveBranch(point)
	}
	at, err := v.Resolve(point)
	if err != nil {
		return err
	}
	return v.Remove(at)
}

func hasBranch(v *replica.VM, name string) bool {
	for _, b := range v.Branches() {
		if b.Name == name {
			return true
		}
	}
	return false
}

// servePoint serves one disk as of a point, or of a branch, read-only, on a socket
// of its own until ctx is done; served is called once it can be opened.
func (d *Daemon) servePoint(ctx context.Context, name string, s admin.ServePoint, served func(admin.Served) error) (err error) {
	if !filepath.IsAbs(s.Socket) {
		return usagef("socket %q: its path must be absolute", s.Socket)
	}
	v, err := d.replicaOf(name, "points are served where they are kept")
	if err != nil {
		return err
	}
	var dev blockdev.Device
	var at wire.PointID
	if hasBranch(v, s.Point) {
		dev, err = v.OpenBranch(s.Point, s.Disk)
	} else if at, err = v.Resolve(s.Point); err == nil {
		dev, err = v.OpenPoint(at, s.Disk)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	queue := blockdev.NewPool(dev, pointWorkers)
	export := fmt.Sprintf("%s@%s/%s", name, s.Point, s.Disk)
	srv := &nbd.Server{Log: d.log}
	for _, e := range []nbd.Export{{Name: export}, {Unlisted: true}} {
		e.Queue, e.ReadOnly = queue, true
		if err := srv.Add(e); err != nil {
			return err
		}
	}
	ln, err := nbd.ListenUnix(s.Socket)
	if err != nil {
		return err
	}
	info := admin.Served{VM: name, Point: at, Disk: s.Disk, Size: dev.Size(), Export: export, URI: nbd.URI{Socket: s.Socket, Export: export}.String()}
	if err := served(info); err != nil {
		return errors.Join(err, ln.Close())
	}
	return srv.Serve(ctx, ln)
}
