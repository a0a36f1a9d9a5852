package ship_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
)

// A content is a layer in memory. Reads are checked: few bytes at a time, none
// after PutLayer has returned.
type content struct {
	*bytes.Reader
	b    []byte
	over atomic.Bool
	bad  atomic.Bool
}

func (c *content) ReadAt(p []byte, off int64) (int, error) {
	if c.over.Load() || len(p) > 64<<10 {
		c.bad.Store(true)
	}
	return c.Reader.ReadAt(p, off)
}

func aLayer(n int) (*content, string) {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	sum := sha256.Sum256(b)
	return &content{Reader: bytes.NewReader(b), b: b}, hex.EncodeToString(sum[:])
}

// put sends a layer, and checks that the replica has it.
func (p *pair) put(t *testing.T, data *content, digest string, o ship.PutOptions) {
	t.Helper()
	data.over.Store(false)
	if err := p.c.PutLayer(t.Context(), p.id, digest, data, data.Size(), o); err != nil {
		t.Fatal(err)
	}
	data.over.Store(true)
	if !bytes.Equal(p.fake.Get(p.id).Layer(digest), data.b) {
		t.Fatal("the replica has other bytes")
	}
	if data.bad.Load() {
		t.Fatal("it was read in large pieces, or after PutLayer had returned")
	}
}

func (p *pair) forget(t *testing.T) {
	t.Helper()
	if err := p.c.Discard(t.Context(), p.id, nil); err != nil {
		t.Fatal(err)
	}
}

// TestResumeAnswerLost: the connection breaks when a piece is durable over there
// and nobody here knows, at each end of a piece.
func TestResumeAnswerLost(t *testing.T) {
	p := newPair(t, nil)
	data, digest := aLayer(2*wire.PieceMax + 12345)
	for _, at := range []int64{wire.PieceMax, 2 * wire.PieceMax, data.Size()} {
		cut := false
		p.fake.OnSynced = func(_ string, synced int64) {
			if synced == at && !cut {
				cut = true
				p.line.CutNow()
			}
		}
		sent := int64(0)
		p.put(t, data, digest, ship.PutOptions{Sent: func(n int64) { sent += n }})
		if !cut || sent != data.Size() {
			t.Errorf("cut at %d: %d of %d bytes were sent: what had arrived was sent again", at, sent, data.Size())
		}
		p.forget(t)
	}
}

// TestResumeInPiece: the connection breaks anywhere, also in the handshake.
func TestResumeInPiece(t *testing.T) {
	p := newPair(t, nil)
	data, digest := aLayer(wire.PieceMax + 12345)
	for _, at := range []int64{
		1, 700, 2000, 3000, 4000, 100_000, wire.PieceMax / 2, wire.PieceMax, wire.PieceMax + 20_000,
	} {
		p.line.CutNow() // so that each begins with a handshake
		p.line.CutAt()
		for p.tryHello(t) != nil {
		}
		p.line.CutAt(at)
		p.put(t, data, digest, ship.PutOptions{})
		if p.line.Cuts() != 1 {
			t.Errorf("cut at %d: %d cuts", at, p.line.Cuts())
		}
		p.line.CutAt()
		p.forget(t)
	}
	p.line.CutEvery(1 << 20)
	p.put(t, data, digest, ship.PutOptions{})
	if n := p.line.Cuts(); n < 8 {
		t.Errorf("%d cuts in %d bytes", n, data.Size())
	}
}

// TestNoProgress: a line that never carries enough is given up after some tries.
func TestNoProgress(t *testing.T) {
	p := newPair(t, nil)
	data, digest := aLayer(wire.PieceMax)
	var once sync.Once
	err := p.c.PutLayer(t.Context(), p.id, digest, data, data.Size(), ship.PutOptions{Sent: func(int64) {
		once.Do(func() { p.line.CutEvery(500); p.line.CutNow() })
	}})
	var un *ship.UnreachableError
	if !errors.As(err, &un) || !strings.Contains(err.Error(), "send layer "+digest) {
		t.Errorf("%v", err)
	}
	if n := p.line.Cuts(); n < 3 || n > 10 {
		t.Errorf("it tried %d times", n)
	}
}

// TestResumeAfterRestart: the peer's daemon is started anew between two pieces, or
// in one, and has lost some of what it had, as after a power cut.
func TestResumeAfterRestart(t *testing.T) {
	for _, lose := range []int{0, 1, 5 << 20} {
		p := newPair(t, func(o *servertest.Options) { o.DrainTimeout = time.Millisecond })
		data, digest := aLayer(3 * wire.PieceMax)
		var restart sync.WaitGroup
		done := false
		p.fake.OnSynced = func(_ string, synced int64) {
			if synced >= 2*wire.PieceMax && !done {
				done = true
				restart.Go(func() {
					if err := p.host.Stop(); err != nil {
						t.Error(err)
					}
					v := p.fake.Get(p.id)
					v.Lose(digest, len(v.Layer(digest))-lose)
					p.host.Start(p.ca)
				})
			}
		}
		p.put(t, data, digest, ship.PutOptions{})
		restart.Wait()
	}
}

// TestPutRefusals: what may pass is tried again, what cannot is not.
func TestPutRefusals(t *testing.T) {
	p := newPair(t, nil)
	data, digest := aLayer(100_000)
	tries := 0
	fail := func(n int, err error) {
		tries = 0
		p.fake.Fault = func(op string) error {
			if op == "stage" {
				if tries++; tries <= n {
					return err
				}
			}
			return nil
		}
	}
	fail(2, replica.ErrClosed) // the daemon over there is about to end
	p.put(t, data, digest, ship.PutOptions{})
	p.forget(t)
	fail(2, &replica.OffsetError{Synced: 0})
	p.put(t, data, digest, ship.PutOptions{})
	p.forget(t)

	for _, x := range []struct {
		err   error
		code  wire.Code
		tries int
	}{
		{replica.ErrNoRoom, wire.CodeNoRoom, 1},
		{replica.ErrRole, wire.CodeRole, 1},
		{hrl.ErrDamaged, wire.CodeDamaged, 1},
		{errors.New("input/output error"), wire.CodeFailed, 1},
		{replica.ErrClosed, wire.CodeBusy, 4},
		{&replica.OffsetError{Synced: 0}, wire.CodeOffset, 4},
	} {
		fail(100, x.err)
		err := p.c.PutLayer(t.Context(), p.id, digest, data, data.Size(), ship.PutOptions{})
		var refused *wire.Error
		if !errors.As(err, &refused) || refused.Code != x.code || tries != x.tries || !strings.Contains(err.Error(), p.line.Addr()) {
			t.Errorf("%v: %v after %d tries", x.err, err, tries)
		}
	}
	fail(0, nil)

	for name, put := range map[string]func() error{
		"no digest": func() error {
			return p.c.PutLayer(t.Context(), p.id, "x/../y", data, data.Size(), ship.PutOptions{})
		},
		"no bytes": func() error { return p.c.PutLayer(t.Context(), p.id, digest, data, 0, ship.PutOptions{}) },
		"other bytes": func() error {
			_, digest := aLayer(4)
			return p.c.PutLayer(t.Context(), p.id, digest, data, data.Size(), ship.PutOptions{})
		},
		"short file": func() error {
			return p.c.PutLayer(t.Context(), p.id, digest, data, data.Size()+1, ship.PutOptions{})
		},
		"bad file": func() error {
			return p.c.PutLayer(t.Context(), p.id, digest, badFile{}, 100, ship.PutOptions{})
		},
		"impossible limit": func() error {
			return p.c.PutLayer(t.Context(), p.id, digest, data, data.Size(), ship.PutOptions{Limit: rate.NewLimiter(1, 0)})
		},
	} {
		if err := put(); err == nil || errors.As(err, new(*ship.UnreachableError)) || !strings.Contains(err.Error(), "send layer") {
			t.Errorf("%s: %v", name, err)
		}
		p.forget(t)
	}
	if err := p.c.PutLayer(t.Context(), p.id, digest, badFile{}, 100, ship.PutOptions{}); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v", err)
	}
}

type badFile struct{}

func (badFile) ReadAt([]byte, int64) (int, error) { return 0, syscall.EIO }

// TestPutCancel: the context ends it while the limit makes it wait, and Close does.
func TestPutCancel(t *testing.T) {
	for _, how := range []string{"cancel", "deadline", "close"} {
		p := newPair(t, nil)
		data, digest := aLayer(wire.PieceMax)
		ctx, cancel := context.WithCancel(t.Context())
		want := context.Canceled
		if how == "deadline" {
			ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
			want = context.DeadlineExceeded
		}
		err := p.c.PutLayer(ctx, p.id, digest, data, data.Size(), ship.PutOptions{
			Limit: rate.NewLimiter(10, 64<<10), // an hour
			Sent: func(int64) {
				switch how {
				case "cancel":
					cancel()
				case "close":
					want = ship.ErrClosed
					_ = p.c.Close()
				}
			},
		})
		data.over.Store(true)
		if !errors.Is(err, want) || errors.As(err, new(*ship.UnreachableError)) {
			t.Errorf("%s: %v", how, err)
		}
		cancel()
		if data.bad.Load() {
			t.Error("it was read after PutLayer had returned")
		}
	}
}

// TestPutCancelReading: the layer is the caller's again when PutLayer returns, also
// if a read of it was under way.
func TestPutCancelReading(t *testing.T) {
	p := newPair(t, nil)
	data, digest := aLayer(wire.PieceMax)
	ctx, cancel := context.WithCancel(t.Context())
	slow := slowReader{data, func() {
		cancel()
		time.Sleep(100 * time.Millisecond) // time enough to return too early
	}}
	if err := p.c.PutLayer(ctx, p.id, digest, slow, data.Size(), ship.PutOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	data.over.Store(true)
	time.Sleep(200 * time.Millisecond) // for a read that should not be
	if data.bad.Load() {
		t.Error("it was read after PutLayer had returned")
	}
}

// TestPutRefusedEarly: the same with a peer that refuses a piece while it is still
// being sent.
func TestPutRefusedEarly(t *testing.T) {
	ca := servertest.NewCA(t)
	data, digest := aLayer(wire.PieceMax)
	done := make(chan bool)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(wire.VersionHeader, "1")
		if r.Method == http.MethodGet {
			_, _ = io.WriteString(w, `{"digest":"`+digest+`"}`)
			return
		}
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		answer := `{"code":"no_room","error":"full"}`
		w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
		w.WriteHeader(http.StatusInsufficientStorage)
		_, _ = io.WriteString(w, answer)
		_ = rc.Flush()
		<-done
	}))
	srv.TLS = ca.Config("b.example")
	srv.StartTLS()
	defer srv.Close()
	defer close(done)
	c := ship.Dial(srv.Listener.Addr().String(), ca.Config("a.example"))
	defer c.Close()
	slow := slowReader{data, func() { time.Sleep(10 * time.Millisecond) }}
	var refused *wire.Error
	if err := c.PutLayer(t.Context(), wire.VMID{}, digest, slow, data.Size(), ship.PutOptions{}); !errors.As(err, &refused) || refused.Code != wire.CodeNoRoom {
		t.Errorf("%v", err)
	}
	data.over.Store(true)
	time.Sleep(200 * time.Millisecond) // for a read that should not be
	if data.bad.Load() {
		t.Error("it was read after PutLayer had returned")
	}
}

type slowReader struct {
	*content
	wait func()
}

func (r slowReader) ReadAt(p []byte, off int64) (int, error) {
	r.wait()
	return r.content.ReadAt(p, off)
}

// TestLimit: each byte is taken from the limit, the waiting is not the peer's
// silence, and a layer under a limit goes in small pieces.
func TestLimit(t *testing.T) {
	p := newPair(t, nil)
	data, digest := aLayer(100_000)
	l := rate.NewLimiter(0, 100_000) // all there is
	p.put(t, data, digest, ship.PutOptions{Limit: l})
	if l.AllowN(time.Now(), 1) {
		t.Error("not every byte was taken from the limit")
	}
	p.forget(t)
	p.put(t, data, digest, ship.PutOptions{Limit: rate.NewLimiter(rate.Inf, 0)})
	p.forget(t)

	p.c.SetSilence(500 * time.Millisecond)
	small, digest := aLayer(32 << 10)
	p.put(t, small, digest, ship.PutOptions{Limit: rate.NewLimiter(16<<10, 16<<10)})

	for limit, want := range map[rate.Limit]int64{
		rate.Inf: wire.PieceMax, 1: 64 << 10, 128 << 10: 256 << 10, 1 << 40: wire.PieceMax, wire.PieceMax / 2: wire.PieceMax,
	} {
		if got := ship.PieceBytes(rate.NewLimiter(limit, 1)); got != want {
			t.Errorf("at %v bytes a second: pieces of %d bytes", limit, got)
		}
	}
	if ship.PieceBytes(nil) != wire.PieceMax {
		t.Error("without a limit: small pieces")
	}
}

func (p *pair) tryHello(t *testing.T) error {
	_, err := p.c.Hello(t.Context())
	return err
}
