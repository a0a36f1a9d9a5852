package pki

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"
)

const year = 365 * 24 * time.Hour

func TestHandshake(t *testing.T) {
	dirA, dirB := hosts(t)
	dirX, dirG := filepath.Join(t.TempDir(), "x"), filepath.Join(t.TempDir(), "g")
	ok(t, Init(dirX, []string{"hostb", "127.0.0.1"}, Options{}))              // of another CA
	ok(t, Issue(dirA, dirG, []string{"hostg"}, Options{Valid: -time.Second})) // has expired
	a, b, x, g := openFiles(t, dirA), openFiles(t, dirB), openFiles(t, dirX), openFiles(t, dirG)
	early := at(t, dirA, -year) // its clock is

	// What a side does that ours does not.
	shows := func(f *Files) func(*tls.Config) {
		return func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &f.m.cert, nil }
		}
	}
	showsNone := func(c *tls.Config) { c.GetClientCertificate = nil }
	old := func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }
	oldServer := func(c *tls.Config) {
		old(c)
		c.GetConfigForClient, c.ClientAuth, c.Certificates = nil, tls.NoClientCert, []tls.Certificate{b.m.cert}
	}

	const own, peers = false, true
	type told struct {
		reason Reason // "": no matter
		peer   bool
	}
	for _, tt := range []struct {
		name           string
		server, client *Files
		dialed         string
		server0        func(*tls.Config)
		client0        func(*tls.Config)
		clientIs       told // what the client is told
		serverIs       told
		words          []string // in what the client is told
	}{
		{"a name that it does not have", b, a, "hostc", nil, nil, told{WrongName, peers}, told{Refused, own},
			[]string{"hostc", "hostb, Alias.example.com, 127.0.0.1, ::1", "cert rotate", "--name hostb,Alias.example.com,127.0.0.1,::1,hostc"}},
		{"an address that it does not have", b, a, "10.9.8.7", nil, nil, told{WrongName, peers}, told{Refused, own}, []string{"10.9.8.7"}},
		{"no name", b, a, "", nil, nil, told{WrongName, peers}, told{Refused, own}, nil},

		{"an expired server", g, a, "hostg", nil, nil, told{Expired, peers}, told{Refused, own},
			[]string{"the certificate of hostg expired", "over there", "clock"}},
		{"an expired client", a, g, "hosta", nil, nil, told{Expired, own}, told{},
			[]string{"the certificate of this host", filepath.Join(dirG, certFile), "cert rotate"}},
		{"an expired client that shows it", a, g, "hosta", nil, shows(g), told{Expired, own}, told{Expired, peers},
			[]string{"the peer says", filepath.Join(dirG, certFile), "cert rotate"}},
		{"a server before its time", b, early, "hostb", nil, nil, told{NotYetValid, peers}, told{Refused, own}, []string{"hostb", "clock"}},
		{"a client before its time", early, b, "hosta", nil, nil, told{Expired, own}, told{NotYetValid, peers}, []string{"clock"}},

		{"a server of another CA", x, a, "hostb", nil, nil, told{UnknownCA, peers}, told{Refused, own},
			[]string{"the certificate of hostb", filepath.Join(dirA, caFile), "afterimage CA hostb", "cert issue"}},
		{"that by address", x, a, "127.0.0.1", nil, nil, told{UnknownCA, peers}, told{Refused, own}, []string{"hostb, dialed as 127.0.0.1"}},
		{"a client of another CA", a, b, "hosta", nil, shows(x), told{UnknownCA, own}, told{UnknownCA, peers},
			[]string{"the peer does not know the CA"}},
		{"a client without certificate", a, b, "hosta", nil, showsNone, told{NoCertificate, own}, told{NoCertificate, peers}, nil},

		{"a server of TLS 1.2", b, a, "hostb", oldServer, nil, told{Version, peers}, told{Version, peers}, []string{"TLS 1.3"}},
		{"a client of TLS 1.2", a, b, "hosta", nil, old, told{Version, peers}, told{Version, peers}, []string{"TLS 1.3"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, client := tt.server.Server(), tt.client.Client(tt.dialed)
			if tt.server0 != nil {
				tt.server0(server)
			}
			if tt.client0 != nil {
				tt.client0(client)
			}
			m := meet(t, server, client)
			if m.server == nil || m.client == nil || m.clientID != "" {
				t.Fatalf("they have met: %+v", m)
			}
			for _, side := range []struct {
				name  string
				files *Files
				err   error
				want  told
			}{{"client", tt.client, m.client, tt.clientIs}, {"server", tt.server, m.server, tt.serverIs}} {
				if side.want.reason == "" {
					continue
				}
				err := side.files.Explain(fmt.Errorf("step: %w", side.err))
				e := reason(t, err, side.want.reason)
				if e.Peer != side.want.peer || !errors.Is(err, side.err) {
					t.Errorf("%s: %v: of the peer: %v; from %v", side.name, err, e.Peer, side.err)
				}
				if side.name == "client" {
					mentions(t, e, tt.words...)
				}
			}
		})
	}

	for _, dialed := range []string{"hostb", "127.0.0.1", "::1", "::1%lo", "aLIAS.Example.com"} {
		good(t, meet(t, b.Server(), a.Client(dialed)), "hostb", "hosta")
	}
	good(t, meet(t, b.Server(), b.Client("hostb")), "hostb", "hostb")
}

// TestHTTP: an error is explained through all that net/http wraps around it.
func TestHTTP(t *testing.T) {
	dirA, dirB := hosts(t)
	a, b := openFiles(t, dirA), openFiles(t, dirB)

	serve := func(wrap func(net.Listener) net.Listener) (addr string) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		ok(t, err)
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.TLS != nil {
				id, err := Identity(r.TLS)
				fmt.Fprint(w, id, err)
			}
		}), ErrorLog: log.New(io.Discard, "", 0)}
		done := make(chan struct{})
		go func() { defer close(done); srv.Serve(wrap(ln)) }()
		t.Cleanup(func() { srv.Close(); <-done })
		return ln.Addr().String()
	}
	secure := serve(func(ln net.Listener) net.Listener { return tls.NewListener(ln, b.Server()) })
	plain := serve(func(ln net.Listener) net.Listener { return ln })

	get := func(url string, conf *tls.Config) (string, error) {
		tr := &http.Transport{TLSClientConfig: conf}
		defer tr.CloseIdleConnections()
		resp, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get(url)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}

	if body, err := get("https://"+secure, a.Client("127.0.0.1")); err != nil || body != "hosta<nil>" {
		t.Errorf("a good request: %q, %v", body, err)
	}
	none := a.Client("hostb")
	none.GetClientCertificate = nil
	_, err := get("https://"+secure, none)
	reason(t, a.Explain(err), NoCertificate)
	_, err = get("https://"+secure, a.Client("hostc"))
	mentions(t, reason(t, a.Explain(err), WrongName), "hostc", "hostb")
	_, err = get("https://"+plain, a.Client("hostb"))
	mentions(t, reason(t, a.Explain(err), Plaintext), "port")

	// What has nothing to do with TLS is left alone.
	for _, err := range []error{nil, io.EOF, &net.OpError{Op: "dial", Err: errors.New("connection refused")}} {
		if got := a.Explain(err); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
}

// TestPlaintext: who speaks no TLS to the port gets nothing, and is understood.
func TestPlaintext(t *testing.T) {
	dirA, _ := hosts(t)
	a := openFiles(t, dirA)
	const alertRecord = 21
	for _, say := range []string{"GET / HTTP/1.1\r\nHost: hosta\r\n\r\n", "NBDMAGIC", "\x00\x00\x00\x00\x00\x00"} {
		ours, theirs := net.Pipe()
		heard := make(chan []byte)
		go func() {
			theirs.Write([]byte(say))
			answer, _ := io.ReadAll(theirs)
			heard <- answer
		}()
		err := tls.Server(ours, a.Server()).Handshake()
		ours.Close()
		if e := reason(t, a.Explain(err), Plaintext); !e.Peer {
			t.Errorf("%q: %v is our fault", say, e)
		}
		if answer := <-heard; len(answer) > 0 && answer[0] != alertRecord {
			t.Errorf("%q is answered with %q", say, answer)
		}
		theirs.Close()
	}
}

// TestOwnTime: a host says itself that its certificate is out of its time.
func TestOwnTime(t *testing.T) {
	dirA, _ := hosts(t)
	for _, tt := range []struct {
		off  time.Duration
		want Reason
	}{{-year, NotYetValid}, {0, ""}, {824 * 24 * time.Hour, ""}, {826 * 24 * time.Hour, Expired}} {
		f := at(t, dirA, tt.off)
		_, err := f.Client("hosta").GetClientCertificate(nil)
		if tt.want == "" {
			ok(t, err)
			continue
		}
		mentions(t, reason(t, err, tt.want), filepath.Join(dirA, certFile), "clock")
	}
}
