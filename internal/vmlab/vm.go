package vmlab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"afterimage/internal/vmlab/wire"
)

// A VM is a guest that was booted. Its methods are for the test's own
// goroutine: they fail the test when the guest is not as it should be.
//
//	booting ──hello──▶ running ──PowerCut, PowerOff, the test's end──▶ ended
//	   │                  │
//	   └──────────────────┴── anything else that ends QEMU ──▶ ended, and the test fails
type VM struct {
	t       testing.TB
	lab     *Lab
	console console
	qemu    *qemu
	port    *os.File // to the guest
	expires *time.Timer
	ends    time.Time // when it expires

	hello chan wire.Greeting // one at most
	// gone is closed when QEMU has ended and all that had left the guest by
	// then is with those that wait for it.
	gone chan struct{}

	// sendMu is taken to write to port, for one message.
	sendMu sync.Mutex

	// mu guards the rest.
	mu       sync.Mutex
	procs    map[uint32]*Process // those that have not ended
	last     uint32              // the newest process's number
	expected bool                // it may end, or has been told to
	expired  bool
	reported bool // what was wrong with its end
	linkErr  error
}

// Boot starts a guest, and returns when it takes orders. The one before must have
// ended; the drives are as it has left them.
func (l *Lab) Boot() *VM {
	t := l.t
	t.Helper()
	if l.running != nil && !l.running.hasEnded() {
		t.Fatal("vmlab: the lab's last guest still runs: PowerCut or PowerOff it first")
	}
	vm := &VM{
		t: t, lab: l, procs: map[uint32]*Process{},
		hello: make(chan wire.Greeting, 1), gone: make(chan struct{}),
	}
	begun := time.Now()
	var err error
	if vm.qemu, vm.port, err = startQEMU(l, &vm.console); err != nil {
		t.Fatal(err)
	}
	l.running = vm
	go vm.listen()
	vm.ends = begun.Add(l.o.Timeout)
	vm.expires = time.AfterFunc(l.o.Timeout, vm.expire)
	t.Cleanup(vm.stop)
	select {
	case hello := <-vm.hello:
		if hello.Err != "" {
			vm.fatalf("the guest's start: %s", hello.Err)
		}
		t.Logf("vmlab: booted Linux %s in %v", hello.Release, time.Since(begun).Round(10*time.Millisecond))
	case <-vm.gone:
		vm.fatalEnded("while it booted")
	case <-time.After(bootLimit):
		vm.fatalf("the guest has not come up in %v", bootLimit)
	}
	return vm
}

// listen takes what the guest sends, until it sends nothing more.
func (vm *VM) listen() {
	err := vm.receive()
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		vm.mu.Lock()
		vm.linkErr = err
		vm.mu.Unlock()
		_ = vm.qemu.cmd.Process.Kill() // there is no talking to it
	}
	<-vm.qemu.ended
	vm.expires.Stop()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for id, p := range vm.procs {
		p.lose()
		delete(vm.procs, id)
	}
	close(vm.gone) // under mu: a Start beside it adds before, or is told
}

// receive returns io.EOF, or an error that wraps it, when QEMU has ended.
func (vm *VM) receive() error {
	for {
		m, err := wire.Read(vm.port)
		if err != nil {
			return err
		}
		if m.Kind == wire.Hello {
			var g wire.Greeting
			if err := json.Unmarshal(m.Body, &g); err != nil {
				return fmt.Errorf("the guest's greeting: %w", err)
			}
			select {
			case vm.hello <- g:
			default:
				return errors.New("the guest greets twice")
			}
			continue
		}
		vm.mu.Lock()
		p := vm.procs[m.Process]
		if m.Kind == wire.Exit {
			delete(vm.procs, m.Process)
		}
		vm.mu.Unlock()
		if p == nil {
			return fmt.Errorf("the guest speaks of process %d, which is not there", m.Process)
		}
		if err := p.take(m); err != nil {
			return err
		}
	}
}

// send sends a message to the guest. It fails if the guest has ended.
func (vm *VM) send(kind wire.Kind, process uint32, body []byte) error {
	vm.sendMu.Lock()
	defer vm.sendMu.Unlock()
	return wire.Write(vm.port, wire.Message{Kind: kind, Process: process, Body: body})
}

// PowerCut ends the guest as a power cut ends a host: at this moment, wherever
// it is. The package's documentation says what that loses. Programs that run
// end with [Result].Lost; events that had left the guest are still delivered.
func (vm *VM) PowerCut() {
	vm.t.Helper()
	vm.expectEnd("before its power was cut")
	vm.qemu.kill()
	<-vm.gone
	for _, d := range vm.lab.o.Drives {
		if d.Volatile == nil {
			continue
		}
		seed := rand.Uint64()
		n, err := d.Volatile.Cut(seed)
		if err != nil {
			vm.t.Fatalf("drive %s: cut its power: %v", d.Name, err)
		}
		vm.t.Logf("vmlab: of drive %s, %d sectors were left to chance (seed %d)", d.Name, n, seed)
	}
	vm.check()
}

// PowerOff ends the guest in order: its programs are killed, file systems on its
// drives are written and unmounted.
func (vm *VM) PowerOff() {
	vm.t.Helper()
	vm.expectEnd("before it was told to switch off")
	if err := vm.send(wire.PowerOff, 0, nil); err != nil {
		vm.fatalf("tell the guest to switch off: %v", err)
	}
	<-vm.gone
	vm.check()
}

// expectEnd says that the guest is about to be ended. If it has ended already,
// the test fails.
func (vm *VM) expectEnd(when string) {
	vm.t.Helper()
	vm.mu.Lock()
	ended := vm.hasEnded()
	if !ended {
		vm.expected = true
	}
	vm.mu.Unlock()
	if ended {
		<-vm.gone
		vm.fatalEnded(when)
	}
}

func (vm *VM) hasEnded() bool {
	select {
	case <-vm.qemu.ended:
		return true
	default:
		return false
	}
}

// Console is what the guest's kernel has said.
func (vm *VM) Console() string { return vm.console.String() }

// expire ends a guest that has run for too long.
func (vm *VM) expire() {
	vm.mu.Lock()
	vm.expired, vm.expected = true, false
	vm.mu.Unlock()
	vm.qemu.kill()
}

// stop ends the guest with its test.
func (vm *VM) stop() {
	vm.mu.Lock()
	if !vm.hasEnded() { // expected or not, that is known already
		vm.expected = true
	}
	vm.mu.Unlock()
	vm.qemu.kill()
	<-vm.gone
	vm.port.Close()
	vm.check()
	if vm.t.Failed() {
		vm.t.Logf("vmlab: the guest's console:\n%s", vm.console.String())
	}
}

// check fails the test, once, if something was wrong with a guest that ended.
func (vm *VM) check() {
	vm.t.Helper()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.reported {
		return
	}
	var wrong []string
	if lines := vm.console.troubles(); len(lines) > 0 {
		wrong = append(wrong, "its kernel said:\n\t"+strings.Join(lines, "\n\t"))
	}
	switch {
	case vm.expired:
		wrong = append(wrong, fmt.Sprintf("it still ran after %v", vm.lab.o.Timeout))
	case vm.linkErr != nil:
		wrong = append(wrong, vm.linkErr.Error())
	case !vm.expected:
		wrong = append(wrong, "it ended by itself: "+vm.qemu.how())
	}
	if len(wrong) > 0 {
		vm.reported = true
		vm.t.Errorf("vmlab: the guest: %s", strings.Join(wrong, "\n"))
	}
}

// fatalf ends the test over a guest that may still run.
func (vm *VM) fatalf(format string, args ...any) {
	vm.t.Helper()
	vm.t.Fatalf("vmlab: "+format, args...)
}

// fatalEnded ends the test over a guest that has ended when it should not.
func (vm *VM) fatalEnded(when string) {
	vm.t.Helper()
	vm.check()
	vm.fatalf("the guest has ended %s", when)
}

// remaining is how long the guest may still run.
func (vm *VM) remaining() time.Duration { return time.Until(vm.ends) }
