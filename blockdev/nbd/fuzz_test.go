package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
)

// socketPair returns the two ends of a connection.
func socketPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		nc, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(time.Now().Add(patience))
		ends[i] = nc.(*net.UnixConn)
	}
	return ends[0], ends[1]
}

// strictQueue does nothing, but looks at what it is asked.
type strictQueue struct {
	nullQueue
	t testing.TB
}

func (q *strictQueue) Submit(reqs []*blockdev.Request) {
	if len(reqs) == 0 || len(reqs) > blockdev.BatchMax {
		q.t.Errorf("a batch of %d", len(reqs))
	}
	info := q.Info()
	for _, r := range reqs {
		if err := r.Check(&info, q.size); err != nil {
			q.t.Errorf("the server lets through: %v", err)
		}
		if r.Owner != reqs[0].Owner {
			q.t.Error("a batch of two owners")
		}
		for i := range r.Buf {
			if r.Op == blockdev.OpRead {
				r.Buf[i] = byte(r.Off) + byte(i)
			}
		}
	}
	reqs[0].Owner.Complete(reqs)
}

// converse sends say to a new server and returns all that it says until it
// closes.
func converse(t testing.TB, say []byte) []byte {
	s := quiet()
	q := &strictQueue{nullQueue{100_000}, t}
	add(t, s, Export{Name: "disk", Description: "a disk", Queue: q})
	add(t, s, Export{Queue: q, ReadOnly: true})
	ours, theirs := socketPair(t)
	defer ours.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		s.ServeConn(t.Context(), theirs)
	}()
	go func() {
		ours.Write(say) // fails when the server has had enough
		ours.CloseWrite()
	}()
	said, err := io.ReadAll(ours)
	if e, ok := err.(net.Error); ok && e.Timeout() {
		t.Error("the server does not come to an end")
	}
	<-served
	return said
}

func FuzzHandshake(f *testing.F) {
	flags := []byte{0, 0, 0, 3}
	for _, say := range [][]byte{
		{}, {0, 0, 0, 1}, {255, 255, 255, 255},
		option(optAbort, nil), option(optList, nil), option(optInfo, infoData("disk", 0, 1, 2, 3)),
		append(option(optGo, infoData("")), command(request{cmd: cmdRead, length: 10})...),
		append(option(optExportName, []byte("disk")), command(request{cmd: cmdWrite, length: 3}, 1, 2, 3)...),
		append(option(77, make([]byte, 100)), option(optList, []byte{1})...),
		appendOption(nil, optGo, 0xffffffff),
	} {
		f.Add(say)
		f.Add(append(bytes.Clone(flags), say...))
	}
	f.Fuzz(func(t *testing.T, say []byte) {
		if said := converse(t, say); len(said) < greetingSize {
			t.Errorf("greeted with % x", said)
		}
	})
}

// FuzzTransmission compares what the server answers with what a plain parser
// expects.
func FuzzTransmission(f *testing.F) {
	for _, h := range []request{
		{cmd: cmdRead, off: 7, length: 1000, cookie: 1}, {cmd: cmdWrite, length: 4, cookie: 2}, {cmd: cmdFlush, cookie: 3},
		{cmd: cmdTrim, length: 5000}, {cmd: cmdWriteZeroes, length: 100_000, flags: cmdFlagFastZero}, {cmd: cmdDisc},
		{cmd: cmdWrite, off: 1 << 63, length: 4}, {cmd: 99, flags: 99}, {cmd: cmdRead, length: 0xffffffff}, {cmd: cmdWrite, length: 0xffffffff},
	} {
		f.Add(append(command(h, 1, 2, 3, 4), command(h, 5, 6, 7, 8)...))
		f.Add(append(command(h), command(request{cmd: cmdRead, off: 99_999, length: 1})...))
	}
	f.Fuzz(func(t *testing.T, say []byte) {
		hello := append([]byte{0, 0, 0, 3}, option(optExportName, []byte("disk"))...)
		said := converse(t, append(hello, say...))
		if len(said) < greetingSize+10 {
			t.Fatalf("no transmission: % x", said)
		}
		said = said[greetingSize+10:]
		want := make(map[uint64]map[uint32]int) // cookie, length of the read, how often
		n := 0
		for len(say) >= requestSize {
			var h request
			if !h.decode(say) || h.cmd == cmdDisc {
				break
			}
			say = say[requestSize:]
			if h.cmd == cmdWrite {
				if h.length > maxPayload || int(h.length) > len(say) {
					break
				}
				say = say[h.length:]
			}
			length := uint32(0)
			if h.cmd == cmdRead {
				length = h.length
			}
			if want[h.cookie] == nil {
				want[h.cookie] = make(map[uint32]int)
			}
			want[h.cookie][length]++
			n++
		}
		for ; n > 0; n-- {
			if len(said) < replySize || binary.BigEndian.Uint32(said) != replyMagic {
				t.Fatalf("%d replies are missing; got % x", n, said)
			}
			code, cookie := binary.BigEndian.Uint32(said[4:]), binary.BigEndian.Uint64(said[8:])
			said = said[replySize:]
			lengths := want[cookie]
			if lengths == nil {
				t.Fatalf("an answer to %d, which was not asked", cookie)
			}
			if code != wireOK {
				continue
			}
			// Cookies may repeat: then any length that fits will do.
			ok := false
			for length := range lengths {
				rest := said[min(int64(length), int64(len(said))):]
				if int64(length) <= int64(len(said)) && (len(rest) == 0 || bytes.HasPrefix(rest, []byte("gDf\x98"))) {
					said, ok = rest, true
					break
				}
			}
			if !ok {
				t.Fatalf("the answer to %d is not of the length asked for", cookie)
			}
		}
		if len(said) > 0 {
			t.Fatalf("more answers than questions: % x", said)
		}
	})
}

// FuzzClient lets a server say anything.
func FuzzClient(f *testing.F) {
	greeting := []byte("NBDMAGICIHAVEOPT\x00\x03")
	info := exportInfo(1<<20, wantFlags)
	granted := appendOptionReply(bytes.Clone(greeting), optGo, repInfo, []byte(info.data))
	granted = appendOptionReply(granted, optGo, repInfo, []byte(blockSizeReply.data))
	granted = appendOptionReply(granted, optGo, repAck)
	var ok [3 * replySize]byte
	for i := range uint64(3) {
		encodeReply(ok[i*replySize:], wireOK, (i+1)<<32)
	}
	f.Add([]byte{})
	f.Add(greeting)
	f.Add([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00"))
	f.Add([]byte("NBDMAGICIHAVEOPT\x00\x02\x00\x00\x00\x00\x00\x10\x00\x00\x00\x01"))
	f.Add(appendOptionReply(bytes.Clone(greeting), optGo, repErrUnknown, []byte("no")))
	f.Add(append(appendOptionReply(bytes.Clone(greeting), optGo, repErrUnsup), "\x00\x00\x00\x00\x00\x10\x00\x00\x01\x01"...))
	f.Add(granted)
	f.Add(append(bytes.Clone(granted), ok[:]...))
	f.Add(append(append(bytes.Clone(granted), ok[:replySize]...), make([]byte, 4096)...))
	f.Fuzz(func(t *testing.T, say []byte) {
		ours, theirs := socketPair(t)
		defer theirs.Close()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			theirs.Write(say)
			theirs.CloseWrite()
			io.Copy(io.Discard, theirs)
		}()
		defer func() {
			ours.Close()
			<-drained
		}()
		o, err := choose(ours, "disk")
		if err != nil {
			return
		}
		c := newClient(ours, "fuzz", o, Options{})
		defer c.Close()
		mem := bytes.Repeat([]byte{0x77}, 3*4096)
		reqs := []*blockdev.Request{
			{Op: blockdev.OpRead, Len: 4096, Buf: mem[4096 : 2*4096 : 2*4096]},
			{Op: blockdev.OpWrite, Flags: blockdev.FlagFUA, Len: 4096, Buf: make([]byte, 4096)},
			{Op: blockdev.OpTrim, Len: 4096},
		}
		c.Do(reqs)
		for i, b := range mem {
			if b != 0x77 && i/4096 != 1 {
				t.Fatalf("a read wrote beyond its buffer, at %d", i-4096)
			}
		}
		blockdev.Flush(c)
	})
}
