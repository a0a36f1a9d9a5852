package wire

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestMessages(t *testing.T) {
	var b bytes.Buffer
	sent := []Message{
		{Stdout, 7, []byte("text")},
		{PowerOff, 0, nil},
		{Event, 1<<32 - 1, bytes.Repeat([]byte{0xff}, MaxBody)},
	}
	for _, m := range sent {
		if err := Write(&b, m); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteJSON(&b, Exit, 7, Outcome{Status: 127, Err: "gone"}); err != nil {
		t.Fatal(err)
	}
	for _, want := range append(sent, Message{Exit, 7, []byte(`{"Status":127,"Err":"gone"}`)}) {
		got, err := Read(&b)
		if err != nil || got.Kind != want.Kind || got.Process != want.Process || !bytes.Equal(got.Body, want.Body) {
			t.Fatalf("got %d of %d with %.40q, %v; want %d of %d with %.40q",
				got.Kind, got.Process, got.Body, err, want.Kind, want.Process, want.Body)
		}
	}
	if _, err := Read(&b); err != io.EOF {
		t.Errorf("after the last message: %v", err)
	}
	if err := Write(io.Discard, Message{Stdout, 1, make([]byte, MaxBody+1)}); err == nil {
		t.Error("a body that is too long was written")
	}
}

// A message that ends early is not taken for one, wherever that is.
func TestCutShort(t *testing.T) {
	var b bytes.Buffer
	if err := Write(&b, Message{Event, 1, []byte("acknowledged")}); err != nil {
		t.Fatal(err)
	}
	for n := 1; n < b.Len(); n++ {
		if _, err := Read(bytes.NewReader(b.Bytes()[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	good := []byte{byte(Stdout), 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}
	for _, tt := range []struct {
		name  string
		at    int
		value byte
	}{
		{"no kind", 0, 0}, {"unknown kind", 0, byte(kinds)},
		{"reserved byte 1", 1, 1}, {"reserved byte 2", 2, 1}, {"reserved byte 3", 3, 1},
		{"too long", 11, 1},
	} {
		b := bytes.Clone(good)
		b[tt.at] = tt.value
		if _, err := Read(bytes.NewReader(b)); err == nil || !strings.Contains(err.Error(), "no message") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if _, err := Read(bytes.NewReader(good)); err != nil {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte{byte(Stdout), 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 'h', 'i'})
	f.Add([]byte{byte(PowerOff), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		m, err := Read(bytes.NewReader(in))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := Write(&out, m); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(in, out.Bytes()) {
			t.Fatalf("read %x, wrote %x", in, out.Bytes())
		}
	})
}
