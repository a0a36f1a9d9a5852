package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"path/filepath"
	"time"
)

const (
	// caYears is how long a CA is good for.
	caYears = 10
	// HostValid is how long a host's certificate is good for, unless it is said
	// otherwise; never longer than its CA.
	HostValid = 825 * 24 * time.Hour
	// skew is how much a certificate is dated back, so that a host whose clock
	// is behind believes it at once.
	skew = time.Hour
)

// PEM blocks.
const (
	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY" // PKCS #8
)

// An authority is a CA with its key.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	// believed is all of ca.pem: cert, and others while hosts change from one CA
	// to another.
	believed []*x509.Certificate
}

// newAuthority makes a CA. Its name holds a part of its key's digest, so that two
// of them are told apart in messages, and by whoever looks a CA up by its name.
func newAuthority(host string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(public)
	tmpl := &x509.Certificate{
		Subject:               pkix.Name{CommonName: fmt.Sprintf("afterimage CA %s %x", host, digest[:4])},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.AddDate(caYears, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := certify(tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make a CA: %w", err)
	}
	return &authority{cert, key, []*x509.Certificate{cert}}, nil
}

// openAuthority reads the CA in dir: that one of ca.pem that ca-key.pem belongs to.
func openAuthority(dir string) (*authority, error) {
	keyPath, caPath := filepath.Join(dir, caKeyFile), filepath.Join(dir, caFile)
	key, err := readKey(keyPath)
	if err != nil {
		return nil, withAdvice(err, "name with --ca the directory that `afterimage cert init` made: it has the CA's key, ca-key.pem")
	}
	cas, err := readCerts(caPath)
	if err != nil {
		return nil, err
	}
	for _, ca := range cas {
		if belongs(ca, key) {
			return &authority{ca, key, cas}, nil
		}
	}
	return nil, &Error{Reason: Unpaired, File: keyPath, msg: fmt.Sprintf("%s and %s do not belong together", keyPath, caPath),
		hint: "put back the pair that `afterimage cert init` made"}
}

// sign makes a key and a certificate for a host. It is good until valid from now,
// but never longer than the CA.
func (a *authority) sign(names []string, now time.Time, valid time.Duration) (*pair, error) {
	if now.After(a.cert.NotAfter) {
		return nil, &Error{Reason: Expired, msg: fmt.Sprintf("the CA %q expired on %s: nobody believes what it signs", a.cert.Subject.CommonName, day(a.cert.NotAfter)),
			hint: "make a new one with `afterimage cert init` in another directory, add its ca.pem to that of every host, then rotate with --ca"}
	}
	if now.Add(skew).Before(a.cert.NotBefore) {
		return nil, &Error{Reason: NotYetValid, msg: fmt.Sprintf("the CA %q is good from %s on, the clock here says %s", a.cert.Subject.CommonName,
			day(a.cert.NotBefore), day(now)), hint: "set the clock of this host"}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		Subject:               pkix.Name{CommonName: names[0]},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(valid),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, n)
		}
	}
	if tmpl.NotBefore.Before(a.cert.NotBefore) {
		tmpl.NotBefore = a.cert.NotBefore
	}
	if tmpl.NotAfter.After(a.cert.NotAfter) {
		tmpl.NotAfter = a.cert.NotAfter
	}
	cert, err := certify(tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate for %s: %w", names[0], err)
	}
	host := &pair{chain: []*x509.Certificate{cert}, key: key}
	// A CA of another tool may be limited to names, or be none.
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	if _, err := chained(host.chain, pool, now); err != nil {
		return nil, &Error{Reason: UnknownCA, Err: err, msg: fmt.Sprintf("what the CA %q signs is not valid: %v", a.cert.Subject.CommonName, err),
			hint: "use a CA that `afterimage cert init` made"}
	}
	return host, nil
}

// certify signs and reads back what was signed.
func certify(tmpl, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// A pair is a key and the certificate for it, with those between it and the CA.
type pair struct {
	chain []*x509.Certificate // the host's own first
	key   crypto.Signer
}

func encodeCerts(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: c.Raw}))
	}
	return b.Bytes()
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), nil
}

// belongs says whether the certificate is for the key.
func belongs(cert *x509.Certificate, key crypto.Signer) bool {
	public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(key.Public())
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
