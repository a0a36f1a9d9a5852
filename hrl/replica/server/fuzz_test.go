package server_test

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/wire"
)

// FuzzRequest: whatever comes is answered, with the status that goes with the
// answer, makes nothing panic, and does nothing if it was refused as malformed.
func FuzzRequest(f *testing.F) {
	const vm = "/v1/vms/01234567-89ab-4def-8123-456789abcdef"
	digest := strings.Repeat("5a", 32)
	for _, s := range []struct {
		method, path, body string
		known              bool
	}{
		{"GET", "/v1/hello", "", true},
		{"PUT", vm, offerOf(2), true},
		{"GET", vm, "", true},
		{"GET", vm + "/points", "", true},
		{"POST", vm + "/points", `{"id":"1.1.1","parent":"none","time":"2026-01-02T03:04:05Z","kind":"crash","disks":[{"name":"root","size":1024,"layers":[]}]}`, true},
		{"POST", vm + "/discard", `{"keep":["` + digest + `"]}`, true},
		{"POST", vm + "/digests", `{"point":"1.1.1","disk":"root","ranges":[[0,512],[512,9223372036854775807]]}`, true},
		{"GET", vm + "/layers/" + digest, "", true},
		{"PUT", vm + "/layers/" + digest + "?size=10&offset=0", "abc", true},
		{"PUT", vm + "/layers/" + digest + "?size=10&offset=3", "abc", false},
	} {
		f.Add(s.method, s.path, []byte(s.body), s.known)
	}
	f.Fuzz(func(t *testing.T, method, path string, body []byte, known bool) {
		u, err := url.ParseRequestURI(path)
		if err != nil {
			t.Skip("no request has such a path")
		}
		log := &panics{}
		ops := 0
		fake := &servertest.Fake{}
		srv := server.New(server.Options{
			Name: "b.example", PulseEvery: time.Hour, Warn: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelError})),
			Identity: func(*tls.ConnectionState) (string, error) { return "a.example", nil },
			Allow:    func(string) (server.Grant, error) { return server.Grant{Store: fake}, nil },
		})
		id, _ := wire.ParseVMID("01234567-89ab-4def-8123-456789abcdef")
		if _, err := fake.Accept(id, wire.Offer{Name: "web", Term: 1, Generation: 1}, "a.example", 0); err != nil {
			t.Fatal(err)
		}
		fake.Fault = func(op string) error {
			if op != "vm" && op != "state" {
				ops++
			}
			return nil
		}
		r := &http.Request{
			Method: method, URL: u, Header: http.Header{wire.VersionHeader: {"1"}}, TLS: &tls.ConnectionState{},
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: io.NopCloser(bytes.NewReader(body)), ContentLength: -1,
		}
		if known {
			r.ContentLength = int64(len(body))
		}
		w := httptest.NewRecorder()
		srv.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			var e wire.Error
			if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Code.Status() != w.Code || e.Message == "" {
				t.Errorf("status %d, %q: %v", w.Code, w.Body, err)
			}
			if (e.Code == wire.CodeMalformed || e.Code == wire.CodeUnknown) && ops > 0 {
				t.Errorf("%q, but %d operations", e.Message, ops)
			}
		}
		if log.n > 0 {
			t.Errorf("it panicked: %s", log.last)
		}
	})
}

// panics counts what is logged.
type panics struct {
	n    int
	last []byte
}

func (p *panics) Write(b []byte) (int, error) {
	p.n++
	p.last = append([]byte(nil), b...)
	return len(b), nil
}
