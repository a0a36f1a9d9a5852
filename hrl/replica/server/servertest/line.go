package servertest

import (
	"net"
	"sync"
	"testing"
)

// A Line is a TCP proxy to a server. Connections can be cut when so many bytes
// have gone to the server over all of them.
type Line struct {
	ln net.Listener
	to string

	wg sync.WaitGroup

	// mu guards the rest.
	mu    sync.Mutex
	conns map[net.Conn]bool
	sent  int64
	cuts  []int64 // rising; what lies behind the first does not arrive
	every int64   // as many bytes after each cut comes another; 0: none
	made  int     // cuts so far
	dead  bool    // it takes connections, and carries nothing
}

// NewLine makes a line to the address.
func NewLine(t testing.TB, to string) *Line {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &Line{ln: ln, to: to, conns: map[net.Conn]bool{}}
	l.wg.Go(l.accept)
	t.Cleanup(l.close)
	return l
}

// Addr is where to connect to.
func (l *Line) Addr() string { return l.ln.Addr().String() }

// To changes where later connections lead.
func (l *Line) To(addr string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.to = addr
}

// CutAt cuts whenever the bytes sent from now on reach one of at.
func (l *Line) CutAt(at ...int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent, l.cuts, l.made = 0, at, 0
}

// CutEvery cuts after each n bytes.
func (l *Line) CutEvery(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent, l.cuts, l.every, l.made = 0, []int64{n}, n, 0
}

// CutNow cuts all there is.
func (l *Line) CutNow() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		c.Close()
	}
	l.made++
}

// Kill keeps connections, old and new ones, and carries nothing any more.
func (l *Line) Kill() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
}

// Cuts is how often it was cut since CutAt or CutEvery.
func (l *Line) Cuts() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.made
}

// Sent is how many bytes were sent to the server since then.
func (l *Line) Sent() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

func (l *Line) accept() {
	for {
		c, err := l.ln.Accept()
		if err != nil {
			return
		}
		l.mu.Lock()
		to := l.to
		l.mu.Unlock()
		s, err := net.Dial("tcp", to)
		if err != nil {
			c.Close()
			continue
		}
		l.mu.Lock()
		l.conns[c], l.conns[s] = true, true
		l.mu.Unlock()
		var both sync.WaitGroup
		both.Go(func() { l.carry(s, c, true) })
		both.Go(func() { l.carry(c, s, false) })
		l.wg.Go(func() {
			both.Wait()
			l.mu.Lock()
			defer l.mu.Unlock()
			delete(l.conns, c)
			delete(l.conns, s)
			c.Close()
			s.Close()
		})
	}
}

// carry copies until an end or a cut, which ends both directions.
func (l *Line) carry(to, from net.Conn, counted bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			pass, cut := l.pass(int64(n), counted)
			if _, werr := to.Write(buf[:pass]); werr != nil {
				return
			}
			if cut {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// pass says how much of n bytes goes through, and whether the line is cut then.
func (l *Line) pass(n int64, counted bool) (int64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return 0, false
	}
	if !counted {
		return n, false
	}
	if len(l.cuts) == 0 || l.sent+n < l.cuts[0] {
		l.sent += n
		return n, false
	}
	n = l.cuts[0] - l.sent
	l.sent = l.cuts[0]
	l.cuts = l.cuts[1:]
	if l.every > 0 {
		l.cuts = []int64{l.sent + l.every}
	}
	l.made++
	return n, true
}

func (l *Line) close() {
	l.ln.Close()
	l.mu.Lock()
	for c := range l.conns {
		c.Close()
	}
	l.mu.Unlock()
	l.wg.Wait()
}
