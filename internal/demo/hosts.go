package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"afterimage/internal/admin"
	"afterimage/internal/pki"
)

// makeCertificates makes a CA and the certificates of the two hosts, each in its
// own directory.
func makeCertificates(dir string) error {
	if err := pki.Init(tlsDir(dir, "primary"), []string{"primary.example", "127.0.0.1"}, pki.Options{}); err != nil {
		return err
	}
	return pki.Issue(tlsDir(dir, "primary"), tlsDir(dir, "replica"), []string{"replica.example", "127.0.0.1"}, pki.Options{})
}

func tlsDir(dir, name string) string { return filepath.Join(dir, name+".tls") }

// A host is a daemon in a process of its own.
type host struct {
	name   string
	state  string // its state directory
	listen string // HOST:PORT for peers
	admin  *admin.Client

	cmd    *exec.Cmd
	stderr lockedBuffer
	exited chan struct{}
}

// startHost starts a daemon and waits until it answers.
func startHost(ctx context.Context, program, dir, name string) (*host, error) {
	h := &host{name: name, state: filepath.Join(dir, name), exited: make(chan struct{})}
	h.cmd = exec.Command(program, "daemon", "--state", h.state, "--tls-dir", tlsDir(dir, name), "--listen", "127.0.0.1:0")
	h.cmd.Args[0] = os.Args[0] // a program may go by the name that it is called by
	h.cmd.Stderr = &h.stderr
	// The hosts end with the demo, whatever ends it.
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	h.cmd.Env = append(os.Environ(), "AFTERIMAGE_ADMIN=")
	if err := h.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start host %s: %w", name, err)
	}
	go func() {
		_ = h.cmd.Wait() // killed, more often than not
		close(h.exited)
	}()
	h.admin = admin.NewClient(filepath.Join(h.state, "admin.sock"))
	for began := time.Now(); ; {
		info, err := h.admin.Daemon(ctx)
		if err == nil {
			h.listen = info.Listen
			return h, nil
		}
		select {
		case <-h.exited:
			return nil, fmt.Errorf("host %s did not start: %s", name, bytes.TrimSpace(h.stderr.Bytes()))
		default:
		}
		if time.Since(began) > settle {
			return nil, errors.Join(fmt.Errorf("host %s does not answer: %w", name, err), h.kill())
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return nil, errors.Join(err, h.kill())
		}
	}
}

// kill is kill -9; it returns when the process is gone.
func (h *host) kill() error {
	err := h.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-h.exited
	return err
}

// stop ends the host in peace, if it still runs.
func (h *host) stop() error {
	h.admin.Close()
	_ = h.cmd.Process.Signal(syscall.SIGTERM) // it may be gone
	select {
	case <-h.exited:
		return nil
	case <-time.After(settle):
		return errors.Join(fmt.Errorf("host %s did not end", h.name), h.kill())
	}
}

// lockedBuffer keeps what a process says.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// Bytes returns a copy.
func (l *lockedBuffer) Bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b.Bytes())
}
