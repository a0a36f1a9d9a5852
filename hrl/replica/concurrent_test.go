package replica

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
	"afterimage/internal/testenv"
)

// TestConcurrent opens, reads and compares points from several goroutines while
// others come, are retired and folded.
func TestConcurrent(t *testing.T) {
	p := newPrimary(t, 5, "root", "data")
	_, v := accepted(t, p, Options{})
	must(t, v.SetKeep(2))
	var mu sync.Mutex // of was, which the primary adds to
	was := map[wire.PointID]map[string][]byte{}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	opens := make([]int, 4)
	for g := range opens {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for ctx.Err() == nil {
				points := v.Points()
				if len(points) == 0 {
					continue
				}
				id := points[rng.IntN(len(points))].ID
				disk := p.order[rng.IntN(len(p.order))]
				mu.Lock()
				want := was[id][disk]
				mu.Unlock()
				d, err := v.OpenPoint(id, disk)
				if errors.Is(err, ErrNoPoint) {
					continue // retired just now
				}
				if err != nil {
					t.Error(err)
					return
				}
				if g%2 == 0 {
					time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
				}
				got := make([]byte, d.Size())
				if err := blockdev.ReadAt(d, got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("disk %s of point %v is wrong: %v", disk, id, err)
				}
				sum := make([][32]byte, 1)
				err = v.Digests(id, disk, []blockdev.Extent{{Off: 0, Len: int64(len(want))}}, sum)
				if err != nil || sum[0] != sha256.Sum256(want) {
					t.Errorf("disk %s of point %v has another digest: %v", disk, id, err)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
				opens[g]++
			}
		})
	}
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := v.Settle(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for range testenv.Rounds(60, 30) {
		for _, d := range p.order {
			p.write(d)
		}
		info := p.point()
		mu.Lock()
		was[info.ID] = p.was[info.ID]
		mu.Unlock()
		must(t, p.send(v, info))
	}
	cancel()
	wg.Wait()
	settle(t, v)
	if n := len(v.Points()); n != 2 {
		t.Errorf("%d points are left", n)
	}
	p.check(v)
	for g, n := range opens {
		if n == 0 {
			t.Errorf("goroutine %d never opened a point", g)
		}
	}
	if len(v.uses) > 1 || len(v.held) > 2 { // that digests were asked of last
		t.Errorf("%v are held, %v", v.uses, v.held)
	}
}

// TestOpenAcrossFold: what was opened before a fold stays right after it, when
// its layers have lost their names.
func TestOpenAcrossFold(t *testing.T) {
	p := newPrimary(t, 5, "root")
	s, v := accepted(t, p, Options{})
	must(t, v.SetKeep(1))
	first := p.points(v, 1)[0]
	d, err := v.OpenPoint(first, "root")
	must(t, err)
	second := p.points(v, 1)[0]
	e, err := v.OpenPoint(second, "root")
	must(t, err)
	settle(t, v)
	p.same(d, first, "root", p.was[first]["root"])
	must(t, d.Close())
	p.points(v, 5)
	settle(t, v)
	if got := v.current().Base; got != second {
		t.Fatalf("the base is at %v", got)
	}
	p.same(e, second, "root", p.was[second]["root"])
	must(t, e.Close())
	if err := e.Close(); !errors.Is(err, blockdev.ErrClosed) {
		t.Fatal(err)
	}
	settle(t, v)
	if n := len(v.current().Points); n != 1 {
		t.Fatalf("%d points are left", n)
	}
	// A device that outlives its store fails, no more.
	d, err = v.OpenPoint(p.at, "root")
	must(t, err)
	must(t, s.Close())
	if err := blockdev.ReadAt(d, make([]byte, 512), 0); !errors.Is(err, blockdev.ErrClosed) {
		t.Fatal(err)
	}
	must(t, d.Close())
}

// hookFS calls back before a file is opened for reading, and before the journal
// is synced.
type hookFS struct {
	hrl.FS
	open, journal atomic.Pointer[func(path string)] // once
}

func call(hook *atomic.Pointer[func(path string)], path string) {
	if f := hook.Swap(nil); f != nil {
		(*f)(path)
	}
}

func (f *hookFS) Open(path string) (hrl.File, error) {
	call(&f.open, path)
	return f.FS.Open(path)
}

func (f *hookFS) Create(path string) (hrl.File, error) {
	g, err := f.FS.Create(path)
	return &hookFile{g, f, path}, err
}

func (f *hookFS) Edit(path string) (hrl.File, error) {
	g, err := f.FS.Edit(path)
	return &hookFile{g, f, path}, err
}

type hookFile struct {
	hrl.File
	f    *hookFS
	path string
}

func (f *hookFile) Sync() error {
	if filepath.Base(f.path) == journalName {
		call(&f.f.journal, f.path)
	}
	return f.File.Sync()
}

// TestOpenWhileFoldEnds: a fold does not take layers away from under somebody who
// has looked them up and is about to open them.
func TestOpenWhileFoldEnds(t *testing.T) {
	p := newPrimary(t, 5, "root")
	fs := &hookFS{FS: hrl.OS}
	s, v := accepted(t, p, Options{FS: fs})
	must(t, v.SetKeep(1))
	p.whole(v, "root", 1)
	settle(t, v)
	must(t, s.Close())
	s = openStore(t, s.Dir(), Options{FS: fs}) // whose journal is not a new file
	v, err := s.VM(p.id)
	must(t, err)
	second := p.whole(v, "root", 1)[0]
	must(t, v.wait(t, second))
	done := make(chan error, 1)
	opening := func(path string) {
		// As long as it is the fold that waits, it may wait.
		for range 100 {
			if _, err := os.Stat(path); err != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	recording := func(string) {
		looked := make(chan bool)
		wait := func(path string) { close(looked); opening(path) }
		fs.open.Store(&wait)
		go func() {
			d, err := v.OpenPoint(second, "root")
			if err == nil {
				p.same(d, second, "root", p.was[second]["root"])
				err = d.Close()
			}
			done <- err
		}()
		<-looked
	}
	fs.journal.Store(&recording)
	settle(t, v)
	must(t, <-done)
	if v.current().Base != second {
		t.Fatal("nothing was folded")
	}
}

// TestFoldGroups: retired points wait until there are some of them.
func TestFoldGroups(t *testing.T) {
	p := newPrimary(t, 5, "root")
	_, v := accepted(t, p, Options{})
	must(t, v.SetKeep(1))
	var bases []wire.PointID
	for range 3 * foldGroup {
		id := p.points(v, 1)[0]
		must(t, v.wait(t, id))
		if b := v.current().Base; len(bases) == 0 || b != bases[len(bases)-1] {
			bases = append(bases, b)
		}
	}
	if len(bases) < 2 || len(bases) > 5 {
		t.Fatalf("the base was at %v", bases)
	}
	p.check(v)
}

// wait waits until only the point is listed, and the keeper has had its round.
func (v *VM) wait(t *testing.T, id wire.PointID) error {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		v.folding.Lock()
		points := v.Points()
		v.folding.Unlock()
		if len(points) == 1 && points[0].ID == id {
			return nil
		}
		if time.Now().After(end) {
			return errors.New("not in time: older points are retired")
		}
	}
}

func TestDigests(t *testing.T) {
	p := newPrimary(t, 5, "root", "data")
	_, v := accepted(t, p, Options{})
	points := p.points(v, 2)
	size := int64(len(p.disks["root"]))
	ext := []blockdev.Extent{{Off: 0, Len: 512}, {Off: 100, Len: 1000}, {Off: 65536, Len: 65536}, {Off: size - 512, Len: 4096}, {Off: size + 5, Len: 10}}
	for _, id := range points {
		for _, disk := range p.order {
			out := make([][32]byte, len(ext))
			must(t, v.Digests(id, disk, ext, out))
			want := append(bytes.Clone(p.was[id][disk]), make([]byte, 8192)...)
			for i, e := range ext {
				if out[i] != sha256.Sum256(want[e.Off:e.End()]) {
					t.Errorf("disk %s at %v, %v", disk, id, e)
				}
			}
		}
	}
	for name, c := range map[string]struct {
		id   wire.PointID
		disk string
		e    blockdev.Extent
		n    int
		want error
	}{
		"no point": {wire.PointID{Generation: 9, Incarnation: 9, Epoch: 9}, "root", ext[0], 1, ErrNoPoint},
		"no disk":  {points[0], "none", ext[0], 1, ErrNoPoint},
		"huge":     {points[0], "root", blockdev.Extent{Off: 0, Len: 1 << 40}, 1, ErrBad},
		"negative": {points[0], "root", blockdev.Extent{Off: -1, Len: 1}, 1, ErrBad},
		"no room":  {points[0], "root", ext[0], 0, ErrBad},
	} {
		if err := v.Digests(c.id, c.disk, []blockdev.Extent{c.e}, make([][32]byte, c.n)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
