package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// identityMax is the most bytes of a host's first name: the limit of X.509 for a
// common name. The other names may have what DNS allows.
const (
	identityMax = 64
	nameMax     = 253
	labelMax    = 63
)

// ParseNames reads NAME[,ALIAS...] as on the command line.
func ParseNames(s string) ([]string, error) {
	names := strings.Split(s, ",")
	for i := range names {
		names[i] = strings.TrimSpace(names[i])
	}
	return checkNames(names)
}

// checkNames returns the names in the form in which they stand in a certificate,
// each once.
func checkNames(names []string) ([]string, error) {
	if len(names) == 0 {
		return nil, errors.New("a host needs a name")
	}
	var checked []string
	for _, n := range names {
		n, err := checkName(n)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(checked, n) {
			checked = append(checked, n)
		}
	}
	if n := checked[0]; len(n) > identityMax {
		return nil, fmt.Errorf("%q is too long for the first name, which has at most %d characters: put a short one before it", n, identityMax)
	}
	return checked, nil
}

// checkName accepts a name of one host or an address. A pattern is refused: it
// would make one host another.
func checkName(n string) (string, error) {
	if ip, err := netip.ParseAddr(n); err == nil {
		if ip.Zone() != "" {
			return "", fmt.Errorf("%q: an address in a certificate has no zone", n)
		}
		return ip.Unmap().String(), nil
	}
	if n == "" {
		return "", errors.New("the name of a host is empty")
	}
	if len(n) > nameMax {
		return "", fmt.Errorf("%q is too long for a name: at most %d characters", n, nameMax)
	}
	for _, c := range []byte(n) {
		if !nameByte(c) {
			return "", fmt.Errorf("%q is neither a host's name (letters, digits, '-', '_' and '.') nor an address", n)
		}
	}
	for label := range strings.SplitSeq(n, ".") {
		if label == "" || len(label) > labelMax || label[0] == '-' || label[len(label)-1] == '-' {
			return "", fmt.Errorf("%q is not the name of a host", n)
		}
	}
	if strings.Trim(n, "0123456789.") == "" && strings.Contains(n, ".") {
		return "", fmt.Errorf("%q is not an address", n)
	}
	return n, nil
}

func nameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
}

// namesOf returns the names a certificate is for, the identity first. That is the
// common name, if the certificate is for it: it alone can stand before names and
// addresses alike. A certificate of another tool may have any common name; its
// first name then is the first one it is for.
func namesOf(cert *x509.Certificate) []string {
	names := slices.Clone(cert.DNSNames)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	if i := slices.Index(names, cert.Subject.CommonName); i > 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, cert.Subject.CommonName)
	}
	return names
}

// identityOf returns the identity in a certificate. An error calls it what.
func identityOf(cert *x509.Certificate, what string) (string, error) {
	names := namesOf(cert)
	if len(names) == 0 {
		return "", &Error{Reason: NoName, msg: what + " is for no host at all: it has neither a DNS name nor an address",
			hint: "make it with `afterimage cert issue`, or with another tool that adds a subject alternative name"}
	}
	if _, err := checkNames(names[:1]); err != nil {
		return "", &Error{Reason: NoName, Err: err, msg: fmt.Sprintf("the first name of %s is none of a host: %v", what, err),
			hint: "issue a certificate whose first name is the host's"}
	}
	return names[0], nil
}

// Identity returns the first name of the peer's certificate. The connection must
// be one whose handshake was done with a configuration of Files: it has checked
// that certificate.
func Identity(cs *tls.ConnectionState) (string, error) {
	if cs == nil || len(cs.PeerCertificates) == 0 {
		return "", noPeerCertificate(nil)
	}
	return peerIdentity(cs.PeerCertificates[0])
}

func peerIdentity(cert *x509.Certificate) (string, error) {
	name, err := identityOf(cert, "the peer's certificate")
	var e *Error
	if errors.As(err, &e) {
		e.Peer = true
	}
	return name, err
}

// hostOf is serverName as certificates know it: an address has no zone there.
func hostOf(serverName string) string {
	host, zone, ok := strings.Cut(serverName, "%")
	if ok && zone != "" && net.ParseIP(host) != nil {
		return host
	}
	return serverName
}
