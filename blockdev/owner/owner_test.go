package owner

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func image(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func write1(t *testing.T, path string, role Role) Identity {
	t.Helper()
	id := Identity{VM: [16]byte{1, 2, 15: 255}, Name: "web", Disk: "root", Role: role, Owner: "/var/lib/afterimage", Generation: 7}
	if err := Write(path, id); err != nil {
		t.Fatal(err)
	}
	return id
}

func TestWriteReadRemove(t *testing.T) {
	path := image(t)
	if id, err := Read(path); id != nil || err != nil {
		t.Fatalf("%v, %v", id, err)
	}
	if err := Remove(path); err != nil {
		t.Fatal(err)
	}
	want := write1(t, path, RolePrimary)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, link} {
		got, err := Read(p)
		if err != nil || got == nil || *got != want {
			t.Fatalf("%s: %+v, %v", p, got, err)
		}
	}
	want.Generation = 0
	want.Role = RoleRun
	if err := Write(link, want); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(path); err != nil || *got != want {
		t.Fatalf("%+v, %v", got, err)
	}
	other := filepath.Join(path+".afterimage", "latch")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Remove(path); err != nil {
		t.Fatal(err)
	}
	if id, err := Read(path); id != nil || err != nil {
		t.Fatalf("%v, %v", id, err)
	}
	if err := os.Remove(other); err != nil {
		t.Fatalf("what is not ours is gone: %v", err)
	}
	write1(t, path, RolePrimary)
	if err := Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path + ".afterimage"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("an empty directory is left: %v", err)
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		role  Role
		owner string
		ok    bool
	}{
		{RolePrimary, "/var/lib/afterimage", true},
		{RolePrimary, "/var/lib/afterimage/", true},
		{RolePrimary, "/other", false},
		{RolePrimary, "", false},
		{RoleRun, "/var/lib/afterimage", true},
		{RoleRun, "/other", false},
		{RoleReplica, "/var/lib/afterimage", false},
		{RoleReplica, "", false},
	} {
		path := image(t)
		if err := Check(path, c.owner); err != nil {
			t.Fatalf("nobody's: %v", err)
		}
		id := write1(t, path, c.role)
		err := Check(path, c.owner)
		var owned *OwnedError
		if c.ok != (err == nil) || !c.ok && (!errors.As(err, &owned) || owned.Identity != id || owned.Hint() == "" || !strings.Contains(err.Error(), id.Owner)) {
			t.Errorf("%s of %q asked by %q: %v", c.role, id.Owner, c.owner, err)
		}
	}
}

// TestDamage: whatever byte is changed, and wherever the file is cut short, the
// image is not free.
func TestDamage(t *testing.T) {
	path := image(t)
	write1(t, path, RolePrimary)
	file := filepath.Join(path+".afterimage", "identity")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	try := func(b []byte, want error) {
		t.Helper()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		err := Check(path, "/var/lib/afterimage")
		var h interface{ Hint() string }
		if !errors.Is(err, want) || !errors.As(err, &h) || h.Hint() == "" {
			t.Fatalf("%q: %v", b, err)
		}
	}
	for i := range whole {
		b := append([]byte(nil), whole...)
		b[i] ^= 1
		try(b, ErrDamaged)
		try(whole[:i], ErrDamaged)
	}
	try(append(whole[:len(whole):len(whole)], '\n'), ErrDamaged)
	for text, want := range map[string]error{
		`{"version":2}`: ErrVersion,
		`{"version":1}`: ErrDamaged,
		`{`:             ErrDamaged,
		`{"version":1,"vm":"000102030405060708090a0b0c0d0e0f","role":"king","owner":"/x"}`: ErrDamaged,
	} {
		try([]byte(sealed(text)), want)
	}
}

func TestRefused(t *testing.T) {
	path := image(t)
	for _, id := range []Identity{{Role: "king", Owner: "/x"}, {Role: RoleRun, Owner: "x"}, {Role: RoleRun, Owner: "/" + strings.Repeat("x", fileMax)}} {
		if err := Write(path, id); err == nil {
			t.Errorf("%.80v was written", id)
		}
	}
	if err := Write(path+"x", Identity{Role: RoleRun, Owner: "/x"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an image that does not exist: %v", err)
	}
	if id, err := Read(path); id != nil || err != nil {
		t.Fatalf("%v, %v", id, err)
	}
}

// TestDevice: what is no file has no identity, and nothing is put beside it.
func TestDevice(t *testing.T) {
	const device = "/dev/null"
	if err := Write(device, Identity{Role: RoleRun, Owner: "/x"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(Check(device, ""), Remove(device)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(device + besideSuffix); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

func FuzzIdentity(f *testing.F) {
	b, err := encode(&Identity{Role: RoleRun, Owner: "/x", Name: "n", Disk: "d"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, false)
	f.Add([]byte(`{"version":1,"vm":"000102030405060708090a0b0c0d0e0f","name":"n","disk":"d","role":"run","owner":"/x"}`), true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal {
			b = []byte(sealed(string(b)))
		}
		id, err := decode(b)
		if err != nil {
			return
		}
		again, err := encode(id)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decode(again); err != nil || *got != *id {
			t.Fatalf("%+v became %+v: %v", id, got, err)
		}
	})
}

// sealed is a line with the right checksum.
func sealed(text string) string {
	return fmt.Sprintf("%08x %s\n", crc32.Checksum([]byte(text), castagnoli), text)
}
