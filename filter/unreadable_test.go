package filter

import (
	"errors"
	"slices"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/hrl"
)

// TestCopyUnreadable: of a block that cannot be read all is copied that can be, in the
// pieces that the disk has, and a disk that fails in another way is an error.
func TestCopyUnreadable(t *testing.T) {
	const size = 1<<20 + 4096
	dev := faultdev.New(blockdev.NewMem(size))
	f := newFilter(t, dev, Options{})
	q := &queueDevice{Filter: f}
	l, _ := openLog(t, tempDir(t), hrl.Options{})
	attach(t, f, l)
	fill := make([]byte, size)
	for i := range fill {
		fill[i] = byte(1 + i/4096%200)
	}
	if err := ask(q, blockdev.OpWrite, 0, 0, fill); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2<<20)
	pass := func() (lost []blockdev.Extent, err error) {
		if !f.GapAll() {
			t.Fatal("the log takes no gap")
		}
		for off := int64(0); ; {
			e, ok := f.NextGap(off, 2<<20)
			if !ok {
				return lost, nil
			}
			err := f.CopyGap(e, buf, func(c *Copied) {
				lost = append(lost, c.Unreadable...)
				at := c.Off
				_ = c.Parts(func(off int64, p []byte) error {
					if off < at || !slices.Equal(p, fill[off:off+int64(len(p))]) {
						t.Errorf("wrong at %d", off)
					}
					at = off + int64(len(p))
					return nil
				})
			})
			if err != nil {
				return nil, err
			}
			off = e.End()
		}
	}
	if lost, err := pass(); lost != nil || err != nil {
		t.Fatal(lost, err)
	}
	var want []blockdev.Extent
	for i := int64(0); i < 16; i += 2 { // every other piece of a block, the most entries there can be
		want = append(want, blockdev.Extent{Off: 128<<10 + i*4096, Len: 4096})
	}
	want = append(want, blockdev.Extent{Off: 256<<10 - 4096, Len: 4096}, blockdev.Extent{Off: 256 << 10, Len: 8192}, blockdev.Extent{Off: 1 << 20, Len: 4096})
	for _, e := range want {
		dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: e, Err: syscall.EIO})
	}
	// What fails now and then, the block once and the piece twice, is read in the end.
	dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: 512 << 10, Len: 4096}, Err: syscall.EIO, Times: 3})
	if lost, err := pass(); err != nil || !slices.Equal(lost, want) {
		t.Fatalf("lost %v, not %v: %v", lost, want, err)
	}
	if all, open := f.GapBytes(); open != 0 || all < size {
		t.Errorf("%d bytes are gaps, %d of them open", all, open)
	}
	// They can be read again.
	dev.Reset()
	dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: want[0], Err: syscall.EIO})
	f.SealGaps()
	f.AckGaps()
	for _, e := range want {
		f.RetryUnreadable(e)
	}
	var gaps []blockdev.Extent
	f.Gaps(func(off, length int64) { gaps = append(gaps, blockdev.Extent{Off: off, Len: length}) })
	if !slices.Equal(gaps, []blockdev.Extent{{Off: 128 << 10, Len: 192 << 10}, {Off: 1 << 20, Len: hrl.BlockBytes}}) {
		t.Errorf("gaps again: %v", gaps)
	}
	dev.Reset()
	dev.Add(faultdev.Rule{Op: blockdev.OpRead, Err: syscall.ENODEV})
	if _, err := pass(); !errors.Is(err, syscall.ENODEV) {
		t.Fatal(err)
	}
	dev.Reset()
	if lost, err := pass(); lost != nil || err != nil {
		t.Fatal(lost, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}
