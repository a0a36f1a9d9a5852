package server_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/wire"
)

// TestStrangers: who brings no good certificate, or no TLS, gets nothing, and the
// log one line.
func TestStrangers(t *testing.T) {
	ca := servertest.NewCA(t)
	b := servertest.Serve(t, ca, &servertest.Fake{}, func(o *servertest.Options) { o.LogEvery = time.Hour })
	for _, c := range []struct {
		name string
		conf *tls.Config
	}{
		{"other CA", func() *tls.Config {
			conf := servertest.NewCA(t).Config("a.example")
			conf.RootCAs = ca.With().RootCAs
			return conf
		}()},
		{"expired", ca.With(ca.Issue("a.example", time.Now().Add(-time.Hour)))},
		{"no certificate", ca.With()},
		{"old TLS", func() *tls.Config {
			conf := ca.Config("a.example")
			conf.MinVersion, conf.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return conf
		}()},
	} {
		if resp, _, err := dial(t, b.Addr(), c.conf).do("GET", "/v1/hello", nil, nil); err == nil {
			t.Errorf("%s: it was answered with status %d", c.name, resp.StatusCode)
		}
	}

	nc, err := net.Dial("tcp", b.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := io.WriteString(nc, "GET /v1/hello HTTP/1.1\r\nHost: b\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(nc), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), "HTTPS server") {
		t.Errorf("plaintext: status %d, %q", resp.StatusCode, body)
	}

	nc2, err := net.Dial("tcp", b.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer nc2.Close()
	if _, err := nc2.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, nc2) // until it is closed

	a := dial(t, b.Addr(), ca.Config("a.example"))
	var hello wire.Hello
	a.fine("GET", "/v1/hello", "", &hello)
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if log := b.Log(); strings.Count(log, "\n") != 1 || !strings.Contains(log, "TLS handshake error") {
		t.Errorf("it logged: %s", log)
	}
}

// TestTooManyConnections: they are closed, and room comes back.
func TestTooManyConnections(t *testing.T) {
	ca := servertest.NewCA(t)
	b := servertest.Serve(t, ca, &servertest.Fake{}, func(o *servertest.Options) { o.MaxConnections = 2 })
	var held []*tls.Conn
	for range 2 {
		nc, err := tls.Dial("tcp", b.Addr(), ca.Config("a.example"))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		held = append(held, nc)
	}
	nc, err := net.Dial("tcp", b.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if n, err := nc.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Fatal("a connection too many is not closed")
	}
	held[0].Close()
	a := dial(t, b.Addr(), ca.Config("a.example"))
	for { // the server hears of the end when it does
		if _, _, err := a.do("GET", "/v1/hello", nil, nil); err == nil {
			break
		}
	}
	if !strings.Contains(b.Log(), "too many") {
		t.Errorf("it logged: %s", b.Log())
	}
}

// TestDrain: at the end what has begun is answered, a host that is stuck is cut
// off, and nothing uses the store afterwards.
func TestDrain(t *testing.T) {
	ca, id := servertest.NewCA(t), wire.NewVMID()
	in, out := make(chan bool), make(chan bool)
	fake := &servertest.Fake{Fault: func(op string) error {
		if op == "discard" {
			in <- true
			<-out
		}
		return nil
	}}
	b := servertest.Serve(t, ca, fake, func(o *servertest.Options) { o.DrainTimeout = time.Hour })
	a := dial(t, b.Addr(), ca.Config("a.example"))
	var st wire.VMState
	vm := "/v1/vms/" + id.String()
	a.fine("PUT", vm, offerOf(1), &st)
	answered := make(chan int, 1)
	go func() {
		resp, _, err := a.do("POST", vm+"/discard", strings.NewReader("{}"), nil)
		if err != nil {
			t.Error(err)
			answered <- 0
			return
		}
		answered <- resp.StatusCode
	}()
	<-in
	ended := make(chan error, 1)
	go func() { ended <- b.Stop() }()
	for { // no new ones
		nc, err := net.Dial("tcp", b.Addr())
		if err != nil {
			break
		}
		nc.Close()
	}
	close(out)
	if st := <-answered; st != http.StatusOK {
		t.Errorf("status %d", st)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestDrainCuts(t *testing.T) {
	ca, fake, id := servertest.NewCA(t), &servertest.Fake{}, wire.NewVMID()
	b := servertest.Serve(t, ca, fake, func(o *servertest.Options) { o.DrainTimeout = time.Millisecond })
	a := dial(t, b.Addr(), ca.Config("a.example"))
	var st wire.VMState
	a.fine("PUT", "/v1/vms/"+id.String(), offerOf(1), &st)
	data, digest := layer(100000)
	p := a.stuck(fmt.Sprintf("/v1/vms/%s/layers/%s?size=100000&offset=0", id.String(), digest), 100000, data[:1000])
	fake.Get(id).WaitCame(digest, 1000)
	var kept atomic.Bool
	fake.OnSynced = func(string, int64) {
		time.Sleep(100 * time.Millisecond) // time enough for Serve to return too early
		kept.Store(true)
	}
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if !kept.Load() {
		t.Error("the server ended while the store was in use")
	}
	if err := p.end(); err == nil {
		t.Error("a piece that is stuck was answered")
	}
	if n := len(fake.Get(id).Layer(digest)); n > 1000 {
		t.Errorf("%d bytes came", n)
	}
}

// TestConnectionAge: an old connection is not used for ever.
func TestConnectionAge(t *testing.T) {
	ca := servertest.NewCA(t)
	b := servertest.Serve(t, ca, &servertest.Fake{}, func(o *servertest.Options) { o.ConnectionAge = time.Nanosecond })
	resp, _, err := dial(t, b.Addr(), ca.Config("a.example")).do("GET", "/v1/hello", nil, nil)
	if err != nil || !resp.Close {
		t.Errorf("the connection is kept: %v", err)
	}
	young := servertest.Serve(t, ca, &servertest.Fake{}, nil)
	if resp, _, err = dial(t, young.Addr(), ca.Config("a.example")).do("GET", "/v1/hello", nil, nil); err != nil || resp.Close {
		t.Errorf("the connection is not kept: %v", err)
	}
}

// TestServeFails: an error of the listener is returned.
func TestServeFails(t *testing.T) {
	ca := servertest.NewCA(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := newServer(&servertest.Fake{}).Serve(context.Background(), ln, ca.Config("b.example")); err == nil {
		t.Error("a closed listener is no error")
	}
}
