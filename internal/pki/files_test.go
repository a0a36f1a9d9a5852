package pki

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestRotationUnderAListener: every connection to a listener that runs is good,
// while both sides change key and certificate as often as they can.
func TestRotationUnderAListener(t *testing.T) {
	dirA, dirB := hosts(t)
	a, b := openFiles(t, dirA), openFiles(t, dirB)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", b.Server())
	ok(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				if id, err := talk(conn.(*tls.Conn)); err != nil || id != "hosta" {
					t.Errorf("the listener: %q, %v", id, err)
				}
			})
		}
	})
	dial := func(conf *tls.Config) (serial string) {
		conn, err := net.Dial("tcp", ln.Addr().String())
		ok(t, err)
		defer conn.Close()
		c := tls.Client(conn, conf)
		if id, err := talk(c); err != nil || id != "hostb" {
			t.Errorf("dialing: %q, %v", id, err)
			return ""
		}
		return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}

	conf := a.Client("hostb")
	first := dial(conf)
	if again := dial(conf); again != first {
		t.Errorf("the certificate changed by itself")
	}
	ok(t, Rotate(dirB, dirA, nil, Options{}))
	if second := dial(conf); second == first {
		t.Errorf("the listener still has the old certificate")
	}
	if dir := fingerprint(t, dirB); b.Err() != nil || dir == "" {
		t.Error(b.Err())
	}

	stop := make(chan struct{})
	var rotations sync.WaitGroup
	for _, dir := range []string{dirA, dirB} {
		rotations.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := Rotate(dir, dirA, nil, Options{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	serials := map[string]bool{}
	for range 100 {
		serials[dial(conf)] = true
		openFiles(t, dirB) // whoever starts meanwhile finds a pair too
	}
	close(stop)
	rotations.Wait()
	ln.Close()
	wg.Wait()
	if len(serials) < 3 {
		t.Errorf("only %d certificates were seen", len(serials))
	}
	ok(t, a.Err())
	ok(t, b.Err())
}

// TestUnusable: files that cannot be used change nothing for whoever runs, and are
// an error for whoever starts.
func TestUnusable(t *testing.T) {
	dirA, dirB := hosts(t)
	other := filepath.Join(t.TempDir(), "other")
	ok(t, Init(other, []string{"other"}, Options{}))
	a := openFiles(t, dirA)
	was := snapshot(t, dirB)
	in := func(name string) string { return filepath.Join(dirB, name) }
	for _, tt := range []struct {
		name   string
		do     func() error
		reason Reason
		file   string
	}{
		{"no CA", func() error { return os.Remove(in(caFile)) }, Missing, caFile},
		{"no certificate", func() error { return os.Remove(in(certFile)) }, Missing, certFile},
		{"no key", func() error { return os.Remove(in(keyFile)) }, Missing, keyFile},
		{"no directory", func() error { return os.RemoveAll(dirB) }, Missing, caFile},
		{"another's key", func() error { copyFile(t, filepath.Join(dirA, keyFile), in(keyFile)); return nil }, Unpaired, keyFile},
		{"another's certificate", func() error { copyFile(t, filepath.Join(dirA, certFile), in(certFile)); return nil }, Unpaired, certFile},
		{"another CA", func() error { copyFile(t, filepath.Join(other, caFile), in(caFile)); return nil }, UnknownCA, caFile},
		{"a pair of another CA", func() error {
			copyFile(t, filepath.Join(other, certFile), in(certFile))
			copyFile(t, filepath.Join(other, keyFile), in(keyFile))
			return nil
		}, UnknownCA, certFile},
		{"an empty CA", func() error { return os.Truncate(in(caFile), 0) }, Malformed, caFile},
		{"half a certificate", func() error { return os.Truncate(in(certFile), 300) }, Malformed, certFile},
		{"a certificate of nonsense", func() error {
			return os.WriteFile(in(certFile), []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0o600)
		}, Malformed, certFile},
		{"half a key", func() error { return os.Truncate(in(keyFile), 100) }, Malformed, keyFile},
		{"a key of nonsense", func() error {
			return os.WriteFile(in(keyFile), []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), 0o600)
		}, Malformed, keyFile},
		{"key and certificate exchanged", func() error {
			copyFile(t, filepath.Join(dirA, keyFile), in(certFile))
			copyFile(t, filepath.Join(dirA, certFile), in(keyFile))
			return nil
		}, Malformed, keyFile},
		{"far too much", func() error { return os.Truncate(in(caFile), fileMax+1) }, Malformed, caFile},
		{"a directory", func() error { return errors.Join(os.Remove(in(caFile)), os.Mkdir(in(caFile), 0o700)) }, Malformed, caFile},
	} {
		t.Run(tt.name, func(t *testing.T) {
			restore(t, dirB, was)
			b := openFiles(t, dirB)
			var log bytes.Buffer
			b.Warn = slog.New(slog.NewTextHandler(&log, nil))
			expires := b.Expires()
			ok(t, tt.do())

			_, err := Open(dirB)
			mentions(t, reason(t, err, tt.reason), in(tt.file))
			if errors.Is(err, fs.ErrNotExist) != (tt.reason == Missing) {
				t.Errorf("not there: %v", err)
			}
			for range 2 {
				good(t, meet(t, b.Server(), a.Client("hostb")), "hostb", "hosta")
			}
			mentions(t, reason(t, b.Err(), tt.reason), in(tt.file))
			if b.Name() != "hostb" || !b.Expires().Equal(expires) {
				t.Errorf("it is now %s, until %v", b.Name(), b.Expires())
			}
			if n := strings.Count(log.String(), "cannot be used"); n != 1 {
				t.Errorf("said %d times: %s", n, log.String())
			}

			restore(t, dirB, was)
			ok(t, b.Err())
			if !strings.Contains(log.String(), "have changed") {
				t.Errorf("nothing is said of the return: %s", log.String())
			}
		})
	}
}

// TestForeignFiles: certificates may come from another tool, and be put in place
// by one that keeps the time of a file.
func TestForeignFiles(t *testing.T) {
	dirA, dirB := hosts(t)
	a, b := openFiles(t, dirA), openFiles(t, dirB)
	path := filepath.Join(dirB, certFile)
	fi, err := os.Stat(path)
	ok(t, err)
	data, err := os.ReadFile(path)
	ok(t, err)
	// The same length, the same inode, the same time; of no use.
	ok(t, os.WriteFile(path, bytes.Repeat([]byte("x"), len(data)), 0o600))
	ok(t, os.Chtimes(path, fi.ModTime(), fi.ModTime()))
	reason(t, b.Err(), Malformed)

	// Text around the blocks is no harm, nor is the order.
	key, err := os.ReadFile(filepath.Join(dirB, keyFile))
	ok(t, err)
	ok(t, os.WriteFile(path, append([]byte("subject: hostb\n\n"), data...), 0o600))
	ok(t, os.WriteFile(filepath.Join(dirB, keyFile), append(append([]byte{}, data...), key...), 0o600))
	ok(t, b.Err())
	good(t, meet(t, b.Server(), a.Client("hostb")), "hostb", "hosta")
	if got := time.Until(b.Expires()); got > HostValid || got < HostValid-time.Hour {
		t.Errorf("it expires in %v", got)
	}
}

// TestInspectUnfit: what can be said of a certificate that cannot be used is said.
func TestInspectUnfit(t *testing.T) {
	dirA, dirB := hosts(t)
	copyFile(t, filepath.Join(dirA, keyFile), filepath.Join(dirB, keyFile))
	ok(t, os.Chmod(filepath.Join(dirA, keyFile), 0o640))
	info, err := Inspect(dirB, time.Now())
	reason(t, err, Unpaired)
	if info == nil || info.Name != "hostb" || info.Fingerprint == "" {
		t.Errorf("%+v", info)
	}
	info, err = Inspect(filepath.Join(dirB, "none"), time.Now())
	reason(t, err, Missing)
	if info != nil {
		t.Errorf("%+v", info)
	}
	for off, want := range map[time.Duration]string{
		0:                      "0640",
		-year:                  "valid from",
		800 * 24 * time.Hour:   "expires in 24 days",
		826 * 24 * time.Hour:   "expired on",
		10*year + 24*time.Hour: "expired on",
	} {
		info, err = Inspect(dirA, time.Now().Add(off))
		ok(t, err)
		if !strings.Contains(strings.Join(info.Warnings, "\n"), want) {
			t.Errorf("after %v: %q", off, info.Warnings)
		}
	}
	// One that ends because its CA does needs more than a rotation.
	ok(t, Rotate(dirA, "", nil, Options{Valid: 20 * year}))
	info, err = Inspect(dirA, time.Now().Add(10*year-24*time.Hour))
	ok(t, err)
	if !strings.Contains(info.Warnings[0], "it is the CA that expires") {
		t.Errorf("%q", info.Warnings)
	}
}
