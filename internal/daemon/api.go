package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"afterimage/internal/admin"
)

// bodyMax bounds the body of a command's question, in bytes.
const bodyMax = 1 << 20

// none is the body of a question without one, or of such an answer.
type none struct{}

// handler answers commands; the paths are those of package admin.
func (d *Daemon) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /v1/daemon", answer(func(*http.Request, none) (admin.Daemon, error) { return d.Info(), nil }))

	mux.Handle("GET /v1/vms", answer(func(*http.Request, none) ([]admin.VM, error) { return d.vmList(), nil }))
	mux.Handle("POST /v1/vms", answer(func(r *http.Request, a admin.AddVM) (admin.VM, error) { return d.addVM(r.Context(), a) }))
	mux.Handle("GET /v1/vms/{vm}", answer(func(r *http.Request, _ none) (admin.VM, error) { return d.vmNamed(vmOf(r)) }))
	mux.Handle("DELETE /v1/vms/{vm}", answer(func(r *http.Request, _ none) (none, error) {
		return none{}, d.remove(r.Context(), vmOf(r))
	}))

	mux.Handle("POST /v1/vms/{vm}/disks/{disk}/resize", answer(func(r *http.Request, s admin.ResizeDisk) (admin.Resized, error) {
		return d.resize(r.Context(), vmOf(r), r.PathValue("disk"), s)
	}))

	mux.Handle("GET /v1/peers", answer(func(*http.Request, none) ([]admin.Peer, error) { return d.peerList(), nil }))
	mux.Handle("POST /v1/peers", answer(func(_ *http.Request, a admin.AllowPeer) (admin.Peer, error) { return d.allowPeer(a) }))
	mux.Handle("DELETE /v1/peers", answer(func(r *http.Request, _ none) (none, error) {
		return none{}, d.removePeer(r.URL.Query().Get("pattern"))
	}))
	mux.Handle("POST /v1/peers/test", answer(func(r *http.Request, t admin.TestPeer) (admin.PeerTested, error) {
		return d.testPeer(r.Context(), t.Address)
	}))

	mux.Handle("GET /v1/replication", answer(func(r *http.Request, _ none) ([]admin.Replication, error) {
		return d.statusList(r.Context()), nil
	}))
	mux.Handle("GET /v1/vms/{vm}/replication", answer(func(r *http.Request, _ none) (admin.Replication, error) {
		return d.statusNamed(r.Context(), vmOf(r))
	}))
	mux.Handle("POST /v1/vms/{vm}/replication", answer(func(r *http.Request, e admin.Enable) (admin.Replication, error) {
		return d.enable(r.Context(), vmOf(r), e)
	}))
	mux.Handle("DELETE /v1/vms/{vm}/replication", answer(func(r *http.Request, _ none) (none, error) {
		return none{}, d.disable(r.Context(), vmOf(r))
	}))
	mux.Handle("POST /v1/vms/{vm}/sync", stream(func(r *http.Request, _ none, e *events) (admin.Point, error) {
		return d.sync(r.Context(), vmOf(r), e.progress)
	}))
	mux.Handle("POST /v1/vms/{vm}/pause", answer(func(r *http.Request, _ none) (none, error) {
		return none{}, d.pause(r.Context(), vmOf(r), true)
	}))
	mux.Handle("POST /v1/vms/{vm}/resume", answer(func(r *http.Request, _ none) (none, error) {
		return none{}, d.pause(r.Context(), vmOf(r), false)
	}))

	mux.Handle("GET /v1/vms/{vm}/points", answer(func(r *http.Request, _ none) ([]admin.Point, error) {
		return d.points(r.Context(), vmOf(r))
	}))
	mux.Handle("POST /v1/vms/{vm}/points/pin", answer(func(r *http.Request, p admin.PointName) (none, error) {
		return none{}, d.pinPoint(vmOf(r), p.Point, true)
	}))
	mux.Handle("POST /v1/vms/{vm}/points/unpin", answer(func(r *http.Request, p admin.PointName) (none, error) {
		return none{}, d.pinPoint(vmOf(r), p.Point, false)
	}))
	mux.Handle("POST /v1/vms/{vm}/points/remove", answer(func(r *http.Request, p admin.PointName) (none, error) {
		return none{}, d.removePoint(vmOf(r), p.Point)
	}))
	mux.Handle("POST /v1/vms/{vm}/points/serve", stream(func(r *http.Request, s admin.ServePoint, e *events) (none, error) {
		return none{}, d.servePoint(r.Context(), vmOf(r), s, func(info admin.Served) error { return e.result(info) })
	}))

	mux.Handle("GET /v1/runs", answer(func(*http.Request, none) ([]admin.Run, error) { return d.runList(), nil }))
	mux.Handle("POST /v1/vms/{vm}/test", stream(func(r *http.Request, s admin.StartRun, e *events) (admin.Run, error) {
		return d.startTest(r.Context(), vmOf(r), s, e.progress)
	}))
	mux.Handle("POST /v1/vms/{vm}/failover", stream(func(r *http.Request, s admin.StartRun, e *events) (admin.Run, error) {
		return d.startFailover(r.Context(), vmOf(r), s, e.progress)
	}))
	mux.Handle("POST /v1/vms/{vm}/cancel", answer(func(r *http.Request, _ none) (admin.Cancelled, error) {
		return d.cancelFailover(r.Context(), vmOf(r))
	}))
	mux.Handle("POST /v1/vms/{vm}/commit", answer(func(r *http.Request, _ none) (none, error) {
		return none{}, d.commitFailover(r.Context(), vmOf(r))
	}))
	mux.Handle("DELETE /v1/tests/{name}", answer(func(r *http.Request, _ none) (none, error) {
		return none{}, d.endTest(r.Context(), r.PathValue("name"))
	}))
	return mux
}

func vmOf(r *http.Request) string { return r.PathValue("vm") }

// answer is a handler that decodes the question and sends the answer or refusal.
func answer[In, Out any](f func(*http.Request, In) (Out, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in, err := question[In](w, r)
		var out Out
		if err == nil {
			out, err = f(r, in)
		}
		if err != nil {
			e := refusal(err)
			send(w, e.Status.HTTP(), e)
			return
		}
		send(w, http.StatusOK, out)
	})
}

func send(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // who asked has gone: nobody to tell
}

// question decodes the body. A field that is not known is refused: what a newer
// command asks for must not be left out silently.
func question[In any](w http.ResponseWriter, r *http.Request) (in In, err error) {
	if _, empty := any(in).(none); empty {
		return in, nil
	}
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, bodyMax))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&in); err != nil {
		e := &admin.Error{Status: admin.StatusUsage, Message: "the request cannot be understood: " + err.Error()}
		if strings.Contains(err.Error(), "unknown field") {
			e.Advice = "the command is newer than the daemon: restart the daemon"
		}
		return in, e
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return in, usagef("the request goes on after its end")
	}
	return in, nil
}

// events writes the lines of a stream.
type events struct {
	mu   sync.Mutex // a line at a time
	enc  *json.Encoder
	rc   *http.ResponseController
	last time.Time // of the last progress
}

// progress tells how far the request is, as often as anybody wants to know.
func (e *events) progress(p admin.Progress) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if time.Since(e.last) < progressEvery/2 {
		return
	}
	e.last = time.Now()
	_ = e.writeLocked(admin.Event{Progress: &p})
}

func (e *events) result(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.writeLocked(admin.Event{Result: b})
}

func (e *events) writeLocked(ev admin.Event) error {
	if err := e.enc.Encode(ev); err != nil {
		return err
	}
	return e.rc.Flush()
}

// stream is a handler whose answer takes a while. What can be refused at once is
// refused with a status of its own; once a line was sent the error is the last one.
func stream[In, Out any](f func(*http.Request, In, *events) (Out, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in, err := question[In](w, r)
		if err != nil {
			e := refusal(err)
			send(w, e.Status.HTTP(), e)
			return
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		e := &events{enc: json.NewEncoder(w), rc: http.NewResponseController(w)}
		out, err := f(r, in, e)
		if err == nil {
			err = e.result(out)
		}
		if err != nil {
			e.mu.Lock()
			defer e.mu.Unlock()
			_ = e.writeLocked(admin.Event{Error: refusal(err)})
		}
	})
}

// remove lets go of a VM, of whatever role.
func (d *Daemon) remove(ctx context.Context, name string) error {
	d.mu.Lock()
	v := d.vms[name]
	d.mu.Unlock()
	if v != nil {
		return d.removeVM(ctx, v)
	}
	return d.eraseReplica(ctx, name)
}
