package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

// TestCommands asks for every edge of a disk of 1 MiB ("disk"), or of 2 MiB that
// is read-only ("fixed").
func TestCommands(t *testing.T) {
	_, socket := testServer(t)
	const end = 1 << 20
	const max64 = 1<<64 - 1
	for i, c := range []struct {
		export string
		h      request
		code   uint32
	}{
		{"disk", request{cmd: cmdRead, length: end}, wireOK},
		{"disk", request{cmd: cmdRead, off: end - 1, length: 1}, wireOK},
		{"disk", request{cmd: cmdRead, off: end - 1, length: 2}, wireINVAL},
		{"disk", request{cmd: cmdRead, off: end, length: 1}, wireINVAL},
		{"disk", request{cmd: cmdRead, off: max64, length: 1}, wireINVAL},
		{"disk", request{cmd: cmdRead, off: max64 - 511, length: 512}, wireINVAL},
		{"disk", request{cmd: cmdRead, off: 1 << 63, length: 512}, wireINVAL},
		{"disk", request{cmd: cmdRead, length: maxPayload}, wireINVAL},
		{"disk", request{cmd: cmdRead, length: maxPayload + 1}, wireINVAL},
		{"disk", request{cmd: cmdRead, length: 0xffffffff}, wireINVAL},
		{"disk", request{cmd: cmdRead, length: 0}, wireOK},
		{"disk", request{cmd: cmdRead, off: end, length: 0}, wireOK},
		{"disk", request{cmd: cmdRead, off: end + 1, length: 0}, wireINVAL},
		{"disk", request{cmd: cmdRead, length: 512, flags: cmdFlagFUA}, wireOK},
		{"disk", request{cmd: cmdRead, length: 512, flags: 1 << 2}, wireINVAL}, // DF is not offered
		{"disk", request{cmd: cmdRead, length: 512, flags: cmdFlagNoHole}, wireINVAL},
		{"disk", request{cmd: cmdWrite, off: end - 512, length: 512}, wireOK},
		{"disk", request{cmd: cmdWrite, off: end - 512, length: 512, flags: cmdFlagFUA}, wireOK},
		{"disk", request{cmd: cmdWrite, off: end - 511, length: 512}, wireNOSPC},
		{"disk", request{cmd: cmdWrite, off: max64 - 100, length: 512}, wireNOSPC},
		{"disk", request{cmd: cmdWrite, off: end, length: 3 << 20}, wireNOSPC},
		{"disk", request{cmd: cmdWrite, length: 0}, wireOK},
		{"disk", request{cmd: cmdWrite, length: 512, flags: cmdFlagFastZero}, wireINVAL},
		{"disk", request{cmd: cmdWrite, length: 512, flags: 1 << 15}, wireINVAL},
		{"disk", request{cmd: cmdFlush}, wireOK},
		{"disk", request{cmd: cmdFlush, flags: cmdFlagFUA}, wireOK},
		{"disk", request{cmd: cmdFlush, length: 1}, wireINVAL},
		{"disk", request{cmd: cmdFlush, off: 1}, wireINVAL},
		{"disk", request{cmd: cmdTrim, length: end}, wireOK},
		{"disk", request{cmd: cmdTrim, length: end, flags: cmdFlagFUA}, wireOK},
		{"disk", request{cmd: cmdTrim, length: end + 1}, wireINVAL},
		{"disk", request{cmd: cmdTrim, length: 0xffffffff}, wireINVAL},
		{"disk", request{cmd: cmdTrim, length: 512, flags: cmdFlagNoHole}, wireINVAL},
		{"disk", request{cmd: cmdTrim, length: 0}, wireOK},
		{"disk", request{cmd: cmdWriteZeroes, length: end}, wireOK},
		{"disk", request{cmd: cmdWriteZeroes, length: end, flags: cmdFlagFUA | cmdFlagNoHole}, wireOK},
		{"disk", request{cmd: cmdWriteZeroes, length: end, flags: cmdFlagFastZero}, wireOK},
		{"disk", request{cmd: cmdWriteZeroes, off: 1, length: end}, wireNOSPC},
		{"disk", request{cmd: cmdWriteZeroes, length: 0xffffffff}, wireNOSPC},
		{"disk", request{cmd: cmdWriteZeroes, length: 512, flags: 1 << 5}, wireINVAL},
		{"disk", request{cmd: 5, length: 512}, wireINVAL}, // CACHE is not offered
		{"disk", request{cmd: 7, length: 512}, wireINVAL}, // nor BLOCK_STATUS
		{"disk", request{cmd: 0xffff, off: max64, length: 0xffffffff, flags: 0xffff}, wireINVAL},
		{"fixed", request{cmd: cmdRead, length: 512}, wireOK},
		{"fixed", request{cmd: cmdWrite, length: 512}, wirePERM},
		{"fixed", request{cmd: cmdWrite, length: 1 << 20}, wirePERM},
		{"fixed", request{cmd: cmdTrim, length: 512}, wirePERM},
		{"fixed", request{cmd: cmdWriteZeroes, length: 512}, wirePERM},
		{"fixed", request{cmd: cmdFlush}, wireOK},
	} {
		t.Run(fmt.Sprintf("%d-%s-%d", i, c.export, c.h.cmd), func(t *testing.T) {
			nc := transmission(t, socket, c.export)
			c.h.cookie = uint64(i) << 32
			var payload []byte
			length := 0
			switch c.h.cmd {
			case cmdWrite:
				payload = make([]byte, c.h.length)
			case cmdRead:
				length = int(c.h.length)
			}
			go nc.Write(command(c.h, payload...))
			if cookie, code, _ := reply(t, nc, length); code != c.code || cookie != c.h.cookie {
				t.Fatalf("%+v: request %d is answered with %d, want %d", c.h, cookie, code, c.code)
			}
			// Nothing of it is left in the stream.
			write(t, nc, command(request{cmd: cmdFlush, cookie: 9}))
			wantReply(t, nc, 9, wireOK)
			write(t, nc, command(request{cmd: cmdDisc}))
			wantEOF(t, nc)
		})
	}
}

// TestTransmissionEnds lists what ends a connection, and nothing else.
func TestTransmissionEnds(t *testing.T) {
	_, socket := testServer(t)
	for name, say := range map[string][]byte{
		"garbage":          bytes.Repeat([]byte{0xa5}, requestSize),
		"a write of 4 GiB": command(request{cmd: cmdWrite, length: 0xffffffff}),
		"a longer write":   command(request{cmd: cmdWrite, length: maxPayload + 1}),
	} {
		nc := transmission(t, socket, "disk")
		write(t, nc, append(command(request{cmd: cmdRead, cookie: 3}), say...))
		wantReply(t, nc, 3, wireOK)
		wantEOF(t, nc)
		t.Log(name)
	}
	alive(t, socket, "disk")
}

// TestDiscFinishes: what was asked before the goodbye is done and answered.
func TestDiscFinishes(t *testing.T) {
	_, socket := testServer(t)
	nc := transmission(t, socket, "disk")
	var say []byte
	const n = 100
	for i := range n {
		say = append(say, command(request{cmd: cmdWrite, cookie: uint64(i), off: uint64(i) * 512, length: 512}, bytes.Repeat([]byte{byte(i)}, 512)...)...)
	}
	say = append(say, command(request{cmd: cmdDisc, flags: 0xffff})...)
	write(t, nc, say)
	seen := make(map[uint64]bool)
	for range n {
		cookie, code, _ := reply(t, nc, 0)
		if code != wireOK || seen[cookie] || cookie >= n {
			t.Fatalf("request %d: error %d, seen %v", cookie, code, seen[cookie])
		}
		seen[cookie] = true
	}
	wantEOF(t, nc)
	nc = transmission(t, socket, "disk")
	write(t, nc, command(request{cmd: cmdRead, length: n * 512}))
	_, _, data := reply(t, nc, n*512)
	for i := range n {
		if data[i*512] != byte(i) || data[i*512+511] != byte(i) {
			t.Fatalf("write %d was lost", i)
		}
	}
}

// TestFragments sends random commands in random fragments and compares what is
// read with a model. Nothing overlaps while it is under way: each round waits.
func TestFragments(t *testing.T) {
	s := quiet()
	const size = 8 << 20
	add(t, s, Export{Queue: memPool(size)})
	nc := transmission(t, serve(t, s), "")
	model := make([]byte, size)
	rnd := rand.New(rand.NewPCG(1, 2))
	lengths := []int{1, 100, 512, 4096, 60 << 10, 65 << 10, 200 << 10, 300 << 10, 1 << 20}
	for round := range 150 {
		var say []byte
		expect := make(map[uint64][]byte)
		// One slot of the disk each, so that nothing overlaps.
		slots := rnd.Perm(8)[:1+rnd.IntN(8)]
		for i, slot := range slots {
			length := lengths[rnd.IntN(len(lengths))]
			off := slot<<20 + rnd.IntN(1<<20-length+1)
			h := request{cookie: uint64(round)<<8 | uint64(i), off: uint64(off), length: uint32(length)}
			part := model[off : off+length]
			switch rnd.IntN(5) {
			case 0:
				h.cmd = cmdRead
				expect[h.cookie] = bytes.Clone(part)
				say = append(say, command(h)...)
			case 1:
				h.cmd = cmdWriteZeroes
				clear(part)
				expect[h.cookie] = nil
				say = append(say, command(h)...)
			default:
				h.cmd = cmdWrite
				for j := range part {
					part[j] = byte(rnd.Uint32())
				}
				expect[h.cookie] = nil
				say = append(say, command(h, part...)...)
			}
		}
		sent := make(chan error, 1)
		seed := rnd.Uint64()
		go func() {
			rnd := rand.New(rand.NewPCG(seed, 0))
			var err error
			for len(say) > 0 && err == nil {
				n := min(len(say), 1+rnd.IntN([]int{30, 5000, 400 << 10}[rnd.IntN(3)]))
				_, err = nc.Write(say[:n])
				say = say[n:]
			}
			sent <- err
		}()
		for range slots {
			b := read(t, nc, replySize)
			cookie := uint64(b[8])<<56 | uint64(b[9])<<48 | uint64(b[10])<<40 | uint64(b[11])<<32 | uint64(b[12])<<24 | uint64(b[13])<<16 | uint64(b[14])<<8 | uint64(b[15])
			want, ok := expect[cookie]
			if !ok || !bytes.Equal(b[4:8], []byte{0, 0, 0, 0}) {
				t.Fatalf("round %d: reply % x", round, b)
			}
			delete(expect, cookie)
			if got := read(t, nc, len(want)); !bytes.Equal(got, want) {
				t.Fatalf("round %d: wrong content", round)
			}
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	}
}
