package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
)

// The client's side of the wire, byte by byte.

func write(t testing.TB, nc net.Conn, b []byte) {
	t.Helper()
	if _, err := nc.Write(b); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, nc net.Conn, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(nc, b); err != nil {
		t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

// greet takes the server's greeting and answers it with flags.
func greet(t testing.TB, nc net.Conn, flags uint32) {
	t.Helper()
	want := []byte("NBDMAGICIHAVEOPT\x00\x03")
	if got := read(t, nc, greetingSize); !bytes.Equal(got, want) {
		t.Fatalf("greeted with %q, want %q", got, want)
	}
	write(t, nc, binary.BigEndian.AppendUint32(nil, flags))
}

// option is the bytes of one option.
func option(id uint32, data []byte) []byte {
	return append(appendOption(nil, id, len(data)), data...)
}

// infoData is the data of optInfo and optGo.
func infoData(export string, wishes ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(wishes)))
	for _, w := range wishes {
		b = binary.BigEndian.AppendUint16(b, w)
	}
	return b
}

type optionReply struct {
	kind uint32
	data string
}

// replies takes the answers to an option up to the last.
func replies(t testing.TB, nc net.Conn, id uint32) (list []optionReply) {
	t.Helper()
	for {
		kind, data, err := readOptionReply(nc, id)
		if err != nil {
			t.Fatalf("answer %d to option %d: %v", len(list)+1, id, err)
		}
		list = append(list, optionReply{kind, string(data)})
		if kind == repAck || kind&repErrBit != 0 {
			return list
		}
	}
}

// transmission connects to an export up to the point where commands are sent.
func transmission(t testing.TB, socket, export string) net.Conn {
	t.Helper()
	nc := dialSocket(t, socket)
	greet(t, nc, flagFixedNewstyle|flagNoZeroes)
	write(t, nc, option(optGo, infoData(export)))
	list := replies(t, nc, optGo)
	if last := list[len(list)-1]; last.kind != repAck {
		t.Fatalf("the export %q is refused: %#x %q", export, last.kind, last.data)
	}
	return nc
}

// command is the bytes of one command.
func command(h request, payload ...byte) []byte {
	b := make([]byte, requestSize, requestSize+len(payload))
	h.encode(b)
	return append(b, payload...)
}

// reply takes a reply, with length bytes of data unless it is an error.
func reply(t testing.TB, nc net.Conn, length int) (cookie uint64, code uint32, data []byte) {
	t.Helper()
	b := read(t, nc, replySize)
	if m := binary.BigEndian.Uint32(b); m != replyMagic {
		t.Fatalf("a reply begins with %#x", m)
	}
	code, cookie = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:])
	if code == wireOK && length > 0 {
		data = read(t, nc, length)
	}
	return cookie, code, data
}

// wantReply fails unless the next reply is this one.
func wantReply(t testing.TB, nc net.Conn, cookie uint64, code uint32) {
	t.Helper()
	if gotCookie, got, _ := reply(t, nc, 0); got != code || gotCookie != cookie {
		t.Fatalf("request %d is answered with %d, want request %d with %d", gotCookie, got, cookie, code)
	}
}

// alive fails unless the server still serves an export.
func alive(t testing.TB, socket, export string) {
	t.Helper()
	nc := transmission(t, socket, export)
	write(t, nc, command(request{cmd: cmdRead, cookie: 77, length: 512}))
	if cookie, code, _ := reply(t, nc, 512); cookie != 77 || code != wireOK {
		t.Fatalf("the server does not serve any more: request %d, error %d", cookie, code)
	}
	nc.Close()
}
