package ship

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"afterimage/hrl/wire"
)

const (
	// pieceMin is the smallest piece that a limit makes, and pieceSeconds how long
	// one should take under it: a piece is synced over there when it ends.
	pieceMin     = 64 << 10
	pieceSeconds = 2
	// chunk is what is read, and taken from the limit, at a time.
	chunk = 32 << 10
	// triesMax is how often PutLayer tries again without the peer getting any
	// further; firstPause is before the first time, and four times as long before
	// each of the others.
	triesMax   = 3
	firstPause = 100 * time.Millisecond
)

// PutOptions of PutLayer.
type PutOptions struct {
	// Limit is taken from by the byte; nil: none. Its burst bounds what is sent at
	// once: 64 KiB is enough for any rate.
	Limit *rate.Limiter
	// Sent is told what was sent, also what must be sent again; it may be nil. It
	// is called from another goroutine, but not after PutLayer has returned.
	Sent func(n int64)
}

// PutLayer sends a layer, from where the peer has it, until the peer has checked
// all of it. It sends pieces, each in one request, and when one breaks off asks
// how much of it is durable over there and goes on.
// Nothing is read from f after it has returned, and little is held in memory.
func (c *Client) PutLayer(ctx context.Context, id wire.VMID, digest string, f io.ReaderAt, size int64, o PutOptions) error {
	step := "send layer " + digest
	if err := wire.CheckDigest(digest); err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	if size <= 0 {
		return fmt.Errorf("%s: a layer of %d bytes is impossible", step, size)
	}
	p := &put{c: c, step: step, path: vmPath(id) + "/layers/" + digest, digest: digest, f: f, size: size, o: o}
	var (
		at    int64       // where to go on, if known
		known bool        // the peer has said so since the last piece that broke off
		most  = int64(-1) // the furthest it has ever said
		tries int         // failures since then
	)
	for {
		var st wire.LayerState
		var err error
		if known {
			st, err = p.piece(ctx, at)
		} else {
			st, err = p.ask(ctx)
		}
		var refused *wire.Error
		var un *UnreachableError
		switch {
		case err == nil && st.Complete:
			return nil
		case err == nil:
			at, known = st.Synced, true
		case errors.As(err, &refused) && refused.Code == wire.CodeOffset && refused.Synced >= 0 && refused.Synced <= size:
			at, known = refused.Synced, true
			tries++
		case most >= 0 && (errors.As(err, &un) || refused != nil && refused.Code == wire.CodeBusy):
			known = false
			tries++
		default:
			return err
		}
		if known && at > most {
			most, tries = at, 0
		}
		if tries > triesMax {
			return err
		}
		if !known {
			c.pause(ctx, firstPause<<(2*(tries-1)))
		}
	}
}

// pause waits, or until the request that comes next would fail at once anyway.
func (c *Client) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-c.ctx.Done():
	}
}

// A put is a layer on its way.
type put struct {
	c          *Client
	step, path string
	digest     string
	f          io.ReaderAt
	size       int64
	o          PutOptions
}

// ask asks how much of the layer is durable over there.
func (p *put) ask(ctx context.Context) (wire.LayerState, error) {
	return p.state(p.c.send(ctx, p.step, http.MethodGet, p.path, nil))
}

// state checks what the peer says of the layer.
func (p *put) state(answer []byte, err error) (st wire.LayerState, _ error) {
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(answer, &st); err != nil {
		return st, p.c.impossible(p.step, "%v", err)
	}
	if st.Digest != p.digest || st.Synced < 0 || st.Synced > p.size {
		return st, p.c.impossible(p.step, "%d bytes of layer %.80q", st.Synced, st.Digest)
	}
	return st, nil
}

// piece sends what lies at byte at. With all of it over there already, it asks
// with an empty piece for the check of the whole.
func (p *put) piece(ctx context.Context, at int64) (wire.LayerState, error) {
	b := &pieceBody{p: p, off: at, end: at + min(p.size-at, pieceBytes(p.o.Limit))}
	url := fmt.Sprintf("%s?size=%d&offset=%d", p.path, p.size, at)
	answer, err := p.c.roundTrip(ctx, p.step, http.MethodPut, url, func(w *watch, r *http.Request) {
		if b.end > at {
			b.ctx, b.watch = r.Context(), w
			r.Body, r.ContentLength = b, b.end-at
		}
	})
	// The transport may still be at it.
	if local := b.finish(); err != nil && local != nil && ctx.Err() == nil && p.c.ctx.Err() == nil {
		return wire.LayerState{}, fmt.Errorf("%s: read it: %w", p.step, local)
	}
	st, err := p.state(answer, err)
	if err == nil && !st.Complete && (st.Synced != b.end || b.end == p.size) {
		err = p.c.impossible(p.step, "with the piece up to byte %d it has %d of %d", b.end, st.Synced, p.size)
	}
	return st, err
}

// pieceBytes is how much to send at once.
func pieceBytes(l *rate.Limiter) int64 {
	if l == nil || l.Limit() >= wire.PieceMax/pieceSeconds {
		return wire.PieceMax
	}
	return max(pieceMin, int64(l.Limit()*pieceSeconds))
}

// A pieceBody is the body of a piece's request.
type pieceBody struct {
	p     *put
	ctx   context.Context // of the request
	watch *watch
	end   int64

	// mu guards the rest. It is held while the layer is read, so that finish
	// waits for that.
	mu   sync.Mutex
	off  int64
	over bool
	err  error // of this host: the peer is not to blame
}

var errPieceOver = errors.New("the piece's request has ended")

func (b *pieceBody) Read(buf []byte) (int, error) {
	buf = buf[:min(len(buf), chunk)]
	b.mu.Lock()
	buf = buf[:min(int64(len(buf)), b.end-b.off)]
	b.mu.Unlock()
	if len(buf) == 0 {
		return 0, io.EOF
	}
	var limited error
	if l := b.p.o.Limit; l != nil && l.Limit() != rate.Inf {
		buf = buf[:min(len(buf), max(l.Burst(), 1))]
		b.watch.hold()
		limited = take(b.ctx, l, len(buf))
		b.watch.release()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over {
		return 0, errPieceOver
	}
	if limited != nil {
		b.err = limited
		return 0, limited
	}
	n, err := b.p.f.ReadAt(buf, b.off)
	b.off += int64(n)
	b.watch.alive()
	if n > 0 && b.p.o.Sent != nil {
		b.p.o.Sent(int64(n))
	}
	switch {
	case n == len(buf):
		return n, nil
	case err == nil || err == io.EOF:
		err = io.ErrUnexpectedEOF // shorter than it was said to be
	}
	b.err = err
	return n, err
}

// take waits until the limit lets n bytes through. Unlike WaitN it does not give
// up before the context does.
func take(ctx context.Context, l *rate.Limiter, n int) error {
	r := l.ReserveN(time.Now(), n)
	if !r.OK() {
		return fmt.Errorf("a limit with a burst of %d bytes lets nothing through", l.Burst())
	}
	t := time.NewTimer(r.Delay())
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		r.Cancel()
		return ctx.Err()
	}
}

// Close is the transport's.
func (b *pieceBody) Close() error { return nil }

// finish says that nothing more may be read, and what went wrong on this host.
func (b *pieceBody) finish() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	return b.err
}
