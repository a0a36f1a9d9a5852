package ship_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
)

// A pair is a client and the host it asks, whose store is a fake, for faults.
type pair struct {
	ca   *servertest.CA
	fake *servertest.Fake
	host *servertest.Host
	line *servertest.Line
	c    *ship.Client
	id   wire.VMID
}

func newPair(t *testing.T, change func(*servertest.Options)) *pair {
	t.Helper()
	p := &pair{ca: servertest.NewCA(t), fake: &servertest.Fake{}, id: wire.NewVMID()}
	p.host = servertest.Serve(t, p.ca, p.fake, change)
	p.line = servertest.NewLine(t, p.host.Addr())
	p.c = ship.Dial(p.line.Addr(), p.ca.Config("a.example"))
	t.Cleanup(func() { _ = p.c.Close() })
	if _, err := p.c.Offer(t.Context(), p.id, anOffer()); err != nil {
		t.Fatal(err)
	}
	return p
}

func anOffer() wire.Offer {
	return wire.Offer{Name: "web", Disks: []wire.Disk{{Name: "root", Size: 1 << 30}}, Generation: 1, Term: 1}
}

func aPoint(epoch uint64, parent wire.PointID, layers ...string) wire.PointInfo {
	return wire.PointInfo{
		ID: wire.PointID{Generation: 1, Incarnation: 1, Epoch: epoch}, Parent: parent, Time: time.Unix(1, 0).UTC(), Kind: wire.KindCrash,
		Disks: []wire.PointDisk{{Disk: wire.Disk{Name: "root", Size: 1 << 30}, Layers: layers}},
	}
}

func TestClient(t *testing.T) {
	p, ctx := newPair(t, nil), t.Context()
	h, err := p.c.Hello(ctx)
	if err != nil || h.Name != "b.example" || h.You != "a.example" || !h.Allowed {
		t.Fatalf("%+v, %v", h, err)
	}
	data, digest := aLayer(3 << 20)
	if err := p.c.PutLayer(ctx, p.id, digest, data, data.Size(), ship.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	st, err := p.c.State(ctx, p.id)
	if err != nil || len(st.Layers) != 1 || !st.Layers[0].Complete {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := p.c.Discard(ctx, p.id, []string{digest}); err != nil {
		t.Fatal(err)
	}
	point := aPoint(1, wire.PointID{}, digest)
	for range 2 {
		if got, err := p.c.List(ctx, p.id, point); err != nil || got.ID != point.ID {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	// A layer that is listed is not sent again.
	sent := int64(0)
	if err := p.c.PutLayer(ctx, p.id, digest, data, data.Size(), ship.PutOptions{Sent: func(n int64) { sent += n }}); err != nil || sent > 0 {
		t.Fatalf("%d bytes, %v", sent, err)
	}
	ps, err := p.c.Points(ctx, p.id)
	if err != nil || len(ps) != 1 || ps[0].ID != point.ID || !ps[0].Time.Equal(point.Time) {
		t.Fatalf("%+v, %v", ps, err)
	}
	_, err = p.c.List(ctx, p.id, aPoint(3, wire.PointID{Generation: 1, Incarnation: 1, Epoch: 2}))
	var refused *wire.Error
	if !errors.As(err, &refused) || refused.Code != wire.CodeParent || refused.Newest != point.ID ||
		!strings.Contains(err.Error(), "list point 1.1.3") || !strings.Contains(err.Error(), p.line.Addr()) {
		t.Fatalf("%v", err)
	}

	ext := make([]blockdev.Extent, 2*wire.DigestsMax+1)
	for i := range ext {
		ext[i] = blockdev.Extent{Off: int64(i) << 20, Len: wire.DigestLenMax}
	}
	sums, err := p.c.Digests(ctx, p.id, point.ID, "root", ext)
	if err != nil || len(sums) != len(ext) {
		t.Fatalf("%d digests, %v", len(sums), err)
	}
	want := make([][32]byte, len(ext))
	if err := p.fake.Get(p.id).Digests(point.ID, "root", ext, want); err != nil {
		t.Fatal(err)
	}
	for i := range want {
		if sums[i] != want[i] {
			t.Fatalf("digest %d is that of another range", i)
		}
	}
	if sums, err := p.c.Digests(ctx, p.id, point.ID, "root", nil); err != nil || len(sums) != 0 {
		t.Fatalf("%v, %v", sums, err)
	}
	ext[0].Len++
	if _, err := p.c.Digests(ctx, p.id, point.ID, "root", ext); err == nil {
		t.Fatal("a range that is too long is asked for")
	}
	if p.host.Log() != "" {
		t.Errorf("the host logged: %s", p.host.Log())
	}
	_ = p.c.Close()
	if _, err := p.c.State(ctx, p.id); !errors.Is(err, ship.ErrClosed) {
		t.Errorf("a closed client: %v", err)
	}
}

// TestImpossibleAnswers: what a peer says is not taken on faith.
func TestImpossibleAnswers(t *testing.T) {
	ca := servertest.NewCA(t)
	ctx := t.Context()
	_, digest := aLayer(100)
	var answer func(http.ResponseWriter, *http.Request)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(wire.VersionHeader, "1")
		answer(w, r)
	}))
	srv.TLS = ca.Config("b.example")
	srv.StartTLS()
	defer srv.Close()
	c := ship.Dial(srv.Listener.Addr().String(), ca.Config("a.example"))
	defer c.Close()
	text := func(s string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, s) }
	}
	status := func(code int, version, s string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(wire.VersionHeader, version)
			if version == "" {
				w.Header().Del(wire.VersionHeader)
			}
			if code == http.StatusFound {
				w.Header().Set("Location", "https://"+srv.Listener.Addr().String()+"/")
			}
			w.WriteHeader(code)
			_, _ = io.WriteString(w, s)
		}
	}
	hello := func() error { _, err := c.Hello(ctx); return err }
	list := func() error { _, err := c.List(ctx, wire.VMID{}, aPoint(2, wire.PointID{})); return err }
	sums := func() error {
		_, err := c.Digests(ctx, wire.VMID{}, wire.PointID{}, "root", []blockdev.Extent{{Off: 0, Len: 512}})
		return err
	}
	data, _ := aLayer(100)
	put := func() error {
		return c.PutLayer(ctx, wire.VMID{}, digest, data, data.Size(), ship.PutOptions{})
	}
	const (
		impossible = iota
		unreachable
		version
	)
	for _, x := range []struct {
		name   string
		do     func() error
		answer func(http.ResponseWriter, *http.Request)
		kind   int
		says   string
	}{
		{"newer peer that refuses", hello, status(426, "2", `{"code":"version","error":"host b speaks version 2"}`), version, "speaks version 2"},
		{"newer peer that answers", hello, status(200, "2", `{}`), version, `version "2"`},
		{"older peer that answers", hello, status(200, "0", `{}`), version, `version "0"`},
		{"somebody else", hello, status(200, "", `{}`), unreachable, "not afterimage"},
		{"somebody else's redirect", hello, status(302, "", ``), unreachable, "not afterimage"},
		{"redirect", hello, status(302, "1", ``), unreachable, "302"},
		{"no content", hello, status(204, "1", ``), unreachable, "204"},
		{"error of another kind", hello, status(500, "1", `oops`), unreachable, "500"},
		{"error without code", hello, status(500, "1", `{}`), unreachable, "500"},
		{"garbage", hello, text("\x00"), impossible, "invalid"},
		{"garbage behind", hello, text(`{"version":1}{}`), impossible, "after top-level"},
		{"nothing", hello, text(""), impossible, "unexpected end"},
		{"long", hello, text(`{"name":"` + strings.Repeat("x", wire.BodyMax) + `"}`), unreachable, "longer than"},
		{"broken off", hello, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "{")
			panic(http.ErrAbortHandler)
		}, unreachable, "EOF"},
		{"another point", list, text(`{"id":"1.1.1","parent":"none"}`), impossible, "lists 1.1.1 instead"},
		{"no point", list, text(`{}`), impossible, "lists none instead"},
		{"too few digests", sums, text(strings.Repeat("x", 31)), impossible, "31 bytes for 1 digests"},
		{"too many digests", sums, text(strings.Repeat("x", 64)), impossible, "64 bytes"},
		{"another layer", put, text(`{"digest":"x"}`), impossible, `layer "x"`},
		{"more than there is", put, text(`{"digest":"` + digest + `","synced":101}`), impossible, "101 bytes"},
		{"less than nothing", put, text(`{"digest":"` + digest + `","synced":-1}`), impossible, "-1 bytes"},
		{"less than was sent", put, text(`{"digest":"` + digest + `","synced":50}`), impossible, "it has 50 of 100"},
		{"never complete", put, text(`{"digest":"` + digest + `","synced":100}`), impossible, "it has 100 of 100"},
		{"always elsewhere", put, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			status(409, "1", `{"code":"offset","error":"elsewhere","synced":0}`)(w, r)
		}, version + 1, "elsewhere"},
	} {
		answer = x.answer
		err := x.do()
		var un *ship.UnreachableError
		var refused *wire.Error
		kind := impossible
		switch {
		case errors.As(err, &un):
			kind = unreachable
		case errors.As(err, &refused) && refused.Code == wire.CodeVersion:
			kind = version
		case refused != nil:
			kind = version + 1
		}
		if err == nil || kind != x.kind || !strings.Contains(err.Error(), x.says) || !strings.Contains(err.Error(), c.Addr()) {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}

// TestUnreachable: a peer that cannot be asked is told from one that refuses, and
// the operator hears what to check.
func TestUnreachable(t *testing.T) {
	ca, other := servertest.NewCA(t), servertest.NewCA(t)
	soon, past := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	// Its own listener, so that nothing listens there any more.
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	for _, x := range []struct {
		name         string
		addr         string // "": a TLS server with
		server       *tls.Config
		client       *tls.Config
		says, advice string
	}{
		{"nobody", gone.Addr().String(), nil, ca.Config("a"), "refused", "--listen"},
		{"no port", "nothing", nil, ca.Config("a"), "missing port", "address"},
		{"no such name", "b.invalid.:1", nil, ca.Config("a"), "b.invalid", "check the"},
		{"plaintext", plain.Listener.Addr().String(), nil, ca.Config("a"), "TLS handshake", "port"},
		{"their CA", "", other.Config("b"), ca.Config("a"), "unknown authority", "one CA"},
		{"their name", "", ca.Config("b"), func() *tls.Config {
			conf := ca.Config("a")
			conf.ServerName = "c"
			return conf
		}(), "not c", "not for this name"},
		{"they have expired", "", ca.With(ca.Issue("b", past)), ca.Config("a"), "expired", "rotate"},
		// With TLS 1.3 the refusal of a client's certificate comes after the
		// handshake, perhaps behind the end of the connection.
		{"our CA", "", ca.Config("b"), func() *tls.Config {
			conf := ca.With(other.Issue("a", soon))
			conf.GetClientCertificate = always(conf.Certificates[0])
			return conf
		}(), "", "this host's certificate"},
		{"we have expired", "", ca.Config("b"), ca.With(ca.Issue("a", past)), "", "this host's certificate"},
		{"we have none", "", ca.Config("b"), ca.With(), "", "this host's certificate"},
	} {
		t.Run(x.name, func(t *testing.T) {
			addr := x.addr
			if addr == "" {
				srv := httptest.NewUnstartedServer(http.NotFoundHandler())
				srv.TLS = x.server
				srv.Config.ErrorLog = log.New(io.Discard, "", 0)
				srv.StartTLS()
				defer srv.Close()
				addr = srv.Listener.Addr().String()
			}
			c := ship.Dial(addr, x.client)
			defer c.Close()
			_, err := c.Hello(t.Context())
			var un *ship.UnreachableError
			if !errors.As(err, &un) || un.Addr != addr || !strings.Contains(err.Error(), "ask who is there: peer "+addr+" cannot be reached") || !strings.Contains(err.Error(), x.says) {
				t.Fatalf("%v", err)
			}
			if !strings.Contains(un.Hint(), x.advice) {
				t.Errorf("%v: %s", err, un.Hint())
			}
		})
	}
}

func always(cert tls.Certificate) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
}

// TestSilence: a peer that hangs is noticed; one that only takes its time, or is
// made to wait by this host, is not taken for it.
func TestSilence(t *testing.T) {
	t.Run("hung", func(t *testing.T) {
		t.Parallel() // they wait
		p := newPair(t, nil)
		p.c.SetSilence(50 * time.Millisecond)
		p.line.Kill()
		_, err := p.c.State(t.Context(), p.id)
		var un *ship.UnreachableError
		if !errors.As(err, &un) || !errors.Is(err, ship.ErrSilent) || !strings.Contains(un.Hint(), "line") {
			t.Errorf("%v", err)
		}
		data, digest := aLayer(100)
		if err := p.c.PutLayer(t.Context(), p.id, digest, data, data.Size(), ship.PutOptions{}); !errors.As(err, &un) {
			t.Errorf("%v", err)
		}
	})
	t.Run("hung in a piece", func(t *testing.T) {
		t.Parallel() // they wait
		p := newPair(t, nil)
		p.c.SetSilence(500 * time.Millisecond)
		data, digest := aLayer(wire.PieceMax)
		sent := int64(0)
		err := p.c.PutLayer(t.Context(), p.id, digest, data, data.Size(), ship.PutOptions{Sent: func(n int64) {
			if sent += n; sent > 100<<10 {
				p.line.Kill()
			}
		}})
		if !errors.As(err, new(*ship.UnreachableError)) {
			t.Errorf("%v", err)
		}
	})
	t.Run("slow", func(t *testing.T) {
		t.Parallel() // they wait
		p := newPair(t, func(o *servertest.Options) { o.PulseEvery = 10 * time.Millisecond })
		p.c.SetSilence(time.Second)
		p.fake.Fault = func(op string) error {
			if op == "list" {
				time.Sleep(2 * time.Second)
			}
			return nil
		}
		if _, err := p.c.List(t.Context(), p.id, aPoint(1, wire.PointID{})); err != nil {
			t.Error(err)
		}
	})
}

// TestCancel: the caller's context ends a request, whatever it waits for.
func TestCancel(t *testing.T) {
	p := newPair(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	in := make(chan bool)
	p.fake.Fault = func(op string) error {
		if op == "discard" {
			cancel()
			<-in
		}
		return nil
	}
	if err := p.c.Discard(ctx, p.id, nil); !errors.Is(err, context.Canceled) || errors.As(err, new(*ship.UnreachableError)) {
		t.Errorf("%v", err)
	}
	in <- true
	if _, err := p.c.State(ctx, p.id); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	late, stop := context.WithTimeout(t.Context(), time.Millisecond)
	defer stop()
	p.line.Kill()
	if _, err := p.c.State(late, p.id); !errors.Is(err, context.DeadlineExceeded) || errors.As(err, new(*ship.UnreachableError)) {
		t.Errorf("%v", err)
	}
}

// TestNotAllowed: what a host without permission hears.
func TestNotAllowed(t *testing.T) {
	ca, fake := servertest.NewCA(t), &servertest.Fake{}
	b := servertest.Serve(t, ca, fake, func(o *servertest.Options) {
		o.Allow = func(name string) (server.Grant, error) {
			return server.Grant{}, fmt.Errorf("%s: %w", name, server.ErrNotAllowed)
		}
	})
	c := ship.Dial(b.Addr(), ca.Config("a.example"))
	defer c.Close()
	h, err := c.Hello(t.Context())
	if err != nil || h.Allowed {
		t.Fatalf("%+v, %v", h, err)
	}
	_, err = c.Offer(t.Context(), wire.NewVMID(), anOffer())
	var refused *wire.Error
	if !errors.As(err, &refused) || refused.Code != wire.CodeNotAllowed || !strings.Contains(refused.Hint(), "peer allow a.example") || !strings.Contains(err.Error(), "offer VM web") {
		t.Errorf("%v", err)
	}
}

// TestHints: what an operator is told to check, by what went wrong.
func TestHints(t *testing.T) {
	op := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	for _, x := range []struct {
		err  error
		says string
	}{
		{op(&net.DNSError{Err: "no such host", Name: "b"}), "resolver"},
		{op(os.NewSyscallError("connect", syscall.ECONNREFUSED)), "--listen"},
		{op(os.NewSyscallError("connect", syscall.EHOSTUNREACH)), "address"},
		{op(os.ErrDeadlineExceeded), "firewalls"},
		{os.NewSyscallError("write", syscall.EPIPE), "broke"},
		{io.ErrUnexpectedEOF, "broke"},
		{x509.CertificateInvalidError{Reason: x509.Expired}, "rotate"},
		{x509.CertificateInvalidError{Reason: x509.NotAuthorizedToSign}, "cert show"},
		{tls.AlertError(42), "this host's certificate"},
		{tls.RecordHeaderError{Msg: "first record"}, "port"},
		{fmt.Errorf("tls: %w", &wire.Error{Advice: "as it says"}), "as it says"},
	} {
		if hint := (&ship.UnreachableError{Addr: "b:1", Err: x.err}).Hint(); !strings.Contains(hint, x.says) {
			t.Errorf("%v: %s", x.err, hint)
		}
	}
}
