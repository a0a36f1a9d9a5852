package nbd

import (
	"bytes"
	"encoding/binary"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	"afterimage/blockdev"
)

// testServer exports "disk" (1 MiB, described), "fixed" (read-only, 2 MiB) and
// the default export (4 MiB, unlisted).
func testServer(t testing.TB) (s *Server, socket string) {
	t.Helper()
	s = quiet()
	add(t, s, Export{Name: "disk", Description: "a disk", Queue: memPool(1 << 20)})
	add(t, s, Export{Name: "fixed", Queue: memPool(2 << 20), ReadOnly: true})
	add(t, s, Export{Queue: memPool(4 << 20), Unlisted: true})
	return s, serve(t, s)
}

const (
	wantFlags   = flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendWriteZeroes | flagMultiConn | flagSendFastZero
	wantFlagsRO = flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn | flagReadOnly
)

func exportInfo(size uint64, flags uint16) optionReply {
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, size)
	return optionReply{repInfo, string(binary.BigEndian.AppendUint16(b, flags))}
}

var (
	ackReply       = optionReply{repAck, ""}
	blockSizeReply = optionReply{repInfo, "\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x04\x00\x00\x00"}
)

func TestOptions(t *testing.T) {
	_, socket := testServer(t)
	diskInfo := exportInfo(1<<20, wantFlags)
	fixedInfo := exportInfo(2<<20, wantFlagsRO)
	long := strings.Repeat("x", maxName+1)
	for _, c := range []struct {
		name string
		id   uint32
		data []byte
		want []optionReply // data of errors is not compared
	}{
		{"unknown", 99, nil, []optionReply{{repErrUnsup, ""}}},
		{"unknown with data", 4711, make([]byte, 3000), []optionReply{{repErrUnsup, ""}}},
		{"unknown with much data", 4711, make([]byte, maxSkip), []optionReply{{repErrUnsup, ""}}},
		{"starttls", 5, nil, []optionReply{{repErrUnsup, ""}}},
		{"structured reply", 8, nil, []optionReply{{repErrUnsup, ""}}},
		{"list", optList, nil, []optionReply{{repServer, "\x00\x00\x00\x04diska disk"}, {repServer, "\x00\x00\x00\x05fixed"}, ackReply}},
		{"list with data", optList, []byte{0}, []optionReply{{repErrInvalid, ""}}},
		{"list with too much data", optList, make([]byte, maxOption+1), []optionReply{{repErrTooBig, ""}}},
		{"info", optInfo, infoData("disk"), []optionReply{diskInfo, ackReply}},
		{"info with everything", optInfo, infoData("disk", infoName, infoDescription, infoBlockSize, infoExport),
			[]optionReply{diskInfo, {repInfo, "\x00\x01disk"}, {repInfo, "\x00\x02a disk"}, blockSizeReply, ackReply}},
		{"info with the same wish twice", optInfo, infoData("disk", infoName, infoName), []optionReply{diskInfo, {repInfo, "\x00\x01disk"}, ackReply}},
		{"info with unknown wishes", optInfo, infoData("disk", 4, 77, 0xffff), []optionReply{diskInfo, ackReply}},
		{"info of one without description", optInfo, infoData("fixed", infoDescription), []optionReply{fixedInfo, ackReply}},
		{"info of the default", optInfo, infoData("", infoName), []optionReply{exportInfo(4<<20, wantFlags), {repInfo, "\x00\x01"}, ackReply}},
		{"info of an unknown one", optInfo, infoData("none"), []optionReply{{repErrUnknown, ""}}},
		{"info of the longest name", optInfo, infoData(long[1:]), []optionReply{{repErrUnknown, ""}}},
		{"info of a name too long", optInfo, infoData(long), []optionReply{{repErrTooBig, ""}}},
		{"info far too long", optInfo, make([]byte, maxOption+1), []optionReply{{repErrTooBig, ""}}},
		{"info without data", optInfo, nil, []optionReply{{repErrInvalid, ""}}},
		{"info of 5 bytes", optInfo, make([]byte, 5), []optionReply{{repErrInvalid, ""}}},
		{"info with a name beyond its end", optInfo, []byte{0, 0, 0, 1, 0, 0}, []optionReply{{repErrInvalid, ""}}},
		{"info with a name of 4 GiB", optInfo, []byte{255, 255, 255, 255, 0, 0, 0, 0}, []optionReply{{repErrInvalid, ""}}},
		{"info with wishes beyond its end", optInfo, []byte{0, 0, 0, 0, 0, 2, 0, 3}, []optionReply{{repErrInvalid, ""}}},
		{"info with half a wish", optInfo, []byte{0, 0, 0, 0, 0, 1, 0}, []optionReply{{repErrInvalid, ""}}},
		{"info with something behind", optInfo, append(infoData("disk"), 0), []optionReply{{repErrInvalid, ""}}},
		{"go to an unknown one", optGo, infoData("none"), []optionReply{{repErrUnknown, ""}}},
		{"malformed go", optGo, []byte{1}, []optionReply{{repErrInvalid, ""}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			nc := dialSocket(t, socket)
			greet(t, nc, flagFixedNewstyle|flagNoZeroes)
			// Twice, because nothing may be left of the first time.
			for range 2 {
				write(t, nc, option(c.id, c.data))
				got := replies(t, nc, c.id)
				for i := range got {
					if got[i].kind&repErrBit != 0 {
						got[i].data = ""
					}
				}
				if !reflect.DeepEqual(got, c.want) {
					t.Fatalf("got %+v, want %+v", got, c.want)
				}
			}
			// And the connection goes on.
			write(t, nc, option(optGo, infoData("disk")))
			if got := replies(t, nc, optGo); !reflect.DeepEqual(got, []optionReply{diskInfo, ackReply}) {
				t.Fatalf("go: %+v", got)
			}
			write(t, nc, command(request{cmd: cmdFlush, cookie: 5}))
			wantReply(t, nc, 5, wireOK)
		})
	}
}

func TestAbort(t *testing.T) {
	_, socket := testServer(t)
	nc := dialSocket(t, socket)
	greet(t, nc, flagFixedNewstyle)
	write(t, nc, option(optAbort, nil))
	if got := replies(t, nc, optAbort); !reflect.DeepEqual(got, []optionReply{ackReply}) {
		t.Fatalf("got %+v", got)
	}
	wantEOF(t, nc)
}

// TestInfoThenGo: what INFO was about does not stick.
func TestInfoThenGo(t *testing.T) {
	_, socket := testServer(t)
	nc := dialSocket(t, socket)
	greet(t, nc, flagFixedNewstyle|flagNoZeroes)
	write(t, nc, option(optInfo, infoData("disk")))
	replies(t, nc, optInfo)
	write(t, nc, option(optGo, infoData("none")))
	if got := replies(t, nc, optGo); got[0].kind != repErrUnknown {
		t.Fatalf("an unknown export is granted after a known one was described: %+v", got)
	}
}

func TestExportName(t *testing.T) {
	_, socket := testServer(t)
	for _, c := range []struct {
		flags uint32
		name  string
		size  uint64
		want  uint16
	}{
		{0, "disk", 1 << 20, wantFlags},
		{flagFixedNewstyle, "fixed", 2 << 20, wantFlagsRO},
		{flagFixedNewstyle | flagNoZeroes, "", 4 << 20, wantFlags},
		{flagNoZeroes, "disk", 1 << 20, wantFlags},
	} {
		nc := dialSocket(t, socket)
		greet(t, nc, c.flags)
		write(t, nc, option(optExportName, []byte(c.name)))
		want := binary.BigEndian.AppendUint64(nil, c.size)
		want = binary.BigEndian.AppendUint16(want, c.want)
		if c.flags&flagNoZeroes == 0 {
			want = append(want, make([]byte, exportNamePad)...)
		}
		if got := read(t, nc, len(want)); !bytes.Equal(got, want) {
			t.Errorf("flags %d, export %q: % x", c.flags, c.name, got)
		}
		write(t, nc, command(request{cmd: cmdFlush, cookie: 1 << 63}))
		wantReply(t, nc, 1<<63, wireOK)
		nc.Close()
	}
}

// TestHandshakeEnds lists what ends a connection without an answer.
func TestHandshakeEnds(t *testing.T) {
	_, socket := testServer(t)
	flags := func(f uint32, rest ...byte) []byte { return append(binary.BigEndian.AppendUint32(nil, f), rest...) }
	for name, say := range map[string][]byte{
		"unknown flags":                  flags(4),
		"all flags":                      flags(0xffffffff),
		"garbage for an option":          flags(3, bytes.Repeat([]byte("garbage!"), 10)...),
		"EXPORT_NAME of an unknown one":  flags(3, option(optExportName, []byte("none"))...),
		"EXPORT_NAME too long":           flags(3, option(optExportName, make([]byte, maxName+1))...),
		"EXPORT_NAME of 4 GiB":           flags(3, appendOption(nil, optExportName, 0xffffffff)...),
		"GO of 4 GiB":                    flags(3, appendOption(nil, optGo, 0xffffffff)...),
		"unknown option of 4 GiB":        flags(3, appendOption(nil, 4711, 0xffffffff)...),
		"GO without fixed newstyle":      flags(0, option(optGo, infoData("disk"))...),
		"unknown without fixed newstyle": flags(2, option(4711, nil)...),
	} {
		t.Run(name, func(t *testing.T) {
			nc := dialSocket(t, socket)
			read(t, nc, greetingSize)
			write(t, nc, say)
			wantEOF(t, nc)
		})
	}
	alive(t, socket, "disk")
}

// TestHandshakeLeft closes the connection after every byte of a handshake.
func TestHandshakeLeft(t *testing.T) {
	_, socket := testServer(t)
	say := binary.BigEndian.AppendUint32(nil, 3)
	say = append(say, option(optList, nil)...)
	say = append(say, option(optInfo, infoData("disk", infoName))...)
	say = append(say, option(optGo, infoData("disk", infoBlockSize))...)
	say = append(say, command(request{cmd: cmdWrite, length: 16}, make([]byte, 16)...)...)
	say = append(say, command(request{cmd: cmdRead, length: 16})...)
	for n := range len(say) + 1 {
		nc := dialSocket(t, socket)
		write(t, nc, say[:n])
		nc.Close()
	}
	// The old way, and gone before the answer: it has killed other servers.
	for _, name := range []string{"", "disk"} {
		for range 50 {
			nc := dialSocket(t, socket)
			greet(t, nc, 3)
			write(t, nc, option(optExportName, []byte(name)))
			nc.Close()
		}
	}
	alive(t, socket, "disk")
	alive(t, socket, "")
}

// TestSlowWriter sends everything byte by byte.
func TestSlowWriter(t *testing.T) {
	_, socket := testServer(t)
	nc := dialSocket(t, socket)
	slowly := func(b []byte) {
		t.Helper()
		for i := range b {
			write(t, nc, b[i:i+1])
		}
	}
	slowly([]byte{0, 0, 0, 3})
	read(t, nc, greetingSize)
	slowly(option(4711, []byte("abc")))
	replies(t, nc, 4711)
	slowly(option(optGo, infoData("disk")))
	replies(t, nc, optGo)
	slowly(command(request{cmd: cmdWrite, cookie: 1, off: 5, length: 7}, []byte("content")...))
	wantReply(t, nc, 1, wireOK)
	slowly(command(request{cmd: cmdRead, cookie: 2, off: 4, length: 9}))
	if _, code, data := reply(t, nc, 9); code != wireOK || string(data) != "\x00content\x00" {
		t.Fatalf("error %d, %q", code, data)
	}
	slowly(command(request{cmd: cmdDisc}))
	wantEOF(t, nc)
}

func TestHandshakeTimeout(t *testing.T) {
	s := quiet()
	s.HandshakeTimeout = 10 * time.Millisecond
	add(t, s, Export{Queue: memPool(1 << 20)})
	socket := serve(t, s)
	nc := dialSocket(t, socket)
	greet(t, nc, 3)
	wantEOF(t, nc)
}

// TestUnalignedExport announces the blocks of a disk that has larger ones.
func TestUnalignedExport(t *testing.T) {
	s := quiet()
	add(t, s, Export{Queue: blocksQueue{memPool(1 << 20)}})
	socket := serve(t, s)
	nc := dialSocket(t, socket)
	greet(t, nc, 3)
	write(t, nc, option(optGo, infoData("", infoBlockSize)))
	want := optionReply{repInfo, "\x00\x03\x00\x00\x10\x00\x00\x01\x00\x00\x04\x00\x00\x00"}
	if got := replies(t, nc, optGo); len(got) != 3 || got[1] != want {
		t.Fatalf("got %+v", got)
	}
}

// blocksQueue claims blocks of 4 KiB.
type blocksQueue struct{ *blockdev.Pool }

func (q blocksQueue) Info() blockdev.Info {
	return blockdev.Info{BlockSize: 4096, MemAlign: 1, Preferred: 65536}
}

// TestPlainConn serves a connection that is no socket.
func TestPlainConn(t *testing.T) {
	s := quiet()
	add(t, s, Export{Name: "disk", Queue: memPool(8 << 20)})
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- s.ServeConn(t.Context(), theirs) }()
	greet(t, ours, 3)
	go ours.Write(option(optGo, infoData("disk")))
	replies(t, ours, optGo)
	payload := bytes.Repeat([]byte("x"), 3<<20)
	go ours.Write(command(request{cmd: cmdWrite, cookie: 1, length: 3 << 20}, payload...))
	wantReply(t, ours, 1, wireOK)
	go ours.Write(command(request{cmd: cmdRead, cookie: 2, length: 3 << 20}))
	if _, code, data := reply(t, ours, 3<<20); code != wireOK || !bytes.Equal(data, payload) {
		t.Errorf("error %d, or wrong content", code)
	}
	ours.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
