package nbd

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"afterimage/blockdev"
)

func TestListenUnix(t *testing.T) {
	path := tempSocket(t)
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode() != fs.ModeSocket|0o600 {
		t.Fatalf("made %v, %v", fi.Mode(), err)
	}
	if _, err := ListenUnix(path); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("a second server: %v", err)
	}
	nc := dialSocket(t, path) // the first still has it
	nc.Close()
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	if err := ln.Close(); err == nil {
		t.Error("closed twice")
	}
}

// TestListenUnixStale: what a killed server left is replaced, by one.
func TestListenUnixStale(t *testing.T) {
	path := tempSocket(t)
	for round := range 20 {
		dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		dead.SetUnlinkOnClose(false)
		dead.Close()
		var won atomic.Int32
		var mu sync.Mutex
		var lns []net.Listener
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				ln, err := ListenUnix(path)
				if err == nil {
					won.Add(1)
					mu.Lock()
					lns = append(lns, ln)
					mu.Unlock()
				} else if !errors.Is(err, blockdev.ErrInUse) {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if won.Load() != 1 {
			t.Fatalf("round %d: %d servers have the socket", round, won.Load())
		}
		lns[0].Close()
	}
}

func TestListenUnixRefuses(t *testing.T) {
	path := tempSocket(t)
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file is gone")
	}
	if _, err := ListenUnix(filepath.Join(filepath.Dir(path), "no", "sock")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
	long := filepath.Join(filepath.Dir(path), strings.Repeat("x", 100))
	if _, err := ListenUnix(long); err == nil || !strings.Contains(err.Error(), "107 bytes") {
		t.Errorf("a path that is too long: %v", err)
	}
}

// TestListenUnixReplaced: another's socket at the same path is not removed.
func TestListenUnixReplaced(t *testing.T) {
	path := tempSocket(t)
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	nc := dialSocket(t, path)
	nc.Close()
}
