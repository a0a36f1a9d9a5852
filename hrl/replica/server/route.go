package server

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"afterimage/hrl/wire"
)

// A verb is what one kind of request does.
type verb struct {
	do    func(*request) (any, error) // a []byte is answered as it is, anything else as JSON
	body  int64                       // the most bytes of the request's body
	open  bool                        // also for hosts that nothing allows
	piece bool                        // carries a piece of a layer
}

// verbs has them by method and path, without what names a VM or a layer.
var verbs = map[string]*verb{
	"GET hello":            {do: hello, open: true},
	"PUT vms/vm":           {do: offer, body: wire.BodyMax},
	"GET vms/vm":           {do: state},
	"GET vms/vm/points":    {do: points},
	"POST vms/vm/points":   {do: list, body: wire.BodyMax},
	"POST vms/vm/discard":  {do: discard, body: wire.BodyMax},
	"POST vms/vm/digests":  {do: digests, body: wire.BodyMax},
	"GET vms/vm/layers/id": {do: layerState},
	"PUT vms/vm/layers/id": {do: stageLayer, body: wire.PieceMax, piece: true},
}

// route finds the verb, and what the path names; nil if there is none. There is
// one spelling of each path.
func (q *request) route() *verb {
	path, ok := strings.CutPrefix(q.r.URL.EscapedPath(), "/v1/")
	if !ok {
		return nil
	}
	part := strings.Split(path, "/")
	if part[0] == "vms" && len(part) > 1 {
		var err error
		if q.vm, err = wire.ParseVMID(part[1]); err != nil {
			return nil
		}
		part[1] = "vm"
	}
	if len(part) == 4 && part[2] == "layers" {
		q.digest = part[3]
		if wire.CheckDigest(q.digest) != nil {
			return nil
		}
		part[3] = "id"
	}
	return verbs[q.r.Method+" "+strings.Join(part, "/")]
}

// decode reads the request's body, all of it, into v. Fields that are not known
// are let be: a newer host may send more.
func (q *request) decode(v any) error {
	body := q.bounded(wire.BodyMax)
	b, err := io.ReadAll(io.LimitReader(body, wire.BodyMax+1))
	body.end()
	switch {
	case err != nil:
		return malformed("the body broke off: %v", err)
	case len(b) > wire.BodyMax:
		return malformed("a body of more than %d bytes", wire.BodyMax)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return malformed("the body cannot be understood: %v", err)
	}
	return nil
}

// answer sends the answer, or the refusal.
func (q *request) answer(answer any, err error) {
	h, status := q.w.Header(), http.StatusOK
	if err != nil {
		e := q.s.refusal(q, err)
		answer, status = e, e.Code.Status()
	}
	b, raw := answer.([]byte)
	if raw {
		h.Set("Content-Type", "application/octet-stream")
	} else {
		h.Set("Content-Type", "application/json")
		if b, err = json.Marshal(answer); err == nil && len(b) > wire.BodyMax {
			err = errAnswerLong
		}
		if err != nil {
			q.answer(nil, err)
			return
		}
	}
	// A host that does not take the answer is cut off, and is its own to blame.
	_ = q.rc.SetWriteDeadline(time.Now().Add(q.s.allowance(int64(len(b)))))
	q.w.WriteHeader(status)
	_, _ = q.w.Write(b)
}

var errAnswerLong = errors.New("the answer is longer than the protocol has room for")

// allowance is how long n bytes may take.
func (s *Server) allowance(n int64) time.Duration {
	return s.o.StallTimeout + time.Duration(n/slowest)*time.Second
}
