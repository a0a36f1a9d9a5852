package nbd

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"afterimage/internal/testenv"
)

// full returns a server that is serving as many as it may: two.
func full(t *testing.T) (s *Server, socket string, clients []*Client) {
	t.Helper()
	s = quiet()
	s.MaxConnections = 2
	add(t, s, Export{Name: "disk", Queue: memPool(1 << 20)})
	add(t, s, Export{Name: "other", Queue: memPool(1 << 20)})
	socket = serve(t, s)
	return s, socket, []*Client{dial(t, socket, "disk"), dial(t, socket, "other")}
}

func TestMaxConnections(t *testing.T) {
	s, socket, clients := full(t)
	want := ConnStats{Open: 2, Served: 2}
	for range 3 {
		nc := dialSocket(t, socket)
		greet(t, nc, flagFixedNewstyle|flagNoZeroes)
		write(t, nc, option(optList, nil)) // whoever only asks is answered
		if got := replies(t, nc, optList); got[len(got)-1] != (optionReply{repAck, ""}) {
			t.Errorf("list: %+v", got)
		}
		write(t, nc, option(optGo, infoData("disk")))
		if got := replies(t, nc, optGo); len(got) != 1 || got[0] != (optionReply{repErrPolicy, errFull.Error()}) {
			t.Errorf("go: %+v", got)
		}
		write(t, nc, option(optExportName, []byte("disk")))
		wantEOF(t, nc)
		want.Refused += 2
	}
	testenv.Until(t, "refusals are counted", func() bool { return s.ConnStats() == want })

	// The place of one that has left is free at once, whatever its export.
	clients[0].Close()
	dial(t, socket, "other").Close()
	clients[1].Close()
	testenv.Until(t, "all have left", func() bool { return s.ConnStats().Open == 0 })
}

// TestMaxConnectionsKnocking: handshakes are bounded too.
func TestMaxConnectionsKnocking(t *testing.T) {
	_, socket, _ := full(t)
	for range maxKnocking {
		greet(t, dialSocket(t, socket), flagFixedNewstyle)
	}
	wantEOF(t, dialSocket(t, socket))
}

// TestRefusalsAreLoggedRarely: a client that tries without end fills no log.
func TestRefusalsAreLoggedRarely(t *testing.T) {
	var log bytes.Buffer
	s := quiet()
	s.Log = slog.New(slog.NewTextHandler(&log, nil))
	ours, theirs := socketPair(t)
	defer ours.Close()
	defer theirs.Close()
	for range 1000 {
		s.refuse(theirs)
	}
	if got := strings.Count(log.String(), "\n"); got != 1 || s.ConnStats().Refused != 1000 {
		t.Errorf("%+v, %d lines: %s", s.ConnStats(), got, &log)
	}
}
