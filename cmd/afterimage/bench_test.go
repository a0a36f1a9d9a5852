package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"afterimage/bench"
	"afterimage/internal/testenv"
)

func needRivals(t *testing.T) {
	t.Helper()
	for _, program := range []string{"fio", "nbdkit", "qemu-nbd"} {
		testenv.Need(t, program)
	}
}

// TestRealBench measures for as short as can be: every server answers, the log
// holds every write, and nothing is left. What the figures are is not its matter.
func TestRealBench(t *testing.T) {
	needRivals(t)
	dir := t.TempDir()
	output := filepath.Join(dir, "result.json")
	images := filepath.Join(dir, "images")
	if err := os.Mkdir(images, 0o755); err != nil {
		t.Fatal(err)
	}
	table := peer(t, "afterimage", "bench", "quick", "--dir", images, "--size", "8M", "--rounds", "1", "--cell", "50ms", "--output", output)
	b, err := os.ReadFile(output)
	if err != nil {
		t.Fatal(err)
	}
	var r bench.Result
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	if void := r.Void(); len(void) > 0 || len(r.Workloads) != 4 {
		t.Errorf("%d workloads, void: %q", len(r.Workloads), void)
	}
	for _, w := range r.Workloads {
		if !strings.Contains(table, w.Title+"\n") {
			t.Errorf("%s is not in the table:\n%s", w.Title, table)
		}
		servers := map[string]int{}
		for _, row := range w.Rows {
			servers[row.Server]++
			if row.IOPS.Median <= 0 || row.P99Seconds.Median <= 0 || row.Ratio.Median <= 0 || len(row.IOPS.Rounds) != 1 {
				t.Errorf("%s: %s: %+v", w.Title, row.Server, row)
			}
		}
		if servers["afterimage"] != 2 || servers["nbdkit file"] < 2 || servers["qemu-nbd"] < 1 || servers["go-nbd"] < 1 ||
			len(w.Rows) != len(bench.Servers())+1-len(r.Absent) || w.TeeRatio == nil {
			t.Errorf("%s: servers %v, absent %v, tee %v", w.Title, servers, r.Absent, w.TeeRatio)
		}
	}
	if left, err := os.ReadDir(images); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestRealBenchInterrupted stops a run that would take long.
func TestRealBenchInterrupted(t *testing.T) {
	needRivals(t)
	dir := t.TempDir()
	cmd := exec.Command("afterimage", "bench", "quick", "--dir", dir, "--size", "8M", "--cell", "1m")
	p := startCommand(t, cmd)
	// Until a server runs and a client works.
	deadline := time.Now().Add(patience)
	for {
		if found, _ := filepath.Glob(filepath.Join(dir, "*", "fio.json")); len(found) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing is measured: %s", &p.stderr)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if status := p.end(syscall.SIGTERM); status != statusInterrupted {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
