package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// makeLog makes a log of these disks, 1 MiB each, in which disk i got a block
// of 4 KiB full of i+1 at i blocks, a zeroing of the next, and a cut.
func makeLog(t *testing.T, disks ...string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "log")
	l, _, err := hrl.Open(dir, hrl.Options{AppendLimit: -1})
	if err != nil {
		t.Fatal(err)
	}
	g := hrl.NewGroup()
	for i, name := range disks {
		id, err := l.AddDisk(name, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		off := int64(i) * 4096
		g.Add(hrl.Entry{Kind: hrl.KindWrite, Disk: id, Off: off, Len: 4096, Data: bytes.Repeat([]byte{byte(i + 1)}, 4096)})
		g.Add(hrl.Entry{Kind: hrl.KindZero, Disk: id, Off: off + 4096, Len: 4096})
	}
	l.Recovered()
	if err := l.Append(g); err != nil {
		t.Fatal(err)
	}
	l.Finished(g)
	if _, err := l.Cut(hrl.CutCrash); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// command runs afterimage to its end and checks its exit status.
func command(t *testing.T, status int, args ...string) (stdout, stderr string) {
	t.Helper()
	p := start(t, args...)
	out, err := io.ReadAll(p.stdout)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.wait(); got != status {
		t.Errorf("%q: exit status %d, want %d\n%s%s", args, got, status, out, &p.stderr)
	}
	return string(out), p.stderr.String()
}

func TestLog(t *testing.T) {
	dir := makeLog(t, "root")
	out, _ := command(t, statusDone, "log", "verify", dir)
	if !strings.HasPrefix(out, "whole: ") {
		t.Errorf("verify: %s", out)
	}
	out, _ = command(t, statusDone, "log", "show", dir)
	for _, want := range []string{"root", "1.0 MiB", "sealed", "crash"} {
		if !strings.Contains(out, want) {
			t.Errorf("show: no %q in\n%s", want, out)
		}
	}
	out, _ = command(t, statusDone, "log", "show", "--json", dir)
	var shown logShown
	if err := json.Unmarshal([]byte(out), &shown); err != nil {
		t.Fatal(err)
	}
	if len(shown.Disks) != 1 || shown.Disks[0] != (logDisk{"root", 1 << 20}) || len(shown.Cuts) != 1 || len(shown.Segments) == 0 {
		t.Errorf("show: %+v", shown)
	}

	disk := image(t, 1<<20)
	if err := os.WriteFile(disk, bytes.Repeat([]byte{9}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, _ = command(t, statusDone, "log", "replay", dir, "--onto", disk)
	if !strings.HasPrefix(out, "root: 2 frames, ") {
		t.Errorf("replay: %s", out)
	}
	fileHas(t, disk, 0, 1)
	fileHas(t, disk, 4096, 0)
	fileHas(t, disk, 8192, 9)
	// One segment alone, and again: the same.
	out, _ = command(t, statusDone, "log", "replay", shown.Segments[0].Path, "--onto", disk, "--json", "--disk", "root")
	var r logReplayed
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Disk != "root" || r.LatestBytes != 8192 || len(r.Missing) != 0 {
		t.Errorf("replay: %+v, %v", r, err)
	}
}

func TestLogRefused(t *testing.T) {
	dir, disk, held := makeLog(t, "a", "b"), image(t, 1<<20), image(t, 1<<20)
	holder, err := blockdev.OpenFile(held, blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	empty := t.TempDir()
	none := filepath.Join(empty, "none")
	for _, tt := range []struct {
		status  int
		message string
		args    []string
	}{
		{statusUsage, "requires at least 1 arg", []string{"log", "show"}},
		{statusUsage, "requires at least 1 arg", []string{"log", "verify"}},
		{statusUsage, "--onto", []string{"log", "replay", dir}},
		{statusUsage, "--disk: a, b", []string{"log", "replay", dir, "--onto", disk}},
		{statusNotFound, `no disk "c"`, []string{"log", "replay", dir, "--disk", "c", "--onto", disk}},
		{statusNotFound, "no such file", []string{"log", "replay", dir, "--disk", "a", "--onto", none}},
		{statusRefused, "in use", []string{"log", "replay", dir, "--disk", "a", "--onto", held}},
		{statusNotFound, "no such file", []string{"log", "show", none}},
		{statusNotFound, "no such file", []string{"log", "verify", none}},
		{statusNotFound, "no segment", []string{"log", "verify", empty}},
		{statusFailed, "holds no replica log", []string{"log", "verify", filepath.Dir(disk)}},
	} {
		out, stderr := command(t, tt.status, tt.args...)
		if !strings.Contains(stderr, tt.message) || out != "" {
			t.Errorf("%q: no %q in %s; on stdout %q", tt.args, tt.message, stderr, out)
		}
	}
	if st, err := os.Stat(disk); err != nil || st.Size() != 1<<20 {
		t.Errorf("the image has changed: %v, %v", st, err)
	}
	fileHas(t, disk, 0, 0)
	if _, err := os.Stat(none); err == nil {
		t.Error("something was made")
	}
}

// TestLogDamaged flips a byte of a written block's frame.
func TestLogDamaged(t *testing.T) {
	dir, disk := makeLog(t, "root"), image(t, 1<<20)
	segments, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	flipped := false
	for _, path := range segments {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if at := bytes.Index(b, bytes.Repeat([]byte{1}, 4096)); at >= 0 {
			b[at+2000] ^= 1
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			flipped = true
		}
	}
	if !flipped {
		t.Fatal("the payload is in no segment")
	}
	out, stderr := command(t, statusDamaged, "log", "verify", dir)
	if !strings.Contains(out, " at byte ") || !strings.Contains(stderr, "the log is not whole: 1 findings") {
		t.Errorf("verify: %s%s", out, stderr)
	}
	out, _ = command(t, statusDamaged, "log", "verify", dir, "--json")
	var v logVerified
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Whole || len(v.Findings) != 1 {
		t.Errorf("verify: %+v, %v", v, err)
	}
	if out, _ = command(t, statusDamaged, "log", "show", dir); !strings.Contains(out, "DAMAGED") {
		t.Errorf("show: %s", out)
	}
	command(t, statusDamaged, "log", "replay", dir, "--onto", disk)
	fileHas(t, disk, 0, 0)
}
