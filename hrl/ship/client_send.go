package ship

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strconv"
	"sync"
	"time"

	"afterimage/hrl/wire"
)

// send sends a request with a body in memory; nil: none.
func (c *Client) send(ctx context.Context, step, method, path string, body []byte) ([]byte, error) {
	return c.roundTrip(ctx, step, method, path, func(w *watch, r *http.Request) {
		if len(body) == 0 {
			return
		}
		r.Header.Set("Content-Type", "application/json")
		r.ContentLength = int64(len(body))
		r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(w.watched(bytes.NewReader(body))), nil }
		r.Body, _ = r.GetBody()
	})
}

// roundTrip sends one request and returns the whole answer. It is ended when the
// caller's context ends, when the client is closed, and when the peer gives no sign
// of life.
func (c *Client) roundTrip(ctx context.Context, step, method, path string, fill func(*watch, *http.Request)) ([]byte, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("%s: peer %s: %w", step, c.addr, err)
	}
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(ErrClosed) })()
	w := newWatch(c.silence, func() { cancel(&UnreachableError{c.addr, errSilent}) })
	defer w.end()

	answer, err := c.exchange(inner, w, method, path, fill)
	if err == nil {
		return answer, nil
	}
	// What ended the request says more than how it ended.
	if cause := context.Cause(inner); cause != nil {
		err = cause
	}
	var un *UnreachableError
	var refused *wire.Error
	switch {
	case errors.As(err, &un):
		return nil, fmt.Errorf("%s: %w", step, un)
	case errors.As(err, &refused), errors.Is(err, ErrClosed), ctx.Err() != nil:
		return nil, fmt.Errorf("%s: peer %s: %w", step, c.addr, err)
	}
	return nil, fmt.Errorf("%s: %w", step, &UnreachableError{c.addr, c.explain(err)})
}

func (c *Client) exchange(ctx context.Context, w *watch, method, path string, fill func(*watch, *http.Request)) ([]byte, error) {
	// Waiting for one of few connections is not the peer's silence, and making one
	// has a limit of its own.
	w.hold()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:        func(httptrace.GotConnInfo) { w.release() },
		Got1xxResponse: func(int, textproto.MIMEHeader) error { w.alive(); return nil },
	})
	if _, _, err := net.SplitHostPort(c.addr); err != nil { // or it would be port 443
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, method, "https://"+c.addr+path, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set(wire.VersionHeader, strconv.Itoa(wire.Version))
	// All requests may be repeated; an empty list says so to the transport, not to
	// the peer.
	r.Header["Idempotency-Key"] = []string{}
	fill(w, r)
	resp, err := c.transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	w.alive()
	theirs := resp.Header.Get(wire.VersionHeader)
	if theirs == "" {
		return nil, fmt.Errorf("%w: HTTP status %d", errStranger, resp.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(w.watched(resp.Body), wire.BodyMax+1))
	if err != nil {
		return nil, err
	}
	if len(b) > wire.BodyMax {
		return nil, fmt.Errorf("%w: it is longer than %d bytes", errGibberish, wire.BodyMax)
	}
	if resp.StatusCode != http.StatusOK {
		var e wire.Error
		if json.Unmarshal(b, &e) != nil || e.Code == "" {
			return nil, fmt.Errorf("%w: HTTP status %d", errGibberish, resp.StatusCode)
		}
		return nil, &e
	}
	if theirs != strconv.Itoa(wire.Version) {
		return nil, &wire.Error{
			Code:    wire.CodeVersion,
			Message: fmt.Sprintf("it speaks version %.20q of the protocol, this host version %d", theirs, wire.Version),
			Advice:  "install the same version of afterimage on both hosts",
		}
	}
	return b, nil
}

// A watch calls silent once nothing was heard of the peer, and nothing could be
// sent to it, for limit.
type watch struct {
	limit time.Duration

	// mu guards the timer's being set.
	mu    sync.Mutex
	timer *time.Timer
	held  bool // this host is the one that waits
	ended bool
}

func newWatch(limit time.Duration, silent func()) *watch {
	return &watch{limit: limit, timer: time.AfterFunc(limit, silent)}
}

// alive starts the time anew.
func (w *watch) alive() { w.set(func() {}) }

// hold stops it until release: this host itself lets the peer wait.
func (w *watch) hold()    { w.set(func() { w.held = true }) }
func (w *watch) release() { w.set(func() { w.held = false }) }
func (w *watch) end()     { w.set(func() { w.ended = true }) }

func (w *watch) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	if w.held || w.ended {
		w.timer.Stop()
		return
	}
	w.timer.Reset(w.limit)
}

// watched is r, each of whose reads is a sign of life: of the answer, that it
// comes; of the request's body, that the connection has taken what was read before.
func (w *watch) watched(r io.Reader) io.Reader { return &watchedReader{w, r} }

type watchedReader struct {
	w *watch
	r io.Reader
}

func (r *watchedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.w.alive()
	return n, err
}
