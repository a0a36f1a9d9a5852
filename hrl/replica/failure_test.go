package replica

import (
	"errors"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
	"afterimage/internal/testenv"
)

// A life is what happens to a VM here, on a file system that may fail.
type life struct {
	primary
	next  []wire.PointInfo // to be sent
	fs    *faultFS
	s     *Store
	v     *VM
	dir   string
	acked []wire.PointID
	fails bool // an operation has failed for good
}

// TestFailEveryOperation fails every single operation of a VM's life, once, or
// that and all that come after it. One that failed once succeeds when it is asked
// for again, and after either nothing that was acknowledged is missing, nothing
// is half there, and nothing is taken for damage.
func TestFailEveryOperation(t *testing.T) {
	made := newPrimary(t, 7, "root", "data")
	made.piece, made.disks["root"] = 1<<20, make([]byte, 130<<10)
	var points []wire.PointInfo
	for _, size := range []int{0, 0, 70 << 10, 200 << 10, 10 << 10, 150 << 10} {
		for _, d := range made.order {
			made.write(d)
		}
		if d := made.disks["data"]; size > 0 {
			made.disks["data"] = append(slices.Clone(d[:min(size, len(d))]), make([]byte, max(0, size-len(d)))...)
		}
		points = append(points, made.point())
	}
	first, by := testenv.Every(t, 5) // odd: k says which error it is
	for _, sticky := range []bool{false, true} {
		failed, step := 0, 1
		if sticky {
			step = 3 // it takes as long, and finds less
		}
		for k := first; ; k += step * by {
			err := syscall.EIO
			if k%2 == 0 {
				err = syscall.ENOSPC
			}
			l := &life{primary: *made, next: points, fs: newFaultFS(k, sticky, err), dir: tempDir(t)}
			l.rng = rand.New(rand.NewPCG(1, 1))
			l.live()
			if !l.check() {
				break
			}
			failed++
		}
		t.Logf("%d operations, sticky %v", failed, sticky)
		if (failed+1)*by < 100 {
			t.Fatalf("only %d operations", failed)
		}
	}
}

// try does something, and does it again if it fails because of the fault.
func (l *life) try(what string, f func() error) {
	l.t.Helper()
	if l.fails {
		return
	}
	err := f()
	if err == nil {
		return
	}
	if !l.fs.struck() {
		l.t.Fatalf("%s: %v", what, err)
	}
	if l.fs.sticky {
		l.fails = true
		return
	}
	if errors.Is(l.fs.err, syscall.ENOSPC) && errors.Is(err, syscall.ENOSPC) && what != "open" && what != "settle" && !errors.Is(err, ErrNoRoom) {
		l.t.Errorf("%s: no room, and %v", what, err)
	}
	if err := f(); err != nil {
		l.t.Fatalf("operation %d failed, then %s again: %v", l.fs.failAt, what, err)
	}
}

func (l *life) live() {
	l.try("open", func() (err error) { l.s, err = open(l.dir, Options{FS: l.fs}, l.fs.device); return err })
	o := l.offer()
	o.Keep, o.Generation = 1, 1
	l.try("accept", func() (err error) { l.v, err = l.s.Accept(l.id, o, testSender, 0); return err })
	l.point1()
	l.point1()
	l.settle()
	l.failover()
	for len(l.next) > 0 && !l.fails {
		l.point1()
		l.settle()
	}
	if l.s != nil {
		l.try("close", func() error {
			err := l.s.Close()
			l.s = nil
			return err
		})
	}
}

func (l *life) point1() {
	if l.fails {
		return
	}
	info := l.next[0]
	l.next = l.next[1:]
	l.at = info.ID
	l.try("send", func() error { return l.send(l.v, info) })
	if !l.fails {
		l.acked = append(l.acked, info.ID)
	}
}

func (l *life) settle() { l.try("settle", func() error { return l.v.Settle(l.t.Context()) }) }

func (l *life) failover() {
	var r *Run
	l.try("start", func() (err error) { r, err = l.v.Start(l.at); return err })
	l.try("write", func() error {
		d := r.Device("root")
		return errors.Join(blockdev.WriteAt(d, make([]byte, 4096), 0), blockdev.Flush(d))
	})
	l.try("cancel", func() error { _, err := l.v.Cancel(); return err })
	l.try("remove the branch", func() error { return l.v.RemoveBranch("branch-1") })
}

// check opens the store without faults. It reports whether there was one.
func (l *life) check() bool {
	l.t.Helper()
	fired := l.fs.calm()
	if l.s != nil {
		_ = l.s.Close()
	}
	s, err := Open(l.dir, Options{})
	must(l.t, err)
	defer func() { must(l.t, s.Close()) }()
	v, err := s.VM(l.id)
	if errors.Is(err, ErrNoVM) && l.fails && len(l.acked) == 0 {
		return fired
	}
	must(l.t, err)
	if err := v.Broken(); err != nil {
		l.t.Fatalf("operation %d failed: %v", l.fs.failAt, err)
	}
	if v.State().Role == wire.RoleFailedOver {
		if !l.fails {
			l.t.Fatal("a failover stands that was cancelled")
		}
		for _, r := range v.Runs() {
			must(l.t, r.Err())
		}
		_, err := v.Cancel()
		must(l.t, err)
	}
	listed := ids(v.Points())
	if n := len(l.acked); n > 0 && !slices.Contains(listed, l.acked[n-1]) && !(l.fails && slices.Contains(listed, l.at)) {
		l.t.Fatalf("operation %d failed: point %v is not listed, but %v", l.fs.failAt, l.acked[n-1], listed)
	}
	l.primary.check(v)
	settle(l.t, v)
	l.primary.check(v)
	for _, p := range v.Points() {
		if p.Damaged != "" {
			l.t.Fatalf("point %v is marked: %s", p.ID, p.Damaged)
		}
		must(l.t, v.Verify(l.t.Context(), p.ID, nil))
	}
	return fired
}
