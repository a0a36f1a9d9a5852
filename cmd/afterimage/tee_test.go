package main

import (
	"bytes"
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
	cmd := exec.Command("afterimage", args...)
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
		p := start(t, "serve", disk, "-U", disk+".sock", "--log", log)
		uri := p.line()
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
		p = start(t, "serve", disk, "-U", disk+".sock", "--log", log, "--json")
		p.line()
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
