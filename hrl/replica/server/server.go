package server

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"time"

	"afterimage/hrl/wire"
)

// Options of New. Identity, Allow and Name must be set.
type Options struct {
	// Identity names the host at the other end by its certificate.
	Identity func(*tls.ConnectionState) (string, error)
	// Allow says what a host may do here, or gives ErrNotAllowed. It is asked on
	// every request, so that taking a permission back counts at once.
	Allow   func(identity string) (Grant, error)
	Name    string       // identity of this host
	Product string       // its version, for people
	Warn    *slog.Logger // nil for slog.Default()

	// MaxConnections bounds the connections, of all hosts; 0 for 256. Further
	// ones are closed at once.
	MaxConnections int
	// MaxRequests bounds the requests of one host that are worked on at a time,
	// and MaxPieces those of them that carry pieces of layers; 0 for 32 and 8.
	// Further ones wait for BusyWait, and are then refused.
	MaxRequests, MaxPieces int
	BusyWait               time.Duration // 0 for 10 s

	// HeaderTimeout bounds the TLS handshake, and then how long a request's
	// header may take; 0 for 10 s.
	HeaderTimeout time.Duration
	// StallTimeout bounds how long a host may take to send the next bytes of a
	// body, or to take an answer; 0 for 60 s. A whole body may take that long and
	// a second more for every 16 KiB.
	StallTimeout time.Duration
	// IdleTimeout bounds how long a connection may be without a request; 0 for
	// 2 min.
	IdleTimeout time.Duration
	// ConnectionAge is when a connection is ended after its request, so that a
	// certificate that has expired or was replaced does not count for ever; 0
	// for 1 h.
	ConnectionAge time.Duration
	// DrainTimeout bounds how long Serve lets requests go on when it was told to
	// end; 0 for 10 s. Then their connections are cut.
	DrainTimeout time.Duration

	// PulseEvery is how often a request at work says so; 0 for wire.PulseEvery.
	PulseEvery time.Duration
	// LogEvery is the least time between two log lines about the same kind of
	// refusal; 0 for 10 s.
	LogEvery time.Duration
}

// A Grant is what one host may do here.
type Grant struct {
	Store Store
	Quota int64 // bytes a VM of that host may take here; 0: any
}

// ErrNotAllowed is what Allow returns for a host that nothing covers.
var ErrNotAllowed = errors.New("this host may not replicate here")

// slowest is how many bytes a second of a body must come at the least.
const slowest = 16 << 10

// A Server answers requests. It is an http.Handler; Serve is the usual way to
// listen. Its methods may be called from several goroutines.
type Server struct {
	o Options

	slots     slots   // of each host
	uploads   uploads // pieces being received
	vms       vmLocks
	refusals  sometimes // what is refused before it is a request
	strangers sometimes // requests of hosts that nothing allows
	failures  sometimes // requests that failed here
}

// New returns a server.
func New(o Options) *Server {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	num := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	num(&o.MaxConnections, 256)
	num(&o.MaxRequests, 32)
	num(&o.MaxPieces, 8)
	def(&o.BusyWait, 10*time.Second)
	def(&o.HeaderTimeout, 10*time.Second)
	def(&o.StallTimeout, time.Minute)
	def(&o.IdleTimeout, 2*time.Minute)
	def(&o.ConnectionAge, time.Hour)
	def(&o.DrainTimeout, 10*time.Second)
	def(&o.PulseEvery, wire.PulseEvery)
	def(&o.LogEvery, 10*time.Second)
	if o.Warn == nil {
		o.Warn = slog.Default()
	}
	return &Server{o: o}
}

// A request is one request on its way through the server.
type request struct {
	s        *Server
	w        http.ResponseWriter
	r        *http.Request
	rc       *http.ResponseController
	identity string
	grant    Grant
	vm       wire.VMID
	digest   string // of the layer in the path
	body     *body  // once it is being read
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := &request{s: s, w: w, r: r, rc: http.NewResponseController(w)}
	h := w.Header()
	h.Set(wire.VersionHeader, strconv.Itoa(wire.Version))
	if since, ok := r.Context().Value(connectedKey{}).(time.Time); ok && time.Since(since) > s.o.ConnectionAge {
		h.Set("Connection", "close")
	}
	answer, err := q.work()
	q.answer(answer, err)
}

// work does the request, with a pulse. What it returns is the whole answer: a
// handler that panics must not take the other hosts' requests with it.
func (q *request) work() (answer any, err error) {
	stop := q.pulse()
	defer stop()
	defer func() {
		if p := recover(); p != nil {
			q.s.o.Warn.Error("a request of another host made the replica's server panic", "peer", q.identity,
				"request", q.r.Method+" "+q.r.URL.Path, "panic", p, "stack", string(debug.Stack()))
			err = &wire.Error{Code: wire.CodeFailed, Message: fmt.Sprintf("host %s failed in this request", q.s.o.Name),
				Advice: "see the log of the daemon there"}
		}
	}()
	defer q.drain()
	return q.admit()
}

// admit lets the request through to its verb, or says why not.
func (q *request) admit() (any, error) {
	s := q.s
	if v := q.r.Header.Get(wire.VersionHeader); v != strconv.Itoa(wire.Version) {
		return nil, &wire.Error{
			Code:    wire.CodeVersion,
			Message: fmt.Sprintf("host %s speaks version %d of the protocol, the request is of version %.20q", s.o.Name, wire.Version, v),
			Advice:  "install the same version of afterimage on both hosts",
		}
	}
	if q.r.TLS == nil {
		return nil, &wire.Error{Code: wire.CodeNotAllowed, Message: "requests come over TLS, with a certificate"}
	}
	var err error
	if q.identity, err = s.o.Identity(q.r.TLS); err != nil {
		return nil, &wire.Error{
			Code:    wire.CodeNotAllowed,
			Message: fmt.Sprintf("host %s cannot tell who asks: %v", s.o.Name, err),
			Advice:  "make the certificate with `afterimage cert issue`",
		}
	}
	verb := q.route()
	if verb == nil {
		return nil, &wire.Error{Code: wire.CodeUnknown, Message: fmt.Sprintf("host %s knows no request %.10s %.200q", s.o.Name, q.r.Method, q.r.URL.Path)}
	}
	if q.grant, err = s.o.Allow(q.identity); err != nil && !(verb.open && errors.Is(err, ErrNotAllowed)) {
		return nil, q.notAllowed(err)
	}
	release, err := s.slots.take(q.r.Context(), q.identity, verb.piece, s.o)
	if err != nil {
		return nil, err
	}
	defer release()
	if q.r.ContentLength > verb.body {
		return nil, malformed("a body of %d bytes: %d are the most", q.r.ContentLength, verb.body)
	}
	return verb.do(q)
}

func (q *request) notAllowed(err error) error {
	s := q.s
	if !errors.Is(err, ErrNotAllowed) {
		return fmt.Errorf("look up what host %s may do: %w", q.identity, err)
	}
	if n, say := s.strangers.now(s.o.LogEvery); say {
		s.o.Warn.Warn("a host asked that may not replicate here", "peer", q.identity, "address", q.r.RemoteAddr, "times", n)
	}
	return &wire.Error{
		Code:    wire.CodeNotAllowed,
		Message: fmt.Sprintf("host %s does not let %s replicate to it", s.o.Name, q.identity),
		Advice:  fmt.Sprintf("on %s: afterimage peer allow %s", s.o.Name, q.identity),
	}
}
