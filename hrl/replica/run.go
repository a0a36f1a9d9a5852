package replica

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
	"afterimage/hrl/wire"
)

const (
	failoverPrefix = "failover-" // and the generation
	testPrefix     = "test-"     // and the test's name
	topSuffix      = ".top"
)

// dir is the name of the run's directory, below runs.
func (r *runRecord) dir() string {
	if r.Test {
		return testPrefix + r.Name
	}
	return fmt.Sprintf("%s%d", failoverPrefix, r.Generation)
}

func (v *VM) runDir(r *runRecord) string { return filepath.Join(v.dir, runsDir, r.dir()) }

func (v *VM) topPath(r *runRecord, disk string) string {
	return filepath.Join(v.runDir(r), disk+topSuffix)
}

// topFiles are the files that take a run's space.
func (v *VM) topFiles(r *runRecord) []string {
	var out []string
	for _, d := range r.Disks {
		out = append(out, v.topPath(r, d.Name), v.topPath(r, d.Name)+".map")
	}
	return out
}

// under names what a top lies over.
func (v *VM) under(r *runRecord, disk string) [32]byte {
	return sha256.Sum256([]byte(fmt.Sprintf("top of VM %v, point %v, disk %s", v.id, r.Point, disk)))
}

// A Run is a failover that stands, or a test of one: the disks of a point, each
// with a top that is written.
type Run struct {
	// Name is the VM's, or the test's.
	Name  string
	Test  bool
	Point wire.PointID
	// Generation is that of what is written now; 0 for a test.
	Generation uint64
	Started    time.Time

	v     *VM
	order []string
	err   error

	mu     sync.Mutex
	disks  map[string]*runDisk // nil once it is closed
	closed bool
}

type runDisk struct {
	chain *chain
	top   *blockdev.Top // nil: a disk without a byte
	dev   blockdev.Device
}

// Disks are the names of the run's disks, in the order of the VM.
func (r *Run) Disks() []string { return r.order }

// Device is a disk of the run: what the point had, and what was written since.
// It stays the run's, which closes it; nobody else flushes it. Nil: there is none
// of that name, or the run is closed, or could not be opened.
func (r *Run) Device(disk string) blockdev.Device {
	r.mu.Lock()
	defer r.mu.Unlock()
	if d := r.disks[disk]; d != nil {
		return d.dev
	}
	return nil
}

// Err says why the run's disks could not be opened; it stands all the same.
func (r *Run) Err() error { return r.err }

// Close lets the disks go, without flushing them. The run goes on standing: Runs
// opens it again. Requests that are under way may fail.
func (r *Run) Close() error {
	r.mu.Lock()
	disks := r.disks
	r.disks, r.closed = nil, true
	r.mu.Unlock()
	r.v.mu.Lock()
	if r.v.runs[r.Name] == r {
		delete(r.v.runs, r.Name)
	}
	r.v.mu.Unlock()
	var errs []error
	for _, d := range disks {
		errs = append(errs, d.close())
	}
	return errors.Join(errs...)
}

func (d *runDisk) close() error {
	err := d.dev.Close()
	if d.top != nil {
		err = errors.Join(err, d.top.Close())
	}
	d.chain.release()
	return err
}

// openRun opens the disks of a run.
func (v *VM) openRun(rec *runRecord) (*Run, error) {
	r := &Run{
		Name: rec.Name, Test: rec.Test, Point: rec.Point, Generation: rec.Generation, Started: rec.Started,
		v: v, disks: map[string]*runDisk{},
	}
	for _, d := range rec.Disks {
		r.order = append(r.order, d.Name)
	}
	for _, d := range rec.Disks {
		rd, err := v.openRunDisk(rec, d)
		if err != nil {
			return r, errors.Join(err, r.Close())
		}
		r.disks[d.Name] = rd
	}
	return r, nil
}

func (v *VM) openRunDisk(rec *runRecord, d wire.Disk) (*runDisk, error) {
	c, err := v.chain(rec.Point, d.Name)
	if err != nil {
		return nil, err
	}
	rd := &runDisk{chain: c}
	if d.Size > 0 {
		var life [32]byte
		if life, err = v.store.o.Life(v.runDir(rec)); err == nil {
			rd.top, err = blockdev.OpenTop(v.topPath(rec, d.Name), d.Size, v.under(rec, d.Name), life)
		}
	}
	if err == nil {
		rd.dev, err = c.over(rd.top)
	}
	if err != nil {
		if rd.top != nil {
			err = errors.Join(err, rd.top.Close())
		}
		c.release()
		return nil, err
	}
	return rd, nil
}

// Start begins an unplanned failover from a point: from when it returns to Cancel
// or Commit nothing is received, and the disks of the run are the VM's. It looks
// at header and trailer of each layer, not at the rest: Verify does.
//
// A crash after step
//
//  1. empty tops made, their directory and its parent synced: leaves tops that
//     nothing names; Open removes them
//  2. record "started" synced, with a generation that never was: leaves the
//     failover; Runs has it after a restart
//
// Only then has anybody a device to write to (RULES J2). Where the record could
// not be written, the tops stay: whether it will be found after a crash is not
// known.
func (v *VM) Start(id wire.PointID) (*Run, error) {
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.mayList(); err != nil {
		return nil, err
	}
	st := v.current()
	rec := &runRecord{Name: st.Name, Point: id, Generation: st.Generation + 1}
	err := v.clearRunDir(v.runDir(rec))
	for errors.Is(err, ErrExists) {
		// What a guest wrote, and no record names, is in nobody's way.
		rec.Generation++
		err = v.clearRunDir(v.runDir(rec))
	}
	if err != nil {
		return nil, noRoom("a failover", fmt.Errorf("a failover of VM %s: %w", st.Name, err))
	}
	return v.startLocked(rec)
}

// Test begins a test failover, whose top is thrown away with EndTest. Replication
// goes on, and there may be any number of tests. The name is that of no VM and no
// other test of this store. The steps are those of Start.
func (v *VM) Test(name string, id wire.PointID) (*Run, error) {
	if err := wire.CheckName("test", name); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrBad)
	}
	v.store.naming.Lock()
	defer v.store.naming.Unlock()
	if err := v.store.nameTaken(name, nil); err != nil {
		return nil, err
	}
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.usable(); err != nil {
		return nil, err
	}
	rec := &runRecord{Name: name, Test: true, Point: id}
	if err := v.clearRunDir(v.runDir(rec)); err != nil {
		return nil, noRoom("a failover", fmt.Errorf("test failover %s: %w", name, err))
	}
	return v.startLocked(rec)
}

// startLocked starts a run in a directory that is not there yet, or has nothing
// that matters.
func (v *VM) startLocked(rec *runRecord) (*Run, error) {
	st := v.current()
	i := st.find(rec.Point)
	if i < 0 {
		return nil, st.noPoint(rec.Point)
	}
	if why := st.Points[i].Damaged; why != "" {
		return nil, &PointError{st.Name, rec.Point, why}
	}
	for _, d := range st.Points[i].Disks {
		rec.Disks = append(rec.Disks, d.Disk)
	}
	rec.Started = time.Now().UTC()
	what := fmt.Sprintf("a failover of VM %s", st.Name)
	if err := v.makeTops(st, rec); err != nil {
		return nil, noRoom(what, errors.Join(fmt.Errorf("%s: make its tops: %w", what, err), v.store.o.Host.RemoveAll(v.runDir(rec))))
	}
	r, err := v.openRun(rec)
	if err != nil {
		return nil, noRoom(what, errors.Join(fmt.Errorf("%s: %w", what, err), v.store.o.Host.RemoveAll(v.runDir(rec))))
	}
	if err := v.commitLocked(record{Kind: kindStarted, Run: rec}); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.runs[r.Name] = r
	return r, nil
}

// makeTops makes an empty top for each disk, durably.
func (v *VM) makeTops(st *state, rec *runRecord) error {
	dir := v.runDir(rec)
	if err := v.fs.MkdirAll(dir); err != nil {
		return err
	}
	life, err := v.store.o.Life(dir)
	if err != nil {
		return err
	}
	for _, d := range rec.Disks {
		if d.Size == 0 {
			continue
		}
		path := v.topPath(rec, d.Name)
		if err := blockdev.CreateTop(path, d.Size, v.under(rec, d.Name), life); err != nil {
			return err
		}
		if err := v.store.identify(path, st, d.Name, owner.RoleRun, rec.Generation); err != nil {
			return err
		}
	}
	if err := v.fs.SyncDir(dir); err != nil {
		return err
	}
	return v.fs.SyncDir(filepath.Join(v.dir, runsDir))
}

// Runs are the runs that stand, also those of an earlier life of the daemon, with
// their disks open. One whose disks cannot be opened says so in Err.
func (v *VM) Runs() []*Run {
	v.change.Lock()
	defer v.change.Unlock()
	if v.usable() != nil {
		return nil
	}
	var out []*Run
	st := v.current()
	for i := range st.Runs {
		rec := &st.Runs[i]
		v.mu.Lock()
		r := v.runs[rec.Name]
		v.mu.Unlock()
		if r == nil {
			var err error
			if r, err = v.openRun(rec); err != nil {
				r.err = fmt.Errorf("open failover %s of VM %s: %w", rec.Name, st.Name, err)
			} else {
				v.mu.Lock()
				v.runs[rec.Name] = r
				v.mu.Unlock()
			}
		}
		out = append(out, r)
	}
	return out
}

// closeRun closes a run if it is open.
func (v *VM) closeRun(name string) error {
	v.mu.Lock()
	r := v.runs[name]
	v.mu.Unlock()
	if r == nil {
		return nil
	}
	return r.Close()
}

// standing returns the failover that stands, not yet committed.
func (v *VM) standing() (*runRecord, error) {
	if err := v.usable(); err != nil {
		return nil, err
	}
	st := v.current()
	r := st.failover()
	switch {
	case r == nil:
		return nil, fmt.Errorf("VM %s has no failover: %w: %w", st.Name, ErrNoRun, ErrRole)
	case st.Role != wire.RoleFailedOver:
		return nil, &RoleError{VM: st.Name, Role: st.Role, Point: r.Point}
	}
	return r, nil
}

// Cancel ends the failover that stands; from then on the VM is received again.
// What was written is kept as a branch, whose name is returned (RULES J8), and
// with it the point it lies over. Whoever serves the disks closes the run first,
// flushed; Cancel closes it if need be.
//
// A crash before the record is durable leaves the failover, after it the branch:
// the tops stay where they are.
func (v *VM) Cancel() (branch string, err error) {
	v.change.Lock()
	defer v.change.Unlock()
	r, err := v.standing()
	if err != nil {
		return "", err
	}
	if err := v.closeRun(r.Name); err != nil {
		v.warn.Warn("the disks of a failover do not close", "vm", r.Name, "problem", err)
	}
	name := fmt.Sprintf("branch-%d", v.current().LastBranch+1)
	return name, v.commitLocked(record{Kind: kindCancelled, Name: name})
}

// Commit makes the failover that stands final: the VM runs here. The run goes on
// standing.
func (v *VM) Commit() error {
	v.change.Lock()
	defer v.change.Unlock()
	if _, err := v.standing(); err != nil {
		return err
	}
	return v.commitLocked(record{Kind: kindCommitted})
}

// EndTest ends a test and removes what was written in it. Whoever serves its
// disks closes the run first; EndTest closes it if need be.
//
// A crash before the record is durable leaves the test, after it files that Open
// removes.
func (v *VM) EndTest(name string) error {
	v.change.Lock()
	defer v.change.Unlock()
	if err := v.usable(); err != nil {
		return err
	}
	st := v.current()
	r := st.run(name)
	if r == nil || !r.Test {
		return fmt.Errorf("VM %s has no test failover named %s: %w", st.Name, name, ErrNoRun)
	}
	if err := v.closeRun(name); err != nil {
		v.warn.Warn("the disks of a test failover do not close", "test", name, "problem", err)
	}
	if err := v.commitLocked(record{Kind: kindEnded, Name: name}); err != nil {
		return err
	}
	v.store.kick()
	return v.store.o.Host.RemoveAll(v.runDir(r))
}
