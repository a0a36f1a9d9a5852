package filter

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// resizeDev is a disk whose Resize something comes before, or after.
type resizeDev struct {
	blockdev.Device
	before, after func() error
}

func (d *resizeDev) Resize(size int64) error {
	if d.before != nil {
		if err := d.before(); err != nil {
			return err
		}
	}
	err := d.Device.Resize(size)
	if err == nil && d.after != nil {
		err = d.after()
	}
	return err
}

// TestResizeSteps: whatever fails in a resize, and wherever the process is killed in it,
// disk and log agree afterwards: what the log does not have it says, and what was cut
// off does not come back.
func TestResizeSteps(t *testing.T) {
	const mib = 1 << 20
	broken := errors.New("the log's disk is broken")
	for _, what := range []string{
		"nothing", "the log fails", "the log fails, and a kill", "the disk fails", "killed before the disk", "killed behind the disk", "not durable",
	} {
		for _, size := range []int64{8*mib + 4096, mib + 4096, 4*mib + 4096, 4*mib - 4096} {
			t.Run(fmt.Sprintf("%s, %d", what, size), func(t *testing.T) {
				t.Parallel() // a log that has failed takes a second
				dir := tempDir(t)
				fsys := &failingFS{FS: hrl.OS}
				mem := blockdev.NewMem(4 * mib)
				dev := &resizeDev{Device: mem}
				l, _ := openLog(t, dir, hrl.Options{FS: fsys})
				d := &queueDevice{dev: dev, Filter: newFilter(t, dev, Options{}), log: l}
				attach(t, d.Filter, l)
				write := func(off int64, b byte) {
					t.Helper()
					if err := ask(d, blockdev.OpWrite, 0, off, bytes.Repeat([]byte{b}, 8192)); err != nil {
						t.Fatal(err)
					}
				}
				for off := int64(0); off < 4*mib; off += mib {
					write(off, 1)
					write(off+mib-8192, 2)
				}
				killed := false
				kill := func() error {
					killed = true
					return errors.Join(l.Abort(), syscall.EIO)
				}
				fails := true
				switch what {
				case "the log fails", "the log fails, and a kill":
					fsys.set(broken, nil)
					fails = false
				case "the disk fails":
					dev.before = func() error { return syscall.EIO }
				case "killed before the disk":
					dev.before = kill
				case "killed behind the disk":
					dev.after = kill
				case "not durable":
					dev.after = func() error { return syscall.EIO }
				default:
					fails = false
				}
				if err := d.Resize(size); (err != nil) != fails {
					t.Fatalf("resized: %v", err)
				}
				dev.before, dev.after = nil, nil
				fsys.set(nil, nil)
				if !killed {
					for !d.gap(d.locks.teeNow(), 0, 512) { // it can say what it lacks
						time.Sleep(time.Millisecond)
					}
					write(0, 3)
					write(mem.Size()-8192, 4)
					// And to the size it had.
					if err := d.Resize(4 * mib); err != nil && what != "not durable" {
						t.Fatal(err)
					}
					write(4*mib-16384, 5)
				}
				if what == "the log fails, and a kill" {
					killed = true
					if err := l.Abort(); err != nil {
						t.Fatal(err)
					}
				}
				if killed {
					var rec hrl.Recovery
					l, rec = openLog(t, dir, hrl.Options{})
					d = &queueDevice{dev: mem, Filter: newFilter(t, mem, Options{}), log: l}
					id, err := l.AddDisk("root", mem.Size())
					if err != nil {
						t.Fatal(err)
					}
					if _, err := d.Recover(l, id, "root", Found{Log: rec}, nil); err != nil {
						t.Fatal(err)
					}
					if err := l.Recovered(); err != nil {
						t.Fatal(err)
					}
					d.AttachLog(l, id)
					write(4096, 6)
				}
				gaps := map[int64]bool{}
				d.Gaps(func(off, length int64) {
					for b := off; b < off+length; b += hrl.BlockBytes {
						gaps[b] = true
					}
				})
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				copied := blockdev.NewMem(4 * mib)
				err := replayInto(t, dir, copied)
				var missing *hrl.IncompleteError
				if err != nil && !errors.As(err, &missing) {
					t.Fatal(err)
				}
				if missing != nil {
					for _, e := range missing.Extents {
						p := make([]byte, e.Len)
						if err := errors.Join(blockdev.ReadAt(mem, p, e.Off), blockdev.WriteAt(copied, p, e.Off)); err != nil {
							t.Fatal(err)
						}
						for b := e.Off &^ (hrl.BlockBytes - 1); b < e.End(); b += hrl.BlockBytes {
							if !gaps[b] {
								t.Errorf("the log lacks byte %d, and the disk does not know", b)
							}
						}
					}
				}
				if copied.Size() != mem.Size() {
					t.Fatalf("%d bytes in the log, %d on the disk", copied.Size(), mem.Size())
				}
				equalDisks(t, mem, copied)
			})
		}
	}
}
