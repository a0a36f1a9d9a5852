package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"afterimage/blockdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds everything that a test waits for.
const patience = 30 * time.Second

// tempSocket returns a path short enough for a socket.
func tempSocket(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "sock")
}

// quiet returns a server that logs nowhere and gives up soon.
func quiet() *Server {
	return &Server{
		Log:           slog.New(slog.NewTextHandler(io.Discard, nil)),
		DrainTimeout:  time.Second,
		SettleTimeout: patience,
	}
}

// serve runs s on a socket of its own until the test ends, and returns the path.
func serve(t testing.TB, s *Server) (socket string) {
	t.Helper()
	socket, _ = serveUntil(t, s)
	return socket
}

// serveUntil is serve with a way to stop earlier.
func serveUntil(t testing.TB, s *Server) (socket string, stop func()) {
	t.Helper()
	socket = tempSocket(t)
	ln, err := ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, ln) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return socket, stop
}

// add exports q under name, and as the default export if name is empty.
func add(t testing.TB, s *Server, e Export) {
	t.Helper()
	if err := s.Add(e); err != nil {
		t.Fatal(err)
	}
}

// memPool is a Queue over a disk in memory.
func memPool(size int64) *blockdev.Pool { return blockdev.NewPool(blockdev.NewMem(size), 8) }

func dialSocket(t testing.TB, socket string) net.Conn {
	t.Helper()
	nc, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	return nc
}

// wantEOF fails unless the other side closes without another byte.
func wantEOF(t testing.TB, nc net.Conn) {
	t.Helper()
	b := make([]byte, 64)
	n, err := nc.Read(b)
	if n > 0 {
		t.Fatalf("got % x where the connection should have been closed", b[:n])
	}
	var to net.Error
	if errors.As(err, &to) && to.Timeout() {
		t.Fatal("the connection stays open")
	}
}
