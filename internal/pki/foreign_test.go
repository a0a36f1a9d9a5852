package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A foreign is a certificate as another tool makes them, and its key.
type foreign struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// foreignCert makes a certificate signed by another; a nil parent: by itself.
func foreignCert(t *testing.T, parent *foreign, key crypto.Signer, tmpl x509.Certificate) *foreign {
	t.Helper()
	if tmpl.NotBefore.IsZero() {
		tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(year)
	}
	tmpl.BasicConstraintsValid = true
	if parent == nil {
		parent = &foreign{&tmpl, key}
	}
	cert, err := certify(&tmpl, parent.cert, key.Public(), parent.key)
	ok(t, err)
	return &foreign{cert, key}
}

func foreignKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(t, err)
	return key
}

// writeForeign puts them where Open looks.
func writeForeign(t *testing.T, keyType string, key []byte, ca *foreign, chain ...*foreign) (dir string) {
	t.Helper()
	dir = t.TempDir()
	var certs bytes.Buffer
	for _, c := range chain {
		certs.Write(encodeCerts([]*x509.Certificate{c.cert}))
	}
	ok(t, os.WriteFile(filepath.Join(dir, caFile), encodeCerts([]*x509.Certificate{ca.cert}), 0o600))
	ok(t, os.WriteFile(filepath.Join(dir, certFile), certs.Bytes(), 0o600))
	ok(t, os.WriteFile(filepath.Join(dir, keyFile), pem.EncodeToMemory(&pem.Block{Type: keyType, Bytes: key}), 0o600))
	return dir
}

// TestForeignCA: a CA of another tool, with one between it and the hosts, and keys
// in older forms.
func TestForeignCA(t *testing.T) {
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	ca := foreignCert(t, nil, foreignKey(t), x509.Certificate{Subject: pkix.Name{Organization: []string{"Example"}}, IsCA: true, KeyUsage: x509.KeyUsageCertSign})
	between := foreignCert(t, ca, foreignKey(t), x509.Certificate{Subject: pkix.Name{CommonName: "between"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 24 * time.Hour)})
	ec, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	ok(t, err)
	ecDER, err := x509.MarshalECPrivateKey(ec)
	ok(t, err)
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	ok(t, err)
	hostc := foreignCert(t, between, ec, x509.Certificate{Subject: pkix.Name{CommonName: "Host C"}, DNSNames: []string{"hostc"}, ExtKeyUsage: both})
	hostd := foreignCert(t, ca, rs, x509.Certificate{DNSNames: []string{"hostd"}})

	dirC := writeForeign(t, "EC PRIVATE KEY", ecDER, ca, hostc, between)
	dirD := writeForeign(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rs), ca, hostd)
	c, d := openFiles(t, dirC), openFiles(t, dirD)
	good(t, meet(t, c.Server(), d.Client("hostc")), "hostc", "hostd")
	good(t, meet(t, d.Server(), c.Client("hostd")), "hostd", "hostc")
	// It lasts as long as what lasts shortest.
	info, err := Inspect(dirC, time.Now())
	ok(t, err)
	if !info.Expires.Equal(between.cert.NotAfter) || !c.Expires().Equal(info.Expires) || info.CA != "O=Example" || len(info.Warnings) != 1 {
		t.Errorf("%+v", info)
	}
	after := at(t, dirD, 11*24*time.Hour)
	mentions(t, reason(t, meet(t, c.Server(), after.Client("hostc")).client, Expired), `the CA "between"`, "hostc")

	key := foreignKey(t)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	ok(t, err)
	for name, tt := range map[string]struct {
		tmpl   x509.Certificate
		reason Reason
		word   string
	}{
		"for servers only":      {x509.Certificate{DNSNames: []string{"h"}, ExtKeyUsage: both[:1]}, UnknownCA, "clientAuth"},
		"for clients only":      {x509.Certificate{DNSNames: []string{"h"}, ExtKeyUsage: both[1:]}, UnknownCA, "serverAuth"},
		"for nobody":            {x509.Certificate{Subject: pkix.Name{CommonName: "h"}}, NoName, "no host"},
		"for a pattern":         {x509.Certificate{DNSNames: []string{"*.example.com"}}, NoName, "*.example.com"},
		"never valid":           {x509.Certificate{DNSNames: []string{"h"}, NotBefore: time.Now().Add(-3 * year), NotAfter: time.Now().Add(-2 * year)}, Expired, "same time"},
		"of an unknown purpose": {x509.Certificate{DNSNames: []string{"h"}, ExtraExtensions: []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}}, UnknownCA, "extension"},
	} {
		dir := writeForeign(t, pemKey, der, ca, foreignCert(t, ca, key, tt.tmpl))
		_, err := Open(dir)
		e := reason(t, err, tt.reason)
		mentions(t, e, tt.word)
		if text := err.Error(); !bytes.Contains([]byte(text), []byte(filepath.Join(dir, certFile))) {
			t.Errorf("%s: %q does not name the file", name, text)
		}
	}
	// One that names nobody, or only makes servers, is refused by the other side too.
	for _, tmpl := range []x509.Certificate{{}, {DNSNames: []string{"*.example.com"}}, {DNSNames: []string{"h"}, ExtKeyUsage: both[:1]}} {
		x := foreignCert(t, ca, key, tmpl)
		conf := d.Client("hostd")
		conf.GetClientCertificate = nil
		conf.Certificates = append(conf.Certificates, d.m.cert)
		conf.Certificates[0].Certificate, conf.Certificates[0].PrivateKey, conf.Certificates[0].Leaf = [][]byte{x.cert.Raw}, key, nil
		m := meet(t, d.Server(), conf)
		reason(t, d.Explain(m.client), Refused)
		if m.server == nil {
			t.Errorf("%q is let in", tmpl.DNSNames)
		}
	}
}
