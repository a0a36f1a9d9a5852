package nbd

import (
	"fmt"
	"io"
	"syscall"
	"unsafe"

	"afterimage/blockdev"
)

const (
	// minRoom is how much of a receive buffer must be free for receiving into
	// it, in bytes.
	minRoom = 16 << 10
	// inPlace is the longest payload that is moved to a fresh receive buffer
	// when it has begun too late in the present one, in bytes. A longer one gets
	// memory of its own.
	inPlace = 64 << 10
	// lookahead is how much is received behind a large payload in the same
	// call, in bytes: enough for the headers that follow, not so much that the
	// next large payload begins in the wrong place.
	lookahead = 4096
)

// receiver is what the loop of a connection owns.
type receiver struct {
	in         *buffer // nil: nothing is received
	start, end int     // in.b[start:end] has come and is not parsed

	big    *buffer // memory for the payload of bigReq, which is on its way
	bigReq request
	bigGot int // bytes of it that are here

	iovIn [2]syscall.Iovec
	got   int   // bytes that the last call brought
	gotAt int64 // when, by blockdev.Monotonic
	err   error // its error
}

// loop receives, parses and submits until the connection ends or the monitor
// takes the loop away.
func (c *conn) loop() {
	for {
		more, mine := c.parse()
		if !mine {
			return
		}
		if more {
			more = c.receive()
		}
		if !more {
			// Requests of a client that is not there any more must not begin
			// after those of its next connection (rule A6).
			if c.endErr != nil {
				c.hangUp(c.endErr)
			}
			close(c.loopEnded)
			return
		}
	}
}

// fail says why the loop is to end, nil for a client that has to go unheard;
// always false.
func (c *conn) fail(err error) bool {
	if c.stopping.Load() {
		err = nil
	}
	c.endErr = err
	return false
}

// parse submits all requests that are complete. It reports whether there may
// be more of them, and whether the loop is still the caller's.
func (c *conn) parse() (more, mine bool) {
	var b *batch
	size := c.queue.Size()
	for {
		var h request
		var payload []byte
		var own *buffer
		switch {
		case c.big != nil:
			if c.bigGot < int(c.bigReq.length) {
				return true, c.submit(b)
			}
			h, own = c.bigReq, c.big
			payload = own.b[:h.length]
		case c.end-c.start < requestSize:
			return true, c.submit(b)
		default:
			if !h.decode(c.in.b[c.start:c.end]) {
				c.fail(&protocolError{"sent something that is no request"})
				return false, c.submit(b)
			}
			if h.cmd == cmdWrite {
				if h.length > maxPayload {
					c.fail(&protocolError{fmt.Sprintf("announced a write of %d bytes, more than the %d offered", h.length, maxPayload)})
					return false, c.submit(b)
				}
				total := requestSize + int(h.length)
				if c.end-c.start < total {
					if !c.submit(b) {
						return false, false
					}
					if c.start+total > len(c.in.b) && h.length > inPlace {
						if !c.waitRoom() {
							return c.fail(c.why), true
						}
						c.startBig(&h)
					}
					return true, true
				}
				payload = c.in.b[c.start+requestSize : c.start+total : c.start+total]
			}
		}

		if h.cmd == cmdDisc {
			return false, c.submit(b)
		}
		var carries int64
		if h.cmd == cmdRead && h.length <= maxPayload {
			carries = int64(h.length)
		}
		if b != nil && b.full(carries) {
			if !c.submit(b) {
				return false, false
			}
			b = nil
		}
		if b == nil {
			// A large payload that has arrived already counts, and may be all
			// that the connection is allowed.
			if own == nil && !c.waitRoom() {
				return c.fail(c.why), true
			}
			b = c.newBatch()
		}
		r := b.add(&h)
		switch {
		case own != nil:
			b.own, c.big = own, nil
		case payload != nil:
			if b.receive == nil {
				c.in.hold()
				b.receive = c.in
			}
			c.start += requestSize + len(payload)
		default:
			c.start += requestSize
		}
		if code, ask := c.accept(&h, r, size); ask {
			r.Buf = payload
			b.ask(r)
		} else {
			b.answer(r, code)
		}
	}
}

// accept fills in r from h and reports whether the Queue is to be asked; if
// not, code is the answer.
func (c *conn) accept(h *request, r *blockdev.Request, size int64) (code uint32, ask bool) {
	allowed := uint16(cmdFlagFUA) // without meaning for some, but never wrong
	switch h.cmd {
	case cmdRead:
		r.Op = blockdev.OpRead
		if h.length > maxPayload {
			return wireINVAL, false
		}
	case cmdWrite:
		r.Op = blockdev.OpWrite
	case cmdFlush:
		r.Op = blockdev.OpFlush
		if h.off != 0 || h.length != 0 {
			return wireINVAL, false
		}
	case cmdTrim:
		r.Op = blockdev.OpTrim
	case cmdWriteZeroes:
		r.Op = blockdev.OpWriteZeroes
		allowed |= cmdFlagNoHole | cmdFlagFastZero
	default:
		return wireINVAL, false
	}
	if h.flags&^allowed != 0 {
		return wireINVAL, false
	}
	if h.flags&cmdFlagFUA != 0 && r.Op != blockdev.OpRead && r.Op != blockdev.OpFlush {
		r.Flags |= blockdev.FlagFUA
	}
	if h.flags&cmdFlagNoHole != 0 {
		r.Flags |= blockdev.FlagNoHole
	}
	if h.flags&cmdFlagFastZero != 0 {
		r.Flags |= blockdev.FlagFastZero
	}
	if r.Op == blockdev.OpFlush {
		return 0, true
	}
	if c.export.ReadOnly && r.Op != blockdev.OpRead {
		return wirePERM, false
	}
	if h.off > uint64(size) || uint64(h.length) > uint64(size)-h.off {
		return boundsError(r.Op), false
	}
	if h.length == 0 {
		return wireOK, false // nothing to do, and done
	}
	return 0, true
}

// startBig gives the payload of h, of which the beginning may be here, memory of
// its own.
func (c *conn) startBig(h *request) {
	c.big = c.newBuffer(int(h.length))
	c.bigReq = *h
	c.bigGot = copy(c.big.b[:h.length], c.in.b[c.start+requestSize:c.end])
	c.start = c.end
}

func (c *conn) newBatch() *batch {
	b := batches.Get().(*batch)
	b.c = c
	return b
}

// submit gives a batch to the Queue, nil for none. It reports false if the loop
// was taken away meanwhile: then nothing of receiver is the caller's any more.
func (c *conn) submit(b *batch) bool {
	if b == nil {
		return true
	}
	c.batches.Add(1)
	c.requests.Add(int64(b.n))
	b.seal()
	if b.nfail > 0 {
		b.reply(b.failed[:b.nfail])
	}
	if b.ntodo == 0 {
		b.release(1)
		return true
	}
	// Counted first, then looked: whoever sets gone and then finds nothing
	// unfinished knows that nothing more begins (rule A6).
	c.unfinished.Add(int64(b.ntodo))
	if c.gone.Load() {
		for _, r := range b.todo[:b.ntodo] {
			r.Err = blockdev.ErrGone
		}
		b.Complete(b.todo[:b.ntodo])
		b.release(1)
		return true
	}
	c.s.wakeMonitor()
	before := c.loopWord.Load()
	c.loopWord.Store(before + 1)
	c.queue.Submit(b.todo[:b.ntodo])
	b.release(1)
	if c.loopWord.CompareAndSwap(before+1, before+2) {
		return true
	}
	c.taken.Add(-1)
	return false
}

// receive waits for more from the client and takes what there is, with one
// system call. It reports false when the connection is to end.
func (c *conn) receive() bool {
	c.makeRoom()
	var err error
	if c.raw != nil {
		if err = c.raw.Read(c.readable); err == nil {
			err = c.err
		}
	} else {
		c.got, err = c.nc.Read(c.target())
	}
	if err != nil {
		return c.fail(err)
	}
	if c.got == 0 {
		return c.fail(io.EOF)
	}
	c.gotAt = blockdev.Monotonic()
	if c.big != nil {
		n := min(c.got, int(c.bigReq.length)-c.bigGot)
		c.bigGot += n
		c.got -= n
	}
	c.end += c.got
	return true
}

// target is where the next bytes belong.
func (c *conn) target() []byte {
	if c.big != nil {
		return c.big.b[c.bigGot:c.bigReq.length]
	}
	c.needIn()
	return c.in.b[c.end:]
}

func (c *conn) needIn() {
	if c.in == nil {
		c.in = c.newBuffer(receiveSize)
		c.start, c.end = 0, 0
	}
}

// makeRoom sees to it that the request which has begun to arrive, or the next
// one, fits into what is left of the receive buffer.
func (c *conn) makeRoom() {
	if c.in == nil {
		return
	}
	rest := c.in.b[c.start:c.end]
	if len(rest) == 0 && c.in.alone() {
		c.start, c.end = 0, 0
		return
	}
	need := minRoom
	if len(rest) >= requestSize {
		// Its header is right and it is a write, or it would have been parsed.
		var h request
		h.decode(rest)
		need = requestSize + int(h.length)
	}
	if c.start+need <= len(c.in.b) {
		return
	}
	if c.in.alone() {
		c.end = copy(c.in.b, rest)
		c.start = 0
		return
	}
	old := c.in
	c.in = c.newBuffer(receiveSize)
	c.end = copy(c.in.b, rest)
	c.start = 0
	c.dropBuffer(old)
}

// readNow is called with the socket, to receive from it once. It reports false
// to be called again when something has come. An idle connection holds no
// buffer.
func (c *conn) readNow(fd uintptr) bool {
	c.needIn()
	var n uintptr
	var no syscall.Errno
	for {
		if c.big == nil {
			b := c.in.b[c.end:]
			n, _, no = syscall.Syscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		} else {
			b := c.big.b[c.bigGot:c.bigReq.length]
			c.iovIn[0].Base = unsafe.SliceData(b)
			c.iovIn[0].SetLen(len(b))
			b = c.in.b[c.end:]
			c.iovIn[1].Base = unsafe.SliceData(b)
			c.iovIn[1].SetLen(min(len(b), lookahead))
			n, _, no = syscall.Syscall(syscall.SYS_READV, fd, uintptr(unsafe.Pointer(&c.iovIn)), 2)
			clear(c.iovIn[:])
		}
		if no != syscall.EINTR {
			break
		}
	}
	switch no {
	case 0:
		c.got, c.err = int(n), nil
	case syscall.EAGAIN:
		if c.start == c.end && c.in.alone() {
			c.dropReceive()
		}
		return false
	default:
		c.got, c.err = 0, no
	}
	return true
}

// dropReceive lets go of the receiver's memory.
func (c *conn) dropReceive() {
	if c.in != nil {
		c.dropBuffer(c.in)
		c.in, c.start, c.end = nil, 0, 0
	}
}
