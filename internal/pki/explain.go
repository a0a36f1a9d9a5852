package pki

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
)

// Alerts of TLS, as crypto/tls names them.
const (
	alertBadCertificate      tls.AlertError = 42
	alertCertificateExpired  tls.AlertError = 45
	alertUnknownCertificate  tls.AlertError = 46
	alertUnknownCA           tls.AlertError = 48
	alertAccessDenied        tls.AlertError = 49
	alertProtocolVersion     tls.AlertError = 70
	alertCertificateRequired tls.AlertError = 116
)

// Explain returns an *Error that wraps err, if err says that a handshake or the
// first use of a connection failed because of certificates or of TLS, on either
// side; it returns any other error as it is. Who was dialed, or has dialed, is for
// the caller to add.
//
// In TLS 1.3 the server looks at the client's certificate after the client is done
// with its handshake: what the server has against it is an error of the client's
// first read.
func (f *Files) Explain(err error) error {
	var (
		known      *Error
		unverified *tls.CertificateVerificationError
		record     tls.RecordHeaderError
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		e := *known
		e.Err = err
		return &e
	case errors.As(err, &unverified) && len(unverified.UnverifiedCertificates) > 0:
		leaf := unverified.UnverifiedCertificates[0]
		e := peerChainError(unverified.Err, whoIs(leaf, ""), leaf, filepath.Join(f.Dir, caFile), f.now())
		e.Err = err
		return e
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return &Error{Reason: Plaintext, Peer: true, Err: err, msg: "the peer does not speak TLS",
			hint: "check the port: hosts talk to each other on that of `afterimage daemon --listen`"}
	}
	if e := f.alert(err); e != nil {
		e.Err = err
		return e
	}
	// What crypto/tls has no type for.
	switch text := err.Error(); {
	case strings.Contains(text, "tls: client didn't provide a certificate"):
		return noPeerCertificate(err)
	case strings.Contains(text, "tls: client offered only unsupported versions"), strings.Contains(text, "tls: server selected unsupported protocol version"):
		return versionError(err)
	}
	return err
}

func versionError(err error) *Error {
	return &Error{Reason: Version, Peer: true, Err: err, msg: "the peer does not speak TLS 1.3",
		hint: "check that it is an afterimage, and that nothing stands between that ends TLS"}
}

// alert explains what the peer has told us before it closed the connection; nil:
// nothing, or nothing about certificates.
func (f *Files) alert(err error) *Error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" || op.Err == nil {
		return nil
	}
	path := filepath.Join(f.Dir, certFile)
	show := "look at it with `afterimage cert show --tls-dir " + f.Dir + "`; the log of the peer says what it has against it"
	// crypto/tls gives an alert that came over a connection no type of its own.
	is := func(a tls.AlertError) bool { return op.Err.Error() == a.Error() }
	switch {
	case is(alertCertificateExpired):
		return &Error{Reason: Expired, File: path, msg: "the peer says that the certificate of this host, " + path + ", has expired",
			hint: "renew it with `afterimage cert rotate --tls-dir " + f.Dir + "`; if it has not expired, the clock of one of the hosts is wrong"}
	case is(alertUnknownCA):
		return &Error{Reason: UnknownCA, File: path, msg: "the peer does not know the CA of this host's certificate, " + path,
			hint: "both hosts need certificates of one CA: make them with `afterimage cert issue`, where `afterimage cert init` was run"}
	case is(alertCertificateRequired):
		return &Error{Reason: NoCertificate, File: path, msg: "the peer wants a certificate and was shown none", hint: show}
	case is(alertBadCertificate), is(alertUnknownCertificate), is(alertAccessDenied):
		return &Error{Reason: Refused, File: path, msg: "the peer does not accept the certificate of this host, " + path, hint: show}
	case is(alertProtocolVersion):
		return versionError(err)
	}
	return nil
}
