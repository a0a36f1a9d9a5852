package servertest

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"

	"afterimage/hrl/replica/server"
)

// A Host is a server that listens on loopback.
type Host struct {
	t    testing.TB
	conf func() Options
	addr string

	stop func() error
	log  log
}

// Options are the server's, and what a test needs to change beside them.
type Options = server.Options

// Serve starts the server of host b.example, which lets everybody replicate to
// the store. It ends with the test at the latest.
func Serve(t testing.TB, ca *CA, store server.Store, change func(*Options)) *Host {
	t.Helper()
	h := &Host{t: t, addr: "127.0.0.1:0"}
	h.conf = func() Options {
		o := Options{
			Identity: Identity, Name: "b.example", Product: "test", Warn: slog.New(slog.NewTextHandler(&h.log, nil)),
			Allow: func(string) (server.Grant, error) { return server.Grant{Store: store}, nil },
		}
		if change != nil {
			change(&o)
		}
		return o
	}
	h.Start(ca)
	t.Cleanup(func() { _ = h.Stop() })
	return h
}

// Start starts it again, at the same address.
func (h *Host) Start(ca *CA) {
	h.t.Helper()
	ln, err := net.Listen("tcp", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	srv, tlsConf, done := server.New(h.conf()), ca.Config("b.example"), make(chan error, 1)
	go func() { done <- srv.Serve(ctx, ln, tlsConf) }()
	h.stop = sync.OnceValue(func() error { cancel(); return <-done })
}

// Stop ends it, and returns what Serve did.
func (h *Host) Stop() error { return h.stop() }

// Addr is where it listens.
func (h *Host) Addr() string { return h.addr }

// Log is what it has logged.
func (h *Host) Log() string { return h.log.String() }

type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
