package replica

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"afterimage/hrl/wire"
)

// Erase removes the VM and all its files from this host: points, layers, bases.
// It refuses while anything of it is in use, while the VM runs here, and while
// there are branches of cancelled failovers, which hold what a guest wrote.
//
// A crash before the renaming of its directory is durable leaves the VM, after
// it what is left is removed by Open.
func (v *VM) Erase() error {
	s := v.store
	s.naming.Lock()
	defer s.naming.Unlock()
	v.mu.Lock()
	v.interruptLocked()
	v.mu.Unlock()
	v.store.kick() // in case that it stays
	v.folding.Lock()
	defer v.folding.Unlock()
	v.change.Lock()
	defer v.change.Unlock()
	v.dropDigester(wire.PointID{})
	if err := v.mayErase(); err != nil {
		return err
	}
	gone := v.dir + erasedSuffix
	err := v.nothingWritten()
	if err == nil {
		err = v.fs.Rename(v.dir, gone)
	}
	if err == nil {
		if err = v.fs.SyncDir(s.dir); err != nil {
			err = errors.Join(err, v.fs.Rename(gone, v.dir))
		}
	}
	if err != nil {
		v.mu.Lock()
		v.closed = false
		v.mu.Unlock()
		return fmt.Errorf("erase VM %s: %w", v.Name(), err)
	}
	s.mu.Lock()
	delete(s.vms, v.id)
	s.mu.Unlock()
	return errors.Join(v.closeFiles(), s.o.Host.RemoveAll(gone))
}

// mayErase closes the VM for everybody else, if it may be erased.
func (v *VM) mayErase() error {
	if v.broken != nil {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.usableLocked(); err != nil {
		return err
	}
	st, why := v.state, ""
	switch {
	case st.Role != wire.RoleReplica:
		return v.receivingLocked()
	case len(st.Runs) > 0:
		why = fmt.Sprintf("the test %s stands: end it first", st.Runs[0].Name)
	case len(st.Branches) > 0:
		why = fmt.Sprintf("branch %s has what a guest wrote: remove it first", st.Branches[0].Branch)
	case len(v.uses) > 0:
		why = "a point of it is open"
	default:
		for _, l := range v.staged {
			if l.busy {
				why = "layers of it are arriving"
			}
		}
	}
	if why != "" {
		return fmt.Errorf("VM %s cannot be erased: %s: %w", st.Name, why, ErrInUse)
	}
	v.closed = true
	return nil
}

// nothingWritten refuses where there are directories of failovers in which a
// guest has written, whether or not a record names them.
func (v *VM) nothingWritten() error {
	runs := filepath.Join(v.dir, runsDir)
	names, err := v.fs.ReadDir(runs)
	if err != nil && !isMissing(err) {
		return err
	}
	for _, n := range names {
		if !strings.HasPrefix(n, failoverPrefix) {
			continue
		}
		switch written, err := dirWritten(v.fs, filepath.Join(runs, n)); {
		case err != nil:
			return err
		case written:
			return fmt.Errorf("%s has what a guest wrote in a failover: move it away first: %w", filepath.Join(runs, n), ErrInUse)
		}
	}
	return nil
}
