package filter

import (
	"context"
	"encoding/binary"
	"flag"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/blockdev/nbd"
	"afterimage/hrl"
)

var modelTime = flag.Duration("model.time", modelDefault(), "how long TestModel runs (default: $MODEL_TIME, or 2s)")

func modelDefault() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("MODEL_TIME")); err == nil {
		return d
	}
	return 2 * time.Second
}

// TestModel: eight clients, mostly over NBD connections of their own, write,
// zero, trim, read and flush overlapping ranges of a small disk, while cuts are made, the log fails, hangs and returns, and
// the disk fails writes. It goes in rounds; what each round did is checked
// against what a disk may do:
//
//   - what a read found, what the disk has at the end, and what the log gives
//     at each cut and at its end, is for each sector something that was being
//     written or had been written last: no write to the sector lies wholly
//     between that one and the moment of looking
//   - the log's end and the disk are the same, but for gaps both sides know of
//   - flushes are answered, and nothing hangs
func TestModel(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("MODEL_SEED"); s != "" {
		seed = 0
		for _, c := range s {
			seed = seed*10 + uint64(c-'0')
		}
	}
	t.Logf("MODEL_SEED=%d", seed)
	end := time.Now().Add(*modelTime)
	var sum modelStats
	for round := uint64(0); round == 0 || time.Now().Before(end); round++ {
		modelRound(t, rand.New(rand.NewPCG(seed, round)), &sum)
		if t.Failed() {
			t.Fatalf("round %d of seed %d", round, seed)
		}
	}
	t.Logf("%+v", sum)
	if *modelTime >= 10*time.Second && (sum.cuts == 0 || sum.logFailures == 0 || sum.late == 0 || sum.diskErrors == 0) {
		t.Errorf("something never happened: %+v", sum)
	}
}

type modelStats struct {
	rounds, writes, reads, cuts, logFailures, late, diskErrors, gapSectors, conflicts int64
}

const (
	// A round is short: log and disk are compared only at its end, and what
	// went wrong before is soon written over.
	modelSectors = 128
	modelClients = 8
	modelOps     = 6  // batches of each client in a round
	modelOpsLong = 80 // in a round in which the log fails
)

// change is one write to a sector: from when it was submitted to when it was
// answered, in ticks of the round's clock.
type modelChange struct {
	id         uint64 // what every sector it wrote holds; 0: zeroes
	start, end int64
	failed     bool // answered with an error: it may have happened or not
}

// look is one reading of a sector.
type modelLook struct {
	sector     int
	id         uint64
	start, end int64
	what       string
}

type model struct {
	clock atomic.Int64
	ids   atomic.Uint64

	mu      sync.Mutex
	changes [modelSectors][]modelChange
	looks   []modelLook
}

func (m *model) changed(off, length int64, c modelChange) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := off / 512; s < (off+length)/512; s++ {
		m.changes[s] = append(m.changes[s], c)
	}
}

func (m *model) looked(what string, off int64, b []byte, start, end int64, skip func(sector int) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := 0; i < len(b); i += 512 {
		s := int(off)/512 + i/512
		if skip == nil || !skip(s) {
			m.looks = append(m.looks, modelLook{s, binary.LittleEndian.Uint64(b[i:]), start, end, what})
		}
	}
}

// check finds a look that saw what it cannot have seen.
func (m *model) check(t *testing.T) {
	t.Helper()
	for _, l := range m.looks {
		legal := false
		for _, w := range append([]modelChange{{end: 0}}, m.changes[l.sector]...) {
			if w.id != l.id || w.start > l.end {
				continue
			}
			overwritten := false
			for _, v := range m.changes[l.sector] {
				overwritten = overwritten || !v.failed && !w.failed && v.start > w.end && v.end < l.start
			}
			legal = legal || !overwritten
		}
		if !legal {
			t.Errorf("%s [%d, %d] found %d in sector %d; its changes: %+v", l.what, l.start, l.end, l.id, l.sector, m.changes[l.sector])
			return
		}
	}
}

func stampBlock(b []byte, id uint64) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], id)
	}
}

func modelRound(t *testing.T, rng *rand.Rand, sum *modelStats) {
	fsys := &failingFS{FS: hrl.OS}
	dir := filepath.Join(tempDir(t), "log")
	log, _ := openLog(t, dir, hrl.Options{FS: fsys, AppendLimit: 10 * time.Millisecond})
	mem := blockdev.NewMem(modelSectors * 512)
	dev := faultdev.New(&jittery{Device: mem})
	f := newFilter(t, dev, Options{Workers: 8})
	attach(t, f, log)
	m := &model{}
	faults, ops := 0, modelOps
	switch rng.IntN(16) {
	case 0:
		faults, ops = 1, modelOpsLong // the log
	case 1:
		faults, ops = 3, modelOpsLong // both
	case 2, 3, 4, 5:
		faults = 2 // the disk
	}

	stop := make(chan struct{})
	var clients, others sync.WaitGroup
	dial, hangUp := direct(f), func() {}
	if rng.IntN(4) > 0 {
		dial, hangUp = served(t, f)
	}
	for range modelClients {
		r := rand.New(rand.NewPCG(rng.Uint64(), 0))
		do := dial()
		clients.Go(func() { modelClient(t, m, do, r, ops) })
	}
	type cutMade struct {
		seq        uint64
		start, end int64
	}
	var cuts []cutMade
	cutSeed, faultSeed := rng.Uint64(), rng.Uint64()
	others.Go(func() {
		r := rand.New(rand.NewPCG(cutSeed, 1))
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(r.IntN(2000)) * time.Microsecond):
			}
			start := m.clock.Add(1)
			if info, err := log.Cut(hrl.CutCrash); err == nil {
				cuts = append(cuts, cutMade{info.Seq, start, m.clock.Add(1)})
			}
		}
	})
	others.Go(func() {
		r := rand.New(rand.NewPCG(faultSeed, 2))
		for {
			select {
			case <-stop:
				fsys.set(nil, nil)
				return
			case <-time.After(time.Duration(r.IntN(500+faults&1*8000)) * time.Microsecond):
			}
			if faults&1 != 0 {
				switch r.IntN(8) {
				case 0:
					fsys.set(syscall.EIO, nil)
				case 1:
					hang := make(chan struct{})
					fsys.set(nil, hang)
					time.Sleep(time.Duration(5+r.IntN(30)) * time.Millisecond)
					fsys.set(nil, nil)
					close(hang)
				default:
					fsys.set(nil, nil)
				}
			}
			if faults&2 != 0 && r.IntN(3) == 0 {
				dev.Add(faultdev.Rule{Op: blockdev.OpWrite, Skip: r.IntN(20), Times: 1, Partial: int64(r.IntN(3)) * 512, Err: syscall.EIO})
			}
		}
	})
	clients.Wait()
	close(stop)
	others.Wait()
	hangUp()
	f.Drain()
	dev.Reset()
	stats := f.Stats()
	ls := log.Stats()
	sum.late += ls.Late
	sum.logFailures += ls.Failed
	sum.diskErrors += stats.DiskErrors
	sum.conflicts += stats.Conflicts
	sum.cuts += int64(len(cuts))
	sum.rounds++

	// A log that failed to the end can still say so.
	deadline := time.Now().Add(10 * time.Second)
	for log.LostBytes() > 0 && time.Now().Before(deadline) {
		w := &waiter{}
		w.wg.Add(1)
		at := m.clock.Add(1)
		r := &blockdev.Request{Op: blockdev.OpWriteZeroes, Len: 512, Owner: w}
		f.Submit([]*blockdev.Request{r})
		w.wg.Wait()
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		m.changed(0, 512, modelChange{0, at, m.clock.Add(1), false})
		time.Sleep(10 * time.Millisecond)
	}
	f.AttachLog(nil, 0)
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	disk := make([]byte, modelSectors*512)
	if err := blockdev.ReadAt(mem, disk, 0); err != nil {
		t.Fatal(err)
	}
	now := m.clock.Add(1)
	m.looked("the disk", 0, disk, now, now, nil)

	// What the log gives, frame by frame.
	segs, err := hrl.OpenSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer segs.Close()
	img := make([]byte, len(disk))
	var unknown [modelSectors]bool
	skip := func(s int) bool { return unknown[s] }
	for _, s := range segs.Segments {
		if s.Damage != nil {
			t.Fatal(s.Damage)
		}
		err := segs.Each(s, func(fr *hrl.Frame) error {
			switch fr.Kind {
			case hrl.KindWrite, hrl.KindZero:
				if fr.Kind == hrl.KindWrite {
					copy(img[fr.Off:], fr.Payload)
				} else {
					clear(img[fr.Off : fr.Off+fr.Len])
				}
				for i := fr.Off / 512; i < (fr.Off+fr.Len)/512; i++ {
					unknown[i] = false
				}
			case hrl.KindGap:
				return fr.Gap(func(_ hrl.DiskID, off, length int64) {
					for i := off / 512; i < min(off+length, int64(len(img)))/512; i++ {
						unknown[i] = true
					}
				})
			case hrl.KindCut:
				for _, c := range cuts {
					if c.seq == fr.Seq {
						m.looked("a cut", 0, img, c.start, c.end, skip)
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for s := range modelSectors {
		if unknown[s] {
			sum.gapSectors++
			if stats.GapBytes == 0 {
				t.Errorf("the log names sector %d as a gap, the filter knows of none", s)
			}
			continue
		}
		a, b := img[s*512:(s+1)*512], disk[s*512:(s+1)*512]
		if string(a) != string(b) {
			t.Errorf("sector %d is %d in the log and %d on the disk, and no gap", s, binary.LittleEndian.Uint64(a), binary.LittleEndian.Uint64(b))
			return
		}
	}
	for _, c := range m.changes {
		sum.writes += int64(len(c))
	}
	sum.reads += int64(len(m.looks))
	m.check(t)
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}

// direct gives clients that submit to the filter themselves.
func direct(f *Filter) func() func([]*blockdev.Request) {
	return func() func([]*blockdev.Request) { return (&queueDevice{Filter: f}).Do }
}

// served gives each client an NBD connection of its own to a server over the
// filter. done ends them all.
func served(t *testing.T, f *Filter) (dial func() func([]*blockdev.Request), done func()) {
	t.Helper()
	socket := filepath.Join(tempDir(t), "s")
	ln, err := nbd.ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &nbd.Server{Log: slog.New(slog.DiscardHandler)}
	if err := srv.Add(nbd.Export{Name: "model", Queue: f}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ctx, ln) }()
	var conns []*nbd.Client
	dial = func() func([]*blockdev.Request) {
		c, err := nbd.Dial(ctx, nbd.URI{Socket: socket, Export: "model"}.String(), nbd.Options{})
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		return c.Do
	}
	return dial, func() {
		for _, c := range conns {
			c.Close()
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the server: %v", err)
		}
	}
}

// modelClient submits batches and waits for each.
func modelClient(t *testing.T, m *model, do func([]*blockdev.Request), r *rand.Rand, ops int) {
	for range ops {
		n := 1 + r.IntN(blockdev.BatchMax)
		reqs := make([]*blockdev.Request, n)
		ids := make([]uint64, n)
		for i := range reqs {
			sectors := 1 + r.Int64N(16)
			if r.IntN(30) == 0 {
				sectors = 1 + r.Int64N(modelSectors)
			}
			req := &blockdev.Request{Off: r.Int64N(modelSectors-sectors+1) * 512, Len: sectors * 512}
			switch p := r.IntN(20); {
			case p < 11:
				req.Op = blockdev.OpWrite
				ids[i] = m.ids.Add(1)
				req.Buf = make([]byte, req.Len)
				stampBlock(req.Buf, ids[i])
				if p == 0 {
					req.Flags = blockdev.FlagFUA
				}
			case p < 16:
				req.Op, req.Buf = blockdev.OpRead, make([]byte, req.Len)
			case p < 18:
				req.Op = blockdev.OpWriteZeroes
			case p < 19:
				req.Op = blockdev.OpTrim
			default:
				req.Op, req.Off, req.Len = blockdev.OpFlush, 0, 0
			}
			reqs[i] = req
		}
		start := m.clock.Add(1)
		do(reqs)
		end := m.clock.Add(1)
		for i, req := range reqs {
			switch req.Op {
			case blockdev.OpRead:
				if req.Err != nil {
					t.Errorf("a read failed: %v", req.Err)
				}
				m.looked("a read", req.Off, req.Buf, start, end, nil)
			case blockdev.OpTrim:
				if req.Err == nil && req.Done.Len > 0 {
					m.changed(req.Done.Off, req.Done.Len, modelChange{0, start, end, false})
				}
			case blockdev.OpWrite, blockdev.OpWriteZeroes:
				m.changed(req.Off, req.Len, modelChange{ids[i], start, end, req.Err != nil})
			}
		}
	}
}

// jitter lets others run, now and then for longer: what may happen between
// two steps of the filter then does.
func jitter() {
	switch n := rand.IntN(64); {
	case n == 0:
		time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
	case n < 32:
		runtime.Gosched()
	}
}

// jittery is a disk on which nothing takes the same time twice.
type jittery struct{ blockdev.Device }

func (j *jittery) Do(reqs []*blockdev.Request) {
	for _, r := range reqs {
		jitter()
		j.Device.Do([]*blockdev.Request{r})
	}
	jitter()
}

// failingFS is the host's file system whose appends fail, or hang, when told.
type failingFS struct {
	hrl.FS
	mu   sync.Mutex
	err  error
	hang chan struct{}
}

func (f *failingFS) set(err error, hang chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.hang = err, hang
}

func (f *failingFS) Create(path string) (hrl.File, error) {
	g, err := f.FS.Create(path)
	if err != nil {
		return nil, err
	}
	return &failingFile{g, f}, nil
}

// Edit is how a log takes up the spares that an earlier one has left.
func (f *failingFS) Edit(path string) (hrl.File, error) {
	g, err := f.FS.Edit(path)
	if err != nil {
		return nil, err
	}
	return &failingFile{g, f}, nil
}

type failingFile struct {
	hrl.File
	f *failingFS
}

func (f *failingFile) WritevAt(bufs [][]byte, off int64) (int64, error) {
	jitter()
	defer jitter()
	f.f.mu.Lock()
	err, hang := f.f.err, f.f.hang
	f.f.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if err != nil {
		return 0, err
	}
	return f.File.WritevAt(bufs, off)
}
