package bench

import (
	"errors"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseUsage(t *testing.T) {
	const stat = "42 (odd) name) S 1 42 42 0 -1 4194560 909 0 0 0 123 45 0 0 20 0 7 0 9349 1 2 3\n"
	const io = "rchar: 7\nwchar: 8\nsyscr: 100\nsyscw: 23\nread_bytes: 0\nwrite_bytes: 0\ncancelled_write_bytes: 0\n"
	u, err := parseUsage([]byte(stat), []byte(io))
	if want := (usage{1680 * time.Millisecond, 123}); err != nil || u != want {
		t.Errorf("%+v, %v, want %+v", u, err, want)
	}
	for _, tt := range []struct{ name, stat, io string }{
		{"empty", "", ""},
		{"short", "42 (name) S 1 42", io},
		{"no number", strings.Replace(stat, "123", "x", 1), io},
		{"io without syscw", stat, "syscr: 100\n"},
		{"io without number", stat, "syscr: 100\nsyscw: x\n"},
	} {
		if _, err := parseUsage([]byte(tt.stat), []byte(tt.io)); err == nil {
			t.Errorf("%s: no error", tt.name)
		}
	}
	if u, err := usageOf(os.Getpid()); err != nil || u.readWrite == 0 {
		t.Errorf("of this test: %+v, %v", u, err)
	}
	if _, err := usageOf(math.MaxInt32); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no process: %v", err)
	}
}

func TestMachine(t *testing.T) {
	m, err := machine()
	if err != nil || m.Cores < 1 || m.Kernel == "" || m.CPU == "" || m.MemoryBytes <= 0 {
		t.Errorf("%+v, %v", m, err)
	}
	const info = "processor\t: 0\nmodel name\t: Some CPU: 4 GHz\n\nprocessor\t: 1\nmodel name\t: Other\n"
	if got := cpuModel([]byte(info)); got != "Some CPU: 4 GHz" {
		t.Errorf("model %q", got)
	}
	const mem = "MemTotal:       2048 kB\nMemAvailable:   1024 kB\nHugePages_Total: 0\n"
	if n, err := memory([]byte(mem), "MemAvailable"); err != nil || n != 1<<20 {
		t.Errorf("memory %d, %v", n, err)
	}
	if _, err := memory([]byte(mem), "Mem"); err == nil {
		t.Error("a part of a key is taken for one")
	}
}

func TestCheckSpace(t *testing.T) {
	dir := t.TempDir()
	if err := checkSpace(dir, 1); err != nil {
		t.Error(err)
	}
	if err := checkSpace(dir, math.MaxInt64); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "--dir") {
		t.Errorf("too much: %v", err)
	}
	if err := checkSpace(dir+"/absent", 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

func TestFindProgram(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	r := &run{programs: map[*Server]string{}}
	err := r.find(Servers())
	if err == nil {
		t.Fatal("found in an empty directory")
	}
	for _, pkg := range []string{"fio", "nbdkit", "qemu-utils"} {
		if n := strings.Count(err.Error(), "apt-get install --no-install-recommends "+pkg); n != 1 {
			t.Errorf("package %s is named %d times in: %v", pkg, n, err)
		}
	}
}
