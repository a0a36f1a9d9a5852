package ship_test

import (
	"sync/atomic"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/faultdev"
)

// hookDevice does something before a byte is read for the first time once it is armed.
type hookDevice struct {
	blockdev.Device
	armed atomic.Bool
	at    int64
	do    func()
}

func (h *hookDevice) Do(reqs []*blockdev.Request) {
	for _, r := range reqs {
		if r.Op == blockdev.OpRead && r.Off <= h.at && h.at < r.Off+r.Len && h.armed.CompareAndSwap(true, false) {
			h.do()
		}
	}
	h.Device.Do(reqs)
}

// TestUnreadableCollapse: that a block cannot be read is not forgotten when the log gives
// up the entry that says so before there is a point.
func TestUnreadableCollapse(t *testing.T) {
	const mib, bad = 1 << 20, 1<<20 + 4096
	for extra := range 12 {
		w := newWorld(t, 21, 16*mib)
		w.quota = 40 * mib
		var dev *faultdev.Device
		var hook *hookDevice
		w.wrap = func(_ int, d blockdev.Device) blockdev.Device {
			dev = faultdev.New(d)
			hook = &hookDevice{Device: dev, at: 8 * mib}
			return hook
		}
		w.startPrimary()
		w.write(0, 0, 1*mib)
		w.write(0, mib, mib)
		w.write(0, 8*mib, mib)
		w.sync()
		w.write(0, bad, 8192) // logged, and on the disk
		w.write(0, 8*mib, 4096)
		for range 64 + extra { // the log is over its quota: what it had becomes gaps
			w.write(0, 12*mib, mib)
		}
		dev.Add(faultdev.Rule{Op: blockdev.OpRead, Within: blockdev.Extent{Off: bad, Len: 8192}, Err: syscall.EIO})
		hook.do = func() {
			for range 80 {
				w.write(0, 12*mib, mib)
			}
		}
		hook.armed.Store(true)
		if _, err := w.s.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		dev.Reset()
		w.stopPrimary(true)
		w.startPrimary() // what could not be read is tried again
		w.write(0, 2*mib, 512)
		id, err := w.s.Sync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		d, err := w.replicaVM().OpenPoint(id, "disk0")
		if err != nil {
			t.Fatal(err)
		}
		a, b := make([]byte, 8192), make([]byte, 8192)
		if err := blockdev.ReadAt(d, a, bad); err != nil {
			t.Fatal(err)
		}
		if err := blockdev.ReadAt(dev, b, bad); err != nil {
			t.Fatal(err)
		}
		if string(a) != string(b) {
			t.Errorf("%d MiB more: point %v differs from the disk, and does not say so", extra, id)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
