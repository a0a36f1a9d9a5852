package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl/replica"
	"afterimage/hrl/wire"
	"afterimage/internal/sim/simfs"
)

// Stats count what histories did.
type Stats struct {
	Histories, Steps, Requests, Kills, PowerCuts, MidOp, LineCuts, Syncs, Points, Compared int
}

func (s *Stats) add(o *Stats) {
	s.Histories += o.Histories
	s.Steps += o.Steps
	s.Requests += o.Requests
	s.Kills += o.Kills
	s.PowerCuts += o.PowerCuts
	s.MidOp += o.MidOp
	s.LineCuts += o.LineCuts
	s.Syncs += o.Syncs
	s.Points += o.Points
	s.Compared += o.Compared
}

func (s Stats) String() string {
	return fmt.Sprintf("%d histories, %d steps, %d requests, %d kills and %d power cuts (%d in the middle of an operation), %d cuts of the line, %d syncs, %d points, compared %d times",
		s.Histories, s.Steps, s.Requests, s.Kills, s.PowerCuts, s.MidOp, s.LineCuts, s.Syncs, s.Points, s.Compared)
}

// A diskSpec is how a disk is.
type diskSpec struct {
	size int64
	info blockdev.Info
}

// A world is both hosts, the line between them, and what is known of them.
type world struct {
	t    *testing.T
	rng  *rand.Rand // the driver's
	seed uint64
	keys *keys

	phost, rhost *simfs.FS
	line         *line
	copied       *simfs.FS // a copy of the replica's files; nil: none
	id           wire.VMID
	specs        []diskSpec
	every        time.Duration
	quota        int64
	keep         int
	replicaDir   string      // also of the real host: tops are there
	slow         atomic.Bool // the log hangs now and then
	late         atomic.Bool // the next append takes long; for plain worlds
	plain        bool        // nothing takes time: for short sequences

	pri   *primary   // nil: down
	sec   *secondary // nil: down
	life  byte       // of the primary's host
	rlife byte       // of the replica's

	guests sync.WaitGroup

	// mu guards what follows.
	mu      sync.Mutex
	model   *model
	saved   json.RawMessage
	stats   Stats
	err     error // the first thing that was wrong
	trace   []string
	badDisk bool // a fault of a disk was injected in this life of the primary
	badSync bool // one of its syncs has failed, or may have
	rotten  bool // bits have rotted at the replica
	turned  bool // its files were put back
	cutAt   int  // where the line is cut when the next point is to be listed
	known   map[wire.PointID]*known
	order   []wire.PointID // listed ones, the oldest first
	pending int            // syncs that have not returned
}

// known is a point that was seen.
type known struct {
	at    time.Time
	disks [][]uint32
}

const (
	logDir    = "/p/log"
	statePath = "/p/state"
)

func image(i int) string { return fmt.Sprintf("/p/disk%d", i) }

func newWorld(t *testing.T, seed uint64, keys *keys, specs ...diskSpec) *world {
	w := &world{
		t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), keys: keys,
		phost: simfs.New(seed), rhost: simfs.New(seed + 1<<40), line: newLine(seed), specs: specs,
		every: time.Hour, keep: 4, life: 1, rlife: 1, known: map[wire.PointID]*known{},
	}
	w.replicaDir = t.TempDir()
	w.rhost.Mirror(w.replicaDir)
	for i := range w.id {
		w.id[i] = byte(w.rng.Uint32())
	}
	var sectors []int64
	var empty [][]uint32
	for i, s := range specs {
		w.phost.Make(image(i), s.size)
		sectors = append(sectors, s.size/sector)
		empty = append(empty, make([]uint32, s.size/sector))
	}
	w.model = newModel(sectors)
	w.model.begun(empty, true)
	time.Sleep(time.Microsecond)
	return w
}

// note adds to the trace.
func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked(format, args...)
}

func (w *world) noteLocked(format string, args ...any) {
	w.trace = append(w.trace, time.Now().Format(clockFormat)+" "+fmt.Sprintf(format, args...))
}

// wrong says that something is not as it has to be.
func (w *world) wrong(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrongLocked(format, args...)
}

func (w *world) wrongLocked(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf(format, args...)
		w.noteLocked("WRONG: %v", w.err)
	}
}

func (w *world) failed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err != nil
}

// disksNow is what is on the disks.
func (w *world) disksNow() [][]uint32 {
	var out [][]uint32
	for i := range w.specs {
		v, err := values(w.phost.Read(image(i)), i, 0)
		if err != nil {
			w.wrong("after a crash: %v", err)
			v = make([]uint32, w.specs[i].size/sector)
		}
		out = append(out, v)
	}
	return out
}

// quiet logs what the product says into the trace.
func (w *world) log(who string) *slog.Logger {
	return slog.New(slog.NewTextHandler(&traceWriter{w, who}, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

type traceWriter struct {
	w   *world
	who string
}

func (t *traceWriter) Write(p []byte) (int, error) {
	t.w.note("    %s: %s", t.who, strings.TrimSpace(string(p)))
	return len(p), nil
}

// replicaVM is the VM over there, nil if there is none.
func (w *world) replicaVM() *replica.VM {
	if w.sec == nil {
		return nil
	}
	v, err := w.sec.store.VM(w.id)
	if err != nil {
		return nil
	}
	return v
}

// checkPoints looks at the points that the replica lists: at new ones, and, with
// all, at those that are known.
func (w *world) checkPoints(all bool) {
	v := w.replicaVM()
	if v == nil || w.failed() {
		return
	}
	if err := v.Broken(); err != nil {
		if !w.rotten && !w.sec.proc.Gone() && !w.sec.faulty {
			w.wrong("the replica is broken: %v", err)
		}
		return
	}
	points := v.Points()
	listed := map[wire.PointID]bool{}
	for i := range points {
		p := &points[i]
		listed[p.ID] = true
		if k := w.known[p.ID]; k == nil || all {
			w.checkPoint(v, p, k)
		}
	}
	if w.sec.proc.Gone() {
		return
	}
	w.order = slices.DeleteFunc(w.order, func(id wire.PointID) bool { return listed[id] })
	for i := range points {
		w.order = append(w.order, points[i].ID)
	}
	// Those that were seen, the newest of them, are there: they go by retention alone.
	for _, id := range w.order[max(0, len(w.order)-w.keep):] {
		if !listed[id] {
			w.wrong("point %v was listed and is not there any more: %v", id, listed)
		}
	}
}

func (w *world) checkPoint(v *replica.VM, p *wire.PointInfo, k *known) {
	if p.Damaged != "" {
		if !w.rotten {
			w.wrong("point %v is damaged: %s", p.ID, p.Damaged)
		}
		return
	}
	var found [][]uint32
	for i := range w.specs {
		name := fmt.Sprintf("disk%d", i)
		b, err := readPoint(v, p.ID, name, w.specs[i].size)
		if err != nil {
			if w.sec.proc.Gone() || w.rotten || w.sec.faulty || errors.Is(err, replica.ErrNoPoint) {
				return
			}
			w.wrong("point %v, %s: %v", p.ID, name, err)
			return
		}
		vals, err := values(b, i, 0)
		if err != nil {
			w.wrong("point %v: %v", p.ID, err)
			return
		}
		found = append(found, vals)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Compared++
	if k != nil {
		for i := range found {
			for s, v := range found[i] {
				if k.disks[i][s] != v {
					w.wrongLocked("point %v has changed: disk %d, sector %d was #%d and is #%d", p.ID, i, s, k.disks[i][s], v)
					return
				}
			}
		}
		return
	}
	w.stats.Points++
	w.noteLocked("point %v of %s", p.ID, p.Time.Format(clockFormat))
	if err := w.model.checkPoint(found, p.Time, 0); err != nil {
		w.wrongLocked("point %v of %s: %w", p.ID, p.Time.Format(clockFormat), err)
	}
	w.known[p.ID] = &known{p.Time, found}
}

func readPoint(v *replica.VM, id wire.PointID, disk string, size int64) ([]byte, error) {
	d, err := v.OpenPoint(id, disk)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if d.Size() != size {
		return nil, fmt.Errorf("it has %d bytes, not %d", d.Size(), size)
	}
	b := make([]byte, size)
	return b, blockdev.ReadAt(d, b, 0)
}

// settled waits until all guests are answered, or the primary is gone.
func (w *world) settled() { w.guests.Wait() }

// look reads the disks while nothing is under way, and takes what is found as what
// they hold.
func (w *world) look() [][]uint32 {
	w.settled()
	if w.pri == nil || w.pri.proc.Gone() {
		return nil
	}
	found := w.disksNow()
	defer time.Sleep(time.Microsecond) // what comes is later
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return nil
	}
	if err := w.model.adopt(found, false, false); err != nil {
		w.wrongLocked("at rest: %w", err)
	}
	return found
}

// sync asks for a point and looks at it.
func (w *world) sync(limit time.Duration) (wire.PointID, error) {
	pri := w.pri
	w.mu.Lock()
	must := w.model.tick()
	w.stats.Syncs++
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	id, err := pri.ship.Sync(ctx)
	if err != nil {
		w.note("sync: %v", err)
		return id, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked("sync: %v", id)
	pri.synced = append(pri.synced, synced{id, must})
	return id, nil
}

// A synced is what a Sync has promised.
type synced struct {
	id   wire.PointID
	must uint64
}

// checkSynced looks whether the points that were promised hold what they must.
func (w *world) checkSynced() {
	if w.pri == nil || w.sec == nil || w.sec.proc.Gone() || w.failed() {
		return
	}
	w.mu.Lock()
	todo := w.pri.synced
	w.pri.synced = nil
	w.mu.Unlock()
	if len(todo) == 0 {
		return
	}
	w.checkPoints(false)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range todo {
		k := w.known[s.id]
		if k == nil {
			// Newer ones may have taken its place before it was looked at.
			if n := len(w.order); n > 0 && s.id.Before(w.order[n-1]) {
				continue
			}
			if !w.rotten && !w.sec.proc.Gone() && !w.sec.faulty && !w.turned {
				w.wrongLocked("a sync gave %v, and the replica does not list it", s.id)
			}
			continue
		}
		if err := w.model.checkPoint(k.disks, k.at, s.must); err != nil {
			w.wrongLocked("point %v, which a sync gave: %w", s.id, err)
		}
	}
}
