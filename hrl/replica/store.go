package replica

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"afterimage/blockdev/owner"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

const (
	lockName     = "lock"
	erasedSuffix = ".erased"
	// retryAfter is when the keeper tries again what has failed.
	retryAfter = time.Minute
)

// Options say how a store is opened.
type Options struct {
	// FS is the file system for journals, layers and checksums; nil: hrl.OS.
	// Bases and tops are opened through package blockdev.
	FS   hrl.FS
	Warn *slog.Logger // nil: nobody is warned
	// Life identifies boot and mounts of a path, for the tops of failovers (see
	// blockdev.OpenTop); nil: the boot alone.
	Life func(path string) ([32]byte, error)
}

// A Store is the directory with all VMs that are replicated to this host. Its
// methods may be called from several goroutines.
type Store struct {
	dir        string
	o          Options
	lock       hrl.File
	openDevice openDevice // of bases

	keeper keeper

	// naming is held while a VM or a test gets its name, and while VMs come and
	// go. It is taken before every other lock.
	naming sync.Mutex

	mu     sync.Mutex
	vms    map[wire.VMID]*VM
	closed bool
}

// Open opens the store in dir, which it makes if it is not there, with all VMs
// in it. One that cannot be opened is listed as broken. Where another process has
// the store, the error wraps hrl.ErrLocked.
func Open(dir string, o Options) (*Store, error) {
	return open(dir, o, openRaw)
}

func open(dir string, o Options, device openDevice) (*Store, error) {
	if o.FS == nil {
		o.FS = hrl.OS
	}
	if o.Warn == nil {
		o.Warn = slog.New(slog.DiscardHandler)
	}
	if o.Life == nil {
		o.Life = func(string) ([32]byte, error) { return bootLife(), nil }
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: dir, o: o, openDevice: device, vms: map[wire.VMID]*VM{}}
	if err := s.takeDir(); err != nil {
		return nil, fmt.Errorf("open the replica store %s: %w", dir, err)
	}
	if err := s.openVMs(); err != nil {
		for _, v := range s.vms {
			_ = v.close()
		}
		return nil, errors.Join(fmt.Errorf("open the replica store %s: %w", dir, err), s.lock.Close())
	}
	s.keeper.start(s)
	s.kick()
	return s, nil
}

// bootLife is the life of everything where only boots count.
var bootLife = sync.OnceValue(func() [32]byte {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		// Which boot this is nobody knows: it is taken for another one.
		boot = make([]byte, 16)
		_, _ = rand.Read(boot) // never fails
	}
	return sha256.Sum256(boot)
})

func (s *Store) takeDir() error {
	if err := s.o.FS.MkdirAll(s.dir); err != nil {
		return err
	}
	path := filepath.Join(s.dir, lockName)
	f, err := s.o.FS.Edit(path)
	if isMissing(err) {
		if f, err = s.o.FS.Create(path); errors.Is(err, os.ErrExist) {
			f, err = s.o.FS.Edit(path)
		}
	}
	if err != nil {
		return err
	}
	if err := f.Lock(); err != nil {
		return errors.Join(err, f.Close())
	}
	s.lock = f
	return nil
}

func (s *Store) openVMs() error {
	names, err := s.o.FS.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		id, suffix, _ := strings.Cut(name, ".")
		vm, err := wire.ParseVMID(id)
		switch {
		case err != nil || vm.String() != id:
			// Not ours.
		case suffix == "":
			s.vms[vm] = s.openVM(vm)
		case "."+suffix == newSuffix || "."+suffix == erasedSuffix:
			// A VM that was not accepted yet, or is gone.
			if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close ends folding, and closes all VMs and the runs in them. No piece of a
// layer may be arriving: Close waits for it. Devices that are still open fail
// from then on.
func (s *Store) Close() error {
	s.naming.Lock()
	defer s.naming.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.keeper.stop()
	var errs []error
	for _, v := range s.VMs() {
		errs = append(errs, v.close())
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// Dir is the store's directory, an absolute path.
func (s *Store) Dir() string { return s.dir }

// VMs are all VMs, by name.
func (s *Store) VMs() []*VM {
	s.mu.Lock()
	out := make([]*VM, 0, len(s.vms))
	for _, v := range s.vms {
		out = append(out, v)
	}
	s.mu.Unlock()
	slices.SortFunc(out, func(a, b *VM) int { return strings.Compare(a.Name(), b.Name()) })
	return out
}

// VM returns the VM with that UUID; if there is none the error wraps ErrNoVM.
func (s *Store) VM(id wire.VMID) (*VM, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.vms[id]; v != nil {
		return v, nil
	}
	return nil, fmt.Errorf("VM %v is not replicated here: %w", id, ErrNoVM)
}

// Named returns the VM of that name; if there is none the error wraps ErrNoVM.
func (s *Store) Named(name string) (*VM, error) {
	for _, v := range s.VMs() {
		if v.Name() == name {
			return v, nil
		}
	}
	return nil, fmt.Errorf("no VM named %q is replicated here: %w", name, ErrNoVM)
}

// nameTaken says what has the name, apart from the VM itself; naming is held.
func (s *Store) nameTaken(name string, but *VM) error {
	for _, v := range s.VMs() {
		if v != but && v.Name() == name {
			return fmt.Errorf("a VM named %s is replicated here already: %w", name, ErrExists)
		}
		for _, r := range v.peek().Runs {
			if r.Test && r.Name == name {
				return fmt.Errorf("a test failover of VM %s is named %s already: %w", v.Name(), name, ErrExists)
			}
		}
	}
	return nil
}

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
	v = s.openVM(id)
	s.mu.Lock()
	s.vms[id] = v
	s.mu.Unlock()
	if v.broken != nil {
		return nil, v.broken
	}
	return v, nil
}

func (s *Store) createVM(id wire.VMID, o *wire.Offer, sender string, quota int64) error {
	st := &state{VM: id, Keep: keepDefault, Role: wire.RoleReplica, Points: []point{}}
	if err := st.offer(&record{Offer: o, Sender: sender, Quota: quota}); err != nil {
		return err
	}
	dir := filepath.Join(s.dir, id.String())
	tmp := dir + newSuffix
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := s.fillVM(tmp, st); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	if err := s.o.FS.Rename(tmp, dir); err != nil {
		return err
	}
	return s.o.FS.SyncDir(s.dir)
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
	return owner.Write(image, owner.Identity{VM: st.VM, Name: st.Name, Disk: disk, Role: role, Owner: s.dir, Generation: generation})
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
	v.dropDigester()
	if err := v.mayErase(); err != nil {
		return err
	}
	gone := v.dir + erasedSuffix
	err := v.fs.Rename(v.dir, gone)
	if err == nil {
		err = v.fs.SyncDir(s.dir)
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
	return errors.Join(v.closeFiles(), os.RemoveAll(gone))
}

// mayErase closes the VM for everybody else, if it may be erased.
func (v *VM) mayErase() error {
	name := v.Name()
	if v.broken != nil {
		// What it held nobody can tell; what a guest wrote is never removed.
		names, err := v.fs.ReadDir(filepath.Join(v.dir, runsDir))
		if err != nil && !isMissing(err) {
			return err
		}
		if i := slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(n, failoverPrefix) }); i >= 0 {
			return fmt.Errorf("VM %s cannot be erased: %s has what a failed over guest wrote: %w", name, filepath.Join(v.dir, runsDir, names[i]), ErrInUse)
		}
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
		return fmt.Errorf("VM %s cannot be erased: %s: %w", name, why, ErrInUse)
	}
	v.closed = true
	return nil
}

// A keeper is the one goroutine of a store: it retires, folds, and records what
// was found damaged. Store.Close ends it.
type keeper struct {
	wake   chan struct{}
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
}

func (k *keeper) start(s *Store) {
	k.wake, k.done = make(chan struct{}, 1), make(chan struct{})
	k.ctx, k.cancel = context.WithCancel(context.Background())
	go k.run(s)
}

func (k *keeper) run(s *Store) {
	defer close(k.done)
	again := time.NewTimer(retryAfter)
	defer again.Stop()
	for {
		select {
		case <-k.ctx.Done():
			return
		case <-k.wake:
		case <-again.C:
		}
		again.Reset(retryAfter)
		for _, v := range s.VMs() {
			if k.ctx.Err() == nil {
				v.keep(k.ctx)
			}
		}
	}
}

func (k *keeper) stop() {
	k.cancel()
	<-k.done
}

// kick has the keeper look at all VMs.
func (s *Store) kick() {
	select {
	case s.keeper.wake <- struct{}{}:
	default:
	}
}
