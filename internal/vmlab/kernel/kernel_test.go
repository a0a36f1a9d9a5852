package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestFind(t *testing.T) {
	dir := t.TempDir()
	if _, err := Find(filepath.Join(dir, "gone")); !errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "make deps") {
		t.Errorf("no directory: %v", err)
	}
	for _, d := range []string{unpacking + "1/done", "junk", "6.1", "6.12"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, unpacking+"1/done/kernel"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(dir); !errors.Is(err, ErrNone) {
		t.Errorf("no kernel that is complete: %v", err)
	}
	for version, age := range map[string]time.Duration{"6.1": time.Hour, "6.12": 2 * time.Hour} {
		image := filepath.Join(dir, version, "kernel")
		if err := os.WriteFile(image, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		when := time.Now().Add(-age)
		if err := os.Chtimes(image, when, when); err != nil {
			t.Fatal(err)
		}
	}
	k, err := Find(dir)
	if err != nil || k.Version != "6.1" || k.Modules != filepath.Join(dir, "6.1/lib/modules/6.1") {
		t.Errorf("got %+v, %v; want 6.1, which is the newer", k, err)
	}
}

// bzImage makes one around a packed kernel, its unpacker of so many sectors.
func bzImage(sectors byte, packed []byte) []byte {
	at := int(sectors)
	if at == 0 {
		at = 4
	}
	b := make([]byte, (at+1)*512+16)
	b[0x1f1] = sectors
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(b[0x248:], 16)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(packed)+4))
	return append(append(b, packed...), "\x00\x00\x00\x01after it"...)
}

func TestPayload(t *testing.T) {
	for _, sectors := range []byte{0, 4, 39} {
		got, err := payload(bzImage(sectors, []byte("packed")))
		if err != nil || string(got) != "packed" {
			t.Errorf("%d sectors: %q, %v", sectors, got, err)
		}
	}
	good := bzImage(4, []byte("packed"))
	for _, tt := range []struct {
		name   string
		damage func(b []byte) []byte
		want   string
	}{
		{"short", func(b []byte) []byte { return b[:0x24f] }, "no bzImage"},
		{"no magic", func(b []byte) []byte { b[0x202] = 0; return b }, "no bzImage"},
		{"old", func(b []byte) []byte { b[0x206], b[0x207] = 7, 2; return b }, "too old"},
		{"no length", func(b []byte) []byte { b[0x24c] = 3; return b }, "not within"},
		{"too long", func(b []byte) []byte { b[0x24f] = 0xff; return b }, "not within"},
		{"too far", func(b []byte) []byte { b[0x24b] = 0xff; return b }, "not within"},
	} {
		_, err := payload(tt.damage(bytes.Clone(good)))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
	}
}

// A kernel that is packed in a way not known here is booted as it is.
func TestBareFallsBack(t *testing.T) {
	b := bzImage(4, []byte("\x28\xb5\x2f\xfd and so on"))
	got, err := bare(t.Context(), b)
	if err != nil || !bytes.Equal(got, b) {
		t.Errorf("%v, or not the bzImage itself", err)
	}
}
