package pki

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"afterimage/hrl"
)

func TestInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc", "tls")
	ok(t, Init(dir, []string{"hosta", "10.0.0.1"}, Options{}))
	if got := files(t, dir); !is(got, caKeyFile, caFile, certFile, keyFile) {
		t.Errorf("init has made %q", got)
	}
	for _, path := range []string{dir, filepath.Join(dir, keyFile), filepath.Join(dir, caKeyFile)} {
		fi, err := os.Stat(path)
		ok(t, err)
		if fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s can be used by others: mode %v", path, fi.Mode())
		}
	}
	info, err := Inspect(dir, time.Now())
	ok(t, err)
	if info.Name != "hosta" || !is(info.Names, "hosta", "10.0.0.1") || info.DaysLeft(time.Now()) != 824 || info.Expired(time.Now()) || len(info.Warnings) > 0 {
		t.Errorf("%+v", info)
	}
	if years := time.Until(info.CAExpires).Hours() / 24 / 365; years < 9.9 || years > 10.1 {
		t.Errorf("the CA is good for %.1f years", years)
	}
	if !info.Issued.Before(time.Now().Add(-30 * time.Minute)) {
		t.Errorf("issued %v: a host whose clock is behind does not believe it", info.Issued)
	}

	// Whatever of it is there, nothing is overwritten or added.
	for _, name := range []string{caFile, caKeyFile, certFile, keyFile, certFile + newSuffix, keyFile + newSuffix} {
		other := t.TempDir()
		ok(t, os.WriteFile(filepath.Join(other, name), []byte("x"), 0o600))
		for _, err := range []error{
			Init(other, []string{"hosta"}, Options{}),
			Issue(dir, other, []string{"hostb"}, Options{}),
		} {
			mentions(t, reason(t, err, Exists), name)
			if !errors.Is(err, fs.ErrExist) || !is(files(t, other), name) {
				t.Errorf("with %s there: %v, %q", name, err, files(t, other))
			}
		}
	}
	if err := Init(filepath.Join(t.TempDir(), "x"), []string{"*"}, Options{}); err == nil {
		t.Error("a host may be called *")
	}
}

func TestIssue(t *testing.T) {
	a, b := hosts(t)
	if got := files(t, b); !is(got, caFile, certFile, keyFile) {
		t.Errorf("issue has made %q", got)
	}
	good(t, meet(t, openFiles(t, a).Server(), openFiles(t, b).Client("hosta")), "hosta", "hostb")
	good(t, meet(t, openFiles(t, b).Server(), openFiles(t, a).Client("hostb")), "hostb", "hosta")

	// A host is no CA.
	c := filepath.Join(t.TempDir(), "c")
	err := Issue(b, c, []string{"hostc"}, Options{})
	mentions(t, reason(t, err, Missing), caKeyFile, "--ca")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	copyFile(t, filepath.Join(b, keyFile), filepath.Join(b, caKeyFile))
	reason(t, Issue(b, c, []string{"hostc"}, Options{}), Unpaired)
	ok(t, os.WriteFile(filepath.Join(b, caKeyFile), []byte("junk"), 0o600))
	reason(t, Issue(b, c, []string{"hostc"}, Options{}), Malformed)
	// Even one that calls a host's certificate its CA.
	copyFile(t, filepath.Join(b, keyFile), filepath.Join(b, caKeyFile))
	copyFile(t, filepath.Join(b, certFile), filepath.Join(b, caFile))
	reason(t, Issue(b, c, []string{"hostc"}, Options{}), UnknownCA)
	if _, err := os.Stat(c); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what failed has made %s: %v", c, err)
	}
}

// TestValidity: a certificate ends with its CA, and none is made after that.
func TestValidity(t *testing.T) {
	a, _ := hosts(t)
	issue := func(o Options) (*Info, error) {
		dir := filepath.Join(t.TempDir(), "x")
		if err := Issue(a, dir, []string{"hostx"}, o); err != nil {
			return nil, err
		}
		leaf, err := readCerts(filepath.Join(dir, certFile))
		ok(t, err)
		info, err := Inspect(dir, time.Now())
		ok(t, err)
		if end := leaf[0].NotAfter; !end.Equal(info.Expires) {
			t.Errorf("the certificate ends on %v, with its CA on %v", end, info.Expires)
		}
		return info, nil
	}
	in := func(d time.Duration) func() time.Time {
		return func() time.Time { return time.Now().Add(d) }
	}
	const year = 365 * 24 * time.Hour
	short, err := issue(Options{Valid: 48 * time.Hour})
	ok(t, err)
	if d := short.DaysLeft(time.Now()); d != 1 || len(short.Warnings) != 1 {
		t.Errorf("%d days left of two: %q", d, short.Warnings)
	}
	long, err := issue(Options{Valid: 100 * year})
	ok(t, err)
	if !long.Expires.Equal(long.CAExpires) {
		t.Errorf("expires %v, its CA %v", long.Expires, long.CAExpires)
	}
	gone, err := issue(Options{Valid: -time.Second})
	ok(t, err)
	if !gone.Expired(time.Now()) || gone.DaysLeft(time.Now()) != -1 || len(gone.Warnings) != 1 {
		t.Errorf("%+v", gone)
	}
	_, err = issue(Options{Now: in(11 * year)})
	reason(t, err, Expired)
	_, err = issue(Options{Now: in(-year)})
	reason(t, err, NotYetValid)
}

// TestMakeFails: whatever fails, either all is there or nothing.
func TestMakeFails(t *testing.T) {
	a, _ := hosts(t)
	for name, make := range map[string]func(dir string, o Options) error{
		"init":  func(dir string, o Options) error { return Init(dir, []string{"hosta"}, o) },
		"issue": func(dir string, o Options) error { return Issue(a, dir, []string{"hostb"}, o) },
	} {
		for k, fired := 1, true; fired; k++ {
			dir := filepath.Join(t.TempDir(), "tls")
			fsys := &faultFS{FS: hrl.OS, failAt: k, once: true}
			err := make(dir, Options{FS: fsys})
			fired = fsys.fired()
			if fired != errors.Is(err, errInjected) {
				t.Fatalf("%s, operation %d: %v", name, k, err)
			}
			if fired && len(present(dir)) > 0 {
				t.Errorf("%s, operation %d: left %q", name, k, present(dir))
			}
			if !fired {
				openFiles(t, dir)
			}
		}
	}
}
