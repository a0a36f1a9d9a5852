package nbd

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"afterimage/blockdev"
)

// TestSmallReads reads fewer bytes than fit beside the headers.
func TestSmallReads(t *testing.T) {
	s := quiet()
	add(t, s, Export{Queue: memPool(1 << 20)})
	c := dial(t, serve(t, s), "")
	want := []byte("0123456789abcdefghijklmnopqrstuvwxyz")
	if err := blockdev.WriteAt(c, want, 1000); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= len(want); n++ {
		got := make([]byte, n)
		if err := blockdev.ReadAt(c, got, 1000); err != nil || string(got) != string(want[:n]) {
			t.Fatalf("%d bytes: %q, %v", n, got, err)
		}
	}
}

// TestLog: a client that misbehaves is worth one line, one that leaves none.
func TestLog(t *testing.T) {
	for name, c := range map[string]struct {
		say   []byte
		lines int
	}{
		"connects and leaves": {nil, 0},
		"aborts":              {append([]byte{0, 0, 0, 3}, option(optAbort, nil)...), 0},
		"leaves in an option": {append([]byte{0, 0, 0, 3}, option(optGo, infoData("disk"))[:20]...), 0},
		"unknown flags":       {[]byte{0, 0, 0, 8}, 1},
		"garbage":             {append([]byte{0, 0, 0, 3}, make([]byte, 100)...), 1},
		"unknown export":      {append([]byte{0, 0, 0, 3}, option(optExportName, []byte("a\nb"))...), 1},
		"garbage later":       {append(append([]byte{0, 0, 0, 3}, option(optExportName, nil)...), make([]byte, 100)...), 1},
		"write of 4 GiB": {append(append([]byte{0, 0, 0, 3}, option(optExportName, nil)...),
			command(request{cmd: cmdWrite, length: 0xffffffff})...), 1},
		"leaves in a write": {append(append([]byte{0, 0, 0, 3}, option(optExportName, nil)...),
			command(request{cmd: cmdWrite, length: 100}, 1, 2, 3)...), 0},
	} {
		var log bytes.Buffer
		s := quiet()
		s.Log = slog.New(slog.NewTextHandler(&log, nil))
		add(t, s, Export{Queue: &nullQueue{size: 1 << 20}})
		ours, theirs := socketPair(t)
		if _, err := ours.Write(c.say); err != nil {
			t.Fatal(err)
		}
		ours.CloseWrite()
		err := s.ServeConn(t.Context(), theirs)
		ours.Close()
		if got := strings.Count(log.String(), "\n"); got != c.lines || (err != nil) != (c.lines > 0) {
			t.Errorf("%s: %v, and logged: %s", name, err, &log)
		}
	}
}
