package filter

import (
	"bytes"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
	"afterimage/hrl"
)

// TestCopyPastTheCache: after a sync of the disk has failed, what is copied is what the
// disk has, and not what memory still shows (RULES F6).
func TestCopyPastTheCache(t *testing.T) {
	faulty := faultdev.New(blockdev.NewMem(1 << 20))
	disk, err := faultdev.NewVolatile(faulty)
	if err != nil {
		t.Fatal(err)
	}
	l, _ := openLog(t, tempDir(t), hrl.Options{})
	d := &queueDevice{dev: disk, log: l, Filter: newFilter(t, disk, Options{})}
	attach(t, d.Filter, l)
	if err := l.Ready(); err != nil {
		t.Fatal(err)
	}
	if err := ask(d, blockdev.OpWrite, 0, 0, bytes.Repeat([]byte{7}, 4096)); err != nil {
		t.Fatal(err)
	}
	faulty.Add(faultdev.Rule{Op: blockdev.OpFlush, Err: syscall.EIO, Times: 1})
	if err := ask(d, blockdev.OpFlush, 0, 0, nil); err == nil {
		t.Fatal("the flush did not fail")
	}
	e, ok := d.NextGap(0, hrl.BlockBytes)
	if !ok || e.Off != 0 {
		t.Fatal(e, ok)
	}
	err = d.CopyGap(e, make([]byte, hrl.BlockBytes), func(c *Copied) {
		if !c.Zero {
			t.Errorf("%v was copied from the cache", c.Extent)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
}

// TestReopenDropsTheCache: once a disk is reopened, guest and copies see what it has.
func TestReopenDropsTheCache(t *testing.T) {
	faulty := faultdev.New(blockdev.NewMem(1 << 20))
	disk, err := faultdev.NewVolatile(faulty)
	if err != nil {
		t.Fatal(err)
	}
	d := &queueDevice{dev: disk, Filter: newFilter(t, disk, Options{})}
	if err := ask(d, blockdev.OpWrite, 0, 0, bytes.Repeat([]byte{7}, 4096)); err != nil {
		t.Fatal(err)
	}
	faulty.Add(faultdev.Rule{Op: blockdev.OpFlush, Err: syscall.EIO, Times: 1})
	if err := ask(d, blockdev.OpFlush, 0, 0, nil); err == nil {
		t.Fatal("the flush did not fail")
	}
	if err := d.Reopen(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	if err := ask(d, blockdev.OpRead, 0, 0, b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, make([]byte, 4096)) {
		t.Errorf("it reads %d, and the disk never got it", b[0])
	}
}
