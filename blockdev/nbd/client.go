package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"afterimage/blockdev"
)

// A Client is a disk that an NBD server exports. Any number of goroutines may
// have requests under way on its one connection.
//
// What the server lacks is made up for where that is possible: FUA by a flush,
// zeroing by writing zeroes. A trim is a zeroing, or nothing: what a trimmed
// range holds is undefined by the protocol, and a Device must know.
//
// A server without a flush gives no way to make a write durable, whatever it
// does by itself. Flush then fails once anything was written through the
// Client, and FUA always: a success would be a guess about somebody's data.
//
// When the connection breaks, all requests under way fail, and all later ones.
type Client struct {
	nc      net.Conn
	info    blockdev.Info
	offer   offer
	written atomic.Bool // something was written through this Client

	// sendMu is held while the requests of one Do are sent. It is taken before
	// mu.
	sendMu sync.Mutex
	heads  []byte      // headers of the requests being sent
	bufs   net.Buffers // headers and payloads, in the order of the wire
	bufMem [][]byte    // memory of bufs

	mu     sync.Mutex
	slots  []*part  // requests under way; the index is in their cookie
	free   []uint32 // indices of slots that hold nil
	uses   uint32   // counts cookies, so that a stale one is noticed
	err    error    // why no more can be sent; nil: all is well
	closed chan struct{}
}

// Options say how to use an export.
type Options struct {
	// ReadOnly refuses all changes, also where the server would take them.
	ReadOnly bool
}

// Dial connects to the export that the URI names; see URI for its form. Without
// a deadline in ctx it takes at most 30 seconds. The error wraps ErrNoExport if
// the server does not have it.
func Dial(ctx context.Context, uri string, o Options) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	nc, offer, err := connect(ctx, u)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", u, err)
	}
	return newClient(nc, u.String(), offer, o), nil
}

// newClient is the disk called name, which a server has offered on nc.
func newClient(nc net.Conn, name string, offer offer, o Options) *Client {
	if offer.flags&flagHasFlags == 0 {
		offer.flags = 0
	}
	c := &Client{nc: nc, offer: offer, closed: make(chan struct{})}
	c.info = blockdev.Info{
		Name:       name,
		ReadOnly:   o.ReadOnly || c.can(flagReadOnly),
		BlockSize:  int64(offer.least),
		MemAlign:   1,
		Preferred:  int64(offer.preferred),
		Slow:       true,
		CheapZero:  c.can(flagSendWriteZeroes),
		CheapTrim:  c.can(flagSendWriteZeroes),
		Rotational: c.can(flagRotational),
	}
	go func() {
		defer close(c.closed)
		c.receive()
	}()
	return c
}

func (c *Client) can(f uint16) bool { return c.offer.flags&f != 0 }

// Info implements blockdev.Device.
func (c *Client) Info() blockdev.Info { return c.info }

// Size implements blockdev.Device. It is what the server said at first.
func (c *Client) Size() int64 { return c.offer.size }

// Extents implements blockdev.Device. All is said to be data.
func (c *Client) Extents(off, length int64, visit func(blockdev.Run) bool) error {
	if off < 0 || length < 0 || off > c.offer.size || length > c.offer.size-off {
		return fmt.Errorf("%s: extents of %d bytes at %d: %w", c.info.Name, length, off, blockdev.ErrBounds)
	}
	if err := c.broken(); err != nil {
		return err
	}
	if length > 0 {
		visit(blockdev.Run{Extent: blockdev.Extent{Off: off, Len: length}})
	}
	return nil
}

// Resize implements blockdev.Device.
func (c *Client) Resize(int64) error {
	if err := c.broken(); err != nil {
		return err
	}
	return fmt.Errorf("%s: resize: %w", c.info.Name, blockdev.ErrNotSupported)
}

// Close implements blockdev.Device. Requests under way fail.
func (c *Client) Close() error {
	c.mu.Lock()
	if errors.Is(c.err, blockdev.ErrClosed) {
		c.mu.Unlock()
		return c.err
	}
	alive := c.err == nil
	c.err = fmt.Errorf("%s: %w", c.info.Name, blockdev.ErrClosed)
	c.mu.Unlock()
	// A goodbye is a courtesy: not worth waiting for one who is sending.
	if alive && c.sendMu.TryLock() {
		var b [requestSize]byte
		(&request{cmd: cmdDisc}).encode(b[:])
		c.nc.SetWriteDeadline(time.Now().Add(time.Second))
		c.nc.Write(b[:])
		c.sendMu.Unlock()
	}
	c.nc.Close()
	<-c.closed
	return nil
}

// Do implements blockdev.Device.
func (c *Client) Do(reqs []*blockdev.Request) {
	k := calls.Get().(*call)
	defer k.recycle()
	flush := false // some need a flush when they are done
	for _, r := range reqs {
		r.Done = blockdev.Extent{}
		if r.Err = c.check(r); r.Err != nil || r.Len == 0 && r.Op != blockdev.OpFlush {
			continue
		}
		switch {
		case r.Op == blockdev.OpFlush && !c.can(flagSendFlush):
			if c.written.Load() {
				r.Err = c.noFlush("flush")
			}
			continue
		case r.Op == blockdev.OpTrim && !c.can(flagSendWriteZeroes):
			continue
		case r.Op != blockdev.OpRead && r.Op != blockdev.OpFlush:
			c.written.Store(true)
		}
		if c.late(r) {
			flush = true
		}
		if r.Op == blockdev.OpTrim || r.Op == blockdev.OpWriteZeroes {
			c.zero(k, r)
		} else {
			c.split(k, r)
		}
	}
	c.run(k)
	for i := range k.parts {
		p := &k.parts[i]
		if p.cmd == cmdWriteZeroes {
			p.zeroed()
		}
		if p.err != nil && p.r.Err == nil {
			p.r.Err = c.failed(p.r, p.err)
		}
	}
	if flush {
		c.flushLate(k, reqs)
	}
}

// check says why r cannot be asked of the server.
func (c *Client) check(r *blockdev.Request) error {
	switch err := r.Check(&c.info, c.offer.size); {
	case err != nil:
		return fmt.Errorf("%s: %w", c.info.Name, err)
	case r.Op == blockdev.OpRead && r.Flags&blockdev.FlagNoWait != 0:
		return blockdev.ErrWouldBlock
	case r.Op == blockdev.OpWriteZeroes && r.Flags&blockdev.FlagFastZero != 0 && !c.can(flagSendFastZero):
		return fmt.Errorf("%s: fast zeroing: %w", c.info.Name, blockdev.ErrNotSupported)
	case fua(r) && !c.can(flagSendFUA) && !c.can(flagSendFlush):
		return c.noFlush("durable " + r.Op.String())
	}
	return c.broken()
}

// fua reports whether r is a change that must be durable when it returns.
func fua(r *blockdev.Request) bool {
	return r.Flags&blockdev.FlagFUA != 0 && r.Op != blockdev.OpRead && r.Op != blockdev.OpFlush
}

// late reports whether r is made durable by a flush after it.
func (c *Client) late(r *blockdev.Request) bool { return fua(r) && !c.can(flagSendFUA) }

func (c *Client) noFlush(what string) error {
	return fmt.Errorf("%s: %s: the server offers no way to make writes durable; serve the disk with one that has flush: %w",
		c.info.Name, what, blockdev.ErrNotSupported)
}

// failed is the error of a request that the server or the connection failed.
func (c *Client) failed(r *blockdev.Request, err error) error {
	var lost *lostError
	if errors.As(err, &lost) {
		return err // names the server already
	}
	if r.Op == blockdev.OpFlush {
		return fmt.Errorf("%s: flush: the server says: %w", c.info.Name, err)
	}
	return fmt.Errorf("%s: %s of %d bytes at %d: the server says: %w", c.info.Name, r.Op, r.Len, r.Off, err)
}

// flushLate makes durable what should have been at once.
func (c *Client) flushLate(k *call, reqs []*blockdev.Request) {
	flush := blockdev.Request{Op: blockdev.OpFlush}
	k.reset()
	c.split(k, &flush)
	c.run(k)
	err := k.parts[0].err
	for _, r := range reqs {
		if err != nil && r.Err == nil && c.late(r) {
			r.Err = c.failed(&flush, err)
			r.Done = blockdev.Extent{}
		}
	}
}
