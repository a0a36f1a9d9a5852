package server_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"

	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/wire"
)

func newServer(store server.Store) *server.Server {
	return server.New(server.Options{
		Identity: servertest.Identity, Name: "b.example",
		Allow: func(string) (server.Grant, error) { return server.Grant{Store: store}, nil },
	})
}

// A stuckPiece is a piece of which only the beginning is sent.
type stuckPiece struct {
	more *io.PipeWriter
	done chan struct{}
	code wire.Code
	err  error
}

func (h *host) stuck(path string, size int64, begin []byte) *stuckPiece {
	h.t.Helper()
	r, w := io.Pipe()
	p := &stuckPiece{more: w, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		defer r.Close()
		var resp *http.Response
		var b []byte
		resp, b, p.err = h.do("PUT", path, r, func(r *http.Request) { r.ContentLength = size })
		if p.err == nil && resp.StatusCode != http.StatusOK {
			p.code = codeOf(b)
		}
	}()
	if _, err := w.Write(begin); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// end sends no more and waits for the answer.
func (p *stuckPiece) end() error {
	p.more.Close()
	<-p.done
	return p.err
}

func codeOf(b []byte) wire.Code {
	_, rest, _ := strings.Cut(string(b), `"code":"`)
	code, _, _ := strings.Cut(rest, `"`)
	return wire.Code(code)
}

type setup struct {
	fake *servertest.Fake
	b    *servertest.Host
	ca   *servertest.CA
	a    *host
	vm   string // path
	id   wire.VMID
}

func start(t *testing.T, change func(*servertest.Options)) *setup {
	t.Helper()
	s := &setup{fake: &servertest.Fake{}, ca: servertest.NewCA(t), id: wire.NewVMID()}
	s.b = servertest.Serve(t, s.ca, s.fake, change)
	s.a = dial(t, s.b.Addr(), s.ca.Config("a.example"))
	s.vm = "/v1/vms/" + s.id.String()
	var st wire.VMState
	s.a.fine("PUT", s.vm, offerOf(1), &st)
	return s
}

func (s *setup) piece(digest string, size, off int) string {
	return fmt.Sprintf("%s/layers/%s?size=%d&offset=%d", s.vm, digest, size, off)
}

// TestSuperseded: a request for a layer ends an older one that hangs in it, and
// then knows exactly what has come.
func TestSuperseded(t *testing.T) {
	for _, with := range []string{"GET", "PUT"} {
		s := start(t, nil)
		data, digest := layer(100000)
		old := s.a.stuck(s.piece(digest, 100000, 0), 100000, data[:5000])
		s.fake.Get(s.id).WaitCame(digest, 5000)
		var l wire.LayerState
		if with == "GET" {
			s.a.fine("GET", s.vm+"/layers/"+digest, "", &l)
			if l.Synced != 5000 || l.Complete {
				t.Fatalf("%+v", l)
			}
		} else if e := s.a.refused("PUT", s.piece(digest, 100000, 0), strings.NewReader(string(data)), nil); e.Code != wire.CodeOffset || e.Synced != 5000 {
			t.Fatalf("%+v", e)
		}
		if err := old.end(); err == nil && old.code != wire.CodeBusy {
			t.Errorf("the old piece: %q", old.code)
		}
		s.a.fine("PUT", s.piece(digest, 100000, 5000), string(data[5000:]), &l)
		if !l.Complete {
			t.Fatalf("%+v", l)
		}
	}
}

// TestStalled: a host that stops in the middle of a piece is cut off, and what
// came of it is kept.
func TestStalled(t *testing.T) {
	s := start(t, func(o *servertest.Options) { o.StallTimeout = 200 * time.Millisecond })
	data, digest := layer(100000)
	old := s.a.stuck(s.piece(digest, 100000, 0), 100000, data[:5000])
	<-old.done
	if old.err == nil && old.code != wire.CodeBusy {
		t.Errorf("the piece: %q", old.code)
	}
	_ = old.end()
	var l wire.LayerState
	s.a.fine("GET", s.vm+"/layers/"+digest, "", &l)
	if l.Synced != 5000 {
		t.Errorf("%+v", l)
	}
}

// TestPieceSlots: one host may send so many pieces at a time; other requests, and
// other hosts, are not held up by them.
func TestPieceSlots(t *testing.T) {
	s := start(t, func(o *servertest.Options) { o.MaxPieces, o.BusyWait = 1, time.Millisecond })
	data, digest := layer(100000)
	old := s.a.stuck(s.piece(digest, 100000, 0), 100000, data[:5000])
	s.fake.Get(s.id).WaitCame(digest, 5000)
	small, second := layer(10)
	if e := s.a.refused("PUT", s.piece(second, 10, 0), strings.NewReader(string(small)), nil); e.Code != wire.CodeBusy {
		t.Fatalf("%+v", e)
	}
	var st wire.VMState
	s.a.fine("GET", s.vm, "", &st)
	c := dial(t, s.b.Addr(), s.ca.Config("c.example"))
	other := "/v1/vms/" + wire.NewVMID().String()
	c.fine("PUT", other, strings.Replace(offerOf(1), "web", "db", 1), &st)
	var l wire.LayerState
	c.fine("PUT", fmt.Sprintf("%s/layers/%s?size=10&offset=0", other, second), string(small), &l)
	if _, err := old.more.Write(data[5000:]); err != nil {
		t.Fatal(err)
	}
	if err := old.end(); err != nil || old.code != "" {
		t.Fatalf("%q, %v", old.code, err)
	}
	s.a.fine("PUT", s.piece(second, 10, 0), string(small), &l)
}

// TestRequestSlots: the same for all requests of a host.
func TestRequestSlots(t *testing.T) {
	s := start(t, func(o *servertest.Options) { o.MaxRequests, o.BusyWait = 1, time.Millisecond })
	in, out := make(chan bool), make(chan bool)
	s.fake.Fault = func(op string) error {
		if op == "discard" {
			in <- true
			<-out
		}
		return nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		var st wire.VMState
		s.a.fine("POST", s.vm+"/discard", "{}", &st)
	})
	<-in
	if e := s.a.refused("GET", s.vm, nil, nil); e.Code != wire.CodeBusy {
		t.Errorf("%+v", e)
	}
	out <- true
	wg.Wait()
	var st wire.VMState
	s.a.fine("GET", s.vm, "", &st)
}

// TestPulse: a request that takes its time gives signs of life, also while its
// body comes, and then its answer.
func TestPulse(t *testing.T) {
	s := start(t, func(o *servertest.Options) { o.PulseEvery = time.Millisecond })
	seen := make(chan int, 1000)
	trace := func(r *http.Request) {
		*r = *r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
				select {
				case seen <- code:
				default:
				}
				return nil
			},
		}))
	}
	s.fake.Fault = func(op string) error {
		if op == "discard" {
			for range 3 {
				if code := <-seen; code != http.StatusProcessing {
					t.Errorf("status %d", code)
				}
			}
		}
		return nil
	}
	resp, b, err := s.a.do("POST", s.vm+"/discard", strings.NewReader("{}"), trace)
	if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(b), "role") {
		t.Fatalf("%q, %v", b, err)
	}
	// Whoever waits for a "100 Continue" gets that.
	resp, b, err = s.a.do("POST", s.vm+"/digests", strings.NewReader(`{"point":"1.1.1","disk":"root","ranges":[[0,512]]}`), func(r *http.Request) {
		r.Header.Set("Expect", "100-continue")
	})
	if err != nil || resp.StatusCode != http.StatusOK || len(b) != 32 {
		t.Fatalf("%q, %v", b, err)
	}
	data, digest := layer(100000)
	r, w := io.Pipe()
	go func() {
		for _, b := range data[:300] {
			_, _ = w.Write([]byte{b})
		}
		_, _ = w.Write(data[300:])
		w.Close()
	}()
	resp, b, err = s.a.do("PUT", s.piece(digest, len(data), 0), r, func(r *http.Request) { r.ContentLength = int64(len(data)); trace(r) })
	if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(b), "true") {
		t.Fatalf("%q, %v", b, err)
	}
}

// TestOldSender: while the old sender's point is being listed a new one is not
// accepted, and afterwards the old one lists nothing (RULES K7).
func TestOldSender(t *testing.T) {
	s := start(t, nil)
	c := dial(t, s.b.Addr(), s.ca.Config("c.example"))
	accepted := make(chan bool, 1)
	var offer sync.WaitGroup
	s.fake.Fault = func(op string) error {
		switch op {
		case "accept":
			accepted <- true
		case "list":
			offer.Go(func() {
				var st wire.VMState
				c.fine("PUT", s.vm, offerOf(2), &st)
			})
			select {
			case <-accepted:
				t.Error("a new sender is accepted while the old one's point is being listed")
			case <-time.After(200 * time.Millisecond): // time enough to go wrong
			}
		}
		return nil
	}
	const point = `{"id":"1.1.1","parent":"none","time":"2026-01-02T03:04:05Z","kind":"crash","disks":[{"name":"root","size":1048576,"layers":[]}]}`
	var p wire.PointInfo
	s.a.fine("POST", s.vm+"/points", point, &p)
	offer.Wait()
	if e := s.a.refused("POST", s.vm+"/points", strings.NewReader(point), nil); e.Code != wire.CodeSender {
		t.Errorf("%+v", e)
	}
}

// TestSlowCheck: a piece's deadline is over with its last byte, however long the
// store then works on it.
func TestSlowCheck(t *testing.T) {
	s := start(t, func(o *servertest.Options) { o.StallTimeout = 100 * time.Millisecond })
	data, digest := layer(1000)
	s.fake.OnSynced = func(string, int64) { time.Sleep(300 * time.Millisecond) }
	var l wire.LayerState
	s.a.fine("PUT", s.piece(digest, 1000, 0), string(data), &l)
	if !l.Complete {
		t.Fatalf("%+v", l)
	}
	again := false
	_, _, err := s.a.do("GET", s.vm, nil, func(r *http.Request) {
		*r = *r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
			GotConn: func(i httptrace.GotConnInfo) { again = i.Reused },
		}))
	})
	if err != nil || !again {
		t.Errorf("the connection was not kept: %v", err)
	}
}
