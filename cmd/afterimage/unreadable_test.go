package main

import (
	"testing"

	"afterimage/internal/admin"
)

func TestUnreadableWords(t *testing.T) {
	got := unreadableWords([]admin.Unreadable{{Disk: "root", Offset: 4096, Bytes: 8192}, {Disk: "root", Offset: 1 << 20, Bytes: 4096}, {Disk: "data", Bytes: 4096}})
	if want := "UNREADABLE at the primary: 16 KiB of root, data, the first at byte 4096 of root, where it has older content"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
}
