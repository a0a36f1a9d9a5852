package bench

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
)

// measured is a contestant whose rounds gave these IOPS.
func measured(s *Server, control bool, void string, iops ...float64) *contestant {
	c := (&run{}).contestant(s, control)
	c.void = void
	for _, n := range iops {
		latency := time.Duration(32e9 / n)
		c.samples = append(c.samples, sample{fioReport{10000, n, latency, 3 * latency}, 80 * time.Millisecond, 15000})
	}
	return c
}

// given is a result of two workloads: in the first the machine is quiet, in the
// second the control is so far off that all are equal, and a row is void.
func given() *Result {
	s := Servers()
	quiet := sum(Workload{true, 4096, 32}, []*contestant{
		measured(s[0], false, "", 70000, 71000, 69000),
		measured(s[1], false, "", 60000, 61000, 62000),
		measured(s[2], false, "", 30000, 31000, 32000),
		measured(s[3], false, "", 33000, 33000, 33000),
		measured(s[4], false, "", 50000, 40000, 60000),
		measured(s[5], false, "", 84000, 85200, 82800),
		measured(s[6], false, "", 70700, 71000, 69000),
		measured(s[1], true, "", 60500, 61500, 61500),
	}, s[1])
	noisy := sum(Workload{false, 4096, 1}, []*contestant{
		measured(s[0], false, "", 20000, 10000),
		measured(s[4], false, "", 30000, 15000),
		measured(s[5], false, "", 25000, 12000),
		measured(s[6], false, "4096 bytes became gaps", 99000, 99000),
		measured(s[4], true, "", 15000, 16000),
	}, s[4])
	return &Result{
		Begun: time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC), TookSeconds: 61.7,
		Machine: Machine{CPU: "Some CPU", Cores: 2, Kernel: "6.1.0", MemoryBytes: 1 << 33}, LoadBefore: 0.25,
		Versions:  map[string]string{"fio": "fio-3.33", "go-nbd": "v0.3.2"},
		Directory: "/dev/shm", FileSystem: "tmpfs", ImageBytes: 256 << 20, Rounds: 3, CellSeconds: 0.5,
		Absent:    []Absent{{"qemu-nbd", "--aio=io_uring", "this kernel has none"}},
		Workloads: []WorkloadResult{quiet, noisy},
	}
}

func TestTable(t *testing.T) {
	const golden = "testdata/table.golden"
	var b strings.Builder
	if err := given().WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("the table is now (UPDATE_GOLDEN=1 keeps it):\n%s\nand was:\n%s", &b, want)
	}
}

func TestSum(t *testing.T) {
	r := given()
	quiet, noisy := r.Workloads[0], r.Workloads[1]
	if quiet.BestRival != "nbdkit file -t 4" || noisy.BestRival != "go-nbd" {
		t.Errorf("best rivals %q and %q", quiet.BestRival, noisy.BestRival)
	}
	if quiet.Control != "nbdkit file -t 16" || !quiet.Equal.Holds(0.992) || quiet.Equal.Holds(0.99) {
		t.Errorf("control %q, equal %v", quiet.Control, quiet.Equal)
	}
	if r := quiet.Rows[5]; r.Ratio.Median != 1.2 || r.Equal {
		t.Errorf("a fifth faster: %+v", r)
	}
	if r := quiet.Rows[6]; r.Ratio.Median != 1 || !r.Equal {
		t.Errorf("as fast: %+v", r)
	}
	if r := noisy.Rows[2]; !r.Equal {
		t.Errorf("a difference less than the control's: %+v", r)
	}
	if quiet.TeeRatio == nil || quiet.TeeRatio.Median != 71000.0/85200 {
		t.Errorf("tee on over tee off: %+v", quiet.TeeRatio)
	}
	if r := noisy.Rows[3]; r.Equal || r.Ratio.Median != 0 || noisy.TeeRatio != nil {
		t.Errorf("a void row is compared: %+v", r)
	}
	if r := quiet.Rows[0]; r.CPUSeconds.Median != 8e-6 || r.ReadWriteCalls.Median != 1.5 {
		t.Errorf("of a request: %+v", r)
	}
	for i, want := range []bool{true, false, false, true, true, true, true, false} {
		if quiet.Rows[i].Best != want {
			t.Errorf("%s is the best of its settings: %v", quiet.Rows[i].name(), !want)
		}
	}
	void := r.Void()
	if len(void) != 1 || void[0] != "4 KiB random read, QD 1: afterimage --log: 4096 bytes became gaps" {
		t.Errorf("void: %q", void)
	}
}

// TestJSON reads a result back.
func TestJSON(t *testing.T) {
	b, err := json.Marshal(given())
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), ":null") && !strings.Contains(string(b), `"tee_ratio":null`) {
		t.Errorf("a list is null: %s", b)
	}
	var r Result
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	var was, is strings.Builder
	if err := given().WriteTable(&was); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteTable(&is); err != nil {
		t.Fatal(err)
	}
	if was.String() != is.String() {
		t.Errorf("not all of it is in the JSON:\n%s", &is)
	}
}
