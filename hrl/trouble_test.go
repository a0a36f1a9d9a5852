package hrl

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// write appends one write of the disk's first bytes.
func (h *history) write(off int64, n int, b byte) error {
	h.g.Reset()
	h.g.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: off, Len: int64(n), Data: bytes.Repeat([]byte{b}, n)})
	err := h.l.Append(h.g)
	if err == nil {
		h.l.Finished(h.g)
		copy(h.model[off:], h.g.Entries[0].Data)
	}
	return err
}

// recover lets the log try again at once after a failure.
func (h *history) recover() {
	h.l.mu.Lock()
	h.l.retryAt = time.Time{}
	h.l.mu.Unlock()
	h.l.keeper.kick()
}

func (h *history) writeUntilGood(off int64, n int, b byte) {
	h.t.Helper()
	eventually(h.t, "appends succeed again", func() bool {
		h.recover()
		return h.write(off, n, b) == nil
	})
}

func mustOpen(t testing.TB, dir string) *Segments {
	t.Helper()
	r, err := OpenSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// TestReclaimWaitsForSeal: a keeper so slow that all segments but the tail wait
// for their seals uses none of them anew before it is sealed.
func TestReclaimWaitsForSeal(t *testing.T) {
	dir := tempDir(t)
	var l *Log
	var mu sync.Mutex
	var given BlockSet
	l, _ = openTest(t, dir, Options{Spares: 4, Quota: 5 * minSegmentBytes, Reclaimed: func(s *BlockSet) error {
		mu.Lock()
		given.AddSet(s)
		mu.Unlock()
		// Until the appender has used up all spares.
		for range 200 {
			if l.Stats().Spares == 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		return nil
	}})
	h := newHistory(t, l, 1)
	data := make([]byte, PayloadMax)
	for i := range 120 {
		_, _ = h.bytes.Read(data)
		off := h.rng.Int64N(testDisk-PayloadMax) / 512 * 512
		h.g.Reset()
		h.g.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: off, Len: PayloadMax, Data: data})
		if err := l.Append(h.g); err != nil {
			t.Fatalf("append %d: %v", i, err)
		}
		l.Finished(h.g)
		copy(h.model[off:], data)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if f := mustOpen(t, dir).Verify(); len(f) > 0 {
		t.Fatalf("verify: %v", f)
	}
	got, err := replayed(t, dir)
	var inc *IncompleteError
	if err != nil && !errors.As(err, &inc) {
		t.Fatal(err)
	}
	for off := range got {
		if got[off] != h.model[off] && !given.Has(h.disk, int64(off)) {
			t.Fatalf("byte %d differs", off)
		}
	}
}

// TestLostResize: a resize that could not be appended still changes the size
// that the next segment gives the disk.
func TestLostResize(t *testing.T) {
	fsys := newFaultFS()
	dir := tempDir(t)
	fsys.before = func(op string) error {
		if op == "create" { // of LOG; segments are allocated as well
			return nil
		}
		return syscall.ENOSPC
	}
	l, _ := openTest(t, dir, Options{FS: fsys})
	h := newHistory(t, l, 1)
	h.g.Add(ResizeEntry(h.disk, testDisk, 2*testDisk))
	if err := l.Append(h.g); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	fsys.set(func() { fsys.before = nil })
	h.writeUntilGood(0, 512, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if d := mustOpen(t, dir).Disks(); len(d) != 1 || d[0].Size != 2*testDisk {
		t.Fatalf("disks: %v", d)
	}
}

// TestFailedCut: the number of a cut that failed is not given again, and its
// epoch goes on with all it had touched.
func TestFailedCut(t *testing.T) {
	fsys := newFaultFS()
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{FS: fsys})
	defer l.Close()
	h := newHistory(t, l, 1)
	if err := h.write(0, 512, 1); err != nil {
		t.Fatal(err)
	}
	fsys.set(func() { fsys.failAt, fsys.sticky, fsys.ops = 1, true, 0 })
	if _, err := l.Cut(CutCrash); !errors.Is(err, errInjected) {
		t.Fatal(err)
	}
	if err := h.write(2*BlockBytes, 512, 1); err == nil {
		t.Fatal("appended")
	}
	fsys.set(func() { fsys.failAt = 0 })
	h.writeUntilGood(4*BlockBytes, 512, 1)
	info, err := l.Cut(CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	if info.Epoch != 2 {
		t.Fatalf("the cut after a failed one ends epoch %d", info.Epoch)
	}
	for _, b := range []int64{0, 2, 4} {
		if !info.Touched.Has(h.disk, b*BlockBytes) {
			t.Fatalf("block %d was touched and is not named", b)
		}
	}
}

// TestLateAppendReusedBuffers: those whose group went with a hung append may
// use their buffers again; what then lands is behind the seal.
func TestLateAppendReusedBuffers(t *testing.T) {
	fsys := newFaultFS()
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{FS: fsys, AppendLimit: 20 * time.Millisecond})
	h := newHistory(t, l, 1)
	h.writeUntilGood(0, 512, 7)
	lead := NewGroup()
	for i := range 4 {
		lead.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: int64(i) * 4096, Len: 4096, Data: bytes.Repeat([]byte{9}, 4096)})
	}
	abandoned := make(chan error, 1)
	lead.Abandoned = func(err error) { abandoned <- err }
	hang := make(chan struct{})
	fsys.set(func() { fsys.hang = hang })
	returned := make(chan error, 1)
	go func() { returned <- l.Append(lead) }()
	fsys.waitHanging(t)
	<-abandoned
	// As a follower would: the second of four frames has no payload that fits.
	clear(lead.Entries[1].Data)
	fsys.set(func() { fsys.hang = nil })
	close(hang)
	if err := <-returned; !errors.Is(err, ErrAbandoned) {
		t.Fatal(err)
	}
	h.writeUntilGood(0, 4*BlockBytes, 3)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, dir)
	if f := r.Verify(); len(f) > 0 || !r.Segments[0].Sealed {
		t.Fatalf("findings %v", f)
	}
	checkReplay(t, dir, h.model)
}

// TestLateSpare: a leader that was told it is late while it waited for a spare,
// got one at that moment and then hangs, is let go as well.
func TestLateSpare(t *testing.T) {
	fsys := newFaultFS()
	hang, stop := make(chan struct{}), make(chan struct{})
	fsys.before = func(op string) error {
		if op == "create" {
			return nil
		}
		<-stop
		return syscall.ENOSPC
	}
	fsys.hang = hang
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{FS: fsys, AppendLimit: 30 * time.Millisecond})
	h := newHistory(t, l, 1)
	path := filepath.Join(dir, "ff"+segmentSuffix)
	raw, err := OS.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Allocate(minSegmentBytes); err != nil {
		t.Fatal(err)
	}
	g := NewGroup()
	g.Add(Entry{Kind: KindZero, Disk: h.disk, Len: 512})
	abandoned, returned := make(chan error, 1), make(chan error, 1)
	g.Abandoned = func(err error) { abandoned <- err }
	l.mu.Lock() // so that the watchdog does not come first
	go func() { returned <- l.Append(g) }()
	l.mu.Unlock()
	eventually(t, "the leader waits", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.op == nil || l.op.late {
			return l.op != nil
		}
		l.op.late = true
		l.spares = append(l.spares, &segment{path: path, f: &faultFile{raw, fsys}, size: minSegmentBytes})
		l.room.Broadcast()
		return true
	})
	select {
	case err := <-abandoned:
		if !errors.Is(err, ErrLate) {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the append hangs for ever")
	}
	close(hang)
	close(stop)
	<-returned
	l.Abort()
}

// TestLockOutlivesHangs: while something of a closed log may still write, no
// other process gets the log.
func TestLockOutlivesHangs(t *testing.T) {
	reopens := func(t *testing.T, dir string) {
		t.Helper()
		eventually(t, "the log can be opened", func() bool {
			l, _, err := Open(dir, Options{SegmentBytes: minSegmentBytes})
			if err == nil {
				l.Abort()
			} else if !errors.Is(err, ErrLocked) {
				t.Fatal(err)
			}
			return err == nil
		})
	}
	refused := func(t *testing.T, dir string) {
		t.Helper()
		if _, _, err := Open(dir, Options{SegmentBytes: minSegmentBytes}); !errors.Is(err, ErrLocked) {
			t.Fatalf("opened under a hung writer: %v", err)
		}
	}
	for _, clean := range []bool{true, false} {
		t.Run("append", func(t *testing.T) {
			fsys := newFaultFS()
			dir := tempDir(t)
			l, _ := openTest(t, dir, Options{FS: fsys, AppendLimit: 20 * time.Millisecond})
			h := newHistory(t, l, 1)
			h.writeUntilGood(0, 512, 1)
			hang := make(chan struct{})
			fsys.set(func() { fsys.hang = hang })
			g := NewGroup()
			abandoned, returned := make(chan error, 1), make(chan error, 1)
			g.Abandoned = func(err error) { abandoned <- err }
			g.Add(Entry{Kind: KindZero, Disk: h.disk, Len: 512})
			go func() { returned <- l.Append(g) }()
			<-abandoned
			fsys.set(func() { fsys.hang = nil })
			if err := l.close(clean); clean && err == nil {
				t.Fatal("closed cleanly while an append hangs")
			}
			refused(t, dir)
			close(hang)
			<-returned
			reopens(t, dir)
		})
	}
	t.Run("what was lost", func(t *testing.T) {
		fsys := newFaultFS()
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{FS: fsys, AppendLimit: 20 * time.Millisecond})
		h := newHistory(t, l, 1)
		h.writeUntilGood(0, 512, 1)
		hang := make(chan struct{})
		fsys.set(func() { fsys.hang = hang })
		g := NewGroup()
		abandoned, returned := make(chan error, 1), make(chan error, 1)
		g.Abandoned = func(err error) { abandoned <- err }
		g.Add(Entry{Kind: KindZero, Disk: h.disk, Len: 512})
		go func() { returned <- l.Append(g) }()
		<-abandoned
		// Appends are tried again; the next to hang is Close's own.
		eventually(t, "a spare may be used", func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.spareErr == nil
		})
		closed := make(chan error, 1)
		go func() { closed <- l.Close() }()
		select {
		case err := <-closed:
			if err == nil {
				t.Error("closed cleanly while appends hang")
			}
		case <-time.After(5 * time.Second):
			t.Error("Close waits for the log's disk")
		}
		refused(t, dir)
		close(hang)
		<-returned
		reopens(t, dir)
	})
	t.Run("keeper", func(t *testing.T) {
		defer func(d time.Duration) { stopLimit = d }(stopLimit)
		stopLimit = 20 * time.Millisecond
		fsys := newFaultFS()
		hang, hung := make(chan struct{}), make(chan struct{}, 10)
		fsys.before = func(op string) error {
			if op == "allocate" {
				hung <- struct{}{}
				<-hang
			}
			return nil
		}
		dir := tempDir(t)
		l, _ := openTest(t, dir, Options{FS: fsys})
		<-hung
		if err := l.Close(); err == nil {
			t.Fatal("closed cleanly while the keeper hangs")
		}
		refused(t, dir)
		close(hang)
		reopens(t, dir)
	})
}

// TestLastSpare: when no more spares can be made, those there are are used.
func TestLastSpare(t *testing.T) {
	fsys := newFaultFS()
	made := 0
	fsys.before = func(op string) error {
		if op == "create" {
			made++ // the keeper alone comes here once the log is open
		}
		if made > 4 { // LOG and three segments
			return syscall.ENOSPC
		}
		return nil
	}
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{FS: fsys, Spares: 2})
	h := newHistory(t, l, 1)
	n := 0
	for h.write(0, PayloadMax, byte(n)) == nil {
		n++
	}
	if n < 9 {
		t.Fatalf("%d MiB fit into three segments of 4 MiB", n)
	}
	fsys.set(func() { fsys.before = nil })
	h.writeUntilGood(0, PayloadMax, 77)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	checkReplay(t, dir, h.model)
}

// TestRottenMeta: a LOG file of which one copy is bad is no clean close, and
// no incarnation is taken twice.
func TestRottenMeta(t *testing.T) {
	for page := range int64(2) {
		dir := tempDir(t)
		for range 2 {
			l, _ := openTest(t, dir, Options{})
			h := newHistory(t, l, 1)
			h.steps(1)
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		poke(t, filepath.Join(dir, metaName), page*metaPage+60, 0xff)
		l, rec := openTest(t, dir, Options{})
		if rec != RecoverPowerCut || l.Incarnation() <= 2 {
			t.Fatalf("page %d: recovery %v, incarnation %d", page, rec, l.Incarnation())
		}
		l.Abort()
	}
}

// TestDamagedHeader: a segment whose header cannot be read is damage for the
// recovery, not the end of it.
func TestDamagedHeader(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 1)
	h.steps(3)
	path := l.tail.path
	l.Abort()
	poke(t, path, 100, 1)
	l, _ = openTest(t, dir, Options{})
	defer l.Close()
	r, err := l.Segments()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if len(r.Segments) != 1 || r.Segments[0].Damage == nil || len(r.Verify()) != 1 {
		t.Fatalf("segments: %+v", r.Segments)
	}
	if _, err := r.Latest("root", nil); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
}

// TestTornBeforeGap: a segment that was to begin with a gap frame and was torn
// before it does not pass for one that misses nothing.
func TestTornBeforeGap(t *testing.T) {
	fsys := newFaultFS()
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{FS: fsys})
	h := newHistory(t, l, 1)
	h.writeUntilGood(0, 512, 1)
	eventually(t, "the keeper rests", func() bool { return l.Stats().Spares == 2 })
	fsys.set(func() { fsys.failAt, fsys.ops = 1, 0 })
	if h.write(BlockBytes, 512, 1) == nil {
		t.Fatal("appended")
	}
	h.writeUntilGood(2*BlockBytes, 512, 1)
	path := l.tail.path
	l.Abort()
	pokeAll(t, path, headerBytes, make([]byte, 4096))
	if _, err := replayed(t, dir); !errors.Is(err, ErrDamaged) {
		t.Fatalf("replayed as if whole: %v", err)
	}
}

// TestOddSegments: at the quota, segments that an earlier run made in another
// size are given up like any other.
func TestOddSegments(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{SegmentBytes: 2 * minSegmentBytes})
	h := newHistory(t, l, 1)
	for i := range 24 {
		if err := h.write(0, PayloadMax, byte(i)); err != nil {
			t.Fatal(err)
		}
	}
	l.Close()
	var given BlockSet
	l, _ = openTest(t, dir, Options{Quota: 6 * minSegmentBytes, Reclaimed: func(s *BlockSet) error { given.AddSet(s); return nil }})
	h = newHistory(t, l, 1)
	for i := range 40 {
		h.writeUntilGood(2<<20, PayloadMax, byte(i))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if !given.Has(h.disk, 0) {
		t.Fatal("given up without a word")
	}
	_, err := replayed(t, dir)
	var inc *IncompleteError
	if !errors.As(err, &inc) || inc.Extents[0].Off != 0 {
		t.Fatalf("the log does not say what it gave up: %v", err)
	}
	var sum int64
	files, _ := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		sum += st.Size()
	}
	if sum > 6*minSegmentBytes {
		t.Fatalf("%d bytes at a quota of %d", sum, 6*minSegmentBytes)
	}
}

// TestRootFullDisk: on a file system that is really full, appends become gaps,
// and when there is room again the log says which.
func TestRootFullDisk(t *testing.T) {
	testenv.NeedRoot(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=14m"); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(dir, 0)

	l, _ := openTest(t, filepath.Join(dir, "log"), Options{})
	h := newHistory(t, l, 1)
	var err error
	for i := 0; err == nil && i < 100; i++ {
		err = h.write(0, PayloadMax, byte(i))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("on a full disk: %v", err)
	}
	if err := l.Close(); err == nil {
		t.Fatal("closed cleanly though it lacks changes")
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=40m"); err != nil {
		t.Fatal(err)
	}
	l, rec := openTest(t, filepath.Join(dir, "log"), Options{})
	if rec != RecoverKill {
		t.Fatal(rec)
	}
	model := h.model
	h = newHistory(t, l, 1)
	h.model = model
	h.writeUntilGood(0, PayloadMax, 99)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	checkReplay(t, filepath.Join(dir, "log"), h.model)
}

// TestLiveReading: what is read while the log is being written is some prefix
// of it, never damage.
func TestLiveReading(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 1)
	h.steps(1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 500 {
			if err := h.step(); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(50 * time.Microsecond) // lest nobody reads before the end
		}
	}()
	var last uint64
	for live := true; live; {
		select {
		case <-done:
			live = false
		default:
		}
		r, err := OpenSegments(dir)
		if err != nil {
			t.Error(err)
			break
		}
		if f := r.Verify(); len(f) > 0 {
			t.Errorf("findings in a live log: %v", f)
		}
		if n := len(r.Segments); n > 0 {
			if s := r.Segments[n-1]; s.Last < last {
				t.Errorf("the log went back from frame %d to %d", last, s.Last)
			} else {
				last = s.Last
			}
			if _, err := r.Replay("root", blockdev.NewMem(testDisk), nil); err != nil && !errors.Is(err, ErrNoDisk) {
				t.Error(err)
			}
		}
		r.Close()
		if t.Failed() {
			break
		}
	}
	<-done
	l.Close()
	checkReplay(t, dir, h.model)
}

// TestUnfinishedIsKept: a segment is not used anew while a write logged in it
// has not ended on the disk, and every use draws another salt.
func TestUnfinishedIsKept(t *testing.T) {
	l, _ := openTest(t, tempDir(t), Options{Quota: 5 * minSegmentBytes, Reclaimed: func(*BlockSet) error { return nil }})
	defer l.Abort()
	h := newHistory(t, l, 1)
	open := NewGroup()
	open.Add(Entry{Kind: KindZero, Disk: h.disk, Len: 512})
	if err := l.Append(open); err != nil {
		t.Fatal(err)
	}
	first := l.tail.path
	n := 0
	for h.write(0, PayloadMax, 1) == nil {
		if n++; n > 100 {
			t.Fatal("the segment of an unfinished write was used anew")
		}
	}
	if l.Stats().Reclaimed != 0 {
		t.Fatal("reclaimed")
	}
	l.Finished(open)
	salts := map[[16]byte]bool{}
	again := false
	for range 60 {
		h.writeUntilGood(0, PayloadMax, 1)
		l.mu.Lock()
		if s := l.tail; s.end < 2<<20 { // just begun
			if salts[s.head.salt] {
				t.Error("a salt was used twice")
			}
			salts[s.head.salt] = true
			again = again || s.path == first
		}
		l.mu.Unlock()
	}
	if !again || len(salts) < 10 {
		t.Fatalf("%d segments begun, the first one again: %v", len(salts), again)
	}
}

// TestCutSplitsSection: what is appended in one call with a cut, behind it,
// belongs to the next epoch.
func TestCutSplitsSection(t *testing.T) {
	l, _ := openTest(t, tempDir(t), Options{})
	defer l.Close()
	h := newHistory(t, l, 1)
	if err := h.write(0, 512, 1); err != nil {
		t.Fatal(err)
	}
	var p [cutPayloadBytes]byte
	(&cutPayload{epoch: 1, kind: CutCrash}).encode(&p)
	g := NewGroup()
	g.Add(Entry{Kind: KindCut, Disk: noDisk, Data: p[:]})
	g.Add(Entry{Kind: KindZero, Disk: h.disk, Off: 9 * BlockBytes, Len: 512})
	if err := l.append(g); err != nil {
		t.Fatal(err)
	}
	l.Finished(g)
	if set := &g.section.set; !set.Has(h.disk, 0) || set.Has(h.disk, 9*BlockBytes) {
		t.Fatal("the section does not end with the cut")
	}
	l.note(g.section)
	info, err := l.Cut(CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	if info.Touched.Has(h.disk, 0) || !info.Touched.Has(h.disk, 9*BlockBytes) {
		t.Fatal("the next epoch does not begin with the cut")
	}
}

// openHook calls before when a file is about to be opened for reading.
type openHook struct {
	FS
	before func(path string)
}

func (o openHook) Open(path string) (File, error) {
	o.before(path)
	return o.FS.Open(path)
}

// TestRollWhileReading: the tail rolls after a reader has read it and before
// the reader comes to the next segment.
func TestRollWhileReading(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{Spares: 1})
	defer l.Close()
	h := newHistory(t, l, 1)
	h.steps(1)
	first := l.tail.path
	eventually(t, "there is a spare", func() bool { return l.Stats().Spares > 0 })
	r, err := openSegments(openHook{OS, func(path string) {
		for path > first && l.tail.path == first {
			h.steps(1)
		}
	}}, []string{dir})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if f := r.Verify(); len(f) > 0 || len(r.Segments) != 2 || r.Segments[0].Last+1 != r.Segments[1].First {
		t.Fatalf("%d segments, findings %v", len(r.Segments), f)
	}
}

// TestQuotaOverRestarts: every start makes new spares, and the log has not more
// than its quota all the same once it has gone on.
func TestQuotaOverRestarts(t *testing.T) {
	dir := tempDir(t)
	const quota = 6 * minSegmentBytes
	used := func() (n int64) {
		names, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range names {
			if st, err := e.Info(); err == nil && strings.HasSuffix(e.Name(), segmentSuffix) {
				n += st.Size()
			}
		}
		return n
	}
	for start := range 12 {
		l, _ := openTest(t, dir, Options{Quota: quota, Reclaimed: func(*BlockSet) error { return nil }})
		// The recovery takes its time, in which nothing is given up.
		eventually(t, "there are spares", func() bool { return l.Stats().Spares == 2 })
		h := newHistory(t, l, 1)
		for i := range 12 {
			h.writeUntilGood(int64(i)*BlockBytes, PayloadMax, byte(start))
		}
		if start > 2 {
			// What cannot go with one roll, its file still open, goes with the next.
			eventually(t, "the log is within its quota", func() bool {
				if used() <= quota {
					return true
				}
				h.writeUntilGood(0, PayloadMax, byte(start))
				return false
			})
		}
		end := l.Close
		if start%2 == 1 {
			end = l.Abort
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		r := mustOpen(t, dir)
		if f := r.Verify(); len(f) > 0 {
			t.Fatalf("start %d: %v", start, f)
		}
	}
}
