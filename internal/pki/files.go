package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// ExpirySoon is how long before a certificate expires it is time to say so.
const ExpirySoon = 30 * 24 * time.Hour

// Files are a host's certificate and the CAs it believes, in a directory. They are
// looked at whenever they are used, and read again when they have changed.
// Connections that exist stay as they are.
type Files struct {
	Dir string
	// Warn is told when other files come into use, and when those there cannot
	// be used; nil: nobody is. Set before the first use.
	Warn *slog.Logger

	now func() time.Time // the host's clock; tests have another

	// mu guards what follows. It is held while the files are read: who needs
	// them waits for whoever reads.
	mu   sync.Mutex
	m    *material // in use; what it holds never changes
	seen stamps    // of the files that m is from
	err  error     // why the files there now are not those in use
}

// Open reads the files in dir. A certificate that has expired is no error: the
// disks have to be served all the same, and Expires says so.
func Open(dir string) (*Files, error) { return open(dir, time.Now) }

func open(dir string, now func() time.Time) (*Files, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	f := &Files{Dir: dir, now: now}
	m, seen, err := load(dir, now())
	if err != nil {
		return nil, err
	}
	f.useLocked(m, seen) // nobody else has it yet
	return f, nil
}

// current is what is in use from now on.
func (f *Files) current() *material {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil && f.seen == stampsOf(f.Dir) {
		return f.m
	}
	m, seen, err := load(f.Dir, f.now())
	if err != nil {
		// Again at the next use: it may be the reading that failed.
		if f.err == nil || f.err.Error() != err.Error() {
			f.tell(slog.LevelError, "the certificates cannot be used; going on with those of before", "dir", f.Dir, "err", err)
		}
		f.err = err
		return f.m
	}
	f.useLocked(m, seen)
	f.tell(slog.LevelInfo, "the certificates have changed", "dir", f.Dir, "name", m.names[0], "expires", m.expires)
	return m
}

func (f *Files) useLocked(m *material, seen stamps) {
	m.server = &tls.Config{
		Certificates: []tls.Certificate{m.cert},
		ClientCAs:    m.cas,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := Identity(&cs)
			return err
		},
		MinVersion: tls.VersionTLS13,
		Time:       f.now,
		// A resumed session would keep alive a certificate that has expired.
		SessionTicketsDisabled: true,
	}
	f.m, f.seen, f.err = m, seen, nil
}

func (f *Files) tell(level slog.Level, msg string, args ...any) {
	if f.Warn != nil {
		f.Warn.Log(context.Background(), level, msg, args...)
	}
}

// Server returns the configuration of the side that is dialed. It needs no
// renewal: every handshake uses the files as they then are. No protocol is
// negotiated within TLS, so HTTP over it is HTTP/1.1.
func (f *Files) Server() *tls.Config {
	return &tls.Config{
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return f.current().server, nil },
		// For whoever looks at it; the other is the one that is used.
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  x509.NewCertPool(),
		MinVersion: tls.VersionTLS13,
		Time:       f.now,
	}
}

// Client returns the configuration of the side that dials; it needs no renewal
// either. serverName is the HOST of the HOST:PORT that is dialed, a name or an
// address: the peer's certificate must be for it.
//
// The errors of a handshake are *Error, except for what Explain makes one.
func (f *Files) Client(serverName string) *tls.Config {
	serverName = hostOf(serverName)
	return &tls.Config{
		ServerName: serverName,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			m := f.current()
			// Checked here because the peer would only say that it will not have it.
			if err := ownExpired(m, f.now()); err != nil {
				return nil, err
			}
			return &m.cert, nil
		},
		// A configuration has its CAs for good, so package tls must not look at the
		// certificate: verifyServer does what it would.
		InsecureSkipVerify: true,
		VerifyConnection:   func(cs tls.ConnectionState) error { return f.verifyServer(cs.PeerCertificates, serverName) },
		MinVersion:         tls.VersionTLS13,
		Time:               f.now,
	}
}

func (f *Files) verifyServer(chain []*x509.Certificate, serverName string) error {
	if len(chain) == 0 {
		return noPeerCertificate(nil)
	}
	m, leaf := f.current(), chain[0]
	if _, err := verifyAt(chain, m.cas, x509.ExtKeyUsageServerAuth, f.now()); err != nil {
		return peerChainError(err, whoIs(leaf, serverName), leaf, filepath.Join(f.Dir, caFile), f.now())
	}
	// No name is no host's name: it is refused here like any other that is wrong.
	if err := leaf.VerifyHostname(serverName); err != nil {
		return wrongName(err, leaf, serverName)
	}
	_, err := peerIdentity(leaf)
	return err
}

// Name returns the identity of this host: the first name of its certificate.
func (f *Files) Name() string { return f.current().names[0] }

// Names returns all names of this host, the identity first.
func (f *Files) Names() []string { return slices.Clone(f.current().names) }

// Expires says until when the certificate in use, and its CA, are good.
func (f *Files) Expires() time.Time { return f.current().expires }

// Err says why the files that are there now cannot be used, so that older ones
// still are; nil: the files there are those in use.
func (f *Files) Err() error {
	f.current()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}
