package cpio

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// An entry as the kernel reads it.
type entry struct {
	name         string
	mode         uint64
	major, minor uint64
	content      string
}

// read parses an archive by the table of the package's documentation, and
// knows nothing of the Writer.
func read(t *testing.T, b []byte) []entry {
	t.Helper()
	var entries []entry
	inodes := map[uint64]bool{}
	off := 0
	take := func(n int) []byte {
		if off+n > len(b) {
			t.Fatalf("the archive ends at %d, within an entry", len(b))
		}
		off += n
		return b[off-n : off]
	}
	pad := func() {
		for off%4 != 0 {
			if take(1)[0] != 0 {
				t.Fatalf("byte %d is not zero", off-1)
			}
		}
	}
	for {
		h := take(110)
		field := func(at int) uint64 {
			v, err := strconv.ParseUint(string(h[at:at+8]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		if string(h[:6]) != "070701" {
			t.Fatalf("magic %q", h[:6])
		}
		name := take(int(field(94)))
		if name[len(name)-1] != 0 {
			t.Fatalf("the name %q does not end with a zero byte", name)
		}
		pad()
		e := entry{string(name[:len(name)-1]), field(14), field(78), field(86), string(take(int(field(54))))}
		pad()
		if inodes[field(6)] {
			t.Fatalf("%s is a hard link", e.name)
		}
		inodes[field(6)] = true
		if e.name == "TRAILER!!!" {
			if off != len(b) {
				t.Fatalf("%d bytes after the end", len(b)-off)
			}
			return entries
		}
		entries = append(entries, e)
	}
}

func TestArchive(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b)
	for _, err := range []error{
		w.File("/a/b/../b/c", 0o755, []byte("12345")),
		w.File("a/b/empty", 0o640, nil),
		w.Symlink("/bin", "usr/bin"),
		w.CharDevice("dev/console", 0o600, 5, 1),
		w.Dir("a"), w.Dir("/"), w.Dir("d"),
		w.Close(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []entry{
		{"a", 0o040755, 0, 0, ""},
		{"a/b", 0o040755, 0, 0, ""},
		{"a/b/c", 0o100755, 0, 0, "12345"},
		{"a/b/empty", 0o100640, 0, 0, ""},
		{"bin", 0o120777, 0, 0, "usr/bin"},
		{"dev", 0o040755, 0, 0, ""},
		{"dev/console", 0o020600, 5, 1, ""},
		{"d", 0o040755, 0, 0, ""},
	}
	if got := read(t, b.Bytes()); !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if !w.Has("/a/b/c") || w.Has("/a/c") {
		t.Error("Has is wrong")
	}
	if err := w.File("late", 0, nil); err == nil {
		t.Error("a file could be added after Close")
	}
}

func TestArchiveRefuses(t *testing.T) {
	w := NewWriter(io.Discard)
	if err := w.File("a", 0o644, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "/", "", "x\x00y", "TRAILER!!!"} {
		if err := w.File(name, 0o644, nil); err == nil {
			t.Errorf("%q could be added", name)
		}
	}
	if err := w.Close(); err != nil {
		t.Error("refused names are not the archive's end:", err)
	}
}

func TestArchiveWriteFails(t *testing.T) {
	broken := errors.New("broken")
	for n := range 6 {
		w := NewWriter(&failing{left: n, err: broken})
		err := errors.Join(w.File("a", 0o644, []byte("x")), w.Close())
		if !errors.Is(err, broken) || !strings.Contains(err.Error(), "write the archive") {
			t.Errorf("write %d fails: %v", n, err)
		}
	}
}

// failing fails the write after the first few.
type failing struct {
	left int
	err  error
}

func (f *failing) Write(p []byte) (int, error) {
	if f.left--; f.left < 0 {
		return 0, f.err
	}
	return len(p), nil
}
