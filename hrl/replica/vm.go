package replica

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

const (
	disksDir   = "disks"
	layersDir  = "layers"
	stagingDir = "staging"
	runsDir    = "runs"
)

// A VM is one whose disks are replicated here. Its methods may be called from
// several goroutines.
type VM struct {
	store *Store
	id    wire.VMID
	dir   string
	fs    hrl.FS
	warn  *slog.Logger

	broken error // why it could not be opened; nothing else is then used

	// change is held by whoever changes the VM durably, across the syncs of the
	// journal. It is taken before files and mu.
	change  sync.Mutex
	journal *journal

	// files is held shared by whoever opens the files of layers of which the
	// state says that they are there, exclusively by whoever removes some that
	// it no longer names. It is taken before mu.
	files sync.RWMutex

	// folding is held by whoever retires and folds: the store's keeper, and
	// Erase and Close to keep it away. It is taken before all others.
	folding sync.Mutex
	stuck   bool // the last fold has failed; folding is held

	staging sync.WaitGroup // pieces that are being received

	// mu guards what follows. Nothing slow is done under it.
	mu        sync.Mutex
	state     *state
	interrupt context.CancelFunc // of the fold under way, if there is one
	closed    bool
	bases     map[string]*base        // by disk
	held      map[string]*heldLayer   // by digest
	uses      map[wire.PointID]int    // chains that are open
	retiring  map[wire.PointID]bool   // whose retirement is being recorded
	stored    map[string]int64        // bytes of each file in layers, by digest
	staged    map[string]*stagedLayer // that no point has, by digest
	runs      map[string]*Run         // that are open, by name
	notes     map[damage]bool         // that were found; true: not recorded yet
	waiting   []chan error            // calls of Settle
	hurry     bool                    // room is short: fold what is due
	digests   *digester               // what was asked for digests last
}

// current is the state as it is now.
func (v *VM) current() *state {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state
}

// usable says why nothing can be done with the VM, if so.
func (v *VM) usable() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.usableLocked()
}

func (v *VM) usableLocked() error {
	switch {
	case v.broken != nil:
		return v.broken
	case v.closed:
		return fmt.Errorf("VM %s: %w", v.state.Name, ErrClosed)
	}
	return nil
}

// receiving says why nothing is received, if so.
func (v *VM) receivingLocked() error {
	if err := v.usableLocked(); err != nil {
		return err
	}
	if r := v.state.failover(); r != nil {
		return &RoleError{VM: v.state.Name, Role: v.state.Role, Point: r.Point}
	}
	return nil
}

func (s *state) noPoint(id wire.PointID) error {
	return fmt.Errorf("VM %s has no point %v: %w", s.Name, id, ErrNoPoint)
}

// commitLocked makes a change durable and then seen; change is held. After an
// error it was not made, and if the machine dies now it may turn out to have
// been: the journal does not go on before that is settled.
func (v *VM) commitLocked(r record) error {
	now := v.current()
	r.Time = time.Now().UTC()
	next, err := now.apply(&r)
	if err != nil {
		return fmt.Errorf("VM %s: %w", now.Name, err)
	}
	if err := v.journal.append(&r, now); err != nil {
		return noRoom(fmt.Sprintf("the journal of VM %s", now.Name), err)
	}
	v.mu.Lock()
	v.state = next
	v.mu.Unlock()
	if v.journal.grown() {
		if err := v.journal.rewrite(next); err != nil {
			v.warn.Warn("a journal cannot be written anew", "vm", next.Name, "problem", err)
		}
	}
	return nil
}

// openVM opens a VM that has a directory. One that cannot be opened is broken.
func (s *Store) openVM(id wire.VMID) *VM {
	v := &VM{
		store: s, id: id, dir: filepath.Join(s.dir, id.String()), fs: s.o.FS, warn: s.o.Warn,
		bases: map[string]*base{}, held: map[string]*heldLayer{}, uses: map[wire.PointID]int{}, retiring: map[wire.PointID]bool{},
		stored: map[string]int64{}, staged: map[string]*stagedLayer{}, runs: map[string]*Run{}, notes: map[damage]bool{},
	}
	if err := v.open(); err != nil {
		v.broken = fmt.Errorf("VM %s: %w", v.Name(), err)
		v.closeFiles()
		s.o.Warn.Error("a replicated VM cannot be opened", "vm", v.Name(), "problem", err)
	}
	return v
}

func (v *VM) open() error {
	j, st, err := openJournal(v.fs, filepath.Join(v.dir, journalName))
	v.state = st // what could be read names it at least
	if err != nil {
		return err
	}
	v.journal = j
	if st.VM != v.id {
		return &JournalError{j.path, 0, fmt.Errorf("it is that of VM %v", st.VM)}
	}
	for _, d := range st.Disks {
		if err := v.openBase(d.Name); err != nil {
			return err
		}
	}
	if err := v.recoverStaging(); err != nil {
		return err
	}
	return v.recoverRuns()
}

func (v *VM) openBase(disk string) error {
	b, err := openBase(v.fs, v.store.openDevice, filepath.Join(v.dir, disksDir, disk), disk, v.id, v.state.Folds, v.warn)
	if err != nil {
		return err
	}
	// What an overlay finds behind the end of its base reads as zero: a base that
	// was cut off must not pass for one.
	if have, least := b.dev.Size(), v.state.baseLeast(disk); have < least {
		err := &BaseError{b.path, have, fmt.Errorf("the file has %d bytes, at least %d are due", have, least)}
		return errors.Join(err, b.Close())
	}
	b.damaged = func(block int64, err error) { v.note(damage{disk: disk, block: block, reason: err.Error()}) }
	v.mu.Lock()
	defer v.mu.Unlock()
	v.bases[disk] = b
	return nil
}

// close ends what goes on, and lets the files go. Devices that are open fail
// from then on.
func (v *VM) close() error {
	v.mu.Lock()
	v.closed = true
	waiting := v.waiting
	v.waiting = nil
	v.interruptLocked()
	v.mu.Unlock()
	for _, w := range waiting {
		w <- ErrClosed
	}
	v.folding.Lock()
	defer v.folding.Unlock()
	v.staging.Wait()
	v.change.Lock()
	defer v.change.Unlock()
	v.dropDigester(wire.PointID{})
	v.mu.Lock()
	runs := v.runs
	v.runs = map[string]*Run{}
	v.mu.Unlock()
	var errs []error
	for _, r := range runs {
		errs = append(errs, r.Close())
	}
	return errors.Join(append(errs, v.closeFiles())...)
}

// interruptLocked ends the fold under way; it is begun anew later.
func (v *VM) interruptLocked() {
	if v.interrupt != nil {
		v.interrupt()
	}
}

func (v *VM) closeFiles() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var errs []error
	for _, b := range v.bases {
		errs = append(errs, b.Close())
	}
	v.bases = map[string]*base{}
	if v.journal != nil {
		errs = append(errs, v.journal.close())
	}
	return errors.Join(errs...)
}

// ID returns the VM's UUID.
func (v *VM) ID() wire.VMID { return v.id }

// Name returns its name; that of a broken one may be its UUID.
func (v *VM) Name() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.state == nil || v.state.Name == "" {
		return v.id.String()
	}
	return v.state.Name
}

// Broken says why the VM could not be opened, or nil. Of a broken one only ID,
// Name and Erase are of use.
func (v *VM) Broken() error { return v.broken }

// peek is the state to tell of; that of a broken VM says nothing.
func (v *VM) peek() *state {
	if v.broken != nil {
		return &state{VM: v.id, Name: v.Name(), Role: wire.RoleReplica}
	}
	return v.current()
}

// Sender is the identity of the host it comes from.
func (v *VM) Sender() string { return v.peek().Sender }

// Quota is how many bytes it may take; 0: as many as there are.
func (v *VM) Quota() int64 { return v.peek().Quota }

// Keep is how many points are kept.
func (v *VM) Keep() int { return v.peek().Keep }

// Every is how often a point is due, as the primary said; 0: it did not.
func (v *VM) Every() time.Duration { return time.Duration(v.peek().Every * float64(time.Second)) }

// Disks are the disks that were offered.
func (v *VM) Disks() []wire.Disk { return slices.Clone(v.peek().Disks) }

// State is what the sender may know of the VM.
func (v *VM) State() wire.VMState {
	st := v.peek()
	out := wire.VMState{
		Role: st.Role, Generation: st.Generation, Term: st.Term, Newest: st.newest(), Layers: []wire.LayerState{},
	}
	if n := len(st.Points); n > 0 {
		out.NewestTime = st.Points[n-1].Time
	}
	if r := st.failover(); r != nil {
		out.FailedOverTo = r.Point
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range v.staged {
		out.Layers = append(out.Layers, s.stateLocked())
	}
	slices.SortFunc(out.Layers, func(a, b wire.LayerState) int { return strings.Compare(a.Digest, b.Digest) })
	return out
}

// Points are the listed points, the oldest first.
func (v *VM) Points() []wire.PointInfo {
	out := []wire.PointInfo{}
	for _, p := range v.peek().Points {
		if !p.Retired {
			out = append(out, p.info())
		}
	}
	return out
}

// info is the point for others, who may do with it what they like.
func (p *point) info() wire.PointInfo {
	i := p.PointInfo
	i.Disks = slices.Clone(i.Disks)
	for k := range i.Disks {
		i.Disks[k].Layers = slices.Clone(i.Disks[k].Layers)
		i.Disks[k].Unreadable = slices.Clone(i.Disks[k].Unreadable)
	}
	return i
}

// Resolve finds the listed point that s names: its id, or the newest for
// "latest" and "".
func (v *VM) Resolve(s string) (wire.PointID, error) {
	if err := v.usable(); err != nil {
		return wire.PointID{}, err
	}
	st := v.current()
	if s == "" || s == "latest" {
		if len(st.Points) == 0 {
			return wire.PointID{}, fmt.Errorf("VM %s has no point yet: %w", st.Name, ErrNoPoint)
		}
		return st.newest(), nil
	}
	id, err := wire.ParsePointID(s)
	if err != nil {
		return id, fmt.Errorf("VM %s: %w: %w", st.Name, err, ErrNoPoint)
	}
	if st.find(id) < 0 {
		return id, st.noPoint(id)
	}
	return id, nil
}

// Used is how many bytes the VM takes: bases, layers, what is staged or has
// been announced, and tops.
func (v *VM) Used() int64 {
	v.mu.Lock()
	var n int64
	for _, b := range v.stored {
		n += b
	}
	for _, s := range v.staged {
		if !s.complete {
			n += s.size
		}
	}
	var files []string
	for disk := range v.bases {
		dir := filepath.Join(v.dir, disksDir, disk)
		files = append(files, filepath.Join(dir, baseName), filepath.Join(dir, sumsName))
	}
	if v.state != nil {
		for i := range v.state.Runs {
			files = append(files, v.topFiles(&v.state.Runs[i])...)
		}
		for i := range v.state.Branches {
			files = append(files, v.topFiles(&v.state.Branches[i].Run)...)
		}
	}
	v.mu.Unlock()
	for _, f := range files {
		n += allocated(f)
	}
	return n
}

// allocated is how many bytes a file takes on the disk.
func allocated(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

func isMissing(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// noRoom makes an error of the system a *RoomError where it says that the disk
// is full.
func noRoom(what string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return &RoomError{What: what, Err: err}
	}
	return err
}
