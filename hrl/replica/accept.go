package replica

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"afterimage/blockdev/owner"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// Accept takes what a host offers: a new VM, of which quota bytes may be stored
// (0: any number), or what it has to say of one that is known. It is durable when
// it returns.
//
// Another host may only take a VM over with a higher term than there was; a lower
// one is refused from anybody. While a failover stands nothing is changed: the
// state says so.
//
// A crash after step
//
//  1. UUID.new made, with bases, journal and all: leaves it; Open removes it
//  2. renamed to UUID: leaves either
//  3. the store's directory synced: leaves the VM
func (s *Store) Accept(id wire.VMID, o wire.Offer, sender string, quota int64) (*VM, error) {
	if err := o.Check(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrBad)
	}
	if sender == "" || quota < 0 {
		return nil, fmt.Errorf("an offer of %q with a quota of %d: %w", sender, quota, ErrBad)
	}
	s.naming.Lock()
	defer s.naming.Unlock()
	s.mu.Lock()
	v, closed := s.vms[id], s.closed
	s.mu.Unlock()
	if closed {
		return nil, fmt.Errorf("the replica store %s: %w", s.dir, ErrClosed)
	}
	if v != nil && v.broken != nil && !errors.Is(v.broken, hrl.ErrDamaged) {
		v = s.addVM(id) // the disk may have come back
	}
	if v != nil {
		if err := v.renew(&o, sender, quota); err != nil {
			return nil, err
		}
		return v, nil
	}
	if err := s.nameTaken(o.Name, nil); err != nil {
		return nil, err
	}
	if err := s.createVM(id, &o, sender, quota); err != nil {
		return nil, noRoom("VM "+o.Name, fmt.Errorf("accept VM %s: %w", o.Name, err))
	}
	if v = s.addVM(id); v.broken != nil {
		return nil, noRoom("VM "+o.Name, v.broken)
	}
	return v, nil
}

// addVM opens a VM that has a directory, in place of one that was broken.
func (s *Store) addVM(id wire.VMID) *VM {
	v := s.openVM(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vms[id] = v
	return v
}

func (s *Store) createVM(id wire.VMID, o *wire.Offer, sender string, quota int64) error {
	st := &state{VM: id, Keep: keepDefault, Role: wire.RoleReplica, Points: []point{}}
	if err := st.offer(&record{Offer: o, Sender: sender, Quota: quota}); err != nil {
		return err
	}
	dir := filepath.Join(s.dir, id.String())
	tmp := dir + newSuffix
	if err := s.o.Host.RemoveAll(tmp); err != nil {
		return err
	}
	if err := s.fillVM(tmp, st); err != nil {
		return errors.Join(err, s.o.Host.RemoveAll(tmp))
	}
	if err := s.o.FS.Rename(tmp, dir); err != nil {
		return err
	}
	if err := s.o.FS.SyncDir(s.dir); err != nil {
		return errors.Join(err, s.o.Host.RemoveAll(dir)) // nobody has heard of it
	}
	return nil
}

// fillVM makes the directory of a VM, durably but for its own name.
func (s *Store) fillVM(dir string, st *state) error {
	fs := s.o.FS
	for _, sub := range []string{disksDir, layersDir, stagingDir, runsDir} {
		if err := fs.MkdirAll(filepath.Join(dir, sub)); err != nil {
			return err
		}
	}
	for _, d := range st.Disks {
		if err := s.createDisk(filepath.Join(dir, disksDir, d.Name), st, d.Name); err != nil {
			return err
		}
	}
	if err := fs.SyncDir(filepath.Join(dir, disksDir)); err != nil {
		return err
	}
	j, err := createJournal(fs, filepath.Join(dir, journalName), st)
	if err != nil {
		return err
	}
	return j.close()
}

// createDisk makes a disk's base, and says beside it whose it is.
func (s *Store) createDisk(dir string, st *state, disk string) error {
	if err := createBase(s.o.FS, dir, st.VM); err != nil {
		return err
	}
	return s.identify(filepath.Join(dir, baseName), st, disk, owner.RoleReplica, 0)
}

// identify says beside an image whose it is, so that nobody else opens it.
func (s *Store) identify(image string, st *state, disk string, role owner.Role, generation uint64) error {
	return s.o.Host.Identify(image, owner.Identity{VM: st.VM, Name: st.Name, Disk: disk, Role: role, Owner: s.dir, Generation: generation})
}

// renew takes what a host says of a VM that is known. The store's naming is held.
//
// Bases of disks that are new are made, and their directory synced, before the
// record that names them; a crash in between leaves empty ones, which the next
// offer makes anew.
func (v *VM) renew(o *wire.Offer, sender string, quota int64) error {
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.usable(); err != nil {
		return err
	}
	st := v.current()
	switch {
	case sender != st.Sender && o.Term <= st.Term:
		return fmt.Errorf("VM %s comes from host %s, not from %s: %w", st.Name, st.Sender, sender, ErrSender)
	case o.Term < st.Term:
		return fmt.Errorf("VM %s was replicated here with term %d, this is %d: %w", st.Name, st.Term, o.Term, ErrTerm)
	case st.failover() != nil:
		return nil
	}
	if err := v.store.nameTaken(o.Name, v); err != nil {
		return err
	}
	r := record{Kind: kindOffered, Offer: o, Sender: sender, Quota: quota}
	next, err := st.apply(&r)
	if err != nil {
		return err
	}
	if next.Name == st.Name && next.Sender == st.Sender && next.Term == st.Term && next.Generation == st.Generation &&
		next.Keep == st.Keep && next.Every == st.Every && next.Quota == st.Quota && slices.Equal(next.Disks, st.Disks) {
		return nil
	}
	if err := v.addDisks(next); err != nil {
		return noRoom("VM "+o.Name, fmt.Errorf("accept VM %s: %w", o.Name, err))
	}
	if err := v.commitLocked(r); err != nil {
		return err
	}
	v.store.kick()
	return nil
}

// addDisks makes the bases that next has and the VM does not, and renames those
// that it has, where the VM's name changes. change is held.
func (v *VM) addDisks(next *state) error {
	for _, d := range next.Disks {
		dir := filepath.Join(v.dir, disksDir, d.Name)
		v.mu.Lock()
		_, known := v.bases[d.Name]
		renamed := next.Name != v.state.Name
		v.mu.Unlock()
		if known && renamed {
			if err := v.store.identify(filepath.Join(dir, baseName), next, d.Name, owner.RoleReplica, 0); err != nil {
				return err
			}
		}
		if known {
			continue
		}
		if err := v.store.createDisk(dir, next, d.Name); err != nil {
			return err
		}
		if err := v.fs.SyncDir(filepath.Join(v.dir, disksDir)); err != nil {
			return err
		}
		if err := v.openBase(d.Name); err != nil {
			return err
		}
	}
	return nil
}
