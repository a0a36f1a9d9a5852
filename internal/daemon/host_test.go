package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
	"afterimage/internal/pki"
	"afterimage/internal/testenv"
	"afterimage/internal/transfer"
)

// A host is a daemon of a test, with what it keeps.
type host struct {
	*admin.Client
	t      *testing.T
	dir    string // state, certificates and images
	listen string // the same after a restart
	d      *Daemon
}

// newHosts makes two hosts with certificates of one CA, and starts their daemons.
func newHosts(t *testing.T) (a, b *host) {
	t.Helper()
	base, err := os.MkdirTemp("", "ai") // a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	a, b = &host{t: t, dir: filepath.Join(base, "a")}, &host{t: t, dir: filepath.Join(base, "b")}
	if err := pki.Init(a.tls(), []string{"host-a", "127.0.0.1"}, pki.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := pki.Issue(a.tls(), b.tls(), []string{"host-b", "127.0.0.1"}, pki.Options{}); err != nil {
		t.Fatal(err)
	}
	a.start()
	b.start()
	return a, b
}

func (h *host) tls() string   { return filepath.Join(h.dir, "tls") }
func (h *host) state() string { return filepath.Join(h.dir, "state") }

// start starts the daemon, which is closed with the test at the latest.
func (h *host) start() {
	h.t.Helper()
	if h.listen == "" {
		h.listen = "127.0.0.1:0"
	}
	d, err := Start(h.options())
	if err != nil {
		h.t.Fatal(err)
	}
	h.d, h.listen = d, d.Info().Listen
	h.Client = admin.NewClient(d.Info().Admin)
	h.t.Cleanup(h.stop)
}

func (h *host) options() Options {
	return Options{State: h.state(), Listen: h.listen, TLSDir: h.tls(), Product: "test", Retry: 20 * time.Millisecond, Log: slog.New(slog.NewTextHandler(testLog{h}, nil))}
}

// testLog shows what a daemon says with the test that fails.
type testLog struct{ h *host }

func (l testLog) Write(p []byte) (int, error) {
	l.h.t.Logf("%s: %s", filepath.Base(l.h.dir), strings.TrimSpace(string(p)))
	return len(p), nil
}

func (h *host) stop() {
	h.t.Helper()
	if h.d == nil {
		return
	}
	h.Client.Close()
	if err := h.d.Close(); err != nil {
		h.t.Errorf("close the daemon: %v", err)
	}
	h.d = nil
}

func (h *host) restart() {
	h.t.Helper()
	h.stop()
	h.start()
}

// image makes an image, and returns its path.
func (h *host) image(name string, size int64) string {
	h.t.Helper()
	path := filepath.Join(h.dir, name)
	if err := blockdev.CreateFile(path, size); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// add adds a VM with a new image for each disk.
func (h *host) add(name string, size int64, disks ...string) admin.VM {
	h.t.Helper()
	a := admin.AddVM{Name: name, LogQuota: 64 << 20}
	for _, disk := range disks {
		a.Disks = append(a.Disks, admin.AddDisk{Name: disk, Image: h.image(name+"-"+disk+".raw", size)})
	}
	vm, err := h.AddVM(h.t.Context(), a)
	if err != nil {
		h.t.Fatal(err)
	}
	return vm
}

// replicate lets a replicate to b, and the VM of a be replicated there.
func (a *host) replicate(b *host, vm string) {
	a.t.Helper()
	if _, err := b.AllowPeer(a.t.Context(), admin.AllowPeer{Pattern: "host-a"}); err != nil {
		a.t.Fatal(err)
	}
	if _, err := a.Enable(a.t.Context(), vm, admin.Enable{To: b.listen, EverySeconds: 3600, Keep: 8}); err != nil {
		a.t.Fatal(err)
	}
}

func (h *host) sync(vm string) admin.Point {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	p, err := h.Sync(ctx, vm, nil)
	if err != nil {
		h.t.Fatalf("sync: %v", err)
	}
	return p
}

func dial(t *testing.T, uri string) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), uri, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// scribble writes at random places of a disk.
func scribble(t *testing.T, uri string, seed uint64) {
	t.Helper()
	c := dial(t, uri)
	defer c.Close()
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 64<<10)
	for range 60 {
		n := 512 * (1 + r.Int64N(int64(len(b))/512))
		for i := range b[:n] {
			b[i] = byte(r.Uint32())
		}
		off := 512 * r.Int64N((c.Size()-n)/512+1)
		if err := blockdev.WriteAt(c, b[:n], off); err != nil {
			t.Fatal(err)
		}
	}
}

// equal compares disks, each named by its URI.
func equal(t *testing.T, a, b string) {
	t.Helper()
	ca, cb := dial(t, a), dial(t, b)
	defer ca.Close()
	defer cb.Close()
	diff, err := transfer.Compare(t.Context(), ca, cb, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ca.Size() != cb.Size() || !diff.Equal() {
		t.Errorf("%s and %s differ: %d bytes of %d, the first at %d", a, b, diff.Bytes, ca.Size(), diff.First)
	}
}

// testEqual starts a test of a failover and compares it with the VM's disks.
func (b *host) testEqual(vm admin.VM, point string) {
	b.t.Helper()
	run, err := b.Test(b.t.Context(), vm.Name, admin.StartRun{Point: point}, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	if len(run.Disks) != len(vm.Disks) {
		b.t.Fatalf("the test has %d disks, the VM %d", len(run.Disks), len(vm.Disks))
	}
	for i := range vm.Disks {
		equal(b.t, vm.Disks[i].URI, run.Disks[i].URI)
	}
	if err := b.EndTest(b.t.Context(), run.Name); err != nil {
		b.t.Fatal(err)
	}
}

// refused checks that an error has a status and says certain words.
func refused(t *testing.T, what string, err error, status admin.Status, words string) {
	t.Helper()
	var e *admin.Error
	if !errors.As(err, &e) || e.Status != status || !strings.Contains(e.Message, words) {
		t.Errorf("%s: %v; want status %d and %q", what, describe(err), status, words)
	}
}

func describe(err error) string {
	var e *admin.Error
	if errors.As(err, &e) {
		return fmt.Sprintf("status %d, %q, hint %q", e.Status, e.Message, e.Advice)
	}
	return fmt.Sprint(err)
}

// until polls the status of a replication.
func (h *host) until(vm, what string, holds func(admin.Replication) bool) {
	h.t.Helper()
	testenv.Until(h.t, what, func() bool {
		r, err := h.Replication(h.t.Context(), vm)
		return err == nil && holds(r)
	})
}

func newestOf(t *testing.T, h *host, vm string) wire.PointID {
	t.Helper()
	r, err := h.Replication(t.Context(), vm)
	if err != nil || r.LastPoint == nil {
		t.Fatalf("%+v, %v", r, err)
	}
	return r.LastPoint.ID
}
