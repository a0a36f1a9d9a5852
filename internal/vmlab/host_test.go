package vmlab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/internal/vmlab/guest"
)

func TestConsoleTroubles(t *testing.T) {
	for _, tt := range []struct {
		line    string
		trouble bool
	}{
		{"[    4.2] Kernel panic - not syncing: sysrq triggered crash", true},
		{"[    4.2] BUG: kernel NULL pointer dereference, address: 0000000000000000", true},
		{"[    4.2] Oops: 0002 [#1] PREEMPT SMP NOPTI", true},
		{"[    4.2] general protection fault, probably for non-canonical address", true},
		{"[    4.2] kernel BUG at fs/ext4/inode.c:2738!", true},
		{"[    4.2] BUG: unable to handle page fault for address: ffffc90000000000", true},
		{"[    4.2] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!", false},
		{"[    4.2] BUG: workqueue lockup - pool cpus=0 node=0", false},
		{"[    4.2] EXT4-fs (vda): mounted filesystem with ordered data mode", false},
		{"[    4.2] nbd: debugging", false},
	} {
		var c console
		text := "before\r\n" + tt.line + "\r\nafter\r\n"
		for i := range text { // as a serial port does it
			if _, err := c.Write([]byte(text[i : i+1])); err != nil {
				t.Fatal(err)
			}
		}
		want := []string{tt.line}
		if !tt.trouble {
			want = nil
		}
		if got := c.troubles(); !slices.Equal(got, want) {
			t.Errorf("%s: got %q", tt.line, got)
		}
		if got := c.String(); got != strings.ReplaceAll(text, "\r", "") {
			t.Errorf("kept %q", got)
		}
	}
}

func TestConsoleIsBounded(t *testing.T) {
	var c console
	for i := range 2000 {
		fmt.Fprintf(&c, "Oops: %d %s\n", i, strings.Repeat("x", 1000))
	}
	_, _ = c.Write(make([]byte, 3*consoleKeep)) // never fails
	if n := len(c.String()); n < consoleKeep || n > 2*consoleKeep {
		t.Errorf("%d bytes are kept", n)
	}
	if n := len(c.troubles()); n != troubleKeep {
		t.Errorf("%d lines of trouble", n)
	}
	if len(c.line) > consoleKeep {
		t.Errorf("a line of %d bytes", len(c.line))
	}
}

func TestParseLdd(t *testing.T) {
	got, err := parseLdd("\tlinux-vdso.so.1 (0x00007fff)\n" +
		"\tlibext2fs.so.2 => /lib/x86_64-linux-gnu/libext2fs.so.2 (0x00007f00)\n" +
		"\t/lib64/ld-linux-x86-64.so.2 (0x00007f01)\n")
	if err != nil || !slices.Equal(got, []string{"/lib/x86_64-linux-gnu/libext2fs.so.2", "/lib64/ld-linux-x86-64.so.2"}) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := parseLdd("\tlibgone.so.1 => not found\n"); err == nil || !strings.Contains(err.Error(), "libgone") {
		t.Errorf("a library is missing: %v", err)
	}
}

func TestDriveCheck(t *testing.T) {
	disk := &VolatileDisk{}
	for _, tt := range []struct {
		d    Drive
		want string
	}{
		{Drive{Name: "data", Source: "x"}, ""},
		{Drive{Name: "data", Volatile: disk}, ""},
		{Drive{Source: "x"}, "its name"},
		{Drive{Name: "../x", Source: "x"}, "its name"},
		{Drive{Name: strings.Repeat("x", 21), Source: "x"}, "its name"},
		{Drive{Name: "data"}, "not both"},
		{Drive{Name: "data", Source: "x", Volatile: disk}, "not both"},
	} {
		if err := tt.d.check(); (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v", tt.d, err)
		}
	}
}

func TestOutcomes(t *testing.T) {
	const out = `=== RUN   TestA
=== RUN   TestA/x
    a_test.go:1: in x
=== RUN   TestA/y
--- FAIL: TestA (0.00s)
    --- FAIL: TestA/x (0.00s)
    --- PASS: TestA/y (0.00s)
=== RUN   TestB
    a_test.go:2: no
--- SKIP: TestB (0.00s)
=== RUN   TestC
--- PASS: TestC (0.00s)
=== RUN   TestD
panic: why
`
	root, err := parseOutcomes(out)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	var walk func(path string, o *outcomes)
	walk = func(path string, o *outcomes) {
		for _, c := range o.children {
			got = append(got, path+c.name+" "+c.action)
			walk(path+c.name+"/", c)
		}
	}
	walk("", root)
	// Of TestD nothing was said: into makes a failure of that.
	want := []string{"TestA fail", "TestA/x fail", "TestA/y pass", "TestB skip", "TestC pass", "TestD "}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if s := root.children[0].child("x").output.String(); !strings.Contains(s, "in x") || strings.Contains(s, "===") {
		t.Errorf("TestA/x has said %q", s)
	}
	if !root.anyFailed() {
		t.Error("nothing has failed")
	}
}

// Outside a guest nobody hears of events.
func TestEventOutside(t *testing.T) {
	if guest.Inside() {
		t.Fatal("this is a guest")
	}
	for _, e := range []string{"lost", "two\nlines"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("the event %q was told", e)
				}
			}()
			guest.Event("%s", e)
		}()
	}
}

func TestVolatileDisk(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	before := make([]byte, 64<<10)
	for i := range before[:32<<10] {
		before[i] = 1
	}
	if err := os.WriteFile(image, before, 0o644); err != nil {
		t.Fatal(err)
	}
	d := NewVolatileDisk(t, image)
	dial := func() *nbd.Client {
		c, err := nbd.Dial(t.Context(), d.uri(), nbd.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := dial()
	fill := func(v byte) []byte {
		p := make([]byte, len(before))
		for i := range p {
			p[i] = v
		}
		return p
	}
	for _, err := range []error{blockdev.WriteAt(c, fill(2), 0), blockdev.Flush(c), blockdev.WriteAt(c, fill(3), 0)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	n, err := d.Cut(1)
	if err != nil || n != len(before)/blockdev.SectorSize {
		t.Fatalf("cut: %d sectors, %v", n, err)
	}
	c = dial() // the same name has what is left
	defer c.Close()
	served, own := make([]byte, len(before)), make([]byte, len(before))
	if err := blockdev.ReadAt(c, served, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Read(own, 0); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(served, own) {
		t.Error("Read has something else than what is served")
	}
	found := map[byte]int{}
	for _, b := range served {
		found[b]++
	}
	if found[2] == 0 || found[3] == 0 || found[2]+found[3] != len(served) {
		t.Errorf("versions and their bytes: %v", found)
	}
	if n, err := d.Cut(2); n != 0 || err != nil {
		t.Errorf("cut again: %d sectors, %v", n, err)
	}
}

func TestVolatileDiskNeedsSectors(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, make([]byte, 513), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readImage(image); err == nil {
		t.Error("513 bytes are no disk")
	}
}
