package nbd

import (
	"syscall"
	"unsafe"
)

const (
	// sendPieces is how many pieces one system call takes.
	sendPieces = 64
	// sendRounds is how many system calls who has finished a request spends on
	// a connection's replies before it leaves the rest to the connection.
	sendRounds = 4
)

// A piece is a stretch of a batch's replies that is ready to be sent.
type piece struct {
	batch    *batch
	from, to int32 // bytes of batch.out
	replies  int32 // how many lie in it
}

// sender is a connection's way out. Whoever has a reply puts it in line; the
// first to find nobody sending sends, for all that come meanwhile, as far as the
// socket takes it without waiting. When it takes no more, a goroutine of the
// connection goes on.
type sender struct {
	line    []piece // guarded by conn.sendMu
	sending bool    // guarded by conn.sendMu
	broken  bool    // guarded by conn.sendMu: the client gets no more replies

	// The rest belongs to whoever has set sending.
	now  []piece // taken from line
	done int     // pieces of now that are gone
	iov  [sendPieces]syscall.Iovec
	wait bool  // block until the socket takes more
	n    int   // bytes that the last call took
	err  error // its error
}

// send puts replies in line and sends what it can without blocking.
func (c *conn) send(pieces []piece) {
	c.sendMu.Lock()
	if c.out.broken {
		c.sendMu.Unlock()
		release(pieces)
		return
	}
	c.out.line = append(c.out.line, pieces...)
	if c.out.sending {
		c.sendMu.Unlock()
		return
	}
	c.out.sending = true
	c.sendMu.Unlock()
	if c.raw == nil {
		c.sendRest()
		return
	}
	for range sendRounds {
		if !c.nextLine() {
			return
		}
		if !c.sendRaw(false) {
			break
		}
	}
	c.sendRest()
}

// sendRest gives what is in line to a goroutine that may block.
func (c *conn) sendRest() {
	c.goroutines.Go(func() {
		for c.nextLine() {
			if c.raw != nil {
				c.sendRaw(true)
			} else {
				c.sendPlain()
			}
		}
	})
}

// nextLine takes what is in line if nothing is left of what was taken before.
// It reports false, and that nobody is sending, when there is nothing.
func (c *conn) nextLine() bool {
	o := &c.out
	if o.done < len(o.now) {
		return true
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	clear(o.now)
	o.now, o.line, o.done = o.line, o.now[:0], 0
	if len(o.now) == 0 {
		o.sending = false
		return false
	}
	return true
}

// sendRaw sends what was taken from the line, and reports false if the socket
// would have had to wait.
func (c *conn) sendRaw(wait bool) bool {
	o := &c.out
	for o.done < len(o.now) {
		o.wait = wait
		if err := c.raw.Write(c.writable); err != nil {
			o.err = err // closed; o.err may still say EAGAIN
		}
		switch o.err {
		case nil:
			c.sent(o.n)
		case syscall.EAGAIN:
			return false
		default:
			c.sendFailed(o.err)
		}
	}
	return true
}

// writeNow is called with the socket, to write to it once. It reports false to
// be called again when the socket takes more.
func (c *conn) writeNow(fd uintptr) bool {
	o := &c.out
	k := 0
	for _, p := range o.now[o.done:] {
		if k == len(o.iov) {
			break
		}
		b := p.batch.out[p.from:p.to]
		o.iov[k].Base = unsafe.SliceData(b)
		o.iov[k].SetLen(len(b))
		k++
	}
	var n uintptr
	var no syscall.Errno
	for {
		if k == 1 {
			n, _, no = syscall.Syscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(o.iov[0].Base)), uintptr(o.iov[0].Len))
		} else {
			n, _, no = syscall.Syscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&o.iov)), uintptr(k))
		}
		if no != syscall.EINTR {
			break
		}
	}
	clear(o.iov[:k])
	if no != 0 {
		o.n, o.err = 0, no
		return no != syscall.EAGAIN || !o.wait
	}
	o.n, o.err = int(n), nil
	return true
}

// sendPlain sends one piece through the connection's own Write.
func (c *conn) sendPlain() {
	p := c.out.now[c.out.done]
	n, err := c.nc.Write(p.batch.out[p.from:p.to])
	if err != nil {
		c.sendFailed(err)
		return
	}
	c.sent(n)
}

// sent takes n bytes off what was taken from the line.
func (c *conn) sent(n int) {
	o := &c.out
	for n > 0 {
		p := &o.now[o.done]
		if k := int(p.to - p.from); n < k {
			p.from += int32(n)
			return
		} else {
			n -= k
		}
		o.done++
		p.batch.release(p.replies)
		p.batch = nil
	}
}

// sendFailed ends the sending for good: the client does not hear us any more.
func (c *conn) sendFailed(err error) {
	o := &c.out
	c.sendMu.Lock()
	o.broken = true
	line := o.line
	o.line = nil
	c.sendMu.Unlock()
	c.hangUp(err)
	release(o.now[o.done:])
	o.done = len(o.now)
	release(line)
}

// release forgets replies that will not be sent.
func release(pieces []piece) {
	for i := range pieces {
		pieces[i].batch.release(pieces[i].replies)
		pieces[i].batch = nil
	}
}
