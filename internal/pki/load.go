package pki

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// fileMax is the most bytes of a file of certificates; a CA bundle of a whole
// operating system has a quarter of a million.
const fileMax = 1 << 20

// A material is what the files of a host hold, read and found to fit.
type material struct {
	cert  tls.Certificate // with Leaf
	path  string          // the file that it is from
	names []string        // the identity first
	cas   *x509.CertPool
	root  *x509.Certificate // the CA that it comes from
	// expires is when the certificate, or the CA that it comes from, does.
	expires time.Time

	server *tls.Config // made from the above, for one handshake after another
}

// stamps tells the files of one moment from those of another.
type stamps [5]stamp

type stamp struct {
	ino            uint64
	size           int64
	mtime, changed syscall.Timespec // changed also tells of a copy that keeps mtime
}

func stampsOf(dir string) stamps {
	var s stamps
	for i, name := range []string{caFile, certFile, keyFile, certFile + newSuffix, keyFile + newSuffix} {
		// A file that cannot be looked at is like none; reading says why.
		if fi, err := os.Stat(filepath.Join(dir, name)); err == nil {
			st := fi.Sys().(*syscall.Stat_t)
			s[i] = stamp{st.Ino, st.Size, st.Mtim, st.Ctim}
		}
	}
	return s
}

// load reads the files in dir, again if they are changed meanwhile. The stamps
// are of before reading: a change that was missed is found by comparing later.
func load(dir string, now time.Time) (*material, stamps, error) {
	const tries = 5
	for i := 1; ; i++ {
		s := stampsOf(dir)
		m, err := read(dir, now)
		if err == nil || i == tries || s == stampsOf(dir) {
			return m, s, err
		}
	}
}

func read(dir string, now time.Time) (*material, error) {
	caPath := filepath.Join(dir, caFile)
	cas, err := readCerts(caPath)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, ca := range cas {
		pool.AddCert(ca)
	}
	p, path, err := readPair(dir)
	if err != nil {
		return nil, err
	}
	leaf := p.chain[0]
	chain, err := chained(p.chain, pool, now)
	if err != nil {
		return nil, ownChainError(err, leaf, path, caPath)
	}
	if _, err := identityOf(leaf, path); err != nil {
		var e *Error
		if errors.As(err, &e) {
			e.File = path
		}
		return nil, err
	}
	m := &material{path: path, names: namesOf(leaf), cas: pool, root: chain[len(chain)-1], expires: endOf(chain)}
	m.cert = tls.Certificate{PrivateKey: p.key, Leaf: leaf}
	for _, c := range p.chain {
		m.cert.Certificate = append(m.cert.Certificate, c.Raw)
	}
	return m, nil
}

// readPair reads the key, and of the certificate and the one that a rotation is
// about to put in its place the one that belongs to it. It also returns the path
// of that certificate.
func readPair(dir string) (*pair, string, error) {
	certPath, keyPath := filepath.Join(dir, certFile), filepath.Join(dir, keyFile)
	key, err := readKey(keyPath)
	if err != nil {
		return nil, "", err
	}
	chain, err := readCerts(certPath)
	if err == nil && belongs(chain[0], key) {
		return &pair{chain, key}, certPath, nil
	}
	if next, err := readCerts(certPath + newSuffix); err == nil && belongs(next[0], key) {
		return &pair{next, key}, certPath + newSuffix, nil
	}
	if err != nil {
		return nil, "", err
	}
	return nil, "", &Error{Reason: Unpaired, File: keyPath, msg: fmt.Sprintf("%s and %s do not belong together", keyPath, certPath),
		hint: "put back the pair, or make a new one with `afterimage cert rotate`"}
}

// readCerts reads the certificates in a file, at least one.
func readCerts(path string) ([]*x509.Certificate, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != pemCert {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, malformed(path, "a certificate in it cannot be read: "+err.Error())
		}
		certs = append(certs, cert)
	}
	if certs == nil {
		return nil, malformed(path, "it holds no certificate in PEM")
	}
	return certs, nil
}

// readKey reads the private key in a file, in any of the forms that tools write.
func readKey(path string) (crypto.Signer, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return nil, malformed(path, "it holds no private key in PEM that can be read without a passphrase")
		}
		var key any
		switch block.Type {
		case pemKey:
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			continue
		}
		signer, ok := key.(crypto.Signer)
		if err != nil || !ok {
			return nil, malformed(path, "the private key in it cannot be read")
		}
		return signer, nil
	}
}

func readFile(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err == nil && !fi.Mode().IsRegular() {
		return nil, malformed(path, "it is not a regular file")
	}
	if err == nil && fi.Size() > fileMax {
		return nil, malformed(path, "it is too large for a file of certificates")
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &Error{Reason: Missing, File: path, Err: err, msg: fmt.Sprintf("there is no %s", path),
			hint: "make certificates with `afterimage cert init` on the first host, and there for every other with `afterimage cert issue`"}
	}
	return data, err
}

func malformed(path, why string) error {
	return &Error{Reason: Malformed, File: path, msg: fmt.Sprintf("%s: %s", path, why), hint: "put back the file as it was made"}
}

// chained checks that a certificate comes from one of the CAs, for both sides of a
// connection, and returns the longest lived way from it to a CA. That it has
// expired is another question: such a chain is as right as it was.
func chained(chain []*x509.Certificate, cas *x509.CertPool, now time.Time) (best []*x509.Certificate, err error) {
	leaf := chain[0]
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		var chains [][]*x509.Certificate
		// At one of these moments all of the chain is good, if it ever was.
		for _, at := range []time.Time{now, leaf.NotAfter, leaf.NotBefore} {
			chains, err = verifyAt(chain, cas, usage, at)
			var invalid x509.CertificateInvalidError
			if !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
				break
			}
		}
		if err != nil {
			return nil, err
		}
		best = slices.MaxFunc(chains, func(a, b []*x509.Certificate) int { return endOf(a).Compare(endOf(b)) })
	}
	return best, nil
}

// endOf is when the first of a chain expires.
func endOf(chain []*x509.Certificate) time.Time {
	return slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
}

// verifyAt checks a chain as of a moment; the names are not its business.
func verifyAt(chain []*x509.Certificate, cas *x509.CertPool, usage x509.ExtKeyUsage, at time.Time) ([][]*x509.Certificate, error) {
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	return chain[0].Verify(x509.VerifyOptions{
		Roots: cas, Intermediates: between, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage},
	})
}
