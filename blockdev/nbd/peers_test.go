package nbd

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// startNbdkit runs nbdkit on a socket until the test ends.
func startNbdkit(t testing.TB, socket string, args ...string) {
	t.Helper()
	startPeer(t, socket, "nbdkit", append([]string{"-f", "-U", socket}, args...)...)
}

// startQemuNbd runs qemu-nbd over an image until the test ends.
func startQemuNbd(t testing.TB, socket, image string, args ...string) {
	t.Helper()
	startPeer(t, socket, "qemu-nbd", append([]string{"-t", "-f", "raw", "-k", socket}, append(args, image)...)...)
}

// startPeer runs a server that makes socket when it is ready.
func startPeer(t testing.TB, socket, program string, args ...string) {
	t.Helper()
	var said bytes.Buffer
	cmd := exec.Command(testenv.Need(t, program), args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		<-ended
	})
	testenv.Until(t, program+" listens", func() bool {
		select {
		case <-ended:
			t.Fatalf("%s %v: %s", program, args, &said)
		default:
		}
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
		}
		return err == nil
	})
}

// queueDevice makes a Device of a Queue, for tests that look behind a server.
type queueDevice struct{ blockdev.Queue }

func devOf(q blockdev.Queue) blockdev.Device { return queueDevice{q} }

func (d queueDevice) Do(reqs []*blockdev.Request) {
	w := make(waiter, len(reqs))
	for _, r := range reqs {
		r.Owner = w
	}
	d.Submit(reqs)
	for range reqs {
		<-w
	}
}

func (d queueDevice) Resize(int64) error { return blockdev.ErrNotSupported }
func (d queueDevice) Close() error       { return nil }

// waiter is told about every finished request.
type waiter chan *blockdev.Request

func (w waiter) Complete(reqs []*blockdev.Request) {
	for _, r := range reqs {
		w <- r
	}
}
func (w waiter) Gone() bool { return false }
