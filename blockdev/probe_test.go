package blockdev_test

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"afterimage/blockdev"
)

func TestProbe(t *testing.T) {
	at := func(off int, sign string) []byte {
		p := make([]byte, 64<<10)
		copy(p[off:], sign)
		return p
	}
	const end = 64<<10 - 512
	for _, c := range []struct {
		name string
		disk []byte
		want string
	}{
		{"nothing", nil, ""},
		{"zeroes", make([]byte, 64<<10), ""},
		{"shorter than a sector", []byte("QFI\xfb\x00\x00\x00\x03"), "qcow2"},
		{"qcow", at(0, "QFI\xfb\x00\x00\x00\x01"), "qcow"},
		{"qcow2", at(0, "QFI\xfb\x00\x00\x00\x03"), "qcow2"},
		{"vmdk, sparse", at(0, "KDMV"), "vmdk"},
		{"vmdk, ESX", at(0, "COWD"), "vmdk"},
		{"vmdk, descriptor", at(0, "# Disk DescriptorFile\n"), "vmdk"},
		{"vhdx", at(0, "vhdxfile"), "vhdx"},
		{"vhd, dynamic", at(0, "conectix"), "vpc"},
		{"vhd, fixed", at(end, "conectix"), "vpc"},
		{"vdi", at(64, "\x7f\x10\xda\xbe"), "vdi"},
		{"qed", at(0, "QED\x00"), "qed"},
		{"parallels", at(0, "WithoutFreeSpace"), "parallels"},
		{"luks is a guest's", at(0, "LUKS\xba\xbe\x00\x02"), ""},
		{"boot sector", at(510, "\x55\xaa"), ""},
		{"elsewhere", at(512, "QFI\xfb"), ""},
	} {
		got, err := blockdev.Probe(bytes.NewReader(c.disk), int64(len(c.disk)))
		if got != c.want || err != nil {
			t.Errorf("%s: got %q, %v, want %q", c.name, got, err, c.want)
		}
	}
}

// TestRealProbeImages has qemu-img make every format it can.
func TestRealProbeImages(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ format, options, want string }{
		{"raw", "", ""}, {"qcow", "", "qcow"}, {"qcow2", "", "qcow2"}, {"qed", "", "qed"}, {"vdi", "", "vdi"},
		{"vhdx", "", "vhdx"}, {"vpc", "subformat=dynamic", "vpc"}, {"vpc", "subformat=fixed", "vpc"},
		{"vmdk", "", "vmdk"}, {"vmdk", "subformat=monolithicFlat", "vmdk"}, {"parallels", "", "parallels"},
	} {
		path := filepath.Join(dir, c.format+c.options)
		args := []string{"create", "-q", "-f", c.format}
		if c.options != "" {
			args = append(args, "-o", c.options)
		}
		if out, err := run(t, "qemu-img", append(args, path, "64M")...); err != nil {
			t.Fatal(out)
		}
		f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", c.format, err)
			} else {
				f.Close()
			}
			continue
		}
		if err == nil {
			f.Close()
			t.Errorf("%s %s was opened as a raw disk", c.format, c.options)
		} else if !strings.Contains(err.Error(), c.want) && c.options != "subformat=monolithicFlat" {
			t.Errorf("%s %s: %v", c.format, c.options, err)
		}
	}
}

func FuzzProbe(f *testing.F) {
	f.Add([]byte("QFI\xfb\x00\x00\x00\x01"))
	f.Add(append(make([]byte, 512), "conectix"...))
	f.Fuzz(func(t *testing.T, disk []byte) {
		got, err := blockdev.Probe(bytes.NewReader(disk), int64(len(disk)))
		if err != nil {
			t.Fatal(err)
		}
		if got == "" && bytes.HasPrefix(disk, []byte("vhdxfile")) {
			t.Error("a VHDX was taken for a raw disk")
		}
	})
}
