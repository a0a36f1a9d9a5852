package ship_test

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
	"afterimage/internal/testenv"
)

// failingFS is the host's file system, on which appends to the log fail while told to.
type failingFS struct {
	hrl.FS
	failing atomic.Bool
}

type failingFile struct {
	hrl.File
	f *failingFS
}

func (f *failingFS) Create(path string) (hrl.File, error) { return f.file(f.FS.Create(path)) }
func (f *failingFS) Edit(path string) (hrl.File, error)   { return f.file(f.FS.Edit(path)) }

func (f *failingFS) file(file hrl.File, err error) (hrl.File, error) {
	if err != nil {
		return nil, err
	}
	return &failingFile{file, f}, nil
}

func (f *failingFile) WritevAt(bufs [][]byte, off int64) (int64, error) {
	if f.f.failing.Load() {
		return 0, syscall.EIO
	}
	return f.File.WritevAt(bufs, off)
}

// TestShipHistoryGaps: a point says whether there is history between its parent and
// itself, and why there is none; the one behind it has some again.
func TestShipHistoryGaps(t *testing.T) {
	fsys := &failingFS{FS: hrl.OS}
	w := newWorld(t, 9, 16<<20, 1<<20)
	w.quota, w.fs, w.boots = 40<<20, fsys, 1
	w.startPrimary()
	w.changes(20)
	first := w.sync()
	troubles := []struct {
		reason string
		do     func()
	}{
		{"", func() {}},
		{"", func() { w.stopPrimary(true); w.startPrimary() }},
		{"", func() { w.stopPrimary(false); w.startPrimary() }},
		{wire.GapPowerCut, func() { w.stopPrimary(false); w.boots++; w.startPrimary() }},
		{wire.GapLogFull, func() {
			buf := make([]byte, 1<<20)
			for range 80 {
				w.fill(buf)
				if err := ask(w.vm.Disks()[0], blockdev.Request{Op: blockdev.OpWrite, Off: 1 << 20, Len: 1 << 20, Buf: buf}); err != nil {
					t.Fatal(err)
				}
				copy(w.model[0][1<<20:], buf)
			}
		}},
		{wire.GapLogFailed, func() {
			fsys.failing.Store(true)
			w.changes(5)
			fsys.failing.Store(false)
			testenv.Until(t, "the log goes on", func() bool {
				_, err := w.vm.Log().Cut(hrl.CutCrash)
				return err == nil
			})
		}},
		{wire.GapLogLost, func() {
			w.stopPrimary(true)
			os.RemoveAll(filepath.Join(w.dir, "log"))
			w.startPrimary()
		}},
		{wire.GapLogLost, func() { os.RemoveAll(filepath.Join(w.dir, "log")) }},
		{wire.GapCompared, func() { w.saved = nil; w.stopPrimary(true); w.saved = nil; w.startPrimary() }},
	}
	w.keep = 100
	w.stopPrimary(true)
	w.startPrimary()
	last := w.sync()
	for _, x := range troubles {
		w.changes(5)
		x.do()
		w.changes(5)
		w.sync()
		w.changes(5)
		newest := w.sync()
		// A start makes points by itself: the first one made after the trouble says so.
		var gaps []string
		var before wire.PointInfo
		for _, p := range w.replicaVM().Points() {
			if last.Before(p.ID) && p.Gap != "" {
				gaps = append(gaps, p.Gap)
				if !p.ParentTime.Equal(before.Time) {
					t.Errorf("point %v: its parent's time is not that of %v", p.ID, before.ID)
				}
				if p.ID == newest {
					t.Errorf("%q: the point after the next comes after a gap, too", x.reason)
				}
			}
			before = p
		}
		if len(gaps) != min(len(x.reason), 1) || len(gaps) == 1 && gaps[0] != x.reason {
			t.Errorf("gaps %q, it should be %q", gaps, x.reason)
		}
		last = newest
	}
	if p := w.replicaVM().Points(); p[0].ID != first || p[0].Gap != "" {
		t.Errorf("the first point is %v after a gap %q", p[0].ID, p[0].Gap)
	}
	w.checkHistory()
}
