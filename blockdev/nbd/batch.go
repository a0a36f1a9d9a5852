package nbd

import (
	"sync"
	"sync/atomic"

	"afterimage/blockdev"
)

// batchReplies bounds what the replies of one batch take, in bytes, so that the
// first of many large reads need not wait for the last.
const batchReplies = 256 << 10

// A batch is up to blockdev.BatchMax requests of a connection that were given
// to its Queue together. It owns the memory they use and knows where each
// reply lies: all in one stretch, in the order of the requests, the data of a
// read right behind its header. It lives until the last reply is on the wire.
type batch struct {
	c *conn
	n int // requests

	reqs   [blockdev.BatchMax]blockdev.Request
	todo   [blockdev.BatchMax]*blockdev.Request // reqs that the Queue is given, then
	failed [blockdev.BatchMax]*blockdev.Request // reqs that never get there
	ntodo  int
	nfail  int

	cookie [blockdev.BatchMax]uint64
	code   [blockdev.BatchMax]uint32 // answers of failed
	slot   [blockdev.BatchMax]int32  // where the reply lies in out
	size   int                       // of out, in bytes

	out     []byte                              // the replies: in headers or in replies
	headers [blockdev.BatchMax * replySize]byte // enough if nothing is read
	replies *buffer                             // else
	receive *buffer                             // where the requests came in, if any has its payload there
	own     *buffer                             // the payload of a write too large for receive

	// left counts the replies not yet sent, and Submit while it runs: the
	// Queue may still look at todo when all are finished.
	left atomic.Int32
}

var batches = sync.Pool{New: func() any { return new(batch) }}

// full reports whether a request whose reply carries length bytes should go
// into the next batch.
func (b *batch) full(length int64) bool {
	return b.n == blockdev.BatchMax || b.n > 0 && length > 0 && int64(b.size)+length > batchReplies
}

// add puts a request in the batch and returns it to be filled in.
func (b *batch) add(h *request) *blockdev.Request {
	i := b.n
	b.n++
	b.cookie[i] = h.cookie
	b.slot[i] = int32(b.size)
	b.size += replySize
	r := &b.reqs[i]
	*r = blockdev.Request{
		Off:     int64(h.off),
		Len:     int64(h.length),
		Owner:   b,
		Cookie:  uint64(i),
		Arrived: b.c.gotAt,
	}
	return r
}

// ask says that the Queue is to be asked r.
func (b *batch) ask(r *blockdev.Request) {
	if r.Op == blockdev.OpRead {
		b.size += int(r.Len)
	}
	b.todo[b.ntodo] = r
	b.ntodo++
}

// answer says that r is answered with code without asking the Queue.
func (b *batch) answer(r *blockdev.Request, code uint32) {
	r.Len = 0
	b.code[r.Cookie] = code
	b.failed[b.nfail] = r
	b.nfail++
}

// seal makes room for the replies, when all requests are in.
func (b *batch) seal() {
	b.left.Store(int32(b.n) + 1)
	if b.size == b.n*replySize {
		b.out = b.headers[:b.size]
		return
	}
	b.replies = b.c.newBuffer(b.size)
	b.out = b.replies.b[:b.size]
	for _, r := range b.todo[:b.ntodo] {
		if r.Op == blockdev.OpRead {
			from := int64(b.slot[r.Cookie]) + replySize
			r.Buf = b.out[from : from+r.Len : from+r.Len]
		}
	}
}

// Complete implements blockdev.Completer.
func (b *batch) Complete(reqs []*blockdev.Request) {
	for _, r := range reqs {
		b.code[r.Cookie] = wireError(r)
		if r.Err != nil {
			b.c.diskFailed(r)
		}
		if r.Stolen {
			b.steal()
		}
	}
	c := b.c
	c.unfinished.Add(-int64(len(reqs)))
	b.reply(reqs)
}

// Gone implements blockdev.Completer.
func (b *batch) Gone() bool { return b.c.gone.Load() }

// steal leaves the batch's memory to the garbage collector.
func (b *batch) steal() {
	for _, buf := range []*buffer{b.receive, b.own, b.replies} {
		if buf != nil {
			buf.stolen.Store(true)
		}
	}
}

// reply sends the answers of reqs. Those that lie side by side go as one piece.
func (b *batch) reply(reqs []*blockdev.Request) {
	var pieces [blockdev.BatchMax]piece
	n := 0
	for _, r := range reqs {
		i := r.Cookie
		code := b.code[i]
		from := b.slot[i]
		to := from + replySize
		encodeReply(b.out[from:to], code, b.cookie[i])
		if code == wireOK && r.Op == blockdev.OpRead {
			to += int32(r.Len)
		}
		if n > 0 && pieces[n-1].to == from {
			pieces[n-1].to = to
			pieces[n-1].replies++
			continue
		}
		pieces[n] = piece{batch: b, from: from, to: to, replies: 1}
		n++
	}
	b.c.send(pieces[:n])
}

// release takes n off what is left, and with the last ends the batch.
func (b *batch) release(n int32) {
	if b.left.Add(-n) > 0 {
		return
	}
	c := b.c
	for _, p := range []**buffer{&b.receive, &b.own, &b.replies} {
		if *p != nil {
			c.dropBuffer(*p)
			*p = nil
		}
	}
	clear(b.reqs[:b.n]) // payloads must not be kept alive by an idle batch
	requests := int64(b.n)
	b.c, b.out = nil, nil
	b.n, b.ntodo, b.nfail, b.size = 0, 0, 0, 0
	batches.Put(b)
	c.batchDone(requests)
}
