package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"time"
)

// Info is what a host's certificate says.
type Info struct {
	Name        string // the identity
	Names       []string
	CA          string    // name of the CA that signed it
	CAExpires   time.Time // zero if the CA is not known
	Issued      time.Time
	Expires     time.Time // the certificate, or the CA if that comes first
	Fingerprint string    // SHA-256 of the certificate, in hex
	Warnings    []string  // what is to be done soon, or should be done better
}

// DaysLeft is the whole days until the certificate expires; negative: it has.
func (i *Info) DaysLeft(now time.Time) int {
	return int(math.Floor(i.Expires.Sub(now).Hours() / 24))
}

// Expired says whether the certificate has expired.
func (i *Info) Expired(now time.Time) bool { return now.After(i.Expires) }

// Inspect reads the files in dir as Open does. If they cannot be used, it returns
// with the error what can be said of the certificate all the same, or nil.
func Inspect(dir string, now time.Time) (*Info, error) {
	m, _, err := load(dir, now)
	if err != nil {
		if chain, cerr := readCerts(filepath.Join(dir, certFile)); cerr == nil {
			return infoOf(chain[0]), err
		}
		return nil, err
	}
	info := infoOf(m.cert.Leaf)
	info.CA, info.CAExpires, info.Expires = m.root.Subject.CommonName, m.root.NotAfter, m.expires
	if info.CA == "" {
		info.CA = m.root.Subject.String()
	}
	info.Warnings = m.warnings(dir, info, now)
	return info, nil
}

func infoOf(leaf *x509.Certificate) *Info {
	digest := sha256.Sum256(leaf.Raw)
	info := &Info{
		Names:       namesOf(leaf),
		CA:          nameOf(leaf.Issuer.CommonName, leaf.Issuer.String()),
		Issued:      leaf.NotBefore,
		Expires:     leaf.NotAfter,
		Fingerprint: hex.EncodeToString(digest[:]),
	}
	if len(info.Names) > 0 {
		info.Name = info.Names[0]
	}
	return info
}

func (m *material) warnings(dir string, info *Info, now time.Time) []string {
	var w []string
	rotate := fmt.Sprintf("renew it with `afterimage cert rotate --tls-dir %s`", dir)
	if !m.root.NotAfter.After(info.Expires) && m.root.NotAfter.Sub(now) < ExpirySoon {
		rotate = "it is the CA that expires: make a new one with `afterimage cert init` in another directory, append its ca.pem to that of every host, then rotate with --ca"
	}
	switch left := info.Expires.Sub(now); {
	case left < 0:
		w = append(w, fmt.Sprintf("the certificate expired on %s, no host accepts it: %s", day(info.Expires), rotate))
	case left < ExpirySoon:
		w = append(w, fmt.Sprintf("the certificate expires in %d days, on %s: %s", info.DaysLeft(now), day(info.Expires), rotate))
	case now.Before(info.Issued):
		w = append(w, fmt.Sprintf("the certificate is valid from %s on, the clock says %s: set the clock", day(info.Issued), day(now)))
	}
	for _, name := range []string{keyFile, caKeyFile} {
		path := filepath.Join(dir, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode().Perm()&0o077 != 0 {
			w = append(w, fmt.Sprintf("%s can be used by others (mode %04o): chmod 600 %s", path, fi.Mode().Perm(), path))
		}
	}
	if m.path != filepath.Join(dir, certFile) {
		w = append(w, fmt.Sprintf("a rotation was cut off: the certificate in use is %s; the next rotation puts it in place", m.path))
	}
	return w
}
