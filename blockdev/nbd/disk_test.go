package nbd

import (
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// TestSuccessor plays rule A6: the client writes 1, loses its connection, comes
// back and writes 2. The old write is still waiting its turn, and must not get
// it after the new one.
func TestSuccessor(t *testing.T) {
	q := newHeldQueue(memPool(1 << 20))
	s := quiet()
	add(t, s, Export{Name: "disk", Queue: q})
	add(t, s, Export{Name: "", Queue: q, Unlisted: true}) // the same disk
	socket := serve(t, s)
	old := transmission(t, socket, "disk")
	write(t, old, command(request{cmd: cmdWrite, cookie: 1, length: 1}, 1))
	testenv.Until(t, "the old write waits", func() bool { return q.held() == 1 })
	old.Close()

	next := dialSocket(t, socket)
	greet(t, next, 3)
	write(t, next, option(optGo, infoData("")))
	var owner blockdev.Completer
	q.mu.Lock()
	owner = q.kept[0].Owner
	q.mu.Unlock()
	testenv.Until(t, "the old write is called off", owner.Gone)
	q.release() // drops it, as it has not begun
	if list := replies(t, next, optGo); list[len(list)-1].kind != repAck {
		t.Fatalf("refused: %+v", list)
	}
	write(t, next, command(request{cmd: cmdWrite, cookie: 2, length: 1}, 2))
	wantReply(t, next, 2, wireOK)
	write(t, next, command(request{cmd: cmdRead, cookie: 3, length: 1}))
	if _, code, data := reply(t, next, 1); code != wireOK || data[0] != 2 {
		t.Errorf("error %d, content %v: the old write came last", code, data)
	}
}

// TestSuccessorWaits: what has begun for the dead connection ends first; if that
// takes too long the client is refused rather than served.
func TestSuccessorWaits(t *testing.T) {
	q := &hangingQueue{Queue: memPool(1 << 20), release: make(chan struct{})}
	s := quiet()
	s.SettleTimeout = 50 * time.Millisecond
	add(t, s, Export{Name: "disk", Queue: q})
	socket := serve(t, s)
	old := transmission(t, socket, "disk")
	write(t, old, command(request{cmd: cmdWrite, cookie: 1, length: 1}, 1))
	testenv.Until(t, "the old write hangs", func() bool { return q.inside.Load() == 1 })
	// Nothing is wrong with a second connection while the first is alive.
	alive(t, socket, "disk")
	old.Close()

	next := dialSocket(t, socket)
	greet(t, next, 3)
	write(t, next, option(optGo, infoData("disk")))
	if list := replies(t, next, optGo); list[0].kind != repErrPolicy {
		t.Fatalf("admitted while a dead connection's write is under way: %+v", list)
	}
	// The old way of asking cannot be told why.
	oldWay := dialSocket(t, socket)
	greet(t, oldWay, 3)
	write(t, oldWay, option(optExportName, []byte("disk")))
	wantEOF(t, oldWay)

	close(q.release)
	// The client that was refused may ask again.
	testenv.Until(t, "the client is admitted", func() bool {
		write(t, next, option(optGo, infoData("disk")))
		list := replies(t, next, optGo)
		return list[len(list)-1].kind == repAck
	})
	write(t, next, command(request{cmd: cmdWrite, cookie: 2, length: 1}, 2))
	wantReply(t, next, 2, wireOK)
}

// TestSuccessorOfThrottled: a dead connection that is over its bound, and so
// does not read, is noticed all the same.
func TestSuccessorOfThrottled(t *testing.T) {
	q := newHeldQueue(memPool(1 << 20))
	s := quiet()
	add(t, s, Export{Name: "disk", Queue: q})
	socket := serve(t, s)
	old := transmission(t, socket, "disk")
	go func() {
		for i := range uint64(2 * maxRequests) {
			old.Write(command(request{cmd: cmdWrite, cookie: i, length: 1}, 1))
		}
		old.Close()
	}()
	testenv.Until(t, "the old connection is full", func() bool { return q.held() >= maxRequests })
	old.Close()
	next := dialSocket(t, socket)
	greet(t, next, 3)
	write(t, next, option(optGo, infoData("disk")))
	q.mu.Lock()
	owner := q.kept[0].Owner
	q.mu.Unlock()
	testenv.Until(t, "the old writes are called off", owner.Gone)
	q.release()
	if list := replies(t, next, optGo); list[len(list)-1].kind != repAck {
		t.Fatalf("refused: %+v", list)
	}
}

// TestArrived: requests carry the time of their arrival.
func TestArrived(t *testing.T) {
	q := newHeldQueue(memPool(1 << 20))
	s := quiet()
	add(t, s, Export{Queue: q})
	nc := transmission(t, serve(t, s), "")
	// However long the server has slept.
	testenv.Until(t, "the monitor sleeps", s.asleep.Load)
	before := blockdev.Monotonic()
	write(t, nc, command(request{cmd: cmdWrite, cookie: 1, length: 1}, 1))
	testenv.Until(t, "the write waits", func() bool { return q.held() == 1 })
	q.mu.Lock()
	at := q.kept[0].Arrived
	q.mu.Unlock()
	if at < before || at > blockdev.Monotonic() {
		t.Errorf("arrived at %d, which is not between %d and now", at, before)
	}
	q.release()
	wantReply(t, nc, 1, wireOK)
}

// TestGoneBeforeSubmit: what was received of a dead client never reaches the disk.
func TestGoneBeforeSubmit(t *testing.T) {
	ours, theirs := socketPair(t)
	defer ours.Close()
	defer theirs.Close()
	c := newConn(quiet(), theirs)
	c.queue = newHeldQueue(memPool(1 << 20))
	c.hangUp(errSuperseded)
	b := c.newBatch()
	r := b.add(&request{cmd: cmdWrite, cookie: 5, length: 1})
	r.Op, r.Buf = blockdev.OpWrite, []byte{1}
	b.ask(r)
	if !c.submit(b) {
		t.Error("the loop is lost")
	}
	wantReply(t, ours, 5, wireSHUTDOWN)
	if n := c.queue.(*heldQueue).held(); n != 0 || c.unfinished.Load() != 0 {
		t.Errorf("%d requests were submitted, %d are unfinished", n, c.unfinished.Load())
	}
	c.batches.Wait()
}
