package vmlab

import (
	"encoding/json"
	"fmt"
	"iter"
	"strings"
	"sync"
	"syscall"

	"afterimage/internal/vmlab/wire"
)

// A Command is a program to be run in the guest, as root.
type Command = wire.Command

const (
	// outputKeep is how much is kept of each of a process's outputs, in bytes;
	// of more, the beginning.
	outputKeep = 16 << 20
	// eventsKeep is how many events may wait for the test.
	eventsKeep = 1 << 20
)

// A Process is a program in the guest.
type Process struct {
	vm   *VM
	id   uint32
	args []string

	// mu guards the rest, and changed is signalled when any of it changes.
	mu             sync.Mutex
	changed        sync.Cond
	stdout, stderr []byte
	events         []string
	ended          bool
	outcome        *wire.Outcome // nil once ended: it was lost
}

// A Result is what came of a program.
type Result struct {
	Stdout, Stderr string
	// Status is the exit status; 128 and its number for a signal; 127 if the
	// program could not be started, for which Stderr then has the reason.
	Status int
	// Lost says that the guest ended before the program did, and no status is known.
	Lost bool
}

// Go starts a program and does not wait for it. Of what a program leaves behind
// at its end, the output is lost.
func (vm *VM) Go(args ...string) *Process {
	vm.t.Helper()
	return vm.Start(Command{Args: args})
}

// Start is Go with environment and directory.
func (vm *VM) Start(c Command) *Process {
	vm.t.Helper()
	p := &Process{vm: vm, args: c.Args}
	p.changed.L = &p.mu
	vm.mu.Lock()
	select {
	case <-vm.gone:
		vm.mu.Unlock()
		vm.fatalEnded(fmt.Sprintf("before %q was run", c.Args))
	default:
	}
	vm.last++
	p.id = vm.last
	vm.procs[p.id] = p
	vm.mu.Unlock()
	body, err := json.Marshal(c)
	if err == nil {
		err = vm.send(wire.Start, p.id, body)
	}
	if err != nil {
		vm.fatalf("run %q: %v", c.Args, err)
	}
	return p
}

// Run runs a program to its end.
func (vm *VM) Run(args ...string) Result {
	vm.t.Helper()
	return vm.Go(args...).Wait()
}

// Must is Run for a program that succeeds, or else the test fails. It returns
// its standard output.
func (vm *VM) Must(args ...string) string {
	vm.t.Helper()
	r := vm.Run(args...)
	if r.Status != 0 {
		vm.fatalf("%q: status %d\n%s", args, r.Status, strings.TrimSpace(r.Stdout+r.Stderr))
	}
	return r.Stdout
}

// Wait returns what came of the program. If the guest ends unasked, the test
// fails.
func (p *Process) Wait() Result {
	p.vm.t.Helper()
	r := p.wait()
	if r.Lost {
		<-p.vm.gone
		if p.vm.endedUnasked() {
			p.vm.fatalEnded(fmt.Sprintf("while %q ran, which had said\n%s", p.args, strings.TrimSpace(r.Stdout+r.Stderr)))
		}
	}
	return r
}

func (p *Process) wait() Result {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.ended {
		p.changed.Wait()
	}
	r := Result{Stdout: string(p.stdout), Stderr: string(p.stderr), Status: -1, Lost: true}
	if p.outcome != nil {
		r.Status, r.Lost = p.outcome.Status, false
		r.Stderr += p.outcome.Err
	}
	return r
}

// endedUnasked reports whether a guest that has ended should not have.
func (vm *VM) endedUnasked() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return !vm.expected || vm.linkErr != nil
}

// Kill sends a signal to the program and its children.
func (p *Process) Kill(sig syscall.Signal) {
	p.vm.t.Helper()
	if err := p.vm.send(wire.Signal, p.id, []byte{byte(sig)}); err != nil {
		p.vm.fatalf("send %q signal %v: %v", p.args, sig, err)
	}
}

// Events are the lines that the program writes to descriptor 3 (see package
// guest), as they come, until it has ended. Each is yielded once; after a break
// the next range goes on.
func (p *Process) Events() iter.Seq[string] {
	return func(yield func(string) bool) {
		for {
			e, ok := p.nextEvent()
			if !ok || !yield(e) {
				return
			}
		}
	}
}

func (p *Process) nextEvent() (event string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.events) == 0 {
		if p.ended {
			return "", false
		}
		p.changed.Wait()
	}
	event = p.events[0]
	p.events = p.events[1:]
	return event, true
}

// take takes a message about the process. It must not block: everybody's
// messages come through here.
func (p *Process) take(m wire.Message) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.changed.Broadcast()
	switch m.Kind {
	case wire.Stdout:
		p.stdout = append(p.stdout, m.Body[:min(len(m.Body), outputKeep-len(p.stdout))]...)
	case wire.Stderr:
		p.stderr = append(p.stderr, m.Body[:min(len(m.Body), outputKeep-len(p.stderr))]...)
	case wire.Event:
		if len(p.events) == eventsKeep {
			return fmt.Errorf("%d events of %q wait for the test, which takes none", eventsKeep, p.args)
		}
		p.events = append(p.events, string(m.Body))
	case wire.Exit:
		var o wire.Outcome
		if err := json.Unmarshal(m.Body, &o); err != nil {
			return fmt.Errorf("the end of %q: %w", p.args, err)
		}
		p.ended, p.outcome = true, &o
	default:
		return fmt.Errorf("the guest has sent a message of kind %d", m.Kind)
	}
	return nil
}

// lose ends it with its guest.
func (p *Process) lose() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	p.changed.Broadcast()
}
