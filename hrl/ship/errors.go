package ship

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	"afterimage/hrl/wire"
)

// ErrClosed is what a closed Client returns.
var ErrClosed = errors.New("the client was closed")

var (
	errSilent   = fmt.Errorf("it gave no sign of life for %v", wire.SilenceMax)
	errHello    = fmt.Errorf("it did not say who it is within %v", helloMax)
	errStranger = errors.New("what answers there is not afterimage")
)

// An UnreachableError says that a peer could not be asked, or that its answer did
// not arrive: what was asked may have been done. A peer that was asked and refuses
// is a *wire.Error.
type UnreachableError struct {
	Addr string
	Err  error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("peer %s cannot be reached: %v", e.Addr, e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// Hint says what to check.
func (e *UnreachableError) Hint() string {
	var (
		dns     *net.DNSError
		name    x509.HostnameError
		issuer  x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
		alert   tls.AlertError
		record  tls.RecordHeaderError
		timeout net.Error
		knows   interface{ Hint() string }
	)
	switch {
	case errors.As(e.Err, &knows) && knows.Hint() != "":
		return knows.Hint() // whoever checks the certificates knows best
	case errors.As(e.Err, &dns):
		return "check the name of the peer, and this host's resolver"
	case errors.As(e.Err, &name):
		return "the peer's certificate is not for this name: use one that it has, or `afterimage cert issue` it with this one"
	case errors.As(e.Err, &issuer):
		return "the certificates of both hosts must come from one CA: `afterimage cert issue`"
	case errors.As(e.Err, &invalid) && invalid.Reason == x509.Expired:
		return "the peer's certificate has expired, or a clock is wrong: `afterimage cert rotate` on the peer"
	case errors.As(e.Err, &invalid):
		return "`afterimage cert show` on the peer"
	case errors.As(e.Err, &alert), strings.Contains(e.Err.Error(), "remote error: tls:"):
		return "the peer does not take this host's certificate: `afterimage cert show` here; it must be of the peer's CA, and not expired"
	case errors.As(e.Err, &record), errors.Is(e.Err, errStranger), errors.Is(e.Err, errGibberish):
		return "check the port: it is the one of `afterimage daemon --listen` over there"
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return "check that `afterimage daemon` runs over there with --listen, and on this port"
	case errors.Is(e.Err, syscall.ECONNRESET), errors.Is(e.Err, syscall.EPIPE), errors.Is(e.Err, io.EOF), errors.Is(e.Err, io.ErrUnexpectedEOF):
		return "the connection broke: see the log of the daemon over there; it may not take this host's certificate"
	case errors.Is(e.Err, errSilent), errors.Is(e.Err, errHello), errors.As(e.Err, &timeout) && timeout.Timeout():
		return "check the line, and firewalls between the hosts"
	}
	return "check the address, the line, and that `afterimage daemon` runs over there with --listen"
}

// errGibberish is in the chain of an answer that the protocol does not know.
var errGibberish = errors.New("its answer cannot be understood")
