package daemon

import (
	"os"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/admin"
)

// TestResizeDisk: a disk is made larger and smaller while it is served and replicated; new
// clients see it, those connected keep what they knew, and each point has the size of its
// time.
func TestResizeDisk(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	vm := a.add("web", diskSize, "root", "data")
	root, image := vm.Disks[0].URI, vm.Disks[0].Image
	resize := func(size int64, shrink bool) {
		t.Helper()
		before := a.size("web")
		r, err := a.Resize(ctx, "web", "root", admin.ResizeDisk{Size: size, Shrink: shrink})
		if err != nil || r != (admin.Resized{VM: "web", Disk: "root", Size: size, Was: before}) {
			t.Fatalf("%+v, %v", r, err)
		}
		if st, err := os.Stat(image); err != nil || st.Size() != size || a.size("web") != size {
			t.Fatalf("the image: %v, %v; the VM has %d", st, err, a.size("web"))
		}
	}
	resize(diskSize+8192, false) // not replicated
	scribble(t, root, 1)
	scribble(t, vm.Disks[1].URI, 2)
	a.replicate(b, "web")
	first := a.sync("web")

	old := dial(t, root)
	resize(2*diskSize, false)
	now := dial(t, root)
	if old.Size() != diskSize+8192 || now.Size() != 2*diskSize {
		t.Errorf("a client that was connected sees %d bytes, a new one %d", old.Size(), now.Size())
	}
	buf := make([]byte, 8192)
	if err := blockdev.ReadAt(now, buf, diskSize+8192); err != nil || buf[0] != 0 || buf[8191] != 0 {
		t.Errorf("what came anew reads as %d, %v", buf[0], err)
	}
	buf[0], buf[8191] = 1, 2
	if err := blockdev.WriteAt(now, buf, 2*diskSize-8192); err != nil {
		t.Error(err)
	}
	if err := blockdev.ReadAt(old, buf, 0); err != nil {
		t.Errorf("the client that was connected: %v", err)
	}
	second := a.sync("web")
	b.testEqual(vm, second.ID)
	if got := b.size("web"); got != 2*diskSize {
		t.Errorf("the replica has a disk of %d bytes", got)
	}

	_, err := a.Resize(ctx, "web", "root", admin.ResizeDisk{Size: diskSize / 2})
	refused(t, "shrinking without a word", err, admin.StatusRefused, "its last 6291456 would be cut off")
	resize(diskSize/2, true)
	for op, err := range map[string]error{
		"read":  blockdev.ReadAt(now, buf, 2*diskSize-8192),
		"write": blockdev.WriteAt(now, buf, diskSize/2-4096),
		"zero":  blockdev.WriteZeroes(now, blockdev.Extent{Off: diskSize / 2, Len: 4096}),
	} {
		if err == nil {
			t.Errorf("a %s beyond the new end succeeds", op)
		}
	}
	if err := blockdev.ReadAt(now, buf, diskSize/2-8192); err != nil {
		t.Error(err)
	}
	resize(diskSize, false) // in the same interval
	third := a.sync("web")
	b.testEqual(vm, third.ID)

	resize(diskSize+4096, false)
	a.restart()
	if got := a.size("web"); got != diskSize+4096 {
		t.Errorf("after a restart the disk has %d bytes", got)
	}
	scribble(t, root, 3)
	b.testEqual(vm, a.sync("web").ID)
	for id, want := range map[string]int64{first.ID: diskSize + 8192, second.ID: 2 * diskSize, third.ID: diskSize} {
		run, err := b.Test(ctx, "web", admin.StartRun{Point: id}, nil)
		if err != nil || run.Disks[0].Size != want || run.Disks[1].Size != diskSize {
			t.Errorf("point %s: %+v, %v", id, run, err)
		}
		if err := b.EndTest(ctx, run.Name); err != nil {
			t.Error(err)
		}
	}
}

// size is how large the first disk of a VM is.
func (h *host) size(vm string) int64 {
	h.t.Helper()
	v, err := h.VM(h.t.Context(), vm)
	if err != nil {
		h.t.Fatal(err)
	}
	return v.Disks[0].Size
}

func TestResizeRefused(t *testing.T) {
	a, b := newHosts(t)
	ctx := t.Context()
	a.add("web", diskSize, "root")
	a.replicate(b, "web")
	a.sync("web")
	for _, size := range []int64{-4096, 0, 512, diskSize + 512, 1 << 60} {
		_, err := a.Resize(ctx, "web", "root", admin.ResizeDisk{Size: size, Shrink: true})
		refused(t, "an impossible size", err, admin.StatusUsage, "multiple of 4096")
	}
	more := admin.ResizeDisk{Size: 2 * diskSize}
	_, err := a.Resize(ctx, "web", "none", more)
	refused(t, "a disk that there is not", err, admin.StatusNotFound, "no disk none")
	_, err = a.Resize(ctx, "none", "root", more)
	refused(t, "a VM that there is not", err, admin.StatusNotFound, "no VM none")
	_, err = b.Resize(ctx, "web", "root", more)
	refused(t, "on the replica", err, admin.StatusRefused, "resized on the host that runs its VM")
	if _, err := b.Failover(ctx, "web", admin.StartRun{Unplanned: true}, nil); err != nil {
		t.Fatal(err)
	}
	_, err = b.Resize(ctx, "web", "root", more)
	refused(t, "under a failover", err, admin.StatusRefused, "resized on the host that runs its VM")
	release, err := a.d.claim(ctx, "web", "removed")
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Resize(ctx, "web", "root", more)
	refused(t, "while something else is done with the VM", err, admin.StatusRefused, "being removed")
	release()
	// A device node that is there everywhere, and has no size of its own either.
	refused(t, "a device", mayResize("/dev/null", &admin.Resized{VM: "web", Disk: "root", Size: 4096}, false), admin.StatusRefused, "block device")
	if got := a.size("web"); got != diskSize {
		t.Errorf("the disk has %d bytes", got)
	}
}
