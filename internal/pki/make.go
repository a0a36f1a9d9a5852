package pki

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"afterimage/hrl"
)

// The files of a directory of certificates.
const (
	caFile    = "ca.pem"
	caKeyFile = "ca-key.pem"
	certFile  = "cert.pem"
	keyFile   = "key.pem"
	newSuffix = ".new" // of certFile and keyFile, during a rotation
)

// Options say how a certificate is made. The zero value is the usual way.
type Options struct {
	// Valid is how long the host's certificate is good for; 0: HostValid. A
	// negative one, of less than an hour, makes one that has expired.
	Valid time.Duration
	Now   func() time.Time // nil: time.Now
	FS    hrl.FS           // nil: hrl.OS
}

func (o Options) withDefaults() Options {
	if o.Valid == 0 {
		o.Valid = HostValid
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.FS == nil {
		o.FS = hrl.OS
	}
	return o
}

// Init makes a CA and the certificate of the first host in dir, which is made if
// need be. Nothing that exists is overwritten: the error then is fs.ErrExist.
//
// A failure leaves nothing behind. A crash may leave some of the files; then Init
// refuses, and they have to be removed by hand.
func Init(dir string, names []string, o Options) error {
	o = o.withDefaults()
	names, err := checkNames(names)
	if err != nil {
		return err
	}
	ca, err := newAuthority(names[0], o.Now())
	if err != nil {
		return err
	}
	host, err := ca.sign(names, o.Now(), o.Valid)
	if err != nil {
		return err
	}
	caKey, err := encodeKey(ca.key)
	if err != nil {
		return err
	}
	files, err := ca.hostFiles(host)
	if err != nil {
		return err
	}
	return makeFiles(o.FS, dir, append([]newFile{{caKeyFile, caKey}}, files...))
}

// Issue makes the certificate of another host in dir, which is made if need be,
// signed by the CA in caDir, and copies ca.pem there, but not the CA's key. Nothing
// that exists is overwritten: the error then is fs.ErrExist.
func Issue(caDir, dir string, names []string, o Options) error {
	o = o.withDefaults()
	names, err := checkNames(names)
	if err != nil {
		return err
	}
	ca, err := openAuthority(caDir)
	if err != nil {
		return err
	}
	host, err := ca.sign(names, o.Now(), o.Valid)
	if err != nil {
		return err
	}
	files, err := ca.hostFiles(host)
	if err != nil {
		return err
	}
	return makeFiles(o.FS, dir, files)
}

// A newFile is a file to be made.
type newFile struct {
	name string
	data []byte
}

// hostFiles is what a host needs. Its ca.pem has all that this one's has, not
// only the CA that signed: hosts believe the same CAs.
func (a *authority) hostFiles(host *pair) ([]newFile, error) {
	key, err := encodeKey(host.key)
	if err != nil {
		return nil, err
	}
	return []newFile{{caFile, encodeCerts(a.believed)}, {keyFile, key}, {certFile, encodeCerts(host.chain)}}, nil
}

// makeFiles writes files into a directory that must have none of ours, and makes
// them durable.
func makeFiles(fsys hrl.FS, dir string, files []newFile) error {
	if err := makeDir(fsys, dir); err != nil {
		return err
	}
	unlock, err := lockDir(fsys, dir)
	if err != nil {
		return err
	}
	defer unlock()
	if have := present(dir); len(have) > 0 {
		return &Error{Reason: Exists, File: filepath.Join(dir, have[0]), Err: fs.ErrExist,
			msg:  fmt.Sprintf("%s already holds %s", dir, strings.Join(have, ", ")),
			hint: "choose another directory; `afterimage cert rotate` renews a certificate, `cert issue` makes one for another host; nothing was overwritten"}
	}
	for i, f := range files {
		if err := create(fsys, filepath.Join(dir, f.name), f.data); err != nil {
			removeFiles(fsys, dir, files[:i])
			return err
		}
	}
	if err := fsys.SyncDir(dir); err != nil {
		removeFiles(fsys, dir, files)
		return err
	}
	return nil
}

func removeFiles(fsys hrl.FS, dir string, files []newFile) {
	for _, f := range files {
		_ = fsys.Remove(filepath.Join(dir, f.name))
	}
}

// present names those of our files that dir has.
func present(dir string) []string {
	var have []string
	for _, name := range []string{caFile, caKeyFile, certFile, keyFile, certFile + newSuffix, keyFile + newSuffix} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			have = append(have, name)
		}
	}
	return have
}

// makeDir makes a directory that nobody else reads, and makes it durable.
func makeDir(fsys hrl.FS, dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := fsys.MkdirAll(dir); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(filepath.Clean(dir)))
}

// lockDir keeps out another command that would write certificates there.
func lockDir(fsys hrl.FS, dir string) (unlock func(), err error) {
	d, err := fsys.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := d.Lock(); err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return func() { d.Close() }, nil
}

// create writes a file that must not exist, and syncs it. A failure leaves none.
func create(fsys hrl.FS, path string, data []byte) error {
	f, err := fsys.Create(path)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = fsys.Remove(path)
	}
	return err
}
