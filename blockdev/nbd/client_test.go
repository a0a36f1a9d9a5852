package nbd

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/devtest"
	"afterimage/internal/testenv"
)

// dial connects a Client to an export until the test ends.
func dial(t testing.TB, socket, export string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), URI{Socket: socket, Export: export}.String(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestClientDevice(t *testing.T) {
	readOnly := func(t *testing.T) blockdev.Device {
		s := quiet()
		add(t, s, Export{Name: "disk", Queue: memPool(4 << 20), ReadOnly: true})
		return dial(t, serve(t, s), "disk")
	}
	devtest.Run(t, func(t *testing.T) blockdev.Device {
		s := quiet()
		add(t, s, Export{Name: "disk", Queue: memPool(4 << 20)})
		return dial(t, serve(t, s), "disk")
	}, devtest.Options{FixedSize: true, ReadOnly: readOnly})
}

func TestClientOverTCP(t *testing.T) {
	s := quiet()
	add(t, s, Export{Name: "a/b c", Queue: memPool(4 << 20)})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, ln) }()
	c, err := Dial(ctx, "nbd://"+ln.Addr().String()+"/a%2Fb%20c", Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("afterimage"), 300_000)
	if err := blockdev.WriteAt(c, want, 12345); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if err := blockdev.ReadAt(c, got, 12345); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read: %v, equal: %v", err, bytes.Equal(got, want))
	}
	c.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestDialRefused(t *testing.T) {
	s := quiet()
	add(t, s, Export{Name: "disk", Queue: memPool(1 << 20)})
	socket := serve(t, s)
	if _, err := Dial(t.Context(), URI{Socket: socket, Export: "other"}.String(), Options{}); !errors.Is(err, ErrNoExport) {
		t.Errorf("an unknown export: %v", err)
	}
	if _, err := Dial(t.Context(), URI{Socket: socket + "x"}.String(), Options{}); err == nil {
		t.Error("a socket that is not there")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Dial(ctx, URI{Socket: socket, Export: "disk"}.String(), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that is done: %v", err)
	}
}

// TestClientLargeRequests sends more than one command may carry.
func TestClientLargeRequests(t *testing.T) {
	s := quiet()
	add(t, s, Export{Queue: memPool(160 << 20)})
	c := dial(t, serve(t, s), "")
	want := make([]byte, 150<<20)
	for i := range want {
		want[i] = byte(i * 7 >> 9)
	}
	if err := blockdev.WriteAt(c, want, 512); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if err := blockdev.ReadAt(c, got, 512); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("read something else than was written")
	}
}

// TestClientHugeZero zeroes and trims more than a length on the wire can say.
func TestClientHugeZero(t *testing.T) {
	const size = 11 << 30
	mem := blockdev.NewMem(size)
	s := quiet()
	add(t, s, Export{Queue: blockdev.NewPool(mem, 4)})
	c := dial(t, serve(t, s), "")
	for _, off := range []int64{0, 5 << 30, size - 512} {
		if err := blockdev.WriteAt(c, bytes.Repeat([]byte{1}, 512), off); err != nil {
			t.Fatal(err)
		}
	}
	done, err := blockdev.Trim(c, blockdev.Extent{Off: 512, Len: size - 1024})
	if err != nil || done.Len != size-1024 {
		t.Fatalf("trimmed %v, %v", done, err)
	}
	b := make([]byte, 512)
	if blockdev.ReadAt(c, b, 5<<30); b[0] != 0 {
		t.Error("not trimmed")
	}
	if blockdev.ReadAt(c, b, size-512); b[0] != 1 {
		t.Error("trimmed too much")
	}
	r := blockdev.Request{Op: blockdev.OpWriteZeroes, Flags: blockdev.FlagFastZero | blockdev.FlagFUA, Len: size}
	if err := blockdev.Do1(c, &r); err != nil {
		t.Fatal(err)
	}
	if blockdev.ReadAt(c, b, size-512); b[0] != 0 {
		t.Error("not zeroed")
	}
}

// TestClientLost breaks the connection under requests.
func TestClientLost(t *testing.T) {
	q := newHeldQueue(memPool(1 << 20))
	s := quiet()
	add(t, s, Export{Queue: q})
	socket, stop := serveUntil(t, s)
	c := dial(t, socket, "")
	errs := make(chan error, 8)
	for i := range cap(errs) {
		go func() { errs <- blockdev.WriteAt(c, make([]byte, 512), int64(i)*512) }()
	}
	testenv.Until(t, "all are under way", func() bool { return q.held() == cap(errs) })
	go q.releaseAfter(func() bool { return c.broken() != nil })
	stop()
	for range cap(errs) {
		var lost *lostError
		if err := <-errs; err == nil || !errors.As(err, &lost) {
			t.Errorf("a request under way: %v", err)
		}
	}
	if err := blockdev.Flush(c); err == nil {
		t.Error("a later request succeeds")
	}
}

func TestClientClose(t *testing.T) {
	q := newHeldQueue(memPool(1 << 20))
	s := quiet()
	add(t, s, Export{Queue: q})
	c := dial(t, serve(t, s), "")
	errs := make(chan error, 1)
	go func() { errs <- blockdev.WriteAt(c, make([]byte, 512), 0) }()
	testenv.Until(t, "the write is under way", func() bool { return q.held() == 1 })
	c.Close()
	if err := <-errs; !errors.Is(err, blockdev.ErrClosed) {
		t.Errorf("the write under way: %v", err)
	}
	q.release()
	if err := c.Close(); !errors.Is(err, blockdev.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
}

// TestClientAllocs: a request costs no memory once all is warm.
func TestClientAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool forgets at random under the race detector")
	}
	s := quiet()
	add(t, s, Export{Queue: &nullQueue{size: 1 << 20}})
	c := dial(t, serve(t, s), "")
	r := blockdev.Request{Op: blockdev.OpWrite, Len: 4096, Buf: make([]byte, 4096)}
	reqs := []*blockdev.Request{&r}
	n := testing.AllocsPerRun(1000, func() { c.Do(reqs) })
	if n >= 1 || r.Err != nil {
		t.Errorf("%v allocations per write through client and server, %v", n, r.Err)
	}
}

// heldQueue keeps requests until it is told to let them go.
type heldQueue struct {
	blockdev.Queue
	mu   sync.Mutex
	kept []*blockdev.Request
	open bool
}

func newHeldQueue(q blockdev.Queue) *heldQueue { return &heldQueue{Queue: q} }

func (q *heldQueue) Submit(reqs []*blockdev.Request) {
	q.mu.Lock()
	if !q.open {
		q.kept = append(q.kept, reqs...)
		q.mu.Unlock()
		return
	}
	q.mu.Unlock()
	q.Queue.Submit(reqs)
}

func (q *heldQueue) held() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.kept)
}

// release passes on what was kept, unless its owner has gone, and keeps no more.
func (q *heldQueue) release() {
	q.mu.Lock()
	kept := q.kept
	q.kept, q.open = nil, true
	q.mu.Unlock()
	for _, r := range kept {
		if r.Owner.Gone() {
			r.Err = blockdev.ErrGone
			r.Owner.Complete([]*blockdev.Request{r})
		} else {
			q.Queue.Submit([]*blockdev.Request{r})
		}
	}
}

func (q *heldQueue) releaseAfter(cond func() bool) {
	for !cond() {
		waitABit()
	}
	q.release()
}
