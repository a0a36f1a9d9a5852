package server_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/wire"
)

// A host is a client as raw as can be.
type host struct {
	t    testing.TB
	addr string
	http *http.Transport
}

func dial(t testing.TB, addr string, conf *tls.Config) *host {
	t.Helper()
	h := &host{t, addr, &http.Transport{TLSClientConfig: conf}}
	t.Cleanup(h.http.CloseIdleConnections)
	return h
}

// do sends a request and returns the answer. change may be nil.
func (h *host) do(method, path string, body io.Reader, change func(*http.Request)) (*http.Response, []byte, error) {
	h.t.Helper()
	r, err := http.NewRequest(method, "https://"+h.addr+path, body)
	if err != nil {
		h.t.Fatal(err)
	}
	r.Header.Set(wire.VersionHeader, "1")
	if change != nil {
		change(r)
	}
	resp, err := h.http.RoundTrip(r)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

// refused sends a request that must be refused, and returns how.
func (h *host) refused(method, path string, body io.Reader, change func(*http.Request)) *wire.Error {
	h.t.Helper()
	sent := int64(0)
	resp, b, err := h.do(method, path, body, func(r *http.Request) {
		if change != nil {
			change(r)
		}
		sent = r.ContentLength
	})
	if err != nil {
		h.t.Fatal(err)
	}
	if resp.Close && sent >= 0 && sent <= wire.PieceMax {
		h.t.Errorf("%s %s: the connection is ended", method, path)
	}
	var e wire.Error
	if err := json.Unmarshal(b, &e); err != nil || resp.StatusCode != e.Code.Status() || resp.Header.Get(wire.VersionHeader) != "1" || e.Message == "" {
		h.t.Fatalf("%s %s: status %d, %q: %v", method, path, resp.StatusCode, b, err)
	}
	return &e
}

// fine sends a request that must be answered.
func (h *host) fine(method, path, body string, out any) {
	h.t.Helper()
	resp, b, err := h.do(method, path, strings.NewReader(body), nil)
	if err != nil || resp.StatusCode != http.StatusOK {
		h.t.Fatalf("%s %s: %q: %v", method, path, b, err)
	}
	if err := json.Unmarshal(b, out); err != nil {
		h.t.Fatalf("%s %s: %q: %v", method, path, b, err)
	}
}

func offerOf(term int) string {
	return fmt.Sprintf(`{"name":"web","disks":[{"name":"root","size":1048576}],"generation":1,"term":%d,"later":"field"}`, term)
}

func layer(n int) (data []byte, digest string) {
	data = make([]byte, n)
	for i := range data {
		data[i] = byte(i * 7 >> 3)
	}
	sum := sha256.Sum256(data)
	return data, hex.EncodeToString(sum[:])
}

// TestRequests: one of each.
func TestRequests(t *testing.T) {
	ca, fake, id := servertest.NewCA(t), &servertest.Fake{}, wire.NewVMID()
	b := servertest.Serve(t, ca, fake, nil)
	h := dial(t, b.Addr(), ca.Config("a.example"))
	var hello wire.Hello
	h.fine("GET", "/v1/hello", "", &hello)
	if hello != (wire.Hello{Version: 1, Product: "test", Name: "b.example", You: "a.example", Allowed: true}) {
		t.Fatalf("%+v", hello)
	}
	vm := "/v1/vms/" + id.String()
	var st wire.VMState
	h.fine("PUT", vm, offerOf(3), &st)
	if st.Term != 3 || st.Role != wire.RoleReplica || !st.Newest.IsZero() {
		t.Fatalf("%+v", st)
	}
	var ps []wire.PointInfo
	h.fine("GET", vm+"/points", "", &ps)
	if ps == nil || len(ps) != 0 {
		t.Fatalf("%+v: a list is never null", ps)
	}
	data, digest := layer(100000)
	path := vm + "/layers/" + digest
	var l wire.LayerState
	h.fine("GET", path, "", &l)
	if l != (wire.LayerState{Digest: digest}) {
		t.Fatalf("%+v", l)
	}
	h.fine("PUT", path+"?size=100000&offset=0", string(data[:40000]), &l)
	if l != (wire.LayerState{Digest: digest, Synced: 40000}) {
		t.Fatalf("%+v", l)
	}
	h.fine("GET", path, "", &l)
	if l.Synced != 40000 {
		t.Fatalf("%+v", l)
	}
	if e := h.refused("PUT", path+"?size=100000&offset=30000", bytes.NewReader(data[30000:]), nil); e.Code != wire.CodeOffset || e.Synced != 40000 {
		t.Fatalf("%+v", e)
	}
	h.fine("PUT", path+"?size=100000&offset=40000", string(data[40000:]), &l)
	h.fine("PUT", path+"?size=100000&offset=100000", "", &l)
	h.fine("GET", vm, "", &st)
	if len(st.Layers) != 1 || st.Layers[0] != (wire.LayerState{Digest: digest, Synced: 100000, Complete: true}) || l != st.Layers[0] {
		t.Fatalf("%+v", st)
	}
	point := fmt.Sprintf(`{"id":"1.1.1","parent":"none","time":"2026-01-02T03:04:05Z","kind":"crash","disks":[{"name":"root","size":1048576,"layers":[%q]}]}`, digest)
	var p wire.PointInfo
	for range 2 { // everything may be asked again
		h.fine("POST", vm+"/points", point, &p)
		if p.ID != (wire.PointID{Generation: 1, Incarnation: 1, Epoch: 1}) {
			t.Fatalf("%+v", p)
		}
	}
	h.fine("GET", path, "", &l)
	if !l.Complete {
		t.Fatalf("a listed layer is complete: %+v", l)
	}
	h.fine("GET", vm+"/points", "", &ps)
	if len(ps) != 1 || ps[0].ID != p.ID {
		t.Fatalf("%+v", ps)
	}
	if e := h.refused("POST", vm+"/points", strings.NewReader(strings.Replace(point, "1.1.1", "1.1.5", 1)), nil); e.Code != wire.CodeParent || e.Newest != p.ID {
		t.Fatalf("%+v", e)
	}
	h.fine("PUT", vm+"/layers/"+strings.Repeat("0", 64)+"?size=4&offset=0", "abc", &l)
	h.fine("POST", vm+"/discard", `{"keep":[]}`, &st)
	if len(st.Layers) != 0 {
		t.Fatalf("%+v", st)
	}
	resp, sums, err := h.do("POST", vm+"/digests", strings.NewReader(`{"point":"1.1.1","disk":"root","ranges":[[0,512],[512,1024]]}`), nil)
	if err != nil || resp.StatusCode != 200 || len(sums) != 64 {
		t.Fatalf("%d bytes: %v", len(sums), err)
	}
	if b.Log() != "" {
		t.Errorf("it logged: %s", b.Log())
	}
}

// TestRefusals: what is wrong is said, with the code for it, and the connection
// can still be used.
func TestRefusals(t *testing.T) {
	ca, fake, id := servertest.NewCA(t), &servertest.Fake{}, wire.NewVMID()
	broken := wire.NewVMID()
	var fail error
	var at string
	fake.Fault = func(op string) error {
		if op == at {
			return fail
		}
		return nil
	}
	lookup := false
	b := servertest.Serve(t, ca, fake, func(o *servertest.Options) {
		o.Allow = func(identity string) (server.Grant, error) {
			switch {
			case lookup:
				return server.Grant{}, errors.New("the list of peers cannot be read")
			case identity == "stranger":
				return server.Grant{}, fmt.Errorf("look: %w", server.ErrNotAllowed)
			}
			return server.Grant{Store: fake}, nil
		}
	})
	a := dial(t, b.Addr(), ca.Config("a.example"))
	other := dial(t, b.Addr(), ca.Config("other.example"))
	stranger := dial(t, b.Addr(), ca.Config("stranger"))
	var st wire.VMState
	vm := "/v1/vms/" + id.String()
	a.fine("PUT", vm, offerOf(3), &st)
	a.fine("PUT", "/v1/vms/"+broken.String(), offerOf(3), &st)
	fake.Break(broken, fmt.Errorf("journal: %w", hrl.ErrDamaged))
	data, digest := layer(wire.PieceMax)
	lp := vm + "/layers/" + digest
	whole := fmt.Sprintf("%s?size=%d&offset=0", lp, len(data))
	point := `{"id":"1.1.1","parent":"none","time":"2026-01-02T03:04:05Z","kind":"crash","disks":[{"name":"root","size":1048576,"layers":[]}]}`
	version := func(v string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(wire.VersionHeader, v) }
	}

	for _, c := range []struct {
		name         string
		host         *host
		method, path string
		body         string
		change       func(*http.Request)
		at           string
		fail         error
		code         wire.Code
		says, hint   string
	}{
		{name: "newer version", method: "GET", path: "/v1/hello", change: version("2"), code: wire.CodeVersion, says: `version 1 of the protocol, the request is of version "2"`, hint: "same version"},
		{name: "no version", method: "GET", path: "/v1/hello", change: func(r *http.Request) { r.Header.Del(wire.VersionHeader) }, code: wire.CodeVersion},
		{name: "version before all else", host: stranger, method: "GET", path: "/v9/nothing", change: version("one"), code: wire.CodeVersion},
		{name: "path", method: "GET", path: "/", code: wire.CodeUnknown, says: "GET"},
		{name: "path of another kind", method: "GET", path: "/v1/vms", code: wire.CodeUnknown},
		{name: "path with more", method: "GET", path: "/v1/hello/", code: wire.CodeUnknown},
		{name: "path with two spellings", method: "GET", path: "//v1/hello", code: wire.CodeUnknown},
		{name: "path escaped", method: "GET", path: "/v1/%68ello", code: wire.CodeUnknown},
		{name: "path that is the table's word", method: "GET", path: "/v1/vms/vm", code: wire.CodeUnknown},
		{name: "method", method: "DELETE", path: vm, code: wire.CodeUnknown},
		{name: "UUID", method: "GET", path: "/v1/vms/" + strings.ToUpper(id.String()), code: wire.CodeUnknown},
		{name: "digest", method: "GET", path: vm + "/layers/..", code: wire.CodeUnknown},

		{name: "not allowed", host: stranger, method: "GET", path: vm, code: wire.CodeNotAllowed, says: "stranger", hint: "on b.example: afterimage peer allow stranger"},
		{name: "not allowed to offer", host: stranger, method: "PUT", path: vm, body: offerOf(9), code: wire.CodeNotAllowed, hint: "peer allow"},
		{name: "not allowed, piece", host: stranger, method: "PUT", path: whole, body: string(data), code: wire.CodeNotAllowed},
		{name: "other sender's state", host: other, method: "GET", path: vm, code: wire.CodeSender, says: "from a.example, not from other.example"},
		{name: "other sender's points", host: other, method: "GET", path: vm + "/points", code: wire.CodeSender},
		{name: "other sender's layer", host: other, method: "GET", path: lp, code: wire.CodeSender},
		{name: "other sender's piece", host: other, method: "PUT", path: whole, body: string(data), code: wire.CodeSender},
		{name: "other sender's point", host: other, method: "POST", path: vm + "/points", body: point, code: wire.CodeSender},
		{name: "other sender's discard", host: other, method: "POST", path: vm + "/discard", body: "{}", code: wire.CodeSender},
		{name: "other sender's digests", host: other, method: "POST", path: vm + "/digests", body: `{"point":"1.1.1","disk":"root"}`, code: wire.CodeSender},
		{name: "other sender's offer", host: other, method: "PUT", path: vm, body: offerOf(3), code: wire.CodeSender, hint: "one host"},
		{name: "lower term", method: "PUT", path: vm, body: offerOf(2), code: wire.CodeTerm, hint: "taken over"},
		{name: "no VM", method: "GET", path: "/v1/vms/" + wire.NewVMID().String(), code: wire.CodeNoVM, hint: "offer"},
		{name: "broken VM", method: "GET", path: "/v1/vms/" + broken.String(), code: wire.CodeDamaged, says: "journal"},

		{name: "empty body", method: "PUT", path: vm, code: wire.CodeMalformed},
		{name: "garbage", method: "PUT", path: vm, body: "\x00\xff", code: wire.CodeMalformed},
		{name: "garbage behind", method: "PUT", path: vm, body: offerOf(3) + "x", code: wire.CodeMalformed},
		{name: "two bodies", method: "POST", path: vm + "/discard", body: "{}{}", code: wire.CodeMalformed},
		{name: "wrong type", method: "POST", path: vm + "/points", body: `{"id":7}`, code: wire.CodeMalformed},
		{name: "offer of nothing", method: "PUT", path: vm, body: "{}", code: wire.CodeMalformed},
		{name: "point of nothing", method: "POST", path: vm + "/points", body: "{}", code: wire.CodeMalformed},
		{name: "digests of nothing", method: "POST", path: vm + "/digests", body: "{}", code: wire.CodeMalformed},
		{name: "keep of no digest", method: "POST", path: vm + "/discard", body: `{"keep":["../x"]}`, code: wire.CodeMalformed},
		{name: "body where none is", method: "GET", path: vm, body: "{}", code: wire.CodeMalformed, says: "0 are the most"},
		{name: "long body", method: "PUT", path: vm, body: strings.Repeat(" ", wire.BodyMax+1), code: wire.CodeMalformed, says: "are the most"},
		{name: "long body of unknown length", method: "PUT", path: vm, body: strings.Repeat(" ", wire.BodyMax+1), change: func(r *http.Request) { r.ContentLength = -1 }, code: wire.CodeMalformed, says: "more than"},
		{name: "long piece", method: "PUT", path: fmt.Sprintf("%s?size=%d&offset=0", lp, wire.PieceMax*2), body: string(data) + "x", code: wire.CodeMalformed, says: "are the most"},
		{name: "piece of unknown length", method: "PUT", path: whole, body: "abc", change: func(r *http.Request) { r.ContentLength = -1 }, code: wire.CodeMalformed, says: "length"},
		{name: "piece without size", method: "PUT", path: lp + "?offset=0", body: "abc", code: wire.CodeMalformed, says: "size"},
		{name: "piece without offset", method: "PUT", path: lp + "?size=3", body: "abc", code: wire.CodeMalformed, says: "offset"},
		{name: "piece of negative size", method: "PUT", path: lp + "?size=-3&offset=0", body: "abc", code: wire.CodeMalformed},
		{name: "piece beyond the end", method: "PUT", path: lp + "?size=5&offset=3", body: "abc", code: wire.CodeMalformed},
		{name: "piece behind the end", method: "PUT", path: lp + "?size=5&offset=6", code: wire.CodeMalformed},
		{name: "piece that overflows", method: "PUT", path: lp + "?size=9223372036854775807&offset=9223372036854775806", body: "abc", code: wire.CodeMalformed},
		{name: "empty piece", method: "PUT", path: lp + "?size=5&offset=0", code: wire.CodeMalformed},
		{name: "empty layer", method: "PUT", path: lp + "?size=0&offset=0", code: wire.CodeMalformed},

		{name: "role", method: "POST", path: vm + "/points", body: point, at: "list", fail: replica.ErrRole, code: wire.CodeRole, hint: "b.example"},
		{name: "exists", method: "PUT", path: vm, body: offerOf(3), at: "accept", fail: replica.ErrExists, code: wire.CodeExists},
		{name: "no point", method: "POST", path: vm + "/digests", body: `{"point":"1.1.1","disk":"root"}`, at: "digests", fail: replica.ErrNoPoint, code: wire.CodeNoPoint},
		{name: "in use", method: "POST", path: vm + "/discard", body: "{}", at: "discard", fail: replica.ErrInUse, code: wire.CodeInUse},
		{name: "quota", method: "PUT", path: whole, body: string(data), at: "stage", fail: replica.ErrNoRoom, code: wire.CodeNoRoom, hint: "peer allow a.example --quota"},
		{name: "full", method: "PUT", path: whole, body: string(data), at: "stage", fail: &errPath{syscall.ENOSPC}, code: wire.CodeNoRoom, says: "write x"},
		{name: "unfit", method: "POST", path: vm + "/points", body: point, at: "list", fail: replica.ErrBad, code: wire.CodeUnfit},
		{name: "closed", method: "POST", path: vm + "/points", body: point, at: "list", fail: replica.ErrClosed, code: wire.CodeBusy},
		{name: "layer of another version", method: "PUT", path: whole, body: string(data), at: "stage", fail: hrl.ErrVersion, code: wire.CodeVersion, hint: "same version"},
		{name: "damaged", method: "POST", path: vm + "/points", body: point, at: "list", fail: hrl.ErrDamaged, code: wire.CodeDamaged},
		{name: "failed", method: "POST", path: vm + "/points", body: point, at: "list", fail: errors.New("input/output error"), code: wire.CodeFailed, says: "list point 1.1.1: input/output error", hint: "log"},
		{name: "hint of its own", method: "PUT", path: whole, body: string(data), at: "stage", fail: hinted{replica.ErrNoRoom}, code: wire.CodeNoRoom, hint: "do this"},
		{name: "panic", method: "GET", path: vm, at: "state", fail: errors.New("a bug"), code: wire.CodeFailed, hint: "log"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.host == nil {
				c.host = a
			}
			at, fail = c.at, c.fail
			e := (&host{t, c.host.addr, c.host.http}).refused(c.method, c.path, strings.NewReader(c.body), c.change)
			if e.Code != c.code || !strings.Contains(e.Message, c.says) || !strings.Contains(e.Advice, c.hint) {
				t.Errorf("%+v", e)
			}
		})
	}
	at = ""
	a.fine("GET", vm, "", &st)
	if log := b.Log(); !strings.Contains(log, "a bug") || !strings.Contains(log, "server_test") && !strings.Contains(log, "goroutine") {
		t.Errorf("the panic was not logged with its stack: %s", log)
	}

	var hello wire.Hello
	stranger.fine("GET", "/v1/hello", "", &hello)
	if hello.Allowed || hello.You != "stranger" {
		t.Errorf("%+v", hello)
	}
	lookup = true
	if e := a.refused("GET", "/v1/hello", nil, nil); e.Code != wire.CodeFailed || !strings.Contains(e.Message, "list of peers") {
		t.Errorf("%+v", e)
	}
}

type errPath struct{ syscall.Errno }

func (e *errPath) Error() string { return "write x: " + e.Errno.Error() }
func (e *errPath) Unwrap() error { return e.Errno }

type hinted struct{ error }

func (h hinted) Unwrap() error { return h.error }
func (hinted) Hint() string    { return "do this" }
