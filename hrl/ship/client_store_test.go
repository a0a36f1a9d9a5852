package ship_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/pki"
)

// realLayer makes a layer that writes all of the disk anew, from nothing to the
// point. No compressor makes it smaller.
func realLayer(t testing.TB, dir string, vm wire.VMID, disk string, point wire.PointID, content []byte) (path, digest string) {
	t.Helper()
	w, err := hrl.NewLayerWriter(hrl.OS, dir, hrl.LayerInfo{
		VM: vm, Generation: point.Generation, Disk: disk, Q: hrl.Position{Incarnation: point.Incarnation, Epoch: point.Epoch},
		Size: int64(len(content)), QTime: time.Unix(1, 0), Kind: hrl.CutCrash,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Data(0, content); err != nil {
		t.Fatal(err)
	}
	f, err := w.Commit()
	if err != nil {
		t.Fatal(err)
	}
	return f.Path, hex.EncodeToString(f.Digest[:])
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(b)
	return b
}

func putFile(c *ship.Client, id wire.VMID, path, digest string, o ship.PutOptions) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return c.PutLayer(context.Background(), id, digest, f, st.Size(), o)
}

// TestStore: real layers into a real store, over a line that breaks every few
// megabytes and a host whose daemon is started anew meanwhile.
func TestStore(t *testing.T) {
	ca, id, dir, ctx := servertest.NewCA(t), wire.NewVMID(), t.TempDir(), t.Context()
	var mu sync.Mutex
	var store *replica.Store
	open := func() {
		t.Helper()
		s, err := replica.Open(filepath.Join(dir, "store"), replica.Options{Warn: quiet()})
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		defer mu.Unlock()
		store = s
	}
	shut := func() {
		mu.Lock()
		defer mu.Unlock()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	}
	open()
	quota := int64(0)
	host := servertest.Serve(t, ca, nil, func(o *servertest.Options) {
		o.DrainTimeout = time.Millisecond
		o.Allow = func(string) (server.Grant, error) {
			mu.Lock()
			defer mu.Unlock()
			return server.Grant{Store: server.Of(store), Quota: quota}, nil
		}
	})
	defer func() { _ = host.Stop(); shut() }()
	line := servertest.NewLine(t, host.Addr())
	c := ship.Dial(line.Addr(), ca.Config("a.example"))
	defer c.Close()

	var refused *wire.Error
	if _, err := c.State(ctx, id); !errors.As(err, &refused) || refused.Code != wire.CodeNoVM {
		t.Fatalf("a VM that was never offered: %v", err)
	}
	content := noise(2*wire.PieceMax + 3<<20)
	offer := wire.Offer{Name: "web", Disks: []wire.Disk{{Name: "root", Size: int64(len(content))}}, Generation: 1, Term: 1}
	if _, err := c.Offer(ctx, id, offer); err != nil {
		t.Fatal(err)
	}
	point := aPoint(1, wire.PointID{})
	point.Disks[0].Size = int64(len(content))
	path, digest := realLayer(t, dir, id, "root", point.ID, content)
	point.Disks[0].Layers = []string{digest}
	if _, err := c.List(ctx, id, point); !errors.As(err, &refused) {
		t.Fatalf("a point without its layer: %v", err)
	}

	line.CutEvery(3 << 20)
	var restart sync.WaitGroup
	var once sync.Once
	sent := int64(0)
	err := putFile(c, id, path, digest, ship.PutOptions{Sent: func(n int64) {
		if sent += n; sent > 12<<20 {
			once.Do(func() {
				restart.Go(func() {
					if err := host.Stop(); err != nil {
						t.Error(err)
					}
					shut()
					open()
					host.Start(ca)
				})
			})
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	restart.Wait()
	if n := line.Cuts(); n < 5 {
		t.Errorf("%d cuts", n)
	}
	line.CutAt()
	for range 2 {
		if got, err := c.List(ctx, id, point); err != nil || got.ID != point.ID || got.Bytes < int64(len(content)) {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	if err := putFile(c, id, path, digest, ship.PutOptions{Sent: func(int64) { t.Error("a listed layer is sent again") }}); err != nil {
		t.Fatal(err)
	}
	ext := []blockdev.Extent{{Off: 0, Len: 512}, {Off: 1 << 20, Len: 1 << 20}, {Off: int64(len(content)) - 4096, Len: 4096}}
	sums, err := c.Digests(ctx, id, point.ID, "root", ext)
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range ext {
		if sums[i] != sha256.Sum256(content[e.Off:e.End()]) {
			t.Errorf("the digest of %v is another", e)
		}
	}
	if _, err := c.Digests(ctx, id, wire.PointID{Generation: 1, Incarnation: 1, Epoch: 9}, "root", ext); !errors.As(err, &refused) || refused.Code != wire.CodeNoPoint {
		t.Errorf("digests of no point: %v", err)
	}
	if err := c.Discard(ctx, id, nil); err != nil {
		t.Fatal(err)
	}
	if ps, err := c.Points(ctx, id); err != nil || len(ps) != 1 || ps[0].Damaged != "" {
		t.Errorf("%+v, %v", ps, err)
	}
	if st, err := c.State(ctx, id); err != nil || st.Newest != point.ID || len(st.Layers) != 0 {
		t.Errorf("%+v, %v", st, err)
	}

	// What does not fit, or is not whole, is refused and forgotten.
	next := wire.PointID{Generation: 1, Incarnation: 1, Epoch: 2}
	small := content[:1<<20]
	for _, x := range []struct {
		name string
		make func() (path, digest string)
		code wire.Code
	}{
		{"of another VM", func() (string, string) { return realLayer(t, dir, wire.NewVMID(), "root", next, small) }, wire.CodeUnfit},
		{"of another disk", func() (string, string) { return realLayer(t, dir, id, "data", next, small) }, wire.CodeUnfit},
		{"damaged", func() (string, string) {
			path, digest := realLayer(t, dir, id, "root", next, small)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			return path, digest
		}, wire.CodeDamaged},
	} {
		path, digest := x.make()
		if err := putFile(c, id, path, digest, ship.PutOptions{}); !errors.As(err, &refused) || refused.Code != x.code {
			t.Errorf("a layer %s: %v", x.name, err)
		}
		if st, err := c.State(ctx, id); err != nil || len(st.Layers) != 0 {
			t.Errorf("after a layer %s: %+v, %v", x.name, st, err)
		}
	}

	// A quota counts from the next offer on.
	mu.Lock()
	quota = 1 << 20
	mu.Unlock()
	if _, err := c.Offer(ctx, id, offer); err != nil {
		t.Fatal(err)
	}
	path, digest = realLayer(t, dir, id, "root", next, small)
	if err := putFile(c, id, path, digest, ship.PutOptions{}); !errors.As(err, &refused) || refused.Code != wire.CodeNoRoom || !strings.Contains(refused.Hint(), "--quota") {
		t.Errorf("over the quota: %v", err)
	}
	other := ship.Dial(line.Addr(), ca.Config("other.example"))
	defer other.Close()
	if _, err := other.Offer(ctx, id, offer); !errors.As(err, &refused) || refused.Code != wire.CodeSender {
		t.Errorf("another sender: %v", err)
	}
	offer.Term = 2
	if _, err := other.Offer(ctx, id, offer); err != nil {
		t.Errorf("another sender with a higher term: %v", err)
	}
	offer.Term = 1
	if _, err := c.Offer(ctx, id, offer); !errors.As(err, &refused) || refused.Code != wire.CodeTerm && refused.Code != wire.CodeSender {
		t.Errorf("the old sender: %v", err)
	}
}

// TestHostCertificates: with the certificates that hosts really have, which may be
// replaced while both sides run.
func TestHostCertificates(t *testing.T) {
	dir := t.TempDir()
	one, two, stranger := filepath.Join(dir, "one"), filepath.Join(dir, "two"), filepath.Join(dir, "stranger")
	for _, err := range []error{
		pki.Init(one, []string{"one.example", "127.0.0.1"}, pki.Options{}),
		pki.Issue(one, two, []string{"two.example", "127.0.0.1"}, pki.Options{}),
		pki.Init(stranger, []string{"one.example"}, pki.Options{}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	files := func(dir string) *pki.Files {
		f, err := pki.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	fake := &servertest.Fake{}
	s := server.New(server.Options{
		Identity: pki.Identity, Name: "two.example", Warn: quiet(),
		Allow: func(string) (server.Grant, error) { return server.Grant{Store: fake}, nil },
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln, files(two).Server()) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	mine := files(one)
	for range 2 {
		c := ship.Dial(ln.Addr().String(), mine.Client("127.0.0.1"))
		defer c.Close()
		h, err := c.Hello(t.Context())
		if err != nil || h.You != "one.example" {
			t.Fatalf("%+v, %v", h, err)
		}
		for _, dir := range []string{one, two} {
			if err := pki.Rotate(dir, one, nil, pki.Options{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := ship.Dial(ln.Addr().String(), files(stranger).Client("127.0.0.1"))
	defer c.Close()
	_, err = c.Hello(t.Context())
	var un *ship.UnreachableError
	var known *pki.Error
	if !errors.As(err, &un) || !errors.As(err, &known) || known.Hint() == "" || un.Hint() != known.Hint() {
		t.Errorf("%v", err)
	}
}

// BenchmarkPutLayerStore has the disk in it: a layer of 256 MiB is written, synced,
// read and checked. The size of a piece matters little: 190 to 210 MB/s with
// pieces of 8, 32 and 64 MiB on the machine of BenchmarkPutLayer.
func BenchmarkPutLayerStore(b *testing.B) {
	ca, id, dir := servertest.NewCA(b), wire.NewVMID(), b.TempDir()
	store, err := replica.Open(filepath.Join(dir, "store"), replica.Options{Warn: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	host := servertest.Serve(b, ca, server.Of(store), nil)
	defer func() { _ = host.Stop() }()
	c := ship.Dial(host.Addr(), ca.Config("a.example"))
	defer c.Close()
	content := noise(256 << 20)
	offer := wire.Offer{Name: "web", Disks: []wire.Disk{{Name: "root", Size: int64(len(content))}}, Generation: 1, Term: 1}
	if _, err := c.Offer(b.Context(), id, offer); err != nil {
		b.Fatal(err)
	}
	path, digest := realLayer(b, dir, id, "root", wire.PointID{Generation: 1, Incarnation: 1, Epoch: 1}, content)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		if err := putFile(c, id, path, digest, ship.PutOptions{}); err != nil {
			b.Fatal(err)
		}
		if err := c.Discard(b.Context(), id, nil); err != nil {
			b.Fatal(err)
		}
	}
}
