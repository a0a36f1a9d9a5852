package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// headerMax is the most bytes of a request's header; a path has about 200.
const headerMax = 16 << 10

type connectedKey struct{} // of a connection's context: when it was made

// Serve answers the connections of ln over TLS, and closes ln, until ctx ends.
// Then it takes no more requests, lets those that have begun go on for
// DrainTimeout, cuts their connections, and returns nil when the last one is
// through with the store. The configuration should ask for, and check, the
// client's certificate; Identity has the last word.
//
// It speaks HTTP/1.1 alone: one connection carries one piece at a time anyway,
// and is faster without HTTP/2's windows (BenchmarkPutLayer of package ship).
func (s *Server) Serve(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	conf = conf.Clone()
	conf.NextProtos = []string{"http/1.1"}
	var conns sync.WaitGroup
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: s.o.HeaderTimeout,
		IdleTimeout:       s.o.IdleTimeout,
		MaxHeaderBytes:    headerMax,
		Protocols:         new(http.Protocols),
		ErrorLog:          log.New(refused{s}, "", 0),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connectedKey{}, time.Now())
		},
		// New is said before Serve below returns, closed after the handler has
		// returned.
		ConnState: func(_ net.Conn, st http.ConnState) {
			switch st {
			case http.StateNew:
				conns.Add(1)
			case http.StateClosed:
				conns.Done()
			}
		},
	}
	srv.Protocols.SetHTTP1(true)
	drained := make(chan struct{})
	ending := context.AfterFunc(ctx, func() {
		defer close(drained)
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.o.DrainTimeout)
		defer cancel()
		_ = srv.Shutdown(limit) // what is left is cut below
	})
	err := srv.Serve(tls.NewListener(&limited{Listener: ln, s: s, open: make(chan struct{}, s.o.MaxConnections)}, conf))
	if ending() {
		ln.Close()
	} else {
		<-drained
	}
	srv.Close()
	conns.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// refused logs what net/http says of connections that brought no request: no TLS,
// another CA, no certificate.
type refused struct{ s *Server }

func (r refused) Write(line []byte) (int, error) {
	if n, say := r.s.refusals.now(r.s.o.LogEvery); say {
		r.s.o.Warn.Warn("a connection from another host came to nothing", "problem",
			strings.TrimPrefix(strings.TrimSpace(string(line)), "http: "), "times", n)
	}
	return len(line), nil
}

// limited is a listener that closes what is too much.
type limited struct {
	net.Listener
	s    *Server
	open chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.open <- struct{}{}:
			return &limitedConn{c, sync.OnceFunc(func() { <-l.open })}, nil
		default:
			if n, say := l.s.refusals.now(l.s.o.LogEvery); say {
				l.s.o.Warn.Warn("refused a connection from another host: too many", "address", c.RemoteAddr(), "limit", cap(l.open), "times", n)
			}
			c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
