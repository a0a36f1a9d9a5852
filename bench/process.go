package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

const (
	startLimit = 20 * time.Second // until a server accepts clients
	stopLimit  = 60 * time.Second // until it has ended
	pollEvery  = 2 * time.Millisecond

	// A server is at rest when it used no CPU time for so long, a few ticks.
	restWindow = 3 * tick
	restLimit  = 2 * time.Second // then it is measured as it is
)

// own makes a program end with us, and lets an interrupt at the terminal come
// to us alone: we end our programs ourselves, in order.
func own(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// A process is a server while it runs.
type process struct {
	name   string
	cmd    *exec.Cmd
	stderr output
	ended  chan struct{} // closed by the goroutine that waits for it
	err    error         // of Wait; valid once ended is closed
}

// startServer starts a server and returns when it accepts clients on socket. It
// is killed when ctx is done.
func startServer(ctx context.Context, name, program string, args []string, socket string) (*process, error) {
	p := &process{name: name, cmd: exec.CommandContext(ctx, program, args...), ended: make(chan struct{})}
	p.cmd.Stderr = &p.stderr
	own(p.cmd)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	if err := p.ready(ctx, socket); err != nil {
		p.kill()
		return nil, fmt.Errorf("start %s: %w%s", name, err, quoted(p.stderr.bytes()))
	}
	return p, nil
}

// ready waits until the socket takes connections.
func (p *process) ready(ctx context.Context, socket string) error {
	deadline := time.Now().Add(startLimit)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-p.ended:
			return fmt.Errorf("it ended at once (%v)", p.cmd.ProcessState)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollEvery):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no clients are accepted after %v: %w", startLimit, err)
		}
	}
}

// rest waits until the server has done what it does at its start, such as
// preparing a log: what is measured is a disk that has been served for a while.
func (p *process) rest(ctx context.Context) error {
	deadline := time.Now().Add(restLimit)
	for last := time.Duration(-1); time.Now().Before(deadline); {
		u, err := usageOf(p.pid())
		if err != nil {
			return fmt.Errorf("%s: %w%s", p.name, err, quoted(p.stderr.bytes()))
		}
		if u.cpu == last {
			return nil
		}
		last = u.cpu
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(restWindow):
		}
	}
	return nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop asks the server to end and waits for it. Its exit status must be that of
// success, since ours says with another one that not everything was kept.
func (p *process) stop(ctx context.Context) error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.kill()
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	select {
	case <-p.ended:
	case <-time.After(stopLimit):
		p.kill()
		return fmt.Errorf("%s does not end %v after SIGTERM", p.name, stopLimit)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w%s", p.name, p.err, quoted(p.stderr.bytes()))
	}
	return nil
}

// kill ends the server however it stands; it may have ended already.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// output keeps what a process prints and can be read while it runs.
type output struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) bytes() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Clone(o.buf.Bytes())
}
