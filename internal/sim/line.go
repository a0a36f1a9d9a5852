package sim

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"
)

var errLine = errors.New("the line is cut")

// A line connects the primary with the replica. What is sent arrives in order,
// or, after a cut, not at all.
type line struct {
	mu     sync.Mutex
	rng    *rand.Rand
	accept chan net.Conn // of the server that listens; nil: nobody does
	down   bool          // nobody is reached
	silent bool          // what is sent does not arrive, and nobody is told
	conns  map[*end]bool // one end of each connection: the primary's
	// cuts are after how many bytes, to the replica and back, the line is cut; 0: not.
	cuts [2]int64
	made int // how often it was cut in the middle of something
}

func newLine(seed uint64) *line {
	return &line{rng: rand.New(rand.NewPCG(seed, 0x11)), conns: map[*end]bool{}}
}

// dial connects a primary.
func (l *line) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	l.mu.Lock()
	to, down := l.accept, l.down
	l.mu.Unlock()
	if to == nil || down {
		return nil, errLine
	}
	up, back := newPipe(l, 0), newPipe(l, 1)
	a, b := &end{l: l, in: back, out: up}, &end{l: l, in: up, out: back}
	a.peer, b.peer = b, a
	select {
	case to <- b:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(time.Second):
		return nil, errLine
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[a] = true
	return a, nil
}

// cutNow cuts all connections.
func (l *line) cutNow() {
	l.mu.Lock()
	conns := l.conns
	l.conns = map[*end]bool{}
	l.mu.Unlock()
	for c := range conns {
		c.in.cut()
		c.out.cut()
	}
}

// cutAfter cuts all connections once so many bytes more have gone that way, 0 to
// the replica and 1 back.
func (l *line) cutAfter(way int, n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cuts[way] = n
}

func (l *line) set(down, silent bool) {
	l.mu.Lock()
	l.down, l.silent = down, silent
	conns := l.conns
	l.mu.Unlock()
	if down {
		l.cutNow()
	}
	if !silent {
		for c := range conns {
			c.in.wake()
			c.out.wake()
		}
	}
}

func (l *line) heal() {
	l.set(false, false)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cuts = [2]int64{}
}

// pass says how much of n bytes goes through that way, and whether the line is
// cut then.
func (l *line) pass(way, n int) (int, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &l.cuts[way]
	if *c == 0 {
		return n, false
	}
	if *c > int64(n) {
		*c -= int64(n)
		return n, false
	}
	n, *c = int(*c), 0
	l.made++
	return n, true
}

func (l *line) stalled() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.silent
}

// A pipe carries bytes one way. It never blocks who sends.
type pipe struct {
	l    *line
	way  int
	mu   sync.Mutex
	cond sync.Cond
	buf  []byte
	eof  bool // closed by who sends
	err  error
	late bool // the reader's deadline has passed
}

func newPipe(l *line, way int) *pipe {
	p := &pipe{l: l, way: way}
	p.cond.L = &p.mu
	return p
}

func (p *pipe) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cond.Broadcast()
}

func (p *pipe) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err, p.buf = errLine, nil
	p.cond.Broadcast()
}

func (p *pipe) write(b []byte) (int, error) {
	n, cut := p.l.pass(p.way, len(b))
	p.mu.Lock()
	err := p.err
	if p.eof && err == nil {
		err = net.ErrClosed
	}
	if err == nil {
		p.buf = append(p.buf, b[:n]...)
		p.cond.Broadcast()
	}
	p.mu.Unlock()
	if cut {
		// What was sent before arrives; who reads sees the cut behind it.
		time.AfterFunc(time.Millisecond, p.l.cutNow)
		return n, errLine
	}
	return len(b), err
}

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.late:
			return 0, os.ErrDeadlineExceeded
		case p.err != nil:
			return 0, p.err
		case len(p.buf) > 0 && !p.l.stalled():
			n := copy(b, p.buf)
			p.buf = p.buf[n:]
			return n, nil
		case p.eof && len(p.buf) == 0:
			return 0, io.EOF
		}
		p.cond.Wait()
	}
}

// An end is one end of a connection.
type end struct {
	l       *line
	in, out *pipe
	peer    *end

	mu    sync.Mutex
	timer *time.Timer
}

func (e *end) Read(b []byte) (int, error)  { return e.in.read(b) }
func (e *end) Write(b []byte) (int, error) { return e.out.write(b) }

func (e *end) Close() error {
	e.mu.Lock()
	if e.timer != nil {
		e.timer.Stop()
	}
	e.mu.Unlock()
	e.out.mu.Lock()
	e.out.eof = true
	e.out.cond.Broadcast()
	e.out.mu.Unlock()
	e.in.mu.Lock()
	if e.in.err == nil {
		e.in.err = net.ErrClosed
	}
	e.in.cond.Broadcast()
	e.in.mu.Unlock()
	e.l.mu.Lock()
	defer e.l.mu.Unlock()
	delete(e.l.conns, e)
	return nil
}

type addr struct{}

func (addr) Network() string { return "sim" }
func (addr) String() string  { return "127.0.0.1:1" }

func (e *end) LocalAddr() net.Addr  { return addr{} }
func (e *end) RemoteAddr() net.Addr { return addr{} }

func (e *end) SetDeadline(t time.Time) error      { return e.SetReadDeadline(t) }
func (e *end) SetWriteDeadline(t time.Time) error { return nil } // writing never blocks

func (e *end) SetReadDeadline(t time.Time) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
	set := func(late bool) {
		e.in.mu.Lock()
		defer e.in.mu.Unlock()
		e.in.late = late
		e.in.cond.Broadcast()
	}
	switch d := time.Until(t); {
	case t.IsZero():
		set(false)
	case d <= 0:
		set(true)
	default:
		set(false)
		e.timer = time.AfterFunc(d, func() { set(true) })
	}
	return nil
}

// A listener is the replica's.
type listener struct {
	l    *line
	c    chan net.Conn
	done chan struct{}
	once sync.Once
}

func (l *line) listen() *listener {
	ln := &listener{l: l, c: make(chan net.Conn), done: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accept = ln.c
	return ln
}

func (ln *listener) Accept() (net.Conn, error) {
	select {
	case c := <-ln.c:
		return c, nil
	case <-ln.done:
		return nil, net.ErrClosed
	}
}

func (ln *listener) Close() error {
	ln.once.Do(func() {
		ln.l.mu.Lock()
		if ln.l.accept == ln.c {
			ln.l.accept = nil
		}
		ln.l.mu.Unlock()
		close(ln.done)
	})
	return nil
}

func (ln *listener) Addr() net.Addr { return addr{} }
