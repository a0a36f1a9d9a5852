package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// A Reason says what is wrong, for programs.
type Reason string

// The reasons.
const (
	Expired       Reason = "expired"
	NotYetValid   Reason = "not_yet_valid"
	UnknownCA     Reason = "unknown_ca"     // a certificate is of no CA in ca.pem
	WrongName     Reason = "wrong_name"     // a host is dialed by a name that it does not have
	NoName        Reason = "no_name"        // a certificate is for no host
	NoCertificate Reason = "no_certificate" // a side has shown none
	Refused       Reason = "refused"        // the peer does not accept our certificate and gives no other reason
	Plaintext     Reason = "plaintext"      // the peer does not speak TLS
	Version       Reason = "version"        // the peer does not speak TLS 1.3
	Unpaired      Reason = "unpaired"       // key and certificate do not belong together
	Malformed     Reason = "malformed"      // a file cannot be understood
	Missing       Reason = "missing"        // a file is not there
	Exists        Reason = "exists"         // a file is there already
)

// An Error says what is wrong with certificates, on which side, and what to do.
type Error struct {
	Reason Reason
	Peer   bool   // it is the other side's to mend
	File   string // ours, if one is to blame
	Err    error  // what was found; may be nil

	msg, hint string
}

func (e *Error) Error() string { return e.msg }
func (e *Error) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *Error) Hint() string { return e.hint }

// withAdvice gives an error of this package another hint.
func withAdvice(err error, hint string) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	c := *e
	c.hint = hint
	return &c
}

// ownChainError says why the certificate in path is of no use here.
func ownChainError(err error, leaf *x509.Certificate, path, caPath string) error {
	e := &Error{Reason: UnknownCA, File: path, Err: err, hint: "make a new certificate with `afterimage cert rotate`"}
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		e.msg = fmt.Sprintf("%s is signed by %q, which is not in %s", path, nameOf(leaf.Issuer.CommonName, leaf.Issuer.String()), caPath)
		e.hint = "put back the ca.pem of that CA, or make a certificate of the one in ca.pem with `afterimage cert rotate --ca DIR`"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		e.Reason = Expired
		e.msg = fmt.Sprintf("%s and the CA in %s were never valid at the same time", path, caPath)
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		e.msg = fmt.Sprintf("%s is not for both sides of a connection: it needs the usages serverAuth and clientAuth", path)
	default:
		e.msg = fmt.Sprintf("%s is not accepted: %v", path, err)
	}
	return e
}

// peerChainError says why the certificate that a peer has shown is not believed.
// who names the peer, in the words of who cannot know whether it is the one.
func peerChainError(err error, who string, leaf *x509.Certificate, caPath string, now time.Time) *Error {
	e := &Error{Reason: UnknownCA, Peer: true, Err: err}
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		what := "the certificate of " + who
		if invalid.Cert != nil && invalid.Cert.IsCA {
			what = fmt.Sprintf("the CA %q, from which the certificate of %s comes,", invalid.Cert.Subject.CommonName, who)
		}
		e.Reason = Expired
		if invalid.Cert != nil {
			leaf = invalid.Cert
		}
		if now.Before(leaf.NotBefore) {
			e.Reason = NotYetValid
			e.msg = fmt.Sprintf("%s is valid from %s on, the clock here says %s", what, day(leaf.NotBefore), day(now))
			e.hint = "set the clocks of both hosts"
			break
		}
		e.msg = fmt.Sprintf("%s expired on %s", what, day(leaf.NotAfter))
		e.hint = "renew it over there with `afterimage cert rotate --tls-dir DIR`; if the date here is wrong (" + day(now) + "), set the clock"
		if leaf.IsCA {
			e.hint = "make a new CA with `afterimage cert init` in another directory, append its ca.pem to that of every host, then rotate with --ca"
		}
	case errors.As(err, new(x509.UnknownAuthorityError)):
		e.msg = fmt.Sprintf("the certificate of %s is signed by %q, which is not in %s", who, nameOf(leaf.Issuer.CommonName, leaf.Issuer.String()), caPath)
		e.hint = "both hosts need certificates of one CA: make them with `afterimage cert issue`, where `afterimage cert init` was run"
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		e.msg = fmt.Sprintf("the certificate of %s is not for both sides of a connection: it needs the usages serverAuth and clientAuth", who)
		e.hint = "renew it over there with `afterimage cert rotate --tls-dir DIR`"
	default:
		e.msg = fmt.Sprintf("the certificate of %s is not accepted: %v", who, err)
		e.hint = "look at it over there with `afterimage cert show --tls-dir DIR`"
	}
	return e
}

// wrongName says that the host dialed as serverName is another.
func wrongName(err error, leaf *x509.Certificate, serverName string) *Error {
	names, serverName := namesOf(leaf), shownName(serverName)
	if len(names) == 0 {
		return &Error{Reason: WrongName, Peer: true, Err: err, msg: "the certificate of what answered at " + serverName + " is for no host at all",
			hint: "make it with `afterimage cert issue`"}
	}
	return &Error{Reason: WrongName, Peer: true, Err: err,
		msg: fmt.Sprintf("what answered at %s has a certificate for %s, not for %s", serverName, list(names), serverName),
		hint: fmt.Sprintf("dial it by a name it has, or give it this one too, over there: `afterimage cert rotate --tls-dir DIR --name %s,%s`",
			strings.Join(names, ","), serverName)}
}

func noPeerCertificate(err error) *Error {
	return &Error{Reason: NoCertificate, Peer: true, Err: err, msg: "the peer has shown no certificate",
		hint: "between hosts both sides need one: see `afterimage cert -h`"}
}

// ownExpired says that our own certificate is out of its time: no peer would
// accept it.
func ownExpired(m *material, now time.Time) error {
	dir := filepath.Dir(m.path)
	switch {
	case now.After(m.expires):
		return &Error{Reason: Expired, File: m.path, msg: fmt.Sprintf("the certificate of this host, %s, expired on %s", m.path, day(m.expires)),
			hint: fmt.Sprintf("renew it with `afterimage cert rotate --tls-dir %s`; if the date here is wrong (%s), set the clock", dir, day(now))}
	case now.Before(m.cert.Leaf.NotBefore):
		return &Error{Reason: NotYetValid, File: m.path,
			msg:  fmt.Sprintf("the certificate of this host, %s, is valid from %s on, the clock says %s", m.path, day(m.cert.Leaf.NotBefore), day(now)),
			hint: "set the clock of this host"}
	}
	return nil
}

// nameOf is the first that is not empty.
func nameOf(name, other string) string {
	if name != "" {
		return name
	}
	return other
}

// list shows names that a stranger may have made up.
func list(names []string) string {
	const most = 8
	var shown []string
	for i, n := range names {
		if i == most {
			shown = append(shown, fmt.Sprintf("and %d more", len(names)-most))
			break
		}
		shown = append(shown, shownName(n))
	}
	return strings.Join(shown, ", ")
}

func shownName(n string) string {
	if _, err := checkName(n); err != nil {
		return fmt.Sprintf("%.100q", n)
	}
	return n
}

// whoIs names the peer that shows a certificate, dialed as serverName ("": it has
// dialed us).
func whoIs(leaf *x509.Certificate, serverName string) string {
	names := namesOf(leaf)
	switch {
	case len(names) == 0 && serverName == "":
		return "the peer"
	case len(names) == 0 || names[0] == serverName:
		return serverName
	case serverName == "":
		return shownName(names[0])
	}
	return fmt.Sprintf("%s, dialed as %s,", shownName(names[0]), serverName)
}
