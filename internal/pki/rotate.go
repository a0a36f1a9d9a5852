package pki

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"afterimage/hrl"
)

// Rotate makes a new key and a new certificate for the host whose files are in
// dir, signed by the CA in caDir ("": dir itself). The names are those of the old
// certificate, unless others are given. The package comment has the steps, and
// what a crash leaves after each.
func Rotate(dir, caDir string, names []string, o Options) error {
	o = o.withDefaults()
	if caDir == "" {
		caDir = dir
	}
	ca, err := openAuthority(caDir)
	if err != nil {
		return err
	}
	unlock, err := lockDir(o.FS, dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := finishRotation(o.FS, dir); err != nil {
		return err
	}
	if err := checkBelieved(dir, ca); err != nil {
		return err
	}
	certPath, keyPath := filepath.Join(dir, certFile), filepath.Join(dir, keyFile)
	if len(names) == 0 {
		old, err := readCerts(certPath)
		if err != nil {
			return withAdvice(err, "say for which names the certificate is to be, with --name")
		}
		names = namesOf(old[0])
	}
	if names, err = checkNames(names); err != nil {
		return err
	}
	host, err := ca.sign(names, o.Now(), o.Valid)
	if err != nil {
		return err
	}
	key, err := encodeKey(host.key)
	if err != nil {
		return err
	}

	// Step 1.
	if err := create(o.FS, certPath+newSuffix, encodeCerts(host.chain)); err != nil {
		return err
	}
	if err := create(o.FS, keyPath+newSuffix, key); err != nil {
		return err
	}
	if err := o.FS.SyncDir(dir); err != nil {
		return err
	}
	// Step 2.
	if err := o.FS.Rename(keyPath+newSuffix, keyPath); err != nil {
		return err
	}
	if err := o.FS.SyncDir(dir); err != nil {
		return err
	}
	// Step 3.
	if err := o.FS.Rename(certPath+newSuffix, certPath); err != nil {
		return err
	}
	return o.FS.SyncDir(dir)
}

// finishRotation does what an earlier rotation left undone, and removes what it
// left behind. A pair that does not belong together is left alone: it is about to
// be replaced.
func finishRotation(fsys hrl.FS, dir string) error {
	certPath := filepath.Join(dir, certFile)
	_, path, err := readPair(dir)
	var unfit *Error
	if err != nil && !errors.As(err, &unfit) {
		return err
	}
	if path == certPath+newSuffix {
		if err := fsys.Rename(path, certPath); err != nil {
			return err
		}
		if err := fsys.SyncDir(dir); err != nil {
			return err
		}
	}
	have := present(dir)
	for _, name := range []string{certFile + newSuffix, keyFile + newSuffix} {
		if slices.Contains(have, name) {
			if err := fsys.Remove(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkBelieved refuses a CA that this host does not believe: the other hosts
// would not either, and the certificate could not be loaded.
func checkBelieved(dir string, ca *authority) error {
	path := filepath.Join(dir, caFile)
	cas, err := readCerts(path)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(cas, ca.cert.Equal) {
		return nil
	}
	return &Error{Reason: UnknownCA, File: path, msg: fmt.Sprintf("the CA %q is not in %s", ca.cert.Subject.CommonName, path),
		hint: "to change to another CA, first append its ca.pem to that of every host, then rotate, then remove the old one"}
}
