package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"afterimage/blockdev"
)

const (
	// zeroMax is the most that one command zeroes, in bytes; lengths have 32
	// bits on the wire.
	zeroMax = 1<<32 - 64<<10
	// zeroWrites is how many writes of zeroes are under way at once where the
	// server cannot zero.
	zeroWrites = 8
	// replyBuffer is how much of the replies is received at once, in bytes. A
	// read that is longer is received where it belongs.
	replyBuffer = 64 << 10
)

// zeroes is never written to.
var zeroes [1 << 20]byte

// A part is what of a request goes over the wire as one command.
type part struct {
	request
	call *call
	r    *blockdev.Request
	buf  []byte // what is written, or where to read to
	err  error
}

// A call is the parts that one goroutine waits for.
type call struct {
	parts []part
	left  atomic.Int32  // parts that are not finished
	done  chan struct{} // room for one; filled with the last part
}

var calls = sync.Pool{New: func() any { return &call{done: make(chan struct{}, 1)} }}

func (k *call) reset() {
	clear(k.parts)
	k.parts = k.parts[:0]
}

func (k *call) recycle() {
	k.reset()
	calls.Put(k)
}

// add appends the command for a part of r.
func (k *call) add(r *blockdev.Request, cmd uint16, off, length int64, buf []byte) *part {
	h := request{cmd: cmd, off: uint64(off), length: uint32(length)}
	k.parts = append(k.parts, part{request: h, call: k, r: r, buf: buf})
	return &k.parts[len(k.parts)-1]
}

// split appends the commands for a read, write or flush, with at most longest
// bytes each.
func (c *Client) split(k *call, r *blockdev.Request) {
	if r.Op == blockdev.OpFlush {
		k.add(r, cmdFlush, 0, 0, nil)
		return
	}
	longest := int64(c.offer.longest)
	for at := int64(0); at < r.Len; at += longest {
		n := min(longest, r.Len-at)
		cmd := uint16(cmdRead)
		if r.Op == blockdev.OpWrite {
			cmd = cmdWrite
		}
		k.add(r, cmd, r.Off+at, n, r.Buf[at:at+n]).flags = c.wireFlags(r)
	}
}

// wireFlags are the command flags for r.
func (c *Client) wireFlags(r *blockdev.Request) (f uint16) {
	if fua(r) && c.can(flagSendFUA) {
		f |= cmdFlagFUA
	}
	switch r.Op {
	case blockdev.OpTrim:
		if c.can(flagSendFastZero) {
			f |= cmdFlagFastZero
		}
	case blockdev.OpWriteZeroes:
		if r.Flags&blockdev.FlagNoHole != 0 {
			f |= cmdFlagNoHole
		}
		if r.Flags&blockdev.FlagFastZero != 0 {
			f |= cmdFlagFastZero
		}
	}
	return f
}

// zero appends the command for a zeroing or trim, or performs it if one command
// is not enough.
func (c *Client) zero(k *call, r *blockdev.Request) {
	switch {
	case !c.can(flagSendWriteZeroes):
		c.writeZeroes(r)
	case r.Len <= zeroMax:
		k.add(r, cmdWriteZeroes, r.Off, r.Len, nil).flags = c.wireFlags(r)
	default:
		c.zeroLong(r)
	}
}

// zeroed notes the outcome of the one command of a zeroing or trim.
func (p *part) zeroed() {
	if p.r.Op != blockdev.OpTrim {
		return
	}
	if errors.Is(p.err, blockdev.ErrNotSupported) {
		p.err = nil // not cheap: left alone
	} else if p.err == nil {
		p.r.Done = p.r.Extent()
	}
}

// zeroLong zeroes piece by piece.
func (c *Client) zeroLong(r *blockdev.Request) {
	k := calls.Get().(*call)
	defer k.recycle()
	flags := c.wireFlags(r)
	for at := int64(0); at < r.Len; {
		n := min(zeroMax, r.Len-at)
		k.reset()
		k.add(r, cmdWriteZeroes, r.Off+at, n, nil).flags = flags
		c.run(k)
		err := k.parts[0].err
		switch {
		case errors.Is(err, blockdev.ErrNotSupported) && r.Op == blockdev.OpTrim:
			return // the rest is left alone
		case errors.Is(err, blockdev.ErrNotSupported) && at > 0 && flags&cmdFlagFastZero != 0:
			flags &^= cmdFlagFastZero // too late to say that nothing was touched
			continue
		case err != nil:
			r.Err = c.failed(r, err)
			r.Done = blockdev.Extent{}
			return
		}
		at += n
		if r.Op == blockdev.OpTrim {
			r.Done = blockdev.Extent{Off: r.Off, Len: at}
		}
	}
}

// writeZeroes writes zeroes where the server has no command for it.
func (c *Client) writeZeroes(r *blockdev.Request) {
	k := calls.Get().(*call)
	defer k.recycle()
	longest := min(int64(len(zeroes)), int64(c.offer.longest))
	for at := int64(0); at < r.Len; {
		k.reset()
		for len(k.parts) < zeroWrites && at < r.Len {
			n := min(longest, r.Len-at)
			k.add(r, cmdWrite, r.Off+at, n, zeroes[:n]).flags = c.wireFlags(r) & cmdFlagFUA
			at += n
		}
		c.run(k)
		for i := range k.parts {
			if err := k.parts[i].err; err != nil {
				r.Err = c.failed(r, err)
				return
			}
		}
	}
}

// lostError is a connection that broke.
type lostError struct {
	name string
	err  error
}

func (e *lostError) Error() string { return e.name + ": the connection is lost: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// broken says why nothing can be asked any more, nil if it can.
func (c *Client) broken() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// lose gives the connection up. The receiver then fails what is under way.
func (c *Client) lose(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = &lostError{c.info.Name, err}
	}
	c.mu.Unlock()
	c.nc.Close()
}

// run sends the parts of a call and waits until all are finished.
func (c *Client) run(k *call) {
	if len(k.parts) == 0 {
		return
	}
	k.left.Store(int32(len(k.parts)))
	c.mu.Lock()
	if err := c.err; err != nil {
		c.mu.Unlock()
		for i := range k.parts {
			k.parts[i].err = err
		}
		return
	}
	for i := range k.parts {
		c.enlistLocked(&k.parts[i])
	}
	c.mu.Unlock()
	if err := c.send(k.parts); err != nil {
		c.lose(err)
	}
	<-k.done
}

// enlistLocked gives a part a cookie by which its reply is known.
func (c *Client) enlistLocked(p *part) {
	if len(c.free) == 0 {
		c.free = append(c.free, uint32(len(c.slots)))
		c.slots = append(c.slots, nil)
	}
	i := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	c.slots[i] = p
	c.uses++
	p.cookie = uint64(c.uses)<<32 | uint64(i)
}

// delist returns the part with that cookie, nil if there is none.
func (c *Client) delist(cookie uint64) *part {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := uint32(cookie)
	if uint64(i) >= uint64(len(c.slots)) || c.slots[i] == nil || c.slots[i].cookie != cookie {
		return nil
	}
	p := c.slots[i]
	c.slots[i] = nil
	c.free = append(c.free, i)
	return p
}

// send writes the commands with as few system calls as possible.
func (c *Client) send(parts []part) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if need := len(parts) * requestSize; cap(c.heads) < need {
		c.heads = make([]byte, need)
	}
	heads := c.heads[:len(parts)*requestSize]
	bufs := c.bufMem[:0]
	from := 0 // heads[from:to] are not in bufs yet
	for i := range parts {
		p := &parts[i]
		to := (i + 1) * requestSize
		p.encode(heads[to-requestSize:])
		if p.cmd == cmdWrite {
			bufs = append(bufs, heads[from:to], p.buf)
			from = to
		}
	}
	if from < len(heads) {
		bufs = append(bufs, heads[from:])
	}
	c.bufMem = bufs
	c.bufs = bufs
	_, err := c.bufs.WriteTo(c.nc)
	clear(c.bufMem) // payloads must not be kept alive by an idle Client
	return err
}

// finish ends a part.
func (p *part) finish(err error) {
	p.err = err
	k := p.call // p is not ours any more when it was the last
	if k.left.Add(-1) == 0 {
		k.done <- struct{}{}
	}
}

// receive takes replies until the connection ends, then fails what is left.
func (c *Client) receive() {
	c.lose(c.receiveReplies())
	c.mu.Lock()
	slots, err := c.slots, c.err
	c.slots, c.free = nil, nil
	c.mu.Unlock()
	for _, p := range slots {
		if p != nil {
			p.finish(err)
		}
	}
}

// receiveReplies returns what ended it.
func (c *Client) receiveReplies() error {
	buf := make([]byte, replyBuffer)
	start, end := 0, 0 // buf[start:end] has come and is not looked at
	for {
		if start == end {
			start, end = 0, 0
		}
		if end-start < replySize {
			if len(buf)-start < replySize {
				end = copy(buf, buf[start:end])
				start = 0
			}
			n, err := c.nc.Read(buf[end:])
			if err != nil {
				return err
			}
			end += n
			continue
		}
		head := buf[start : start+replySize]
		start += replySize
		if binary.BigEndian.Uint32(head) != replyMagic {
			return errors.New("the server sent something that is no reply")
		}
		code := binary.BigEndian.Uint32(head[4:])
		p := c.delist(binary.BigEndian.Uint64(head[8:]))
		if p == nil {
			return errors.New("the server answered a request that was not made")
		}
		if code == wireOK && p.cmd == cmdRead {
			n := copy(p.buf, buf[start:end])
			start += n
			if _, err := io.ReadFull(c.nc, p.buf[n:]); err != nil {
				p.finish(&lostError{c.info.Name, fmt.Errorf("in the midst of a read: %w", err)})
				return err
			}
		}
		p.finish(fromWire(code))
	}
}
