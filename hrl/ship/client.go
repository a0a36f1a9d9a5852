package ship

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
)

const (
	// connectMax bounds connecting, and then the TLS handshake.
	connectMax = 10 * time.Second
	// helloMax bounds a Hello, which touches no disk.
	helloMax = 15 * time.Second
	// connectionsMax is how many requests a Client has under way; others wait.
	connectionsMax = 4
)

// A Client asks one peer. It connects when it is first used and again whenever it
// must. Its methods may be called from several goroutines.
//
// Each error says what was asked of whom, and is one of
//
//   - *UnreachableError: there was no answer. It may have been done
//   - *wire.Error: the peer refuses
//   - the error of the caller's context, or ErrClosed
//   - anything else: the peer answered something impossible, or what was asked
//     is impossible
//
// Everything may be asked again.
type Client struct {
	addr      string
	transport *http.Transport
	silence   time.Duration // wire.SilenceMax; shorter in tests
	explain   func(error) error

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
}

// Dial returns a client for the peer at addr, a HOST:PORT. The configuration has
// this host's certificate and says whom to believe; without a ServerName in it the
// peer's certificate must be for HOST.
//
// It speaks HTTP/1.1: see BenchmarkPutLayer.
func Dial(addr string, conf *tls.Config) *Client {
	conf = conf.Clone()
	conf.NextProtos = []string{"http/1.1"}
	c := &Client{
		addr:    addr,
		silence: wire.SilenceMax,
		explain: func(err error) error { return err },
		transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: connectMax}).DialContext,
			TLSClientConfig:     conf,
			TLSHandshakeTimeout: connectMax,
			DisableCompression:  true,
			MaxConnsPerHost:     connectionsMax,
			MaxIdleConnsPerHost: connectionsMax,
			// Less than the peer's, so that a request seldom meets a connection
			// that is being closed.
			IdleConnTimeout:        time.Minute,
			MaxResponseHeaderBytes: 16 << 10,
			WriteBufferSize:        64 << 10,
			Protocols:              new(http.Protocols),
		},
	}
	c.transport.Protocols.SetHTTP1(true)
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// ExplainBy has what keeps the peer from being reached explained by f, which knows
// the certificates. It comes before the first question.
func (c *Client) ExplainBy(f func(error) error) { c.explain = f }

// DialBy has connections made by f. It comes before the first question.
func (c *Client) DialBy(f func(ctx context.Context, network, addr string) (net.Conn, error)) {
	c.transport.DialContext = f
}

// Addr returns the address that the client was made for.
func (c *Client) Addr() string { return c.addr }

// Close ends what is under way with ErrClosed, and the connections. It may be
// called twice.
func (c *Client) Close() error {
	c.cancel(ErrClosed)
	c.transport.CloseIdleConnections()
	return nil
}

// Hello asks who is there, and whether this host may replicate to it.
func (c *Client) Hello(ctx context.Context) (wire.Hello, error) {
	var h wire.Hello
	ctx, cancel := context.WithTimeoutCause(ctx, helloMax, &UnreachableError{c.addr, errHello})
	defer cancel()
	err := c.ask(ctx, "ask who is there", http.MethodGet, "/v1/hello", nil, &h)
	return h, err
}

// Offer says that this host has the VM, and renews what was said before.
func (c *Client) Offer(ctx context.Context, id wire.VMID, o wire.Offer) (wire.VMState, error) {
	var st wire.VMState
	err := c.ask(ctx, "offer VM "+o.Name, http.MethodPut, vmPath(id), o, &st)
	return st, err
}

// State asks what the peer has of the VM.
func (c *Client) State(ctx context.Context, id wire.VMID) (wire.VMState, error) {
	var st wire.VMState
	err := c.ask(ctx, fmt.Sprintf("ask for the state of VM %v", id), http.MethodGet, vmPath(id), nil, &st)
	return st, err
}

// Points asks for the listed points, the oldest first.
func (c *Client) Points(ctx context.Context, id wire.VMID) ([]wire.PointInfo, error) {
	var ps []wire.PointInfo
	err := c.ask(ctx, fmt.Sprintf("ask for the points of VM %v", id), http.MethodGet, vmPath(id)+"/points", nil, &ps)
	return ps, err
}

// Discard has the peer forget what is staged and neither in a listed point nor
// named in keep.
func (c *Client) Discard(ctx context.Context, id wire.VMID, keep []string) error {
	if keep == nil {
		keep = []string{}
	}
	var st wire.VMState
	return c.ask(ctx, fmt.Sprintf("discard what is staged of VM %v", id), http.MethodPost, vmPath(id)+"/discard", wire.Discard{Keep: keep}, &st)
}

// List has the point listed. That it returns without an error is the
// acknowledgement: point and layers are durable over there.
func (c *Client) List(ctx context.Context, id wire.VMID, p wire.PointInfo) (wire.PointInfo, error) {
	var listed wire.PointInfo
	step := fmt.Sprintf("list point %v", p.ID)
	if err := c.ask(ctx, step, http.MethodPost, vmPath(id)+"/points", p, &listed); err != nil {
		return wire.PointInfo{}, err
	}
	if listed.ID != p.ID {
		return wire.PointInfo{}, c.impossible(step, "it lists %v instead", listed.ID)
	}
	return listed, nil
}

// Digests asks for the SHA-256 of ranges of a disk as of a point, of at most
// wire.DigestLenMax bytes each.
func (c *Client) Digests(ctx context.Context, id wire.VMID, point wire.PointID, disk string, ext []blockdev.Extent) ([][32]byte, error) {
	step := fmt.Sprintf("ask for digests of disk %s at point %v", disk, point)
	out := make([][32]byte, 0, len(ext))
	for len(ext) > 0 {
		some := ext[:min(len(ext), wire.DigestsMax)]
		ext = ext[len(some):]
		r := wire.DigestRequest{Point: point, Disk: disk, Ranges: make([][2]int64, len(some))}
		for i, e := range some {
			r.Ranges[i] = [2]int64{e.Off, e.Len}
		}
		if err := r.Check(); err != nil {
			return nil, fmt.Errorf("%s: %w", step, err)
		}
		var b []byte
		if err := c.ask(ctx, step, http.MethodPost, vmPath(id)+"/digests", r, &b); err != nil {
			return nil, err
		}
		if len(b) != sha256.Size*len(some) {
			return nil, c.impossible(step, "it sends %d bytes for %d digests", len(b), len(some))
		}
		for ; len(b) > 0; b = b[sha256.Size:] {
			out = append(out, [32]byte(b))
		}
	}
	return out, nil
}

func vmPath(id wire.VMID) string { return "/v1/vms/" + id.String() }

// impossible is the error of an answer that cannot be.
func (c *Client) impossible(step, format string, args ...any) error {
	return fmt.Errorf("%s: peer %s answers something impossible: %s", step, c.addr, fmt.Sprintf(format, args...))
}

// ask sends a request and decodes the answer into out; a *[]byte gets it as it is.
func (c *Client) ask(ctx context.Context, step, method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("%s: %w", step, err)
		}
		if len(body) > wire.BodyMax {
			return fmt.Errorf("%s: a request of %d bytes: %d are the most", step, len(body), wire.BodyMax)
		}
	}
	answer, err := c.send(ctx, step, method, path, body)
	if err != nil {
		return err
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = answer
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return c.impossible(step, "%v", err)
	}
	return nil
}
