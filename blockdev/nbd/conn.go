package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"afterimage/blockdev"
)

const (
	// maxInflight is how much memory a connection may hold before it stops
	// receiving, in bytes. One batch may go over it.
	maxInflight = maxPayload
	// maxRequests is how many requests a connection may have under way before
	// it stops receiving. One batch may go over it.
	maxRequests = 4096
)

// A conn is one client in transmission.
//
// Its loop (receive.go) is run by one goroutine at a time, which owns the
// fields of receiver. Replies go out by whoever finishes requests (send.go).
type conn struct {
	s      *Server
	export *Export
	disk   *disk
	queue  blockdev.Queue
	nc     net.Conn
	raw    syscall.RawConn // nil: nc is no plain socket
	fd     int32           // of raw, to poll; -1 without

	receiver
	loopWord atomic.Uint64 // odd while the loop is in Submit; only grows. See monitor.go
	taken    atomic.Int32  // loops taken away that are still in their Submit

	sendMu   sync.Mutex
	out      sender
	readable func(fd uintptr) bool // readNow, bound once: it is passed on every call
	writable func(fd uintptr) bool // writeNow likewise

	inflight   atomic.Int64 // bytes of buffers held
	requests   atomic.Int64 // in batches that have not ended
	unfinished atomic.Int64 // given to the Queue and not completed
	batches    sync.WaitGroup
	goroutines sync.WaitGroup

	// room is signalled when a batch has ended while waiting is set.
	room    chan struct{}
	waiting atomic.Bool

	// gone: the client is dead, nothing more may begin for it. Set before
	// whoever learns of it goes on, and never cleared.
	gone     atomic.Bool
	stopping atomic.Bool   // receive no more, finish what has begun
	quit     chan struct{} // closed when either is set
	quitOnce sync.Once
	why      error // guarded by quitOnce: what gone was set for

	loopEnded chan struct{} // closed by the loop's last owner, which has set endErr
	endErr    error         // nil: the client said goodbye, or we were told to stop
	complain  sync.Once
	ended     chan struct{} // closed when nothing of the connection is left
}

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{
		s:         s,
		nc:        nc,
		fd:        -1,
		room:      make(chan struct{}, 1),
		quit:      make(chan struct{}),
		loopEnded: make(chan struct{}),
		ended:     make(chan struct{}),
	}
	// Others may do more in Read and Write than the system call.
	switch sock := nc.(type) {
	case *net.TCPConn:
		c.raw, _ = sock.SyscallConn()
	case *net.UnixConn:
		c.raw, _ = sock.SyscallConn()
	}
	if c.raw != nil {
		c.raw.Control(func(fd uintptr) { c.fd = int32(fd) })
	}
	c.readable, c.writable = c.readNow, c.writeNow
	return c
}

// transmit serves the client until it leaves, it is told to stop, or the
// connection breaks, and returns when nothing of it is left.
func (c *conn) transmit() error {
	c.s.watch(c)
	c.loop()
	<-c.loopEnded
	c.batches.Wait()
	c.s.unwatch(c)
	c.nc.Close()
	c.goroutines.Wait()
	c.dropReceive()
	return c.endErr
}

// stop makes the connection end when what has begun is answered.
func (c *conn) stop() {
	c.stopping.Store(true)
	c.quitOnce.Do(func() { close(c.quit) })
	c.nc.SetReadDeadline(time.Unix(1, 0)) // wakes the loop
}

// hangUp notes that the client is dead: what has not begun will not.
func (c *conn) hangUp(err error) {
	c.gone.Store(true)
	c.quitOnce.Do(func() {
		c.why = err
		close(c.quit)
	})
}

// kill ends the connection without answering.
func (c *conn) kill(err error) {
	c.hangUp(err)
	c.nc.Close()
}

// newBuffer returns a buffer that counts as this connection's.
func (c *conn) newBuffer(n int) *buffer {
	buf := newBuffer(n)
	c.inflight.Add(buf.size())
	return buf
}

func (c *conn) dropBuffer(buf *buffer) {
	size := buf.size() // not ours any more after drop
	if buf.drop() {
		c.inflight.Add(-size)
	}
}

// crowded reports that the connection must not receive more for now.
func (c *conn) crowded() bool {
	return c.inflight.Load() >= maxInflight || c.requests.Load() >= maxRequests
}

// waitRoom returns when the connection may receive more, or false when it is to
// end instead.
func (c *conn) waitRoom() bool {
	if !c.crowded() {
		return true
	}
	c.waiting.Store(true)
	defer c.waiting.Store(false)
	for c.crowded() {
		select {
		case <-c.room:
		case <-c.quit:
			return false
		}
	}
	return true
}

// batchDone counts a batch of n requests that has ended.
func (c *conn) batchDone(n int64) {
	c.requests.Add(-n)
	if c.waiting.Load() {
		select {
		case c.room <- struct{}{}:
		default:
		}
	}
	c.batches.Done()
}

// diskFailed says once per connection that the disk, not the client, is at fault.
func (c *conn) diskFailed(r *blockdev.Request) {
	switch wireError(r) {
	case wireIO, wireNOMEM:
	case wireNOSPC:
		if errors.Is(r.Err, blockdev.ErrBounds) {
			return
		}
	default:
		return
	}
	c.complain.Do(func() {
		c.s.log().Error("a request failed; further ones of this connection are not logged",
			"export", c.export.Name, "client", peerName(c.nc), "op", r.Op.String(), "off", r.Off, "len", r.Len, "err", r.Err)
	})
}

// protocolError is what a client did that ends its connection.
type protocolError struct{ what string }

func (e *protocolError) Error() string { return e.what }

// ended reports what is worth saying about the end of a connection: nothing if
// the client has just left.
func ended(err error) error {
	var bad *protocolError
	switch {
	case errors.As(err, &bad):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, context.Canceled):
		return nil
	}
	return err
}

// peerName is who is at the other end, for messages.
func peerName(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	if a := nc.LocalAddr(); a != nil {
		return "of " + a.String()
	}
	return "unknown"
}
