package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
	"afterimage/internal/admin"
	"afterimage/internal/testenv"
)

func TestVM(t *testing.T) {
	h, _ := newHosts(t)
	ctx := t.Context()
	vm := h.add("web", diskSize, "root", "data")
	if vm.Role != admin.RolePrimary || len(vm.Disks) != 2 || vm.Disks[1].Export != "web/data" || vm.Disks[1].Size != diskSize || vm.Disks[0].LogDir != "" {
		t.Errorf("added %+v", vm)
	}
	scribble(t, vm.Disks[0].URI, 1)
	c := dial(t, vm.Disks[1].URI)
	refused(t, "removing a disk in use", h.RemoveVM(ctx, "web"), admin.StatusRefused, "web is in use")
	c.Close()
	h.restart()
	again, err := h.VM(ctx, "web")
	if err != nil || again.ID != vm.ID || again.Disks[0] != vm.Disks[0] {
		t.Errorf("after a restart %+v, %v", again, err)
	}
	image := vm.Disks[0].Image
	id, err := owner.Read(image)
	if err != nil || id == nil || id.VM != vm.ID || id.Disk != "root" || id.Owner != h.state() || id.Role != owner.RolePrimary {
		t.Errorf("the identity: %+v, %v", id, err)
	}
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.RemoveVM(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(image); err != nil || string(after) != string(before) {
		t.Errorf("removing the VM has changed its image: %v", err)
	}
	if id, err := owner.Read(image); id != nil || err != nil {
		t.Errorf("left: %+v, %v", id, err)
	}
	if vms, err := h.VMs(ctx); err != nil || len(vms) != 0 {
		t.Errorf("left: %+v, %v", vms, err)
	}
	h.restart()
	_, err = h.VM(ctx, "web")
	refused(t, "a VM that was removed", err, admin.StatusNotFound, "no VM web")
	// Its image is anybody's again.
	if _, err := h.AddVM(ctx, admin.AddVM{Name: "other", Disks: []admin.AddDisk{{Name: "x", Image: image}}}); err != nil {
		t.Error(err)
	}
}

func TestAddVMRefused(t *testing.T) {
	h, other := newHosts(t)
	ctx := t.Context()
	vm := h.add("web", diskSize, "root")
	theirs := other.add("db", diskSize, "root")
	other.stop() // so that it is not the locks that refuse
	free := h.image("free.raw", diskSize)
	held, err := blockdev.OpenFile(h.image("held.raw", diskSize), blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	qcow2 := filepath.Join(h.dir, "a.qcow2")
	if err := os.WriteFile(qcow2, append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 64<<10)...), 0o600); err != nil {
		t.Fatal(err)
	}
	odd := filepath.Join(h.dir, "odd.raw")
	if err := os.WriteFile(odd, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(h.dir, "link.raw")
	if err := os.Symlink(free, link); err != nil {
		t.Fatal(err)
	}
	ours := filepath.Join(h.dir, "ours.raw")
	if err := os.Symlink(vm.Disks[0].Image, ours); err != nil {
		t.Fatal(err)
	}
	base := h.image("base.raw", diskSize)
	if err := owner.Write(base, owner.Identity{VM: vm.ID, Name: "x", Disk: "root", Role: owner.RoleReplica, Owner: h.state()}); err != nil {
		t.Fatal(err)
	}
	rotten := h.image("rotten.raw", diskSize)
	if err := owner.Write(rotten, owner.Identity{VM: vm.ID, Name: "x", Disk: "root", Role: owner.RolePrimary, Owner: h.state()}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(rotten+".afterimage", "identity"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := func(name, image string) admin.AddDisk { return admin.AddDisk{Name: name, Image: image} }
	for _, tt := range []struct {
		what   string
		add    admin.AddVM
		status admin.Status
		words  string
	}{
		{"a name that there is", admin.AddVM{Name: "web", Disks: []admin.AddDisk{disk("x", free)}}, admin.StatusRefused, "already"},
		{"no name", admin.AddVM{Disks: []admin.AddDisk{disk("x", free)}}, admin.StatusUsage, "empty"},
		{"a name with a slash", admin.AddVM{Name: "a/b", Disks: []admin.AddDisk{disk("x", free)}}, admin.StatusUsage, "a/b"},
		{"a name that leads up", admin.AddVM{Name: "..", Disks: []admin.AddDisk{disk("x", free)}}, admin.StatusUsage, ".."},
		{"no disk", admin.AddVM{Name: "vm"}, admin.StatusUsage, "0 disks"},
		{"a disk name with a slash", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("a/b", free)}}, admin.StatusUsage, "a/b"},
		{"a disk named twice", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", free), disk("x", odd)}}, admin.StatusUsage, "twice"},
		{"an image named twice", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", free), disk("y", link)}}, admin.StatusUsage, "same image"},
		{"a relative path", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", "free.raw")}}, admin.StatusUsage, "absolute"},
		{"a relative log directory", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", free)}, LogDir: "logs"}, admin.StatusUsage, "absolute"},
		{"no image", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", filepath.Join(h.dir, "none"))}}, admin.StatusNotFound, "none"},
		{"a directory", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", h.dir)}}, admin.StatusUsage, "is a directory"},
		{"another format", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", qcow2)}}, admin.StatusUsage, "qcow2"},
		{"no disk's size", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", odd)}}, admin.StatusUsage, "512"},
		{"an image in use", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", held.Info().Name)}}, admin.StatusRefused, "in use"},
		{"an image of another VM", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("root", ours)}}, admin.StatusRefused, "VM web already"},
		{"an image of another daemon", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("root", theirs.Disks[0].Image)}}, admin.StatusRefused, other.state()},
		{"a replica's base", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("root", base)}}, admin.StatusRefused, "replica"},
		{"an identity that rotted", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("root", rotten)}}, admin.StatusDamaged, "damaged"},
		{"one good disk and one bad", admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", free), disk("y", odd)}}, admin.StatusUsage, "512"},
	} {
		_, err := h.AddVM(ctx, tt.add)
		refused(t, tt.what, err, tt.status, tt.words)
	}
	// Nothing is left of all that.
	if id, err := owner.Read(free); id != nil || err != nil {
		t.Errorf("the free image got an identity: %+v, %v", id, err)
	}
	if vms, err := h.VMs(ctx); err != nil || len(vms) != 1 {
		t.Errorf("VMs: %+v, %v", vms, err)
	}
	if _, err := h.AddVM(ctx, admin.AddVM{Name: "vm", Disks: []admin.AddDisk{disk("x", free)}}); err != nil {
		t.Error(err)
	}
}

// TestTroubleAtStart: a VM whose image is missing, locked or another's keeps no
// other VM from being served, says why, and comes back by itself.
func TestTroubleAtStart(t *testing.T) {
	h, _ := newHosts(t)
	ctx := t.Context()
	good, missing, locked, stolen := h.add("good", diskSize, "d"), h.add("missing", diskSize, "c", "d"), h.add("locked", diskSize, "d"), h.add("stolen", diskSize, "d")
	scribble(t, missing.Disks[1].URI, 1)
	h.stop()
	image := missing.Disks[1].Image
	if err := os.Rename(image, image+".away"); err != nil {
		t.Fatal(err)
	}
	holder, err := blockdev.OpenFile(locked.Disks[0].Image, blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	if err := owner.Write(stolen.Disks[0].Image, owner.Identity{VM: stolen.ID, Name: "stolen", Disk: "d", Role: owner.RolePrimary, Owner: "/elsewhere"}); err != nil {
		t.Fatal(err)
	}
	h.start()
	scribble(t, good.Disks[0].URI, 2)
	for name, words := range map[string]string{"good": "", "missing": "no such file", "locked": "in use", "stolen": "/elsewhere"} {
		vm, err := h.VM(ctx, name)
		if err != nil || !strings.Contains(vm.Error, words) || (vm.Error == "") != (words == "") || (vm.Disks[0].URI != "") != (words == "") {
			t.Errorf("VM %s: %+v, %v", name, vm, err)
		}
	}
	_, err = h.Enable(ctx, "missing", admin.Enable{To: "127.0.0.1:1", EverySeconds: 1})
	refused(t, "replicating a VM that is not served", err, admin.StatusNotFound, "not served")
	if err := os.Rename(image+".away", image); err != nil {
		t.Fatal(err)
	}
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"missing", "locked"} {
		testenv.Until(t, name+" is back", func() bool {
			vm, err := h.VM(ctx, name)
			return err == nil && vm.Error == "" && vm.Disks[0].URI != ""
		})
	}
	scribble(t, missing.Disks[1].URI, 3)
	// One that cannot be served can be removed.
	if err := h.RemoveVM(ctx, "stolen"); err != nil {
		t.Error(err)
	}
	if id, err := owner.Read(stolen.Disks[0].Image); err != nil || id == nil || id.Owner != "/elsewhere" {
		t.Errorf("removing it took the identity that another daemon gave: %+v, %v", id, err)
	}
}

// TestOneDaemonPerDirectory: the second is refused, and the first goes on.
func TestOneDaemonPerDirectory(t *testing.T) {
	h, _ := newHosts(t)
	vm := h.add("web", diskSize, "root")
	o := h.options()
	o.Listen = "127.0.0.1:0"
	_, err := Start(o)
	refused(t, "a second daemon", err, admin.StatusRefused, "in use")
	scribble(t, vm.Disks[0].URI, 1)
	o.State = filepath.Join(h.dir, "second")
	o.Admin = h.d.Info().Admin
	_, err = Start(o)
	refused(t, "its socket", err, admin.StatusRefused, "another server listens")
	scribble(t, vm.Disks[0].URI, 2)
	o.Admin, o.TLSDir = "", filepath.Join(h.dir, "no-tls")
	_, err = Start(o)
	refused(t, "no certificates", err, admin.StatusNotFound, "no-tls")
	if _, err := os.Lstat(filepath.Join(o.State, "admin.sock")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a daemon that did not start has left its socket: %v", err)
	}
}
