package modules

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tree writes the files of depmod.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for _, name := range []string{"modules.dep", "modules.softdep", "modules.alias", "modules.builtin"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(files[name]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// A small kernel, in the words of a real one.
var sample = map[string]string{
	"modules.dep": `kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/fs/mbcache.ko kernel/lib/crc16.ko
kernel/fs/jbd2/jbd2.ko:
kernel/fs/mbcache.ko:
kernel/lib/crc16.ko:
kernel/arch/x86/crypto/crc32c-intel.ko:
kernel/crypto/crc32c_generic.ko:
kernel/drivers/scsi/scsi_mod.ko: kernel/drivers/scsi/scsi_common.ko
kernel/drivers/scsi/scsi_common.ko:
kernel/drivers/scsi/libfc/libfc.ko: kernel/drivers/scsi/scsi_transport_fc.ko kernel/drivers/scsi/scsi_mod.ko kernel/drivers/scsi/scsi_common.ko
kernel/drivers/scsi/scsi_transport_fc.ko: kernel/drivers/scsi/scsi_mod.ko kernel/drivers/scsi/scsi_common.ko
kernel/drivers/block/nbd.ko:
kernel/ring/a.ko:
kernel/ring/b.ko:
`,
	"modules.softdep": `# Soft dependencies extracted from modules themselves.
softdep ext4 pre: crypto-crc32c
softdep jbd2 pre: crypto-crc32c
softdep mbcache pre: gone post: nbd
softdep a pre: b
softdep b pre: a
softdep nbd mbcache
`,
	"modules.alias": `# Aliases extracted from modules themselves.
alias crypto-crc32c crc32c_intel
alias crypto-crc32c crc32c_generic
alias of:N*T*Cname with spaces nbd
`,
	"modules.builtin": "kernel/lib/crc32.ko\n",
}

func TestResolve(t *testing.T) {
	tr, err := Open(tree(t, sample))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, wanted, want string }{
		{"nothing", "", ""},
		{"one", "nbd", "mbcache? nbd"},
		{"parameters", "nbd nbds_max=4 max_part=15", "mbcache? nbd:nbds_max=4 max_part=15"},
		{"in order, with either sign", "libfc, scsi-common", "scsi_common scsi_mod scsi_transport_fc libfc"},
		{"what is asked for while it runs", "ext4", "crc32c_intel? crc32c_generic? crc16 mbcache nbd? jbd2 ext4"},
		{"optional, then needed", "jbd2,crc32c_generic", "crc32c_intel? crc32c_generic jbd2"},
		{"by an alias", "crypto-crc32c", "crc32c_intel crc32c_generic"},
		{"in the kernel", "crc32,jbd2", "crc32c_intel? crc32c_generic? jbd2"},
		{"two that ask for each other", "a", "b? a"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var wanted []string
			if tt.wanted != "" {
				wanted = strings.Split(tt.wanted, ",")
			}
			mods, err := tr.Resolve(wanted...)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, m := range mods {
				s := m.Name
				if m.Optional {
					s += "?"
				}
				if m.Params != "" {
					s += ":" + m.Params
				}
				if name(m.Path) != m.Name {
					t.Errorf("%s is at %s", m.Name, m.Path)
				}
				got = append(got, s)
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("got %s, want %s", s, tt.want)
			}
		})
	}
}

func TestResolveRefuses(t *testing.T) {
	tr, err := Open(tree(t, sample))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ wanted, want string }{
		{"nosuch", "has no module nosuch"},
		{"crc32 x=1", "command line"},
	} {
		if _, err := tr.Resolve(tt.wanted); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", tt.wanted, err, tt.want)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for file, text := range map[string]string{
		"modules.dep":     "kernel/x.ko kernel/y.ko",
		"modules.softdep": "softdep x",
		"modules.alias":   "alias x",
	} {
		_, err := Open(tree(t, map[string]string{file: text}))
		if err == nil || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("%s with %q: %v", file, text, err)
		}
	}
	if _, err := Open(t.TempDir()); err == nil {
		t.Error("a directory without modules.dep is no tree")
	}
}
