package primary

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/shim"
	"afterimage/internal/vmlab/guest"
)

const (
	top       = "/mnt"
	image     = top + "/vm.raw"
	diskBytes = 32 << 20
	pageBytes = 4096
	pages     = diskBytes / pageBytes
	// few is how many extents the writes of a run touch at most, of 32.
	few = 6
)

// A pair is a primary and its replica.
type pair struct {
	t     *testing.T
	store *replica.Store
	host  *servertest.Host
	cli   *ship.Client
	vm    *shim.VM
	s     *ship.Shipper
	id    wire.VMID
}

func mount(t *testing.T) {
	t.Helper()
	if err := os.MkdirAll(top, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/dev/vmlab/data", top, "ext4", 0, ""); err != nil {
		t.Fatal("mount:", err)
	}
}

// keep makes a small file durable, old or new.
func keep(path string, b []byte) error {
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close(), os.Rename(path+".new", path))
	return errors.Join(err, hrl.OS.SyncDir(filepath.Dir(path)))
}

func open(t *testing.T) *pair {
	t.Helper()
	p := &pair{t: t}
	if b, err := os.ReadFile(top + "/id"); err == nil {
		if err := p.id.UnmarshalText(b); err != nil {
			t.Fatal(err)
		}
	} else {
		p.id = wire.NewVMID()
		if err := blockdev.CreateFile(image, diskBytes); err != nil {
			t.Fatal(err)
		}
		if err := keep(top+"/id", []byte(p.id.String())); err != nil {
			t.Fatal(err)
		}
	}
	warn := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	if p.store, err = replica.Open(top+"/replica", replica.Options{Warn: warn}); err != nil {
		t.Fatal(err)
	}
	ca := servertest.NewCA(t)
	p.host = servertest.Serve(t, ca, nil, func(o *servertest.Options) {
		o.Allow = func(string) (server.Grant, error) { return server.Grant{Store: server.Of(p.store)}, nil }
	})
	p.cli = ship.Dial(p.host.Addr(), ca.Config("a.example"))
	dev, err := blockdev.OpenFile(image, blockdev.FileOptions{Raw: true})
	if err != nil {
		t.Fatal(err)
	}
	p.vm, err = shim.OpenVM(t.Context(), shim.VMOptions{
		Name: "vm", Disks: []shim.VMDisk{{Name: "root", Image: image, Device: dev}}, Warn: warn, AppendLimit: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile(top + "/state")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	p.s, err = ship.Start(t.Context(), ship.Options{
		VM: p.vm, ID: p.id, Name: "vm", Client: p.cli, LogDir: top + "/log", Every: 300 * time.Millisecond, Keep: 8,
		State: state, Warn: warn, Save: func(b json.RawMessage) error { return keep(top+"/state", b) },
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pair) close() {
	p.t.Helper()
	err := errors.Join(p.s.Close(), p.vm.Close(), p.cli.Close(), p.host.Stop())
	p.store.Close()
	if err != nil {
		p.t.Fatal(err)
	}
}

type asked chan struct{}

func (a asked) Complete([]*blockdev.Request) { close(a) }
func (a asked) Gone() bool                   { return false }

func (p *pair) ask(r blockdev.Request) {
	p.t.Helper()
	done := make(asked)
	r.Owner = done
	p.vm.Disks()[0].Submit([]*blockdev.Request{&r})
	<-done
	if r.Err != nil {
		p.t.Fatal(r.Err)
	}
}

// place is the page of the nth write of a round: in few extents, and others in the next.
func place(round, n int) int64 {
	x := uint64(n)*0x9e3779b97f4a7c15 + uint64(round)
	x ^= x >> 29
	extent := (x*few>>32%few + uint64(round)*few) % (diskBytes >> 20)
	return int64(extent)<<20/pageBytes + int64(x>>7%(1<<20/pageBytes))
}

// page is what the nth write of a round writes.
func page(round, n int) []byte {
	b := make([]byte, pageBytes)
	for i := 0; i < len(b); i += 16 {
		binary.LittleEndian.PutUint64(b[i:], uint64(round))
		binary.LittleEndian.PutUint64(b[i+8:], uint64(n))
	}
	return b
}

func number(t *testing.T, name string) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestLoad writes for ever, flushes now and then, and says how many writes are durable
// and what the newest point is.
func TestLoad(t *testing.T) {
	mount(t)
	p := open(t)
	round := number(t, "ROUND")
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	if _, err := p.s.Sync(ctx); err != nil { // the first copy
		t.Fatal(err)
	}
	guest.Event("ready")
	for n, last := 1, (wire.PointID{}); ; n++ {
		p.ask(blockdev.Request{Op: blockdev.OpWrite, Off: place(round, n) * pageBytes, Len: pageBytes, Buf: page(round, n)})
		if n%200 == 0 {
			p.ask(blockdev.Request{Op: blockdev.OpFlush})
			guest.Event("flushed %d", n)
		}
		if lp := p.s.Status().LastPoint; lp != nil && lp.ID != last {
			last = lp.ID
			guest.Event("point")
		}
	}
}

// TestAfter looks at what a power cut under TestLoad has left: what was flushed is there, not
// all of the disk is compared, points can be read, and the next one equals the disk.
func TestAfter(t *testing.T) {
	mount(t)
	p := open(t)
	defer p.close()
	round, flushed := number(t, "ROUND"), number(t, "FLUSHED")
	disk := p.vm.Disks()[0]
	gap, _ := disk.GapBytes()
	t.Logf("%d KiB of %d are compared", gap>>10, diskBytes>>10)
	// What was hot in an earlier round is warm: marked from the start.
	if gap == 0 || gap > int64(few*round)<<20 {
		t.Errorf("%d bytes of a disk of %d are gaps", gap, diskBytes)
	}
	have := read(t, disk.Size(), func(b []byte, off int64) error {
		done := make(asked)
		r := blockdev.Request{Op: blockdev.OpRead, Off: off, Len: int64(len(b)), Buf: b, Owner: done}
		disk.Submit([]*blockdev.Request{&r})
		<-done
		return r.Err
	})
	newest := map[int64]int{}
	for n := 1; n <= flushed; n++ {
		newest[place(round, n)] = n
	}
	for at, n := range newest {
		b := have[at*pageBytes:][:pageBytes]
		got := int(binary.LittleEndian.Uint64(b[8:]))
		if got < n || int(binary.LittleEndian.Uint64(b)) != round || place(round, got) != at {
			t.Fatalf("page %d has write %d, and %d was flushed", at, got, n)
		}
	}
	v, err := p.store.VM(p.id)
	if err != nil {
		t.Fatal(err)
	}
	for _, pt := range v.Points() {
		if pt.Damaged != "" {
			t.Errorf("point %v: %s", pt.ID, pt.Damaged)
		}
		p.readPoint(v, pt.ID)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	id, err := p.s.Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.readPoint(v, id); !bytes.Equal(got, have) {
		i := 0
		for got[i] == have[i] {
			i++
		}
		t.Fatalf("point %v differs from the disk at byte %d", id, i)
	}
}

func (p *pair) readPoint(v *replica.VM, id wire.PointID) []byte {
	p.t.Helper()
	d, err := v.OpenPoint(id, "root")
	if err != nil {
		p.t.Fatal(err)
	}
	defer d.Close()
	return read(p.t, d.Size(), func(b []byte, off int64) error { return blockdev.ReadAt(d, b, off) })
}

func read(t *testing.T, size int64, at func([]byte, int64) error) []byte {
	t.Helper()
	out := make([]byte, size)
	const step = 256 << 10
	for off := int64(0); off < size; off += step {
		if err := at(out[off:off+step], off); err != nil {
			t.Fatal(fmt.Errorf("read at %d: %w", off, err))
		}
	}
	return out
}
