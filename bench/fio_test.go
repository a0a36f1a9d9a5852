package bench

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseFio(t *testing.T) {
	read := func(name string) []byte {
		b, err := os.ReadFile("testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, tt := range []struct {
		name  string
		write bool
		want  fioReport
	}{
		{"fio-write.json", true, fioReport{14393, 71606.965174, 444334 * time.Nanosecond, 929792 * time.Nanosecond}},
		{"fio-read.json", false, fioReport{27522, 136925.373134, 231977 * time.Nanosecond, 626688 * time.Nanosecond}},
	} {
		got, err := parseFio(read(tt.name), tt.write)
		if err != nil || *got != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, got, err, tt.want)
		}
	}

	good := string(read("fio-write.json"))
	for _, tt := range []struct{ name, report, message string }{
		{"empty", "", "no JSON"},
		{"text", "fio: connection refused\n", "connection refused"},
		{"cut off", good[:len(good)/2], "unexpected end"},
		{"no job", `{"jobs": []}`, "0 jobs"},
		{"failed", strings.Replace(good, `"error" : 0`, `"error" : 5`, 1), "error 5"},
		{"no percentile", strings.ReplaceAll(good, `"99.000000"`, `"98.000000"`), "99th percentile"},
	} {
		if _, err := parseFio([]byte(tt.report), true); err == nil || !strings.Contains(err.Error(), tt.message) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.message)
		}
	}
	if _, err := parseFio([]byte(good), false); err == nil || !strings.Contains(err.Error(), "not one request") {
		t.Errorf("a report of writes taken for reads: %v", err)
	}
}

func TestFioArgs(t *testing.T) {
	for i, w := range Quick() {
		want := []string{"randwrite-4k-qd1", "randwrite-4k-qd32", "randread-4k-qd1", "randread-4k-qd32"}[i]
		if w.Name() != want {
			t.Errorf("workload %d is %s, want %s", i, w.Name(), want)
		}
		args := w.fioArgs(1<<20, 50*time.Millisecond, 7)
		for _, must := range []string{"--runtime=50ms", "--size=1048576", "--bs=4096", "--randseed=7"} {
			if !slices.Contains(args, must) {
				t.Errorf("%s: no %s in %q", want, must, args)
			}
		}
		for _, a := range args {
			if strings.Contains(a, "sync") {
				t.Errorf("%s: %s: one rival has no flush", want, a)
			}
		}
	}
}
