package bench

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestGapBytes(t *testing.T) {
	const stats = `{"filter":{"reads":3,"gap_bytes":65536},"log":{}}` + "\n"
	for _, tt := range []struct {
		name, stderr string
		want         int64
		ok           bool
	}{
		{"nothing", "", 0, false},
		{"others' lines", "connections: 1 open\n{\"level\":1}\n[]\n", 0, false},
		{"half a line", stats[:len(stats)-1], 0, false},
		{"no filter", `{"filter":{"reads":3}}` + "\n", 0, false},
		{"a gap", "connections: 1 open\n" + stats, 65536, true},
		{"none", strings.Replace(stats, "65536", "0", 1), 0, true},
	} {
		if n, ok := gapBytes([]byte(tt.stderr)); n != tt.want || ok != tt.ok {
			t.Errorf("%s: %d, %v", tt.name, n, ok)
		}
	}
}

// TestCheckLog tells a log that is not the whole truth from a check that could
// not be made.
func TestCheckLog(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		fails, void  bool
	}{
		{"equal", "exit 0", false, false},
		{"damaged", `[ "$1" = disk ] || { echo missing >&2; exit 6; }`, true, true},
		{"different", `[ "$1" = log ] || { echo differ >&2; exit 6; }`, true, true},
		{"no check", "exit 1", true, false},
	} {
		binary := filepath.Join(t.TempDir(), "afterimage")
		if err := os.WriteFile(binary, []byte("#!/bin/sh\n"+tt.script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		err := checkLog(context.Background(), binary, "log", "start", "image")
		var void *voidError
		if (err != nil) != tt.fails || errors.As(err, &void) != tt.void {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := checkLog(ctx, "/bin/true", "log", "start", "image"); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

func TestCopyFile(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	if err := fill(from, 3<<20|4096); err != nil {
		t.Fatal(err)
	}
	for _, before := range []string{"", strings.Repeat("longer than what comes", 1<<18)} {
		if err := os.WriteFile(to, []byte(before), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := copyFile(from, to); err != nil {
			t.Fatal(err)
		}
		a, errA := os.ReadFile(from)
		b, errB := os.ReadFile(to)
		if errA != nil || errB != nil || len(a) != 3<<20|4096 || string(a) != string(b) {
			t.Errorf("a copy of %d bytes over %d has %d (%v, %v)", len(a), len(before), len(b), errA, errB)
		}
	}
}
