package nbd

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// hangingQueue hangs in Submit when a batch begins at an offset from hang on.
type hangingQueue struct {
	blockdev.Queue
	hang    int64
	inside  atomic.Int32
	release chan struct{}
}

func (q *hangingQueue) Submit(reqs []*blockdev.Request) {
	if r := reqs[0]; r.Op == blockdev.OpWrite && r.Off >= q.hang {
		q.inside.Add(1)
		<-q.release
		q.inside.Add(-1)
	}
	q.Queue.Submit(reqs)
}

// TestHandOff: a Submit that hangs holds up only its own batch.
func TestHandOff(t *testing.T) {
	q := &hangingQueue{Queue: memPool(1 << 20), hang: 512 << 10, release: make(chan struct{})}
	s := quiet()
	add(t, s, Export{Queue: q})
	nc := transmission(t, serve(t, s), "")
	const hung = 5
	for i := range uint64(hung) {
		write(t, nc, command(request{cmd: cmdWrite, cookie: i, off: 512<<10 + i*512, length: 512}, make([]byte, 512)...))
		testenv.Until(t, "the write hangs", func() bool { return q.inside.Load() == int32(i)+1 })
		// Others go on, large and small, in several batches.
		for k := range uint64(20) {
			cookie := 100 + i*100 + k
			write(t, nc, command(request{cmd: cmdWrite, cookie: cookie, off: k * 512, length: 512}, make([]byte, 512)...))
			wantReply(t, nc, cookie, wireOK)
		}
		write(t, nc, command(request{cmd: cmdWrite, cookie: 99, off: 0, length: 400 << 10}, make([]byte, 400<<10)...))
		wantReply(t, nc, 99, wireOK)
	}
	close(q.release)
	seen := make(map[uint64]bool)
	for range hung {
		cookie, code, _ := reply(t, nc, 0)
		if cookie >= hung || seen[cookie] || code != wireOK {
			t.Fatalf("request %d: error %d, seen %v", cookie, code, seen[cookie])
		}
		seen[cookie] = true
	}
	write(t, nc, command(request{cmd: cmdDisc}))
	wantEOF(t, nc)
}

// TestHandOffBounded: a connection does not pile up goroutines without end.
func TestHandOffBounded(t *testing.T) {
	q := &hangingQueue{Queue: memPool(1 << 20), release: make(chan struct{})}
	s := quiet()
	add(t, s, Export{Queue: q})
	nc := transmission(t, serve(t, s), "")
	sent := make(chan error, 1)
	go func() {
		for i := range uint64(maxTaken * 2) {
			// One batch each: the next is sent when this one hangs.
			if _, err := nc.Write(command(request{cmd: cmdWrite, cookie: i, off: i * 512, length: 512}, make([]byte, 512)...)); err != nil {
				sent <- err
				return
			}
			testenv.Until(t, "the write hangs, or waits", func() bool {
				return q.inside.Load() > min(int32(i), maxTaken)
			})
		}
		sent <- nil
	}()
	testenv.Until(t, "the loop is not taken any more", func() bool { return q.inside.Load() == maxTaken+1 })
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if n := q.inside.Load(); n != maxTaken+1 {
		t.Errorf("%d goroutines are in Submit", n)
	}
	close(q.release)
	for range maxTaken * 2 {
		if cookie, code, _ := reply(t, nc, 0); code != wireOK {
			t.Fatalf("request %d: error %d", cookie, code)
		}
	}
}

// TestHandOffRace takes loops all the time while several clients write.
func TestHandOffRace(t *testing.T) {
	q := &slowQueue{Queue: memPool(4 << 20)}
	s := quiet()
	add(t, s, Export{Queue: q})
	socket := serve(t, s)
	var clients sync.WaitGroup
	for n := range int64(4) {
		c := dial(t, socket, "")
		for k := range int64(8) {
			clients.Go(func() {
				off := n<<20 + k<<16
				for i := range 60 {
					b := make([]byte, 3000)
					for j := range b {
						b[j] = byte(i)
					}
					got := make([]byte, len(b))
					if err := blockdev.WriteAt(c, b, off); err != nil {
						t.Error(err)
						return
					}
					if err := blockdev.ReadAt(c, got, off); err != nil || string(got) != string(b) {
						t.Errorf("round %d: read back something else, %v", i, err)
						return
					}
				}
			})
		}
	}
	clients.Wait()
}

// slowQueue spends about as long in Submit as the monitor tolerates, sometimes.
type slowQueue struct {
	blockdev.Queue
	n atomic.Int64
}

func (q *slowQueue) Submit(reqs []*blockdev.Request) {
	if q.n.Add(1)%7 == 0 {
		time.Sleep(hungTicks * tick)
	}
	q.Queue.Submit(reqs)
}

// TestStuckReader: a client that reads no replies stops nobody else, and its own
// requests are bounded.
func TestStuckReader(t *testing.T) {
	s := quiet()
	mem := memPool(64 << 20)
	add(t, s, Export{Queue: mem})
	socket := serve(t, s)
	stuck := transmission(t, socket, "")
	go func() {
		for i := uint64(0); ; i++ {
			if _, err := stuck.Write(command(request{cmd: cmdRead, cookie: i, length: 4 << 20})); err != nil {
				return
			}
		}
	}()
	// The same few workers serve both.
	c := dial(t, socket, "")
	for i := range int64(200) {
		if err := blockdev.WriteAt(c, make([]byte, 4096), i*4096); err != nil {
			t.Fatal(err)
		}
	}
	s.mu.Lock()
	for conn := range s.watched {
		if n := conn.inflight.Load(); n > maxInflight+2*maxPayload {
			t.Errorf("a connection holds %d bytes", n)
		}
	}
	s.mu.Unlock()
	stuck.Close()
}

// TestStuckReaderRecovers: who reads late gets everything.
func TestStuckReaderRecovers(t *testing.T) {
	s := quiet()
	add(t, s, Export{Queue: memPool(64 << 20)})
	nc := transmission(t, serve(t, s), "")
	const n = 100
	go func() {
		for i := range uint64(n) {
			nc.Write(command(request{cmd: cmdRead, cookie: i, length: 4 << 20}))
		}
	}()
	var conn *conn
	testenv.Until(t, "the connection is watched", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for conn = range s.watched {
		}
		return conn != nil
	})
	testenv.Until(t, "the connection is full", func() bool { return conn.crowded() })
	for range n {
		if cookie, code, _ := reply(t, nc, 4<<20); code != wireOK {
			t.Fatalf("request %d: error %d", cookie, code)
		}
	}
}

// TestManyRequests has more under way than the connection admits.
func TestManyRequests(t *testing.T) {
	q := newHeldQueue(memPool(1 << 20))
	s := quiet()
	add(t, s, Export{Queue: q})
	nc := transmission(t, serve(t, s), "")
	const n = maxRequests * 2
	go func() {
		for i := range uint64(n) {
			nc.Write(command(request{cmd: cmdWrite, cookie: i, length: 1}, 1))
		}
	}()
	testenv.Until(t, "the connection is full", func() bool { return q.held() >= maxRequests })
	if h := q.held(); h > maxRequests+blockdev.BatchMax {
		t.Errorf("%d requests are under way", h)
	}
	q.release()
	seen := make([]bool, n)
	for range n {
		cookie, code, _ := reply(t, nc, 0)
		if code != wireOK || seen[cookie] {
			t.Fatalf("request %d: error %d, seen %v", cookie, code, seen[cookie])
		}
		seen[cookie] = true
	}
}

// TestManyConnections serves 2,000 clients at once, most of them idle.
func TestManyConnections(t *testing.T) {
	s, socket := testServer(t)
	n := 2000
	if raceEnabled {
		n = 500
	}
	conns := make([]net.Conn, n)
	for i := range conns {
		conns[i] = transmission(t, socket, "disk")
	}
	for i := range conns {
		write(t, conns[i], command(request{cmd: cmdFlush, cookie: uint64(i)}))
	}
	for i, nc := range conns {
		wantReply(t, nc, uint64(i), wireOK)
	}
	testenv.Until(t, "idle connections hold no buffers", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		var held int64
		for c := range s.watched {
			held += c.inflight.Load()
		}
		return held == 0
	})
	for _, nc := range conns {
		nc.Close()
	}
}

// TestStolenBuffers: memory that a Queue has kept is never used again.
func TestStolenBuffers(t *testing.T) {
	q := &thievingQueue{Queue: memPool(8 << 20)}
	s := quiet()
	add(t, s, Export{Queue: q})
	socket, stop := serveUntil(t, s)
	c := dial(t, socket, "")
	for i := range 300 {
		size := []int{512, 4096, 100 << 10, 300 << 10}[i%4]
		b := make([]byte, size)
		for j := range b {
			b[j] = byte(i)
		}
		if err := blockdev.WriteAt(c, b, 0); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	stop()
	for _, b := range q.kept {
		for _, x := range b.buf {
			if x != b.want {
				t.Fatalf("a stolen buffer was used again: %d, want %d", x, b.want)
			}
		}
	}
}

// thievingQueue keeps every third buffer.
type thievingQueue struct {
	blockdev.Queue
	n    int
	kept []struct {
		buf  []byte
		want byte
	}
}

func (q *thievingQueue) Submit(reqs []*blockdev.Request) {
	for _, r := range reqs {
		if q.n++; q.n%3 == 0 {
			r.Stolen = true
			q.kept = append(q.kept, struct {
				buf  []byte
				want byte
			}{r.Buf, r.Buf[0]})
		}
		r.Owner.Complete([]*blockdev.Request{r})
	}
}

// TestShutdown: what has begun is answered, then the connection ends; and a
// client that does not take its replies is cut.
func TestShutdown(t *testing.T) {
	q := newHeldQueue(memPool(16 << 20))
	s := quiet()
	s.DrainTimeout = patience
	add(t, s, Export{Queue: q})
	socket, stop := serveUntil(t, s)
	nc := transmission(t, socket, "")
	idle := transmission(t, socket, "")
	early := dialSocket(t, socket)
	write(t, nc, command(request{cmd: cmdWrite, cookie: 1, length: 4}, 1, 2, 3, 4))
	testenv.Until(t, "the write is under way", func() bool { return q.held() == 1 })
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		stop()
	}()
	wantEOF(t, idle)
	read(t, early, greetingSize)
	wantEOF(t, early)
	testenv.Until(t, "no more clients are accepted", func() bool {
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
		}
		return err != nil
	})
	q.release()
	wantReply(t, nc, 1, wireOK)
	wantEOF(t, nc)
	<-stopped
}

func TestShutdownCutsStuckClient(t *testing.T) {
	s := quiet()
	s.DrainTimeout = 10 * time.Millisecond
	add(t, s, Export{Queue: memPool(64 << 20)})
	socket, stop := serveUntil(t, s)
	nc := transmission(t, socket, "")
	write(t, nc, command(request{cmd: cmdRead, length: 32 << 20}))
	read(t, nc, replySize)
	stop() // returns although the rest is never read
}

func TestRemove(t *testing.T) {
	q := newHeldQueue(memPool(1 << 20))
	s := quiet()
	add(t, s, Export{Name: "disk", Queue: q})
	add(t, s, Export{Name: "other", Queue: memPool(1 << 20)})
	if err := s.Add(Export{Name: "disk", Queue: q}); err == nil {
		t.Error("the same name twice")
	}
	socket := serve(t, s)
	nc := transmission(t, socket, "disk")
	other := transmission(t, socket, "other")
	write(t, nc, command(request{cmd: cmdWrite, cookie: 1, length: 4}, 1, 2, 3, 4))
	testenv.Until(t, "the write is under way", func() bool { return q.held() == 1 })
	removed := make(chan error, 1)
	go func() { removed <- s.Remove(context.Background(), "disk") }()
	testenv.Until(t, "the export is gone", func() bool { return s.export([]byte("disk")) == nil })
	select {
	case <-removed:
		t.Error("Remove returns while a request is under way")
	default:
	}
	q.release()
	wantReply(t, nc, 1, wireOK)
	wantEOF(t, nc)
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if err := s.Remove(context.Background(), "disk"); err == nil {
		t.Error("removed twice")
	}
	write(t, other, command(request{cmd: cmdFlush, cookie: 2}))
	wantReply(t, other, 2, wireOK)
}
