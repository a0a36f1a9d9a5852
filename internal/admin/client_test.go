package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// answering starts a daemon of which only the answers are known.
func answering(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "ai")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: ln, Config: &http.Server{Handler: h}}
	srv.Start()
	c := NewClient(socket)
	t.Cleanup(func() {
		c.Close()
		srv.Close()
		os.RemoveAll(dir)
	})
	return c
}

func TestClient(t *testing.T) {
	var asked, body string
	c := answering(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		asked, body = r.Method+" "+r.URL.String(), string(b)
		io.WriteString(w, `{"name":"web","a field of tomorrow":1}`)
	})
	ctx := t.Context()
	vm, err := c.AddVM(ctx, AddVM{Name: "web", Disks: []AddDisk{{"root", "/i"}}})
	if err != nil || vm.Name != "web" || asked != "POST /v1/vms" || body != `{"name":"web","disks":[{"name":"root","image":"/i"}]}` {
		t.Errorf("%+v, %v: asked %s with %s", vm, err, asked, body)
	}
	for want, ask := range map[string]func() error{
		"GET /v1/vms/web":                   func() error { _, err := c.VM(ctx, "web"); return err },
		"DELETE /v1/vms/web":                func() error { return c.RemoveVM(ctx, "web") },
		"DELETE /v1/peers?pattern=%2A.b%3F": func() error { return c.RemovePeer(ctx, "*.b?") },
		"DELETE /v1/tests/a%2Fb":            func() error { return c.EndTest(ctx, "a/b") },
		"POST /v1/vms/web/points/unpin":     func() error { return c.Pin(ctx, "web", "1.2.3", false) },
	} {
		if err := ask(); err != nil || asked != want {
			t.Errorf("asked %s, want %s: %v", asked, want, err)
		}
	}
}

func TestRefusal(t *testing.T) {
	for _, tt := range []struct {
		status int
		body   string
		want   Error
	}{
		{409, `{"status":4,"error":"in use","hint":"end it"}`, Error{StatusRefused, "in use", "end it"}},
		{500, `{"status":1,"error":"it failed"}`, Error{Status: StatusFailed, Message: "it failed"}},
	} {
		c := answering(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(tt.status)
			io.WriteString(w, tt.body)
		})
		err := c.Commit(t.Context(), "web")
		var e *Error
		if !errors.As(err, &e) || *e != tt.want {
			t.Errorf("%s: %+v", tt.body, err)
		}
	}
	// What is no answer of ours is not taken for one.
	for _, body := range []string{"404 page not found", "", "{}", "[", strings.Repeat("x", 2<<20)} {
		c := answering(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(404)
			io.WriteString(w, body)
		})
		err := c.Commit(t.Context(), "web")
		var e *Error
		if !errors.As(err, &e) || e.Status != StatusFailed || !strings.Contains(e.Message, "404") || e.Advice == "" {
			t.Errorf("%.20q: %v", body, err)
		}
	}
}

func TestUnreachable(t *testing.T) {
	c := NewClient(filepath.Join(t.TempDir(), "none"))
	_, err := c.VMs(t.Context())
	var e *Error
	if !errors.As(err, &e) || e.Status != StatusUnreachable || !strings.Contains(e.Message, "none") || e.Advice == "" {
		t.Errorf("no socket: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.VMs(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

func TestStream(t *testing.T) {
	result, _ := json.Marshal(Point{ID: "1.2.3"})
	lines := func(events ...Event) string {
		var b strings.Builder
		for _, e := range events {
			_ = json.NewEncoder(&b).Encode(e)
		}
		return b.String()
	}
	step := func(n int64) Event { return Event{Progress: &Progress{"copied", n, 10}} }
	refusal := &Error{StatusDamaged, "layer x", "older"}
	for _, tt := range []struct {
		name, body string
		told       int
		point      string
		fails      error
	}{
		{"progress, result", lines(step(1), step(5), Event{Result: result}), 2, "1.2.3", nil},
		{"a result alone", lines(Event{Result: result}), 0, "1.2.3", nil},
		{"a field of tomorrow", `{"mood":"good"}` + "\n" + lines(Event{Result: result}), 0, "1.2.3", nil},
		{"an error behind progress", lines(step(1), Event{Error: refusal}), 1, "", refusal},
		{"broken off", lines(step(1)), 1, "", errBroken},
		{"empty", "", 0, "", errBroken},
		{"no JSON", "what?\n", 0, "", errors.New("the daemon's answer")},
		{"no JSON of a point", `{"result":[1]}`, 0, "", errors.New("the daemon's answer")},
		{"a line without end", strings.Repeat("x", 2*lineMax), 0, "", errors.New("the daemon's answer")},
	} {
		told := 0
		c := answering(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, tt.body) })
		p, err := c.Sync(t.Context(), "web", func(Progress) { told++ })
		if p.ID != tt.point || told != tt.told || (err == nil) != (tt.fails == nil) || err != nil && !strings.Contains(err.Error(), tt.fails.Error()) {
			t.Errorf("%s: %+v, told %d times, %v", tt.name, p, told, err)
		}
	}
}

// TestServePoint: the request lasts until its context ends, or the daemon's end.
func TestServePoint(t *testing.T) {
	gone := make(chan struct{})
	c := answering(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := json.Marshal(Served{URI: "nbd+unix:///x"})
		_ = json.NewEncoder(w).Encode(Event{Result: b})
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
		close(gone)
	})
	ctx, cancel := context.WithCancel(t.Context())
	err := c.ServePoint(ctx, "web", ServePoint{}, func(s Served) error {
		if s.URI != "nbd+unix:///x" {
			t.Errorf("served %+v", s)
		}
		cancel()
		return nil
	})
	if err != nil {
		t.Errorf("interrupted: %v", err)
	}
	<-gone
	c = answering(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"result":{}}`+"\n") })
	if err := c.ServePoint(t.Context(), "web", ServePoint{}, func(Served) error { return nil }); !errors.Is(err, errBroken) {
		t.Errorf("the daemon ended: %v", err)
	}
}
