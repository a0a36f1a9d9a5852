package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
)

// dirLockTimeout bounds how long ListenUnix waits for another process that is
// listening in the same directory, too.
const dirLockTimeout = 10 * time.Second

// ListenUnix listens on a Unix socket at path, which only its owner may connect
// to (mode 0600), and removes the socket when the listener is closed. The error
// wraps blockdev.ErrInUse if a server listens there.
//
// A server that was killed leaves its socket behind. Whether one is alive only a
// connection can tell: it is refused by a socket that nobody listens on. Between
// that test and our own bind another process could do the same and one would
// steal the other's socket, so the directory is locked meanwhile (flock: no file
// is left behind, and it ends with its process). A program that does not know
// the lock is refused by bind, or refuses us, unless it removes our socket
// itself.
func ListenUnix(path string) (net.Listener, error) {
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The socket file takes its mode from the socket: there is no moment at
	// which it is more open than it should be.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		if len(path) > 107 {
			return nil, fmt.Errorf("listen on %s: a socket's path has at most 107 bytes, this one has %d", path, len(path))
		}
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	u := ln.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	made, err := os.Lstat(path)
	if err != nil {
		u.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &unixListener{UnixListener: u, path: path, made: made}, nil
}

// unixListener removes its socket if it still is its own.
type unixListener struct {
	*net.UnixListener
	path string
	made os.FileInfo
}

// Close implements net.Listener.
func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	if err != nil {
		return err // closed before
	}
	unlock, err := lockDir(filepath.Dir(l.path))
	if err != nil {
		return err
	}
	defer unlock()
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(l.made, now) {
		return os.Remove(l.path)
	}
	return nil
}

// removeStale removes a socket that nobody listens on. The directory is locked.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen on %s: there is a file that is no socket: %w", path, fs.ErrExist)
	}
	nc, err := net.DialTimeout("unix", path, 5*time.Second)
	if err == nil {
		nc.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen on %s: another server listens there: %w", path, blockdev.ErrInUse)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("listen on %s: remove what a dead server left: %w", path, err)
	}
	return nil
}

// lockDir takes an exclusive lock on a directory.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("listen on a socket: %w", err)
	}
	for deadline := time.Now().Add(dirLockTimeout); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("lock %s, to listen on a socket there: %w", dir, err)
		}
	}
}
