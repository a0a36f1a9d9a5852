package nbd

import (
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
