package ship_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/filter"
	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/shim"
)

// A world is a primary and a replica, both real, on one machine, with a line
// between them that can be cut.
type world struct {
	t       testing.TB
	rng     *rand.Rand
	bytes   *rand.ChaCha8 // what is written
	dir     string
	id      wire.VMID
	every   time.Duration
	quota   int64
	keep    int
	fs      hrl.FS // of the log; nil: the host's
	boots   byte   // of the host; 0: as it is
	limit   int64  // on the line
	streams int    // of copies; 0: the usual number

	ca     *servertest.CA
	store  *replica.Store
	host   *servertest.Host
	client *ship.Client

	disks []string
	sizes []int64
	vm    *shim.VM
	s     *ship.Shipper
	wrap  func(disk int, dev blockdev.Device) blockdev.Device // may be nil

	mu    sync.Mutex
	saved json.RawMessage

	model  [][]byte // content of each disk
	states map[wire.PointID][][]byte
	old    []byte // that the first disk was once
}

func newWorld(t testing.TB, seed uint64, sizes ...int64) *world {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ship")
	if err != nil {
		dir = t.TempDir()
	}
	w := &world{
		t: t, rng: rand.New(rand.NewPCG(seed, 5)), bytes: rand.NewChaCha8([32]byte{byte(seed)}), dir: dir, id: wire.NewVMID(), every: time.Hour, keep: 8,
		ca: servertest.NewCA(t), sizes: sizes, states: map[wire.PointID][][]byte{},
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for i, n := range sizes {
		name := fmt.Sprintf("disk%d", i)
		w.disks = append(w.disks, name)
		if err := blockdev.CreateFile(w.image(i), n); err != nil {
			t.Fatal(err)
		}
		w.model = append(w.model, make([]byte, n))
	}
	w.openStore()
	w.host = servertest.Serve(t, w.ca, nil, func(o *servertest.Options) {
		o.Allow = func(string) (server.Grant, error) { return server.Grant{Store: server.Of(w.store)}, nil }
		o.DrainTimeout = time.Millisecond
	})
	w.client = ship.Dial(w.host.Addr(), w.ca.Config("a.example"))
	t.Cleanup(func() {
		w.stopPrimary(true)
		w.client.Close()
		_ = w.host.Stop()
		w.store.Close()
	})
	return w
}

func (w *world) image(i int) string { return filepath.Join(w.dir, fmt.Sprintf("disk%d.raw", i)) }

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func (w *world) openStore() {
	w.t.Helper()
	var err error
	if w.store, err = replica.Open(filepath.Join(w.dir, "replica"), replica.Options{Warn: quiet()}); err != nil {
		w.t.Fatal(err)
	}
}

// startPrimary opens the VM and begins to ship.
func (w *world) startPrimary() {
	w.t.Helper()
	o := shim.VMOptions{Name: "vm", Warn: quiet(), AppendLimit: -1, FS: w.fs}
	if w.boots > 0 {
		o.Life = func(string) ([32]byte, error) { return [32]byte{w.boots}, nil }
	}
	for i, name := range w.disks {
		var dev blockdev.Device
		dev, err := blockdev.OpenFile(w.image(i), blockdev.FileOptions{Raw: true})
		if err != nil {
			w.t.Fatal(err)
		}
		if w.wrap != nil {
			dev = w.wrap(i, dev)
		}
		o.Disks = append(o.Disks, shim.VMDisk{Name: name, Image: w.image(i), Device: dev})
	}
	var err error
	if w.vm, err = shim.OpenVM(context.Background(), o); err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	state := w.saved
	w.mu.Unlock()
	w.s, err = ship.Start(context.Background(), ship.Options{
		VM: w.vm, ID: w.id, Name: "vm", Client: w.client, LogDir: filepath.Join(w.dir, "log"), LogQuota: w.quota,
		Every: w.every, Keep: w.keep, Limit: w.limit, Streams: w.streams, State: state, Warn: quiet(),
		Save: func(b json.RawMessage) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.saved = bytes.Clone(b)
			return nil
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// stopPrimary ends it, as a kill would or cleanly.
func (w *world) stopPrimary(clean bool) {
	if w.vm == nil {
		return
	}
	err := w.s.Close()
	if clean {
		err = errors.Join(err, w.vm.Close())
	} else {
		err = errors.Join(err, w.vm.Abort())
	}
	w.vm = nil
	if err != nil && clean {
		w.t.Log("closing the primary:", err) // its log may have been removed
	}
}

// asker waits for one request.
type asker struct{ done chan struct{} }

func (a *asker) Complete([]*blockdev.Request) { close(a.done) }
func (a *asker) Gone() bool                   { return false }

func ask(d *filter.Disk, r blockdev.Request) error {
	a := asker{make(chan struct{})}
	r.Owner = &a
	d.Submit([]*blockdev.Request{&r})
	<-a.done
	return r.Err
}

func (w *world) fill(buf []byte) { _, _ = w.bytes.Read(buf) }

// change does one random change of a random disk.
func (w *world) change() {
	w.t.Helper()
	i := w.rng.IntN(len(w.disks))
	size := w.sizes[i]
	n := int64(1+w.rng.IntN(64)) * 512
	off := w.rng.Int64N((size-n)/512+1) * 512
	r := blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: n}
	switch w.rng.IntN(6) {
	case 0:
		r.Op = blockdev.OpWriteZeroes
		clear(w.model[i][off : off+n])
	default:
		r.Buf = make([]byte, n)
		w.fill(r.Buf)
		copy(w.model[i][off:], r.Buf)
	}
	if err := ask(w.vm.Disks()[i], r); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) changes(n int) {
	w.t.Helper()
	for range n {
		w.change()
	}
}

// sync waits for a point of now, and compares it with the model.
func (w *world) sync() wire.PointID {
	w.t.Helper()
	var id wire.PointID
	var err error
	for range 5 { // whatever was cut takes a cycle to be noticed
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		id, err = w.s.Sync(ctx)
		cancel()
		if err == nil {
			break
		}
	}
	if err != nil {
		w.t.Fatalf("sync: %v", err)
	}
	state := make([][]byte, len(w.model))
	for i := range w.model {
		state[i] = bytes.Clone(w.model[i])
	}
	w.states[id] = state
	w.check(id)
	return id
}

func (w *world) replicaVM() *replica.VM {
	w.t.Helper()
	v, err := w.store.VM(w.id)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// check compares a point with what the disks were.
func (w *world) check(id wire.PointID) {
	w.t.Helper()
	for i, name := range w.disks {
		d, err := w.replicaVM().OpenPoint(id, name)
		if err != nil {
			w.t.Fatalf("open %s at %v: %v", name, id, err)
		}
		want := w.states[id][i]
		if d.Size() != int64(len(want)) {
			w.t.Fatalf("%s at %v has %d bytes, not %d", name, id, d.Size(), len(want))
		}
		got := make([]byte, len(want))
		if err := blockdev.ReadAt(d, got, 0); err != nil {
			w.t.Fatalf("read %s at %v: %v", name, id, err)
		}
		if !bytes.Equal(got, want) {
			k := 0
			for got[k] == want[k] {
				k++
			}
			w.t.Fatalf("%s at %v differs from the disk at byte %d", name, id, k)
		}
		if err := d.Close(); err != nil {
			w.t.Fatal(err)
		}
	}
}

// checkHistory compares all points that are listed and known.
func (w *world) checkHistory() (points int) {
	w.t.Helper()
	// What is to be retired is retired before, not meanwhile.
	if err := w.replicaVM().Settle(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	for _, p := range w.replicaVM().Points() {
		if p.Damaged != "" {
			w.t.Errorf("point %v is damaged: %s", p.ID, p.Damaged)
		}
		if w.states[p.ID] != nil {
			w.check(p.ID)
			points++
		}
	}
	return points
}

// copyTree copies a directory, holes and all.
func (w *world) copyTree(from, to string) {
	w.t.Helper()
	if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
		w.t.Fatalf("cp: %v: %s", err, out)
	}
}
