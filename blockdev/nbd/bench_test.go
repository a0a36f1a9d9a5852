package nbd

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
)

// BenchmarkServer measures the server's loop over a Unix socket: a Queue that
// does nothing, a client that sends depth requests at once and waits for all
// replies. One operation is one request.
func BenchmarkServer(b *testing.B) {
	for _, bench := range []struct {
		name  string
		cmd   uint16
		size  uint32
		depth int
	}{
		{"write-4k-qd1", cmdWrite, 4096, 1},
		{"write-4k-qd32", cmdWrite, 4096, 32},
		{"read-4k-qd1", cmdRead, 4096, 1},
		{"read-4k-qd32", cmdRead, 4096, 32},
		{"write-256k-qd8", cmdWrite, 256 << 10, 8},
		{"read-256k-qd8", cmdRead, 256 << 10, 8},
	} {
		b.Run(bench.name, func(b *testing.B) {
			s := quiet()
			add(b, s, Export{Queue: &nullQueue{size: 1 << 30}})
			nc := transmission(b, serve(b, s), "")
			round := newRound(nc, bench.cmd, bench.size, bench.depth)
			round()
			b.SetBytes(int64(bench.size))
			b.ReportAllocs()
			b.ResetTimer()
			for i := 0; i < b.N; i += bench.depth {
				if err := round(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// newRound returns a function that sends depth requests and takes the replies.
func newRound(nc net.Conn, cmd uint16, size uint32, depth int) func() error {
	var out []byte
	answers := depth * replySize
	for i := range depth {
		h := request{cmd: cmd, cookie: uint64(i), off: uint64(i) * uint64(size), length: size}
		var head [requestSize]byte
		h.encode(head[:])
		out = append(out, head[:]...)
		switch cmd {
		case cmdWrite:
			out = append(out, make([]byte, size)...)
		case cmdRead:
			answers += int(size)
		}
	}
	in := make([]byte, answers)
	sent := make(chan error)
	return func() error {
		// More than the socket holds must not wait for the replies.
		if len(out)+len(in) > 128<<10 {
			go func() {
				_, err := nc.Write(out)
				sent <- err
			}()
		} else if _, err := nc.Write(out); err != nil {
			return err
		}
		if _, err := io.ReadFull(nc, in); err != nil {
			return err
		}
		if len(out)+len(in) > 128<<10 {
			if err := <-sent; err != nil {
				return err
			}
		}
		if code := binary.BigEndian.Uint32(in[4:]); code != wireOK {
			return fmt.Errorf("answered with error %d", code)
		}
		return nil
	}
}

// TestServerAllocs: in the steady state the server's side of a request takes no
// memory from the allocator.
func TestServerAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool forgets at random under the race detector")
	}
	for _, cmd := range []uint16{cmdRead, cmdWrite, cmdFlush, cmdWriteZeroes} {
		s := quiet()
		add(t, s, Export{Queue: &nullQueue{size: 1 << 30}})
		nc := transmission(t, serve(t, s), "")
		size, depth := uint32(2048), 16
		if cmd == cmdFlush {
			size, depth = 0, 1
		}
		round := newRound(nc, cmd, size, depth)
		var err error
		n := testing.AllocsPerRun(500, func() {
			if e := round(); e != nil {
				err = e
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		// A garbage collection in between empties the pools once.
		if n >= 1 {
			t.Errorf("command %d: %v allocations a round", cmd, n)
		}
	}
}
