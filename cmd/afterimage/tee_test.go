package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/internal/testenv"
)

// syncBuffer takes what a process prints while it runs.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// runCommand runs a command to its end.
func runCommand(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "afterimage", args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// memDir is a directory in memory where that is possible: kills do not ask for
// durability, and the rounds are many.
func memDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "afterimage")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
}

// replayEquals replays the log onto the image it began with and compares.
func replayEquals(t *testing.T, log, began, image string) {
	t.Helper()
	for _, args := range [][]string{
		{"log", "verify", log},
		{"log", "replay", log, "--onto", began},
		{"disk", "compare", began, image},
	} {
		if status, _, stderr := runCommand(t, args...); status != statusDone {
			t.Fatalf("afterimage %s: status %d: %s", strings.Join(args, " "), status, stderr)
		}
	}
}

// TestKillTee kills a server that tees, under fio, 20 times over one log; after
// each kill and restart the log, replayed onto a copy of the starting image,
// equals the image, and fio's own checksums hold.
func TestKillTee(t *testing.T) {
	const rounds = 20
	fio := testenv.Need(t, "fio")
	dir := memDir(t)
	disk, log := filepath.Join(dir, "vm.raw"), filepath.Join(dir, "log")
	began := filepath.Join(dir, "began.raw")
	r := rand.New(rand.NewPCG(1, 2))
	if err := blockdev.CreateFile(disk, 24<<20); err != nil {
		t.Fatal(err)
	}
	f, err := blockdev.OpenFile(disk, blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fillRandom(t, f, r)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	copyFile(t, disk, began)

	torn := 0
	for round := range rounds {
		p, uri := serveTee(t, disk, log)
		// What a client sees, with overlapping writes of all sizes, zeroes,
		// trims, flushes and FUA beside it.
		cmd := exec.Command(fio, "--name=load", "--ioengine=nbd", "--uri="+uri, "--rw=randrw", "--rwmixread=20",
			"--bsrange=512-256k", "--blockalign=512", "--iodepth=16", "--size=24M", "--io_size=20g",
			"--percentage_random=80", "--fsync=50", "--allow_file_create=0", "--randrepeat=0", "--numjobs=2", "--thread",
			"--group_reporting", "--norandommap")
		cmd.Dir = dir
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		c := dial(t, uri)
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			odd(c, rand.New(rand.NewPCG(uint64(round), 3)), stop)
		}()
		time.Sleep(time.Duration(30+r.IntN(120)) * time.Millisecond)
		p.end(syscall.SIGKILL)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		close(stop)
		<-done
		c.Close()

		// Restart and stop: the log is whole again.
		p, _ = serveTee(t, disk, log)
		if p.stats(t).Recovered.AgainBytes > 0 {
			torn++
		}
		if status := p.end(syscall.SIGTERM); status != statusDone {
			t.Fatalf("round %d: the server ended with status %d", round, status)
		}
		replayEquals(t, log, began, disk)
	}
	t.Logf("%d of %d kills left a disk that lacked part of the newest frames", torn, rounds)
}

func fillRandom(t *testing.T, d blockdev.Device, r *rand.Rand) {
	t.Helper()
	b := make([]byte, 1<<20)
	for off := int64(0); off < d.Size(); off += int64(len(b)) {
		for i := 0; i < len(b); i += 64 {
			b[i] = byte(r.Uint32())
		}
		if err := blockdev.WriteAt(d, b, off); err != nil {
			t.Fatal(err)
		}
	}
}

// odd asks for what fio does not, until the server dies or it is told to stop.
func odd(d blockdev.Device, r *rand.Rand, stop <-chan struct{}) {
	b := make([]byte, 2<<20)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n := 1 + r.Int64N(int64(len(b)))
		off := r.Int64N(d.Size() - n)
		req := &blockdev.Request{Off: off, Len: n, Op: blockdev.OpWriteZeroes}
		switch r.IntN(6) {
		case 0:
			req.Op = blockdev.OpTrim
		case 1:
			req.Flags = blockdev.FlagNoHole | blockdev.FlagFUA
		case 2, 3:
			req.Op, req.Buf = blockdev.OpWrite, b[:n]
			b[r.IntN(int(n))] ^= byte(1 + r.IntN(255))
		case 4:
			req.Op, req.Flags, req.Buf = blockdev.OpWrite, blockdev.FlagFUA, b[:n]
		}
		if blockdev.Do1(d, req) != nil {
			return
		}
	}
}

// serveStats is what SIGUSR1 makes serve print.
type serveStats struct {
	Filter struct {
		GapBytes int64 `json:"gap_bytes"`
		Writes   int64 `json:"writes"`
	} `json:"filter"`
	Log       *hrl.Stats `json:"log"`
	Recovered struct {
		ReadBytes  int64 `json:"read_bytes"`
		AgainBytes int64 `json:"logged_bytes"`
		GapBytes   int64 `json:"gap_bytes"`
	} `json:"recovered"`
}

// stats asks a server for its statistics.
func (p *process) stats(t *testing.T) serveStats {
	t.Helper()
	before := strings.Count(p.stderr.String(), "\n{")
	if err := p.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		out := "\n" + p.stderr.String()
		lines := strings.Split(out, "\n{")
		if len(lines) > before+1 && strings.HasSuffix(out, "\n") {
			var s serveStats
			if err := json.Unmarshal([]byte("{"+strings.SplitN(lines[len(lines)-1], "\n", 2)[0]), &s); err != nil {
				t.Fatal(err)
			}
			return s
		}
	}
	t.Fatalf("no statistics: %s", p.stderr.String())
	panic("unreachable")
}

// serveTee starts a server that tees, and waits until the disk can be opened.
func serveTee(t *testing.T, disk, log string, more ...string) (*process, string) {
	t.Helper()
	// A loaded machine is late now and then, and that would be a gap.
	p := start(t, append([]string{"serve", disk, "-U", disk + ".sock", "--log", log, "--append-limit", "1m"}, more...)...)
	return p, p.line()
}

// TestTeeRefused: logs that are another's, or in use, are left alone.
func TestTeeRefused(t *testing.T) {
	disk, other := image(t, 1<<20), image(t, 1<<20)
	log := filepath.Join(t.TempDir(), "log")
	p, _ := serveTee(t, disk, log)
	status, _, stderr := runCommand(t, "serve", other, "-U", other+".sock", "--log", log)
	if status != statusRefused || !strings.Contains(stderr, "in use by another process") || !strings.Contains(stderr, "hint: ") {
		t.Errorf("a log in use: status %d: %s", status, stderr)
	}
	c := dial(t, uriOf(disk+".sock", "disk"))
	if err := blockdev.WriteAt(c, make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Fatal(status, p.stderr.String())
	}
	status, _, stderr = runCommand(t, "serve", other, "-U", other+".sock", "--log", log, "--export", "data")
	if status != statusRefused || !strings.Contains(stderr, `logs disk "disk"`) {
		t.Errorf("another disk's log: status %d: %s", status, stderr)
	}
}

// TestTeeDamaged: a log that rots is found by every command, and the server that
// is started on it serves, says so, and trusts nothing of it.
func TestTeeDamaged(t *testing.T) {
	disk := image(t, 1<<20)
	log := filepath.Join(t.TempDir(), "log")
	p, uri := serveTee(t, disk, log)
	c := dial(t, uri)
	for i := range int64(20) {
		if err := blockdev.WriteAt(c, []byte(strings.Repeat("x", 4096)), i*8192); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	p.end(syscall.SIGKILL)
	segments, err := filepath.Glob(filepath.Join(log, "*.hrl"))
	if err != nil || len(segments) == 0 {
		t.Fatal(segments, err)
	}
	f, err := os.OpenFile(segments[0], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{0xff}, 20000); err != nil {
		t.Fatal(err)
	}
	f.Close()
	began := filepath.Join(filepath.Dir(disk), "began.raw")
	if err := blockdev.CreateFile(began, 1<<20); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"log", "verify", log}, {"log", "show", log}, {"log", "replay", log, "--onto", began}} {
		if status, stdout, stderr := runCommand(t, args...); status != statusDamaged || !strings.Contains(stdout+stderr, segments[0]) {
			t.Errorf("%v: status %d: %s%s", args, status, stdout, stderr)
		}
	}
	fileHas(t, began, 0, 0)
	p, uri = serveTee(t, disk, log)
	if s := p.stats(t); s.Recovered.GapBytes != 1<<20 || s.Filter.GapBytes != 1<<20 {
		t.Errorf("a log that rotted: %+v", s)
	}
	if !strings.Contains(p.stderr.String(), "cannot vouch") {
		t.Errorf("the operator was told %s", p.stderr.String())
	}
	useDisk(t, dial(t, uri), 0, 9)
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("status %d: %s", status, p.stderr.String())
	}
}

// TestTeeLatchIsBesideTheImage is about where it is kept, whatever way leads to
// the image; what it does is the filter's.
func TestTeeLatchIsBesideTheImage(t *testing.T) {
	disk := image(t, 1<<20)
	link := filepath.Join(t.TempDir(), "link.raw")
	if err := os.Symlink(disk, link); err != nil {
		t.Fatal(err)
	}
	beside := disk + ".afterimage"
	if err := os.Mkdir(beside, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(beside, "latch"), []byte(`{"disk":"vm","why":"input/output error"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, "serve", link, "-U", link+".sock")
	c := dial(t, p.line())
	if err := blockdev.Flush(c); err == nil {
		t.Error("a flush of a latched disk succeeded")
	}
	c.Close()
	if status := p.end(syscall.SIGTERM); status == 0 || !strings.Contains(p.stderr.String(), "reopened") {
		t.Errorf("a latched disk: status %d: %s", status, p.stderr.String())
	}
	p = start(t, "serve", link, "-U", link+".sock", "--reopen")
	c = dial(t, p.line())
	if err := blockdev.Flush(c); err != nil {
		t.Error(err)
	}
	c.Close()
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("a reopened disk: status %d: %s", status, p.stderr.String())
	}
}

// TestTeeQuota: a log at its quota stays there, and the disk goes on.
func TestTeeQuota(t *testing.T) {
	dir := memDir(t)
	disk, log := filepath.Join(dir, "vm.raw"), filepath.Join(dir, "log")
	if err := blockdev.CreateFile(disk, 8<<20); err != nil {
		t.Fatal(err)
	}
	p, uri := serveTee(t, disk, log, "--log-quota", "40M")
	c := dial(t, uri)
	b := make([]byte, 1<<20)
	for i := range int64(200) {
		b[0] = byte(i)
		if err := blockdev.WriteAt(c, b, i%8<<20); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	if s := p.stats(t); s.Log.Reclaimed == 0 || s.Filter.GapBytes != 8<<20 {
		t.Errorf("at the quota: %+v %+v", s.Filter, s.Log)
	}
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("status %d: %s", status, p.stderr.String())
	}
	files, err := filepath.Glob(filepath.Join(log, "*.hrl"))
	if err != nil || len(files)*4 > 40 {
		t.Errorf("%d segments: %v", len(files), err)
	}
}

// TestRootLogDirectories: a log directory without room is refused at the start;
// one that fills up while the server runs is no concern of the guest.
func TestRootLogDirectories(t *testing.T) {
	testenv.NeedRoot(t)
	disk := image(t, 4<<20)
	mount := func(size string) string {
		dir := t.TempDir()
		peer(t, "mount", "-t", "tmpfs", "-o", "size="+size, "none", dir)
		t.Cleanup(func() { peer(t, "umount", "--lazy", dir) })
		return dir
	}
	full := mount("1M")
	if status, _, stderr := runCommand(t, "serve", disk, "-U", disk+".sock", "--log", filepath.Join(full, "log")); status != statusRefused || !strings.Contains(stderr, "no room for changes") {
		t.Errorf("a full directory: status %d: %s", status, stderr)
	}
	readOnly := t.TempDir()
	peer(t, "mount", "-t", "tmpfs", "-o", "ro", "none", readOnly)
	t.Cleanup(func() { peer(t, "umount", "--lazy", readOnly) })
	if status, _, stderr := runCommand(t, "serve", disk, "-U", disk+".sock", "--log", filepath.Join(readOnly, "log")); status == 0 || !strings.Contains(stderr, "read-only file system") {
		t.Errorf("a read-only directory: status %d: %s", status, stderr)
	}
	small := filepath.Join(mount("200M"), "log")
	p, uri := serveTee(t, disk, small)
	c := dial(t, uri)
	b := make([]byte, 1<<20)
	for i := range int64(300) {
		b[0] = byte(i)
		if err := blockdev.WriteAt(c, b, i%4<<20); err != nil {
			t.Fatalf("the guest's write failed with the log: %v", err)
		}
	}
	if err := blockdev.Flush(c); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if s := p.stats(t); s.Filter.GapBytes != 4<<20 || s.Log.Failed == 0 {
		t.Errorf("with a full log: %+v %+v", s.Filter, s.Log)
	}
	if !strings.Contains(p.stderr.String(), "the log fails") {
		t.Errorf("the operator was told %s", p.stderr.String())
	}
	p.end(syscall.SIGTERM)
	if status, _, stderr := runCommand(t, "log", "replay", small, "--onto", disk); status != statusDamaged && !strings.Contains(p.stderr.String(), "no room to say so") {
		t.Errorf("a log that lacks changes replays: status %d: %s", status, stderr)
	}
}
