package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"afterimage/blockdev"
)

// An Export is a disk with the name by which clients ask for it.
type Export struct {
	Name        string // at most 4096 bytes; empty: the default export
	Description string // for people, at most 4096 bytes
	// Queue is asked what the clients ask. It takes buffers of any alignment
	// and is comparable: a pointer. It may be exported under several names.
	Queue blockdev.Queue
	// ReadOnly refuses all changes, also where the Queue would take them.
	ReadOnly bool
	// Unlisted exports can be used but do not appear in the list.
	Unlisted bool
}

// A Server offers exports to NBD clients. Its zero value is ready; the fields
// must not change once it serves. Any number of Serve and ServeConn may run.
type Server struct {
	// Log is told about each client that misbehaves, one line; nil for slog.Default().
	Log *slog.Logger
	// HandshakeTimeout bounds the time until a client has chosen an export; 0
	// for 30 seconds.
	HandshakeTimeout time.Duration
	// DrainTimeout bounds how long, once it was told to end, a connection takes
	// to finish what has begun and to deliver the replies; 0 for 30 seconds.
	// After it the connection is cut.
	DrainTimeout time.Duration
	// SettleTimeout bounds how long a new connection waits for what dead ones
	// have begun on the same disk; 0 for 10 seconds. After it the client is
	// refused.
	SettleTimeout time.Duration
	// MaxConnections bounds how many connections are in transmission at a time;
	// 0: any number. One more is refused when it chooses its export. It is not
	// left to wait: a client that opens several may need them all.
	MaxConnections int

	mu      sync.Mutex
	exports map[string]*Export
	disks   map[blockdev.Queue]*disk
	watched map[*conn]*watch
	conns   int // ServeConns that run
	stats   ConnStats

	refusalSaid time.Time // when the log last heard of refusals
	unsaid      int       // refusals since

	stopMonitor chan struct{} // of the running monitor
	monitorDone chan struct{} // closed when the last one has ended
	asleep      atomic.Bool   // the monitor is
	wake        chan struct{} // room for one
}

func (s *Server) log() *slog.Logger {
	if s.Log != nil {
		return s.Log
	}
	return slog.Default()
}

func orDefault(d, otherwise time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return otherwise
}

func (s *Server) handshakeTimeout() time.Duration {
	return orDefault(s.HandshakeTimeout, 30*time.Second)
}
func (s *Server) drainTimeout() time.Duration  { return orDefault(s.DrainTimeout, 30*time.Second) }
func (s *Server) settleTimeout() time.Duration { return orDefault(s.SettleTimeout, 10*time.Second) }

// Add offers an export from now on.
func (s *Server) Add(e Export) error {
	if len(e.Name) > maxName || len(e.Description) > maxName {
		return fmt.Errorf("export %.40q...: name and description may have at most %d bytes", e.Name, maxName)
	}
	e.ReadOnly = e.ReadOnly || e.Queue.Info().ReadOnly
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[e.Name] != nil {
		return fmt.Errorf("export %q: there is one of that name already", e.Name)
	}
	if s.exports == nil {
		s.exports = make(map[string]*Export)
		s.disks = make(map[blockdev.Queue]*disk)
	}
	s.exports[e.Name] = &e
	if s.disks[e.Queue] == nil {
		s.disks[e.Queue] = &disk{queue: e.Queue, users: make(map[*conn]struct{})}
	}
	return nil
}

// Remove offers an export no longer. Its connections finish what has begun and
// are closed; those that have not ended when ctx is done are cut. When Remove
// returns, no request of the export is under way. The error says that there is
// no such export.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.mu.Lock()
	e := s.exports[name]
	if e == nil {
		s.mu.Unlock()
		return fmt.Errorf("export %q: %w", name, ErrNoExport)
	}
	delete(s.exports, name)
	d := s.disks[e.Queue]
	s.dropDiskLocked(d)
	var conns []*conn
	for c := range d.users {
		if c.export == e {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()

	for _, c := range conns {
		c.stop()
	}
	undo := onDone(ctx, func() {
		for _, c := range conns {
			c.kill(errEnding)
		}
	})
	for _, c := range conns {
		<-c.ended
	}
	undo()
	return nil
}

// Clients returns how many connections use an export, without those whose client
// has gone.
func (s *Server) Clients(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.exports[name]
	if e == nil {
		return 0
	}
	d := s.disks[e.Queue]
	over := d.over()
	n := 0
	for c := range d.users {
		if c.export == e && !slices.Contains(over, c) {
			n++
		}
	}
	return n
}

// onDone calls f on a goroutine of its own when ctx is done. undo, to be called
// once, reports whether it came before that; if not, f has returned.
func onDone(ctx context.Context, f func()) (undo func() bool) {
	returned := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(returned)
		f()
	})
	return func() bool {
		if stop() {
			return true
		}
		<-returned
		return false
	}
}

// listed returns the exports to be listed, by name.
func (s *Server) listed() []*Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*Export
	for _, name := range slices.Sorted(maps.Keys(s.exports)) {
		if e := s.exports[name]; !e.Unlisted {
			list = append(list, e)
		}
	}
	return list
}

// export returns the export of that name, nil if there is none.
func (s *Server) export(name []byte) *Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[string(name)]
}

// Serve accepts connections from ln and serves them until ctx is done or ln
// fails. It closes ln and returns when all its connections have ended, each as
// said at ServeConn; nil if it was ctx that ended it.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	undo := onDone(ctx, func() { ln.Close() })
	defer func() {
		if undo() {
			ln.Close()
		}
	}()
	var conns sync.WaitGroup
	defer conns.Wait()
	pause := time.Duration(0)
	for {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
			conns.Go(func() { s.ServeConn(ctx, nc) })
			continue
		case ctx.Err() != nil:
			return nil
		case !passing(err):
			return fmt.Errorf("accept connections on %s: %w", ln.Addr(), err)
		}
		// Out of descriptors, or the like: whoever is served goes on.
		pause = min(max(2*pause, 10*time.Millisecond), time.Second)
		s.log().Warn("cannot accept a connection; trying again", "err", err, "in", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// passing reports whether an error of Accept is about one connection or a
// shortage, not about the listener.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ServeConn serves one client until it leaves or ctx is done, closes nc and
// returns when nothing of it is under way. When ctx is done it receives no more,
// finishes what has begun, delivers the replies and ends, within DrainTimeout if
// the Queue lets it. A client's misbehaviour is logged and returned.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	if !s.enter() {
		nc.Close()
		s.refuse(nc)
		return errFull
	}
	defer s.exit()
	c := newConn(s, nc)
	err := s.serve(ctx, c)
	nc.Close()
	s.leave(c)
	close(c.ended)
	switch err = ended(err); {
	case errors.Is(err, errFull):
		s.refuse(nc)
	case err != nil:
		s.log().Warn("a client's connection ended", "client", peerName(nc), "err", err)
	}
	return err
}

func (s *Server) serve(ctx context.Context, c *conn) error {
	hs, cancel := context.WithTimeout(ctx, s.handshakeTimeout())
	defer cancel()
	// Nothing is owed to a client in the handshake.
	undo := onDone(hs, func() { c.nc.Close() })
	err := s.handshake(hs, c)
	switch intime := undo(); {
	case ctx.Err() != nil:
		return nil
	case !intime:
		return &protocolError{"took too long to choose an export"}
	case err != nil || c.export == nil:
		return err
	}

	var cut *time.Timer
	undo = onDone(ctx, func() {
		cut = time.AfterFunc(s.drainTimeout(), func() { c.kill(errEnding) })
		c.stop()
	})
	err = c.transmit()
	if !undo() {
		cut.Stop()
	}
	return err
}

// enter counts a connection; the first starts the monitor. False: there are too
// many even to talk to.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.MaxConnections > 0 && s.conns >= s.MaxConnections+maxKnocking {
		return false
	}
	s.conns++
	if s.conns > 1 {
		return true
	}
	if s.watched == nil {
		s.watched = make(map[*conn]*watch)
		s.wake = make(chan struct{}, 1)
	}
	stop, done, before := make(chan struct{}), make(chan struct{}), s.monitorDone
	s.stopMonitor, s.monitorDone = stop, done
	go func() {
		defer close(done)
		if before != nil {
			<-before
		}
		s.monitor(stop)
	}()
	return true
}

// exit takes a connection off the count; the last ends the monitor.
func (s *Server) exit() {
	s.mu.Lock()
	s.conns--
	if s.conns > 0 {
		s.mu.Unlock()
		return
	}
	close(s.stopMonitor)
	done := s.monitorDone
	s.mu.Unlock()
	<-done
}
