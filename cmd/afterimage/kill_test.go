package main

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"afterimage/blockdev"
)

// TestKillServe kills a server under writers, again and again: no write that
// was acknowledged is lost, and none is half there. The socket that a killed
// server leaves behind is in nobody's way.
func TestKillServe(t *testing.T) {
	const (
		rounds    = 10
		writers   = 4
		blocks    = 64 // of each writer
		blockSize = 4096
	)
	disk := image(t, writers*blocks*blockSize)
	var begun, acked [writers * blocks]uint64 // the newest stamp of a block
	r := rand.New(rand.NewPCG(9, 10))
	for round := range rounds {
		p := start(t, "serve", disk, "-U", disk+".sock")
		c := dial(t, p.line())

		buf := make([]byte, blockSize)
		for b := range begun {
			if err := blockdev.ReadAt(c, buf, int64(b)*blockSize); err != nil {
				t.Fatal(err)
			}
			stamp := binary.LittleEndian.Uint64(buf)
			if stamp < acked[b] || stamp > begun[b] {
				t.Fatalf("round %d: block %d has write %d; %d was acknowledged, %d begun", round, b, stamp, acked[b], begun[b])
			}
			for i := 8; i < blockSize; i += 8 {
				if binary.LittleEndian.Uint64(buf[i:]) != stamp {
					t.Fatalf("round %d: block %d is torn at byte %d", round, b, i)
				}
			}
			acked[b], begun[b] = stamp, stamp
		}

		var left atomic.Int64 // writes until the kill
		left.Store(1 + r.Int64N(3000))
		killed := make(chan struct{})
		var wg sync.WaitGroup
		for w := range writers {
			seed := r.Uint64()
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, 0))
				buf := make([]byte, blockSize)
				for {
					b := w*blocks + r.IntN(blocks)
					begun[b]++
					for i := 0; i < blockSize; i += 8 {
						binary.LittleEndian.PutUint64(buf[i:], begun[b])
					}
					if blockdev.WriteAt(c, buf, int64(b)*blockSize) != nil {
						return // the server is dead
					}
					acked[b] = begun[b]
					if left.Add(-1) == 0 {
						close(killed)
					}
				}
			})
		}
		<-killed
		p.end(syscall.SIGKILL)
		wg.Wait()
		c.Close()
	}
}
