package hrl

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"slices"
	"testing"

	"afterimage/blockdev"
)

// TestLayerUnreadable: that a range could not be copied stands in the log where a copy
// would, and the layer says so of what nothing newer covers; a replay lacks it.
func TestLayerUnreadable(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{})
	h := newHistory(t, l, 1)
	add := func(entries ...Entry) {
		t.Helper()
		h.g.Reset()
		for _, e := range entries {
			h.g.Add(e)
		}
		if err := l.Append(h.g); err != nil {
			t.Fatal(err)
		}
		l.Finished(h.g)
	}
	cut := func() Position {
		t.Helper()
		c, err := l.Cut(CutCrash)
		if err != nil {
			t.Fatal(err)
		}
		return Position{c.Incarnation, c.Epoch}
	}
	from := cut()
	if err := h.write(0, 8192, 1); err != nil {
		t.Fatal(err)
	}
	add(GapEntry(h.disk, 0, 2*BlockBytes))
	copied := bytes.Repeat([]byte{7}, 4096)
	sum := sha256.Sum256(copied)
	add(
		UnreadableEntry(h.disk, 0, 8192), // over the write
		Entry{Kind: KindCopy, Disk: h.disk, Off: 8192, Len: 4096, Data: sum[:]},
		UnreadableEntry(h.disk, 12288, BlockBytes-12288),
		UnreadableEntry(h.disk, BlockBytes, BlockBytes),
	)
	if err := h.write(4096, 512, 2); err != nil { // over the unreadable
		t.Fatal(err)
	}
	add(Entry{Kind: KindZero, Disk: h.disk, Off: 2*BlockBytes - 4096, Len: 8192})
	to := cut()
	want := []blockdev.Extent{{Off: 0, Len: 4096}, {Off: 4608, Len: 3584}, {Off: 12288, Len: 2*BlockBytes - 4096 - 12288}}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, dir)
	for _, below := range []bool{true, false} {
		o := LayerOptions{Generation: 1, PGeneration: 1, Disk: "root", Span: Span{P: from, Q: to}, CopiesBelow: below}
		if !below {
			o.Copied = func(e blockdev.Extent, _ [32]byte, buf []byte) error {
				if e != (blockdev.Extent{Off: 8192, Len: 4096}) {
					t.Errorf("asked for %v", e)
				}
				copy(buf, copied)
				return nil
			}
		}
		f, err := r.WriteLayer(OS, tempDir(t), o)
		if err != nil {
			t.Fatal(err)
		}
		lay, err := OpenLayer(OS, f.Path)
		if err != nil {
			t.Fatal(err)
		}
		if err := lay.Verify(); err != nil {
			t.Fatal(err)
		}
		var lost []blockdev.Extent
		if err := lay.Unreadable(func(e blockdev.Extent) bool { lost = append(lost, e); return true }); err != nil || !slices.Equal(lost, want) {
			t.Errorf("unreadable %v, not %v: %v", lost, want, err)
		}
		var bytes int64
		for _, e := range want {
			bytes += e.Len
			if _, ok, err := lay.Lookup(e.Off, e.Len); ok || err != nil {
				t.Errorf("the layer has something in %v: %v", e, err)
			}
		}
		if run, ok, err := lay.Lookup(0, 1<<20); err != nil || !ok || run.Off != 4096 || run.Len != 512 || f.Lost != bytes {
			t.Errorf("%+v %v %v, %d lost", run, ok, err, f.Lost)
		}
		if err := lay.Close(); err != nil {
			t.Fatal(err)
		}
	}
	_, err := r.Replay("root", blockdev.NewMem(1<<20), nil)
	var missing *IncompleteError
	if !errors.As(err, &missing) || !slices.ContainsFunc(missing.Extents, func(e blockdev.Extent) bool { return e == want[0] }) {
		t.Errorf("replayed: %v", err)
	}
}
