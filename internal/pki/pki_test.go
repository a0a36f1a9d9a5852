package pki

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"afterimage/hrl"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ok fails the test on any error.
func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reason checks that err is an *Error with what an operator needs.
func reason(t testing.TB, err error, want Reason) *Error {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("%v (%T) is no error of this package; want %s", err, err, want)
	}
	if e.Reason != want {
		t.Fatalf("%v: reason %s, want %s", err, e.Reason, want)
	}
	if e.Error() == "" || e.Hint() == "" {
		t.Fatalf("%s: message %q, hint %q", e.Reason, e.Error(), e.Hint())
	}
	return e
}

// mentions checks that an error names things, in its text or its hint.
func mentions(t testing.TB, e *Error, what ...string) {
	t.Helper()
	for _, w := range what {
		if !strings.Contains(e.Error()+"\n"+e.Hint(), w) {
			t.Errorf("%q\nhint: %q\ndoes not mention %q", e.Error(), e.Hint(), w)
		}
	}
}

// hosts makes two hosts of one CA: a, which has the CA, and b.
func hosts(t testing.TB) (a, b string) {
	t.Helper()
	dir := t.TempDir()
	a, b = filepath.Join(dir, "a"), filepath.Join(dir, "b")
	ok(t, Init(a, []string{"hosta", "127.0.0.1"}, Options{}))
	ok(t, Issue(a, b, []string{"hostb", "127.0.0.1", "::1", "Alias.example.com"}, Options{}))
	return a, b
}

func openFiles(t testing.TB, dir string) *Files {
	t.Helper()
	f, err := Open(dir)
	ok(t, err)
	return f
}

// at is Open with a clock that is off.
func at(t testing.TB, dir string, off time.Duration) *Files {
	t.Helper()
	f, err := open(dir, func() time.Time { return time.Now().Add(off) })
	ok(t, err)
	return f
}

// meeting is what two sides say of a connection.
type meeting struct {
	server, client     error
	serverID, clientID string // identities that each side has shown
}

// meet lets client dial server; a byte is sent each way.
func meet(t testing.TB, server, client *tls.Config) meeting {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer ln.Close()
	var m meeting
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := ln.Accept()
		if err != nil {
			m.server = err
			return
		}
		defer conn.Close()
		m.clientID, m.server = talk(tls.Server(conn, server))
	}()
	conn, err := net.Dial("tcp", ln.Addr().String())
	ok(t, err)
	m.serverID, m.client = talk(tls.Client(conn, client))
	conn.Close()
	<-done
	return m
}

// talk does the handshake, and says a byte and hears one; it returns who the
// other is.
func talk(c *tls.Conn) (string, error) {
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if err := c.Handshake(); err != nil {
		return "", err
	}
	cs := c.ConnectionState()
	id, err := Identity(&cs)
	if err != nil {
		return "", err
	}
	if _, err := c.Write([]byte{1}); err != nil {
		return "", err
	}
	_, err = c.Read(make([]byte, 1))
	return id, err
}

// good checks that a meeting was one.
func good(t testing.TB, m meeting, serverID, clientID string) {
	t.Helper()
	if m.server != nil || m.client != nil || m.serverID != serverID || m.clientID != clientID {
		t.Fatalf("a meeting of %s and %s: %+v", serverID, clientID, m)
	}
}

// files lists a directory.
func files(t testing.TB, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	ok(t, err)
	var names []string
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names
}

// copyFile copies a file of one directory into another, or to another name.
func copyFile(t testing.TB, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	ok(t, err)
	ok(t, os.WriteFile(to, data, 0o600))
}

// snapshot and restore keep the content of a directory.
func snapshot(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	s := map[string][]byte{}
	for _, n := range files(t, dir) {
		data, err := os.ReadFile(filepath.Join(dir, n))
		ok(t, err)
		s[n] = data
	}
	return s
}

func restore(t testing.TB, dir string, s map[string][]byte) {
	t.Helper()
	ok(t, os.RemoveAll(dir))
	ok(t, os.Mkdir(dir, 0o700))
	for n, data := range s {
		ok(t, os.WriteFile(filepath.Join(dir, n), data, 0o600))
	}
}

var errInjected = errors.New("injected failure")

// faultFS is the host's file system until the operation with number failAt, from
// which on every one fails: a crash, or a disk that is gone.
type faultFS struct {
	hrl.FS
	failAt, ops int  // failAt 0: none
	once        bool // only that one fails
	did         []string
}

func (f *faultFS) op(what, path string) error {
	f.ops++
	f.did = append(f.did, what+" "+filepath.Base(path))
	if f.fired() && (f.ops == f.failAt || !f.once) {
		return errInjected
	}
	return nil
}

func (f *faultFS) fired() bool { return f.failAt > 0 && f.ops >= f.failAt }

func (f *faultFS) MkdirAll(dir string) error {
	if err := f.op("mkdir", dir); err != nil {
		return err
	}
	return f.FS.MkdirAll(dir)
}

func (f *faultFS) Create(path string) (hrl.File, error) {
	if err := f.op("create", path); err != nil {
		return nil, err
	}
	file, err := f.FS.Create(path)
	if err != nil {
		return nil, err
	}
	return &faultFile{file, f, path}, nil
}

func (f *faultFS) Rename(from, to string) error {
	if err := f.op("rename", from); err != nil {
		return err
	}
	return f.FS.Rename(from, to)
}

func (f *faultFS) Remove(path string) error {
	if err := f.op("remove", path); err != nil {
		return err
	}
	return f.FS.Remove(path)
}

func (f *faultFS) SyncDir(dir string) error {
	if err := f.op("syncdir", dir); err != nil {
		return err
	}
	return f.FS.SyncDir(dir)
}

type faultFile struct {
	hrl.File
	f    *faultFS
	path string
}

func (f *faultFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.f.op("write", f.path); err != nil {
		n, _ := f.File.WriteAt(p[:len(p)/2], off)
		return n, err
	}
	return f.File.WriteAt(p, off)
}

func (f *faultFile) Sync() error {
	if err := f.f.op("sync", f.path); err != nil {
		return err
	}
	return f.File.Sync()
}

// is says whether two lists of files are the same.
func is(got []string, want ...string) bool { return slices.Equal(got, want) }
