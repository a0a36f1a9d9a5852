package replica

import (
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

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

const (
	lockName     = "lock"
	erasedSuffix = ".erased"
)

// Options say how a store is opened.
type Options struct {
	// FS is the file system for journals, layers and checksums; nil: hrl.OS.
	// Tops are opened through package blockdev, and bases by Host.
	FS   hrl.FS
	Host Host         // nil: this host
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
	return open(dir, o, nil)
}

func open(dir string, o Options, device openDevice) (*Store, error) {
	if o.FS == nil {
		o.FS = hrl.OS
	}
	if o.Host == nil {
		o.Host = thisHost{}
	}
	if o.Warn == nil {
		o.Warn = slog.New(slog.DiscardHandler)
	}
	if o.Life == nil {
		o.Life = func(string) ([32]byte, error) { return bootLife(), nil }
	}
	if device == nil {
		device = o.Host.OpenBase
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
			if err := s.o.Host.RemoveAll(filepath.Join(s.dir, name)); err != nil {
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
