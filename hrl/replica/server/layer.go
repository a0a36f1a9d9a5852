package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"afterimage/hrl/wire"
)

var errSuperseded = errors.New("the same layer was asked for again, on another connection")

// layerState says how far a layer has come.
func layerState(q *request) (any, error) {
	v, err := q.mine()
	if err != nil {
		return nil, err
	}
	end, err := q.s.uploads.begin(q.r.Context(), uploadKey{q.vm, q.digest}, nil)
	if err != nil {
		return nil, err
	}
	defer end()
	for _, l := range v.State().Layers {
		if l.Digest == q.digest {
			return l, nil
		}
	}
	for _, p := range v.Points() {
		for _, d := range p.Disks {
			for _, l := range d.Layers {
				if l == q.digest {
					return wire.LayerState{Digest: l, Complete: true}, nil
				}
			}
		}
	}
	return wire.LayerState{Digest: q.digest}, nil
}

// stageLayer takes a piece of a layer.
func stageLayer(q *request) (any, error) {
	size, err := q.number("size")
	if err != nil {
		return nil, err
	}
	off, err := q.number("offset")
	if err != nil {
		return nil, err
	}
	switch n := q.r.ContentLength; {
	case n < 0:
		return nil, malformed("a piece of a layer without its length")
	case off > size || n > size-off:
		return nil, malformed("%d bytes at %d of a layer of %d", n, off, size)
	case n == 0 && off < size || size == 0:
		return nil, malformed("an empty piece at %d of a layer of %d bytes", off, size)
	}
	v, err := q.mine()
	if err != nil {
		return nil, err
	}
	b := q.bounded(q.r.ContentLength)
	end, err := q.s.uploads.begin(q.r.Context(), uploadKey{q.vm, q.digest}, b)
	if err != nil {
		return nil, err
	}
	defer end()
	st, err := v.StageLayer(q.digest, size, off, b)
	b.end()
	if broken := b.broken(); err != nil && broken != nil {
		return nil, &wire.Error{
			Code: wire.CodeBusy, Message: fmt.Sprintf("the piece at %d of layer %s broke off after %d bytes: %v", off, q.digest, b.n, broken),
			Advice: "ask where the layer goes on",
		}
	}
	if err != nil {
		return nil, fmt.Errorf("stage layer %s: %w", q.digest, err)
	}
	return st, nil
}

// number is a number of the query, which must be there.
func (q *request) number(name string) (int64, error) {
	s := q.r.URL.Query().Get(name)
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, malformed("%s=%.40q is no number of bytes", name, s)
	}
	return n, nil
}

// A body is the body of a request, read against deadlines.
type body struct {
	q     *request
	until time.Time // when all of it must be there
	n     int64     // bytes read; of the reading goroutine

	// mu guards the rest, and each change of the connection's read deadline while
	// the request may read from it.
	mu   sync.Mutex
	over bool  // nothing more is read
	err  error // why it broke off
}

// bounded returns the request's body, of which n bytes are wanted.
func (q *request) bounded(n int64) *body {
	q.body = &body{q: q, until: time.Now().Add(q.s.allowance(n))}
	return q.body
}

func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	switch {
	case b.err != nil:
		defer b.mu.Unlock()
		return 0, b.err
	case b.over:
		b.mu.Unlock()
		return 0, io.EOF
	}
	deadline := time.Now().Add(b.q.s.o.StallTimeout)
	if deadline.After(b.until) {
		deadline = b.until
	}
	_ = b.q.rc.SetReadDeadline(deadline) // a connection without deadlines has none
	b.mu.Unlock()

	n, err := b.q.r.Body.Read(p)
	b.n += int64(n)
	if err == nil {
		return n, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.err != nil:
	case err == io.EOF:
		b.over = true
		_ = b.q.rc.SetReadDeadline(time.Time{}) // the next request has deadlines of its own
		return n, err
	default:
		b.err = err
	}
	return n, b.err
}

// interrupt makes a read that waits, and all later ones, fail. It does nothing
// once the body was read to its end.
func (b *body) interrupt() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.over && b.err == nil {
		b.err = errSuperseded
		_ = b.q.rc.SetReadDeadline(time.Now())
	}
}

// end says that the store is through with it: there is nothing to interrupt any
// more. The deadline stays, unless all was read: net/http looks for the rest.
func (b *body) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
}

// broken says why the body broke off, if it did.
func (b *body) broken() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// drain reads what is left of a body that is no longer wanted, so that the other
// side, which may still be sending, hears the answer. What is longer than any body
// may be is left to net/http, which closes the connection.
func (q *request) drain() {
	if n := q.r.ContentLength; n == 0 || n > wire.PieceMax || q.body != nil && q.body.broken() != nil {
		return
	}
	b := q.bounded(wire.PieceMax)
	_, _ = io.CopyN(io.Discard, b, wire.PieceMax+1) // if it breaks off the answer is not heard
	b.end()
}

type uploadKey struct {
	vm     wire.VMID
	digest string
}

// uploads has the pieces that are being received. There is one of a layer at a
// time.
type uploads struct {
	mu sync.Mutex
	m  map[uploadKey]*upload
}

type upload struct {
	body *body
	done chan struct{} // closed when the store is through with it
}

// begin ends an older upload of the layer and waits until the store is through
// with it. With a body it enters it as the layer's upload, until the function it
// returns is called.
func (u *uploads) begin(ctx context.Context, key uploadKey, b *body) (func(), error) {
	for {
		u.mu.Lock()
		old := u.m[key]
		if old == nil {
			break
		}
		u.mu.Unlock()
		old.body.interrupt()
		select {
		case <-old.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	defer u.mu.Unlock()
	if b == nil {
		return func() {}, nil
	}
	if u.m == nil {
		u.m = map[uploadKey]*upload{}
	}
	mine := &upload{b, make(chan struct{})}
	u.m[key] = mine
	return func() {
		u.mu.Lock()
		delete(u.m, key)
		u.mu.Unlock()
		close(mine.done)
	}, nil
}
