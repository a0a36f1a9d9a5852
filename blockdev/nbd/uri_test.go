package nbd

import (
	"strings"
	"testing"
)

func TestParseURI(t *testing.T) {
	for _, c := range []struct {
		in   string
		want URI
		out  string // if not in
	}{
		{"nbd://example.org", URI{Host: "example.org:10809"}, "nbd://example.org/"},
		{"nbd://example.org/", URI{Host: "example.org:10809"}, ""},
		{"nbd://example.org:10809/disk", URI{Host: "example.org:10809", Export: "disk"}, "nbd://example.org/disk"},
		{"nbd://example.org:1234/disk", URI{Host: "example.org:1234", Export: "disk"}, ""},
		{"nbd://[::1]/disk", URI{Host: "[::1]:10809", Export: "disk"}, ""},
		{"nbd://[fe80::1%25eth0]:99/", URI{Host: "[fe80::1%eth0]:99"}, ""},
		{"nbd://10.0.0.1//disk", URI{Host: "10.0.0.1:10809", Export: "/disk"}, ""},
		{"nbd://h/vm/disk", URI{Host: "h:10809", Export: "vm/disk"}, ""},
		{"nbd://h/a%20b%2Fc%3Fd%23", URI{Host: "h:10809", Export: "a b/c?d#"}, "nbd://h/a%20b/c%3Fd%23"},
		{"nbd://h/a+b", URI{Host: "h:10809", Export: "a+b"}, "nbd://h/a%2Bb"},
		{"NBD://h/x", URI{Host: "h:10809", Export: "x"}, "nbd://h/x"},
		{"nbd+unix:///disk?socket=/run/nbd.sock", URI{Socket: "/run/nbd.sock", Export: "disk"}, ""},
		{"nbd+unix://?socket=/run/nbd.sock", URI{Socket: "/run/nbd.sock"}, "nbd+unix:///?socket=/run/nbd.sock"},
		{"nbd+unix:///?socket=nbd.sock", URI{Socket: "nbd.sock"}, ""},
		{"nbd+unix:////disk?socket=/a%20b+c%26d", URI{Socket: "/a b+c&d", Export: "/disk"}, "nbd+unix:////disk?socket=/a%20b%2Bc%26d"},
		{"nbd+unix:///x?tls-type=psk&socket=/s&other", URI{Socket: "/s", Export: "x"}, "nbd+unix:///x?socket=/s"},
		{"nbd+unix:///x?socket=%00name", URI{Socket: "\x00name", Export: "x"}, ""},
		{"nbd+unix:///x?socket=@name", URI{Socket: "@name", Export: "x"}, ""},
	} {
		got, err := ParseURI(c.in)
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v, want %+v", c.in, got, err, c.want)
			continue
		}
		out := c.out
		if out == "" {
			out = c.in
		}
		if s := got.String(); s != out {
			t.Errorf("%s: written as %s, want %s", c.in, s, out)
		}
	}
	for _, bad := range []string{
		"", "disk.raw", "/path", "http://h/x", "nbd:h", "nbd:h:10809:exportname=x", "nbd:unix:/s", "nbd://", "nbd:///x", "nbd://:10809/x",
		"nbd://user@h/x", "nbd://h/x#y", "nbd://h/x#", "nbd://h:port/", "nbd://h/%zz", "nbd://h/x?socket=/s",
		"nbds://h/x", "nbds+unix:///x?socket=/s", "nbd+unix:///x", "nbd+unix:///x?socket=", "nbd+unix://h/x?socket=/s",
		"nbd+unix:///x?socket=/a&socket=/b", "nbd+unix:///x?socket=%zz", "nbd+unix:///x?socket=a%00b",
		"nbd://h/" + strings.Repeat("x", maxName+1),
	} {
		if u, err := ParseURI(bad); err == nil {
			t.Errorf("%.60q is taken for %+v", bad, u)
		}
	}
}

func TestDialAddress(t *testing.T) {
	for socket, want := range map[string]string{"/s": "/s", "\x00name": "@name", "@name": "./@name"} {
		if _, got := (URI{Socket: socket}).dialAddress(); got != want {
			t.Errorf("%q: %q, want %q", socket, got, want)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"nbd://h:1/x", "nbd+unix:///a%20b?socket=/s%00", "nbd://[::1%25a]//", "nbd+unix://?socket=@&x=y", "nbds://h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil || again != u {
			t.Fatalf("%q: %+v is written as %q and read as %+v, %v", s, u, u.String(), again, err)
		}
	})
}
