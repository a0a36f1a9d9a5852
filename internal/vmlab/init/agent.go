package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/internal/vmlab/wire"
)

// lingerLimit bounds how long the output of a process is read after its end:
// a child that it has left behind may hold the pipes for ever.
const lingerLimit = time.Second

// A link is the agent's side of the port.
type link struct {
	// mu is taken to write to the port, for one message.
	mu   sync.Mutex
	port io.Writer

	running sync.WaitGroup
	// procsMu guards procs.
	procsMu sync.Mutex
	procs   map[uint32]*exec.Cmd // those that have been started and not ended
}

// agent does what the lab asks for, until it is told to switch off.
func agent() error {
	for _, e := range environment {
		name, value, _ := strings.Cut(e, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	setUpErr := setUp()
	port, err := openPort()
	if err != nil {
		return errors.Join(setUpErr, err)
	}
	s := &link{port: port, procs: map[uint32]*exec.Cmd{}}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	hello := wire.Greeting{Release: unix.ByteSliceToString(u.Release[:])}
	if setUpErr != nil {
		hello.Err = setUpErr.Error()
	}
	s.sendJSON(wire.Hello, 0, hello)
	orders := bufio.NewReader(port)
	for {
		m, err := wire.Read(orders)
		if err != nil {
			return fmt.Errorf("read from the lab: %w", err)
		}
		switch m.Kind {
		case wire.Start:
			var c wire.Command
			if err := json.Unmarshal(m.Body, &c); err != nil {
				return fmt.Errorf("a command: %w", err)
			}
			s.start(m.Process, c)
		case wire.Signal:
			if len(m.Body) != 1 {
				return fmt.Errorf("a signal in %d bytes", len(m.Body))
			}
			s.signal(m.Process, syscall.Signal(m.Body[0]))
		case wire.PowerOff:
			return s.end()
		default:
			return fmt.Errorf("the lab has sent a message of kind %d", m.Kind)
		}
	}
}

// send writes a message. When that fails there is nobody left to be told: the
// agent ends, and the guest with it.
func (s *link) send(kind wire.Kind, process uint32, body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := wire.Write(s.port, wire.Message{Kind: kind, Process: process, Body: body}); err != nil {
		say("write to the lab: %v", err)
		os.Exit(1)
	}
}

func (s *link) sendJSON(kind wire.Kind, process uint32, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		panic(err) // of types that are nothing but strings and numbers
	}
	s.send(kind, process, b)
}

// start starts a process, and a goroutine that waits for it.
func (s *link) start(id uint32, c wire.Command) {
	cmd, events, err := s.launch(id, c)
	if err != nil {
		s.sendJSON(wire.Exit, id, wire.Outcome{Status: 127, Err: err.Error()})
		return
	}
	s.procsMu.Lock()
	s.procs[id] = cmd
	s.procsMu.Unlock()
	s.running.Go(func() {
		told := make(chan error, 1)
		go func() { told <- s.tell(id, events) }()
		err := cmd.Wait()
		s.procsMu.Lock()
		delete(s.procs, id)
		s.procsMu.Unlock()
		o := outcome(cmd, err)
		if err := events.SetReadDeadline(time.Now().Add(lingerLimit)); err != nil {
			o.Err = err.Error()
		}
		if err := <-told; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			o.Err = "its events: " + err.Error()
		}
		events.Close()
		s.sendJSON(wire.Exit, id, o)
	})
}

func (s *link) launch(id uint32, c wire.Command) (cmd *exec.Cmd, events *os.File, err error) {
	if len(c.Args) == 0 {
		return nil, nil, errors.New("there is nothing to be run")
	}
	events, theirs, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	cmd = exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Dir = c.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout = output{s, wire.Stdout, id}
	cmd.Stderr = output{s, wire.Stderr, id}
	cmd.ExtraFiles = []*os.File{theirs} // becomes wire.EventFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = lingerLimit
	if err := cmd.Start(); err != nil {
		events.Close()
		return nil, nil, err
	}
	return cmd, events, nil
}

// output sends what it is given.
type output struct {
	s       *link
	kind    wire.Kind
	process uint32
}

func (o output) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), wire.MaxBody)
		o.s.send(o.kind, o.process, rest[:n])
		rest = rest[n:]
	}
	return len(p), nil
}

// tell sends each line of events.
func (s *link) tell(id uint32, events *os.File) error {
	lines := bufio.NewScanner(events)
	lines.Buffer(nil, wire.MaxBody)
	for lines.Scan() {
		s.send(wire.Event, id, lines.Bytes())
	}
	return lines.Err()
}

func outcome(cmd *exec.Cmd, err error) wire.Outcome {
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return wire.Outcome{Status: 127, Err: err.Error()}
	}
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return wire.Outcome{Status: 128 + int(ws.Signal())}
	}
	return wire.Outcome{Status: ws.ExitStatus()}
}

// signal signals a process and its children, or nobody if it has ended.
func (s *link) signal(id uint32, sig syscall.Signal) {
	s.procsMu.Lock()
	defer s.procsMu.Unlock()
	// A process that has just ended may still be here. Its number is not given
	// to another so soon.
	if cmd := s.procs[id]; cmd != nil {
		// An error says that it has just ended, which its Exit will say too.
		_ = syscall.Kill(-cmd.Process.Pid, sig)
	}
}

// end kills all processes and makes the disks hold everything that was written.
func (s *link) end() error {
	s.procsMu.Lock()
	for _, cmd := range s.procs {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it may have ended
	}
	s.procsMu.Unlock()
	s.running.Wait()
	unix.Sync()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	for i := len(lines) - 1; i >= 0; i-- { // the latest first: one may lie in another
		f := strings.Fields(lines[i])
		if len(f) < 2 || !strings.HasPrefix(f[0], "/dev/") {
			continue
		}
		if err := unix.Unmount(f[1], 0); err != nil {
			say("unmount %s: %v", f[1], err)
		}
	}
	return nil
}
