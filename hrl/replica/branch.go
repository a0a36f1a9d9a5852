package replica

import (
	"fmt"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
)

// A Branch is what was written in a failover that was cancelled.
type Branch struct {
	Name       string
	Point      wire.PointID // it lies over; kept as long as the branch
	Generation uint64
	Time       time.Time // when it was cancelled
	Disks      []string
}

// Branches are the branches there are, the oldest first.
func (v *VM) Branches() []Branch {
	out := []Branch{}
	for _, b := range v.peek().Branches {
		branch := Branch{Name: b.Branch, Point: b.Run.Point, Generation: b.Run.Generation, Time: b.Time}
		for _, d := range b.Run.Disks {
			branch.Disks = append(branch.Disks, d.Name)
		}
		out = append(out, branch)
	}
	return out
}

func (s *state) branch(name string) (*runRecord, error) {
	for i := range s.Branches {
		if s.Branches[i].Branch == name {
			return &s.Branches[i].Run, nil
		}
	}
	return nil, fmt.Errorf("VM %s has no branch %s: %w", s.Name, name, ErrNoRun)
}

// RemoveBranch removes what a guest wrote in a failover that was cancelled, for
// good. A crash after it was recorded, before all files are gone, leaves files
// that Open warns of and does not touch.
func (v *VM) RemoveBranch(name string) error {
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.usable(); err != nil {
		return err
	}
	r, err := v.current().branch(name)
	if err != nil {
		return err
	}
	if err := v.commitLocked(record{Kind: kindBranchRemoved, Name: name}); err != nil {
		return err
	}
	v.store.kick()
	return v.store.o.Host.RemoveAll(v.runDir(r))
}

// OpenBranch opens a disk of a branch, for reading; one at a time.
func (v *VM) OpenBranch(name, disk string) (blockdev.Device, error) {
	if err := v.usable(); err != nil {
		return nil, err
	}
	st := v.current()
	r, err := st.branch(name)
	if err != nil {
		return nil, err
	}
	for _, d := range r.Disks {
		if d.Name != disk {
			continue
		}
		rd, err := v.openRunDisk(r, d)
		if err != nil {
			return nil, fmt.Errorf("open branch %s of VM %s: %w", name, st.Name, err)
		}
		return &branchDevice{rd.dev, rd}, nil
	}
	return nil, fmt.Errorf("branch %s of VM %s has no disk %s: %w", name, st.Name, disk, ErrNoRun)
}

// A branchDevice is a disk of a branch, which is not written any more.
type branchDevice struct {
	blockdev.Device
	disk *runDisk
}

// Info implements blockdev.Device.
func (d *branchDevice) Info() blockdev.Info {
	i := d.Device.Info()
	i.ReadOnly, i.CheapTrim, i.CheapZero = true, false, false
	return i
}

// Do implements blockdev.Device.
func (d *branchDevice) Do(reqs []*blockdev.Request) {
	info := d.Info()
	for _, r := range reqs {
		if r.Done = (blockdev.Extent{}); r.Op == blockdev.OpFlush {
			r.Err = nil // nothing was written here
		} else if r.Err = r.Check(&info, d.Size()); r.Err == nil {
			d.Device.Do([]*blockdev.Request{r})
		}
	}
}

// Close implements blockdev.Device.
func (d *branchDevice) Close() error { return d.disk.close() }
