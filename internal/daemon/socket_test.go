package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/admin"
)

func TestSockets(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new", "admin.sock")
	ln, err := listenAdmin(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	mode := func(path string) fs.FileMode {
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Mode().Perm()
	}
	if m := mode(path); m != 0o600 {
		t.Errorf("the admin socket has mode %#o", m)
	}
	if m := mode(filepath.Dir(path)); m != 0o700 {
		t.Errorf("its directory has mode %#o", m)
	}
	if _, err := listenAdmin(path); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("a second daemon on it: %v", err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := listenAdmin(filepath.Join(open, "admin.sock")); statusOf(err) != admin.StatusRefused {
		t.Errorf("a directory that anybody may write: %v", err)
	}
}

func TestNBDGroup(t *testing.T) {
	base, err := os.MkdirTemp("/tmp", "afterimage-nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(base)
	gid := os.Getegid()
	group := strconv.Itoa(gid)
	path := filepath.Join(base, "x", "nbd.sock")
	// The test's own directory is its owner's alone.
	_, err = listenNBD(path, group)
	if refusal(err).Status != admin.StatusUsage || refusal(err).Advice == "" {
		t.Errorf("a directory that the group cannot enter: %v", err)
	}
	if err := os.Chmod(base, 0o711); err != nil {
		t.Fatal(err)
	}
	ln, err := listenNBD(path, group)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	st, err := os.Lstat(path)
	if err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("the NBD socket: %v, %v", st.Mode(), err)
	}
	if _, err := listenNBD(filepath.Join(base, "other.sock"), "no-such-group"); statusOf(err) != admin.StatusUsage {
		t.Errorf("a group that there is not: %v", err)
	}
	alone, err := listenNBD(filepath.Join(base, "alone.sock"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer alone.Close()
	if st, err := os.Lstat(filepath.Join(base, "alone.sock")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("without a group: %v, %v", st.Mode(), err)
	}
}
