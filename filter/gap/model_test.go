package gap

import (
	"errors"
	"flag"
	"maps"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"afterimage/hrl"
)

var modelTime = flag.Duration("model.time", modelDefault(), "how long TestModel runs (default: $MODEL_TIME, or 2s)")

func modelDefault() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("MODEL_TIME")); err == nil {
		return d
	}
	return 2 * time.Second
}

const (
	kib   = 1 << 10
	gib   = 1 << 30
	block = hrl.BlockBytes
)

// TestModel does random things to a map whose file system loses power, fails
// and is killed, also in the middle of what the map does, and looks what Open finds
// then. What Add returned for is found after a kill, what Sync returned for after
// a power cut; and no more than was ever added is, unless Open says why.
func TestModel(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("MODEL_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("MODEL_SEED=%d", seed)
	end := time.Now().Add(*modelTime)
	var sum modelSum
	for round := uint64(0); round == 0 || time.Now().Before(end); round++ {
		w := &world{t: t, rng: rand.New(rand.NewPCG(seed, round)), fs: newVolatileFS(), sum: &sum,
			size:  []int64{5*block + 4096, 2044 << 20, 5 * gib}[rand.New(rand.NewPCG(round, seed)).IntN(3)],
			added: set{}, synced: set{}, ghosts: set{}, mem: set{}}
		w.run()
		if t.Failed() {
			t.Fatalf("round %d of seed %d", round, seed)
		}
		sum.rounds++
	}
	t.Logf("%+v", sum)
}

type modelSum struct {
	rounds, sessions, kills, cuts, torn, all, broken, resized, synced, fresh int
}

type set map[int64]bool // of blocks

type world struct {
	t    *testing.T
	rng  *rand.Rand
	fs   *volatileFS
	sum  *modelSum
	size int64
	next int64 // what Resize is making of size
	m    *Map

	mem     set // the gaps as memory has to have them
	added   set // Add has returned for them
	synced  set // and then Sync
	ghosts  set // removed, or never finished: may be found, or not
	made    bool
	opening bool
	faults  bool // in this session, or one before
	gone    bool // the map broke: its file may have been removed
}

func (w *world) run() {
	for range 1 + w.rng.IntN(8) {
		w.session()
		if w.t.Failed() {
			return
		}
	}
}

// session is from Open to the end of the process.
func (w *world) session() {
	w.sum.sessions++
	w.next = w.size
	if w.rng.IntN(3) == 0 {
		w.fs.failAt = w.fs.ops + 1 + w.rng.IntN(60)
		w.fs.sticky = w.rng.IntN(2) == 0
		w.faults = true
	}
	w.fs.before = func(string, *volatileFile, []byte, int64) {
		switch w.rng.IntN(16) {
		case 0:
			w.look(w.fs.crash(w.rng), w.synced)
		case 1:
			w.look(w.fs.killed(), w.added)
		}
	}
	must := w.added
	w.opening = true
	m, found, err := Open(w.fs, "d/gaps", w.size, true)
	w.opening = false
	if err != nil {
		if !w.fs.fired {
			w.t.Errorf("open: %v", err)
		}
		w.gone = true // it may have found that the disk fails
	} else {
		w.m = m
		w.check(m, found, must)
		w.adopt(found)
		for range w.rng.IntN(80) {
			if !w.step() || w.t.Failed() {
				break
			}
			w.compare()
		}
		w.gone = w.gone || m.Broken() != nil
		if m.Broken() != nil {
			w.sum.broken++
		}
	}
	if w.rng.IntN(2) == 0 {
		w.fs = w.fs.crash(w.rng)
		maps.Copy(w.ghosts, w.added)
		w.added = maps.Clone(w.synced)
		w.sum.cuts++
	} else {
		w.sum.kills++
	}
	w.fs.kill()
	w.fs.fired = false
}

// adopt takes over what a session begins with, all of it durable.
func (w *world) adopt(found Found) {
	w.made, w.gone = true, false
	w.mem = set{}
	w.m.Runs(func(off, n int64) {
		for b := off / block; b*block < off+n; b++ {
			w.mem[b] = true
		}
	})
	if w.m.Dirty() {
		w.t.Error("dirty when opened")
	}
	w.added, w.synced, w.ghosts = maps.Clone(w.mem), maps.Clone(w.mem), set{}
	if found.All {
		w.sum.all++
	}
	if found.Kind == New {
		w.sum.fresh++
	}
}

// look opens what a crash would leave now, and forgets it.
func (w *world) look(fs *volatileFS, must set) {
	size := w.size
	if w.rng.IntN(2) == 0 {
		size = w.next
	}
	gone := w.gone
	w.gone = gone || w.m != nil && w.m.Broken() != nil
	defer func() { w.gone = gone }()
	m, found, err := Open(fs, "d/gaps", size, true)
	if err != nil {
		w.t.Errorf("open what a crash left: %v", err)
		return
	}
	w.check(m, found, must)
	if err := m.Close(); err != nil {
		w.t.Error(err)
	}
}

// check looks at what Open found; a map of a disk that was being resized has
// what both sizes have.
func (w *world) check(m *Map, found Found, must set) {
	w.t.Helper()
	if found.Why != nil && !found.All {
		w.sum.torn++
	}
	if !w.faults && errors.Is(found.Why, errHeader) {
		w.t.Errorf("a crash alone reads as damage: %v", found.Why)
	}
	if found.Kind == New {
		if w.made && !w.gone || m.Bytes() != 0 {
			w.t.Errorf("the map is gone, or new with %d bytes", m.Bytes())
		}
		return
	}
	end := min(blocksFor(w.size), blocksFor(w.next), blocksFor(m.size))
	for b := range must {
		if b < end && !m.Has(b*block, 1) {
			w.t.Errorf("block %d is not found (%s, all %v, why %v)", b, found.Kind, found.All, found.Why)
			return
		}
	}
	// A removal that a failed sync lost may come back, and Open makes a torn page
	// one that is whole and has all gaps.
	if found.Why == nil && !w.faults && !w.opening {
		m.Runs(func(off, n int64) {
			for b := off / block; b*block < off+n; b++ {
				if !w.added[b] && !w.ghosts[b] && !w.mem[b] {
					w.t.Errorf("block %d was never a gap", b)
					return
				}
			}
		})
	}
}

// compare holds memory against the model.
func (w *world) compare() {
	for b := range w.mem {
		if !w.m.Has(b*block, 1) {
			w.t.Errorf("block %d is not in memory", b)
		}
	}
	n := int64(len(w.mem)) * block
	if last := blocksFor(w.size) - 1; w.mem[last] {
		n -= (last+1)*block - w.size
	}
	if got := w.m.Bytes(); got != n {
		w.t.Errorf("%d bytes are gaps, not %d", got, n)
	}
}

func (w *world) step() bool {
	var err error
	switch n := w.rng.IntN(100); {
	case n < 50:
		err = w.add()
	case n < 65:
		err = w.remove()
	case n < 80:
		err = w.sync()
	case n < 90:
		err = w.resize()
	case n < 92:
		return w.close()
	}
	if err != nil && w.m.Broken() == nil {
		w.t.Error(err)
	}
	return err == nil || w.rng.IntN(4) > 0
}

// where is a range near a border.
func (w *world) where() (off, n int64) {
	centre := []int64{0, pageBits, 2 * pageBits, blocksFor(w.size)}[w.rng.IntN(4)]
	off = (centre-20+w.rng.Int64N(40))*block + w.rng.Int64N(block)
	off = max(min(off, w.size-1), 0)
	n = []int64{1, 4 * kib, 70 * kib, 40 * block}[w.rng.IntN(4)]
	return off, max(min(n, w.size-off), 0)
}

func (w *world) add() error {
	off, n := w.where()
	var bs []int64
	for b := off / block; b*block < off+n; b++ {
		bs = append(bs, b)
		w.mem[b] = true // may be found from now on
	}
	err := w.m.Add(off, n)
	for _, b := range bs {
		if err == nil {
			w.added[b] = true
		}
	}
	return err
}

func (w *world) remove() error {
	off, n := w.where()
	for b := off / block; b*block < off+n; b++ {
		if w.mem[b] {
			w.ghosts[b] = true
		}
		delete(w.mem, b)
		delete(w.added, b)
		delete(w.synced, b)
	}
	if w.rng.IntN(2) == 0 {
		return w.m.Remove(off, n)
	}
	var s hrl.BlockSet
	s.Add(0, off, n)
	s.Add(1, 0, block)
	return w.m.RemoveSet(&s)
}

func (w *world) sync() error {
	err := w.m.Sync()
	if err == nil {
		w.durable()
	}
	if err == nil && w.m.Dirty() {
		w.t.Error("dirty when synced")
	}
	return err
}

func (w *world) durable() {
	w.synced = maps.Clone(w.added)
	w.ghosts = set{}
	w.sum.synced++
}

func (w *world) resize() error {
	size := max(w.size+w.rng.Int64N(40*block)-20*block, 0)
	if w.rng.IntN(3) == 0 {
		size = w.rng.Int64N(6 * gib)
	}
	w.next = size
	err := w.m.Resize(size)
	if err != nil && w.m.Broken() == nil {
		w.next = w.size
		if errors.Is(err, errInjected) {
			return nil // as it was
		}
		return err
	}
	w.sum.resized++
	w.size = size
	for _, s := range []set{w.mem, w.added, w.synced} {
		maps.DeleteFunc(s, func(b int64, _ bool) bool {
			if b >= blocksFor(size) {
				w.ghosts[b] = true
			}
			return b >= blocksFor(size)
		})
	}
	return err
}

func (w *world) close() bool {
	err := w.m.Close()
	switch {
	case err == nil:
		w.durable()
	case !w.fs.fired:
		w.t.Errorf("close: %v", err)
	}
	if err := w.m.Add(0, 1); !errors.Is(err, ErrClosed) && w.m.Broken() == nil && w.size > 0 {
		w.t.Errorf("add to a closed map: %v", err)
	}
	if w.size > 0 {
		w.ghosts[0] = true
	}
	return false
}
