package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
)

// Client asks a daemon.
type Client struct {
	socket string
	http   http.Client
}

// NewClient returns a client of the daemon that listens on a Unix socket. It
// connects when it is asked.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socketAddress(socket))
		},
	}
	return c
}

// socketAddress keeps package net from taking a path for an abstract name.
func socketAddress(path string) string {
	if path != "" && path[0] == '@' {
		return "./" + path
	}
	return path
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Daemon says who is there.
func (c *Client) Daemon(ctx context.Context) (d Daemon, err error) {
	return d, c.ask(ctx, "GET", "/v1/daemon", nil, &d)
}

// AddVM takes a VM into care. Its disks can be opened when it returns.
func (c *Client) AddVM(ctx context.Context, a AddVM) (vm VM, err error) {
	return vm, c.ask(ctx, "POST", "/v1/vms", a, &vm)
}

// VMs lists all VMs, by name.
func (c *Client) VMs(ctx context.Context) (vms []VM, err error) {
	return vms, c.ask(ctx, "GET", "/v1/vms", nil, &vms)
}

// VM shows one.
func (c *Client) VM(ctx context.Context, name string) (vm VM, err error) {
	return vm, c.ask(ctx, "GET", vmPath(name), nil, &vm)
}

// RemoveVM lets go of a VM. On a replica all its points are erased.
func (c *Client) RemoveVM(ctx context.Context, name string) error {
	return c.ask(ctx, "DELETE", vmPath(name), nil, nil)
}

// Resize gives a disk of a VM another size, durably.
func (c *Client) Resize(ctx context.Context, vm, disk string, r ResizeDisk) (out Resized, err error) {
	return out, c.ask(ctx, "POST", vmPath(vm, "disks", url.PathEscape(disk), "resize"), r, &out)
}

// AllowPeer lets hosts replicate to this one.
func (c *Client) AllowPeer(ctx context.Context, a AllowPeer) (p Peer, err error) {
	return p, c.ask(ctx, "POST", "/v1/peers", a, &p)
}

// Peers lists who may replicate here, by pattern.
func (c *Client) Peers(ctx context.Context) (peers []Peer, err error) {
	return peers, c.ask(ctx, "GET", "/v1/peers", nil, &peers)
}

// RemovePeer no longer lets them. What they have stored stays.
func (c *Client) RemovePeer(ctx context.Context, pattern string) error {
	return c.ask(ctx, "DELETE", "/v1/peers?pattern="+url.QueryEscape(pattern), nil, nil)
}

// TestPeer asks another host whether this one may replicate there.
func (c *Client) TestPeer(ctx context.Context, address string) (p PeerTested, err error) {
	return p, c.ask(ctx, "POST", "/v1/peers/test", TestPeer{address}, &p)
}

// Replications lists the VMs that are replicated from here or to here, by name.
func (c *Client) Replications(ctx context.Context) (rs []Replication, err error) {
	return rs, c.ask(ctx, "GET", "/v1/replication", nil, &rs)
}

// Replication shows one.
func (c *Client) Replication(ctx context.Context, vm string) (r Replication, err error) {
	return r, c.ask(ctx, "GET", vmPath(vm, "replication"), nil, &r)
}

// Enable begins to replicate a VM. The peer has accepted it when it returns.
func (c *Client) Enable(ctx context.Context, vm string, e Enable) (r Replication, err error) {
	return r, c.ask(ctx, "POST", vmPath(vm, "replication"), e, &r)
}

// Disable ends it. The replica keeps its points.
func (c *Client) Disable(ctx context.Context, vm string) error {
	return c.ask(ctx, "DELETE", vmPath(vm, "replication"), nil, nil)
}

// Sync cuts a point now and returns when the replica has listed it.
func (c *Client) Sync(ctx context.Context, vm string, progress func(Progress)) (p Point, err error) {
	return p, c.stream(ctx, vmPath(vm, "sync"), nil, &p, progress)
}

// Pause stops cutting and shipping; the log goes on.
func (c *Client) Pause(ctx context.Context, vm string) error {
	return c.ask(ctx, "POST", vmPath(vm, "pause"), nil, nil)
}

// Resume undoes Pause.
func (c *Client) Resume(ctx context.Context, vm string) error {
	return c.ask(ctx, "POST", vmPath(vm, "resume"), nil, nil)
}

// Points lists the recovery points of a VM, oldest first.
func (c *Client) Points(ctx context.Context, vm string) (ps []Point, err error) {
	return ps, c.ask(ctx, "GET", vmPath(vm, "points"), nil, &ps)
}

// Pin keeps a point from being retired, or lets go of it.
func (c *Client) Pin(ctx context.Context, vm, point string, on bool) error {
	verb := "unpin"
	if on {
		verb = "pin"
	}
	return c.ask(ctx, "POST", vmPath(vm, "points", verb), PointName{point}, nil)
}

// RemovePoint removes a point.
func (c *Client) RemovePoint(ctx context.Context, vm, point string) error {
	return c.ask(ctx, "POST", vmPath(vm, "points", "remove"), PointName{point}, nil)
}

// ServePoint serves a disk of a point until ctx is done; served is called once
// it can be opened.
func (c *Client) ServePoint(ctx context.Context, vm string, s ServePoint, served func(Served) error) error {
	resp, err := c.send(ctx, "POST", vmPath(vm, "points", "serve"), s)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	events := newStream(resp.Body)
	var info Served
	if err := events.result(&info, nil); err != nil {
		return err
	}
	if err := served(info); err != nil {
		return err
	}
	err = events.result(nil, nil) // comes only with the end
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Runs lists failovers and tests, by name.
func (c *Client) Runs(ctx context.Context) (runs []Run, err error) {
	return runs, c.ask(ctx, "GET", "/v1/runs", nil, &runs)
}

// Test starts a throw-away copy of a VM from a point.
func (c *Client) Test(ctx context.Context, vm string, s StartRun, progress func(Progress)) (r Run, err error) {
	return r, c.stream(ctx, vmPath(vm, "test"), s, &r, progress)
}

// EndTest ends it; nothing of it is left.
func (c *Client) EndTest(ctx context.Context, name string) error {
	return c.ask(ctx, "DELETE", "/v1/tests/"+url.PathEscape(name), nil, nil)
}

// Failover starts a VM from a point, in earnest.
func (c *Client) Failover(ctx context.Context, vm string, s StartRun, progress func(Progress)) (r Run, err error) {
	return r, c.stream(ctx, vmPath(vm, "failover"), s, &r, progress)
}

// Cancel ends a failover: this host receives again.
func (c *Client) Cancel(ctx context.Context, vm string) (r Cancelled, err error) {
	return r, c.ask(ctx, "POST", vmPath(vm, "cancel"), nil, &r)
}

// Commit makes a failover final.
func (c *Client) Commit(ctx context.Context, vm string) error {
	return c.ask(ctx, "POST", vmPath(vm, "commit"), nil, nil)
}

// vmPath is a path below that of a VM.
func vmPath(name string, more ...string) string {
	path := "/v1/vms/" + url.PathEscape(name)
	for _, m := range more {
		path += "/" + m
	}
	return path
}

// ask sends a question and decodes the answer into out, if that is not nil.
func (c *Client) ask(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.send(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return c.failed(ctx, err)
	}
	return nil
}

// stream posts a question whose answer takes a while.
func (c *Client) stream(ctx context.Context, path string, in, out any, progress func(Progress)) error {
	resp, err := c.send(ctx, "POST", path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	err = newStream(resp.Body).result(out, progress)
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// send sends a question. A refusal is an error; of any other answer the body is
// the caller's to close.
func (c *Client) send(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://afterimage"+path, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.failed(ctx, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	refusal := new(Error)
	if err := json.NewDecoder(io.LimitReader(resp.Body, lineMax)).Decode(refusal); err != nil || refusal.Message == "" {
		return nil, &Error{Status: StatusFailed, Message: fmt.Sprintf("%s: the daemon answers %q to %s %s", c.socket, resp.Status, method, path),
			Advice: "see that daemon and command are of the same version"}
	}
	return nil, refusal
}

// failed is what a daemon that cannot be asked becomes.
func (c *Client) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the address that stands for the socket
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		err = op.Err
	}
	e := &Error{Status: StatusUnreachable, Message: fmt.Sprintf("the daemon cannot be asked on %s: %v", c.socket, err),
		Advice: "start it (afterimage daemon --state DIR), or name its socket with --admin or AFTERIMAGE_ADMIN"}
	if errors.Is(err, fs.ErrPermission) {
		e.Advice = "the socket is its owner's alone: run this as the daemon's user"
	}
	return e
}
