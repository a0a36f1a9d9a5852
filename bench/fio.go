package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"
)

// fioReport is what one run of fio says, as far as it is used here.
type fioReport struct {
	requests int64
	iops     float64
	mean     time.Duration // from a request's submission to its completion
	p99      time.Duration
}

// fioGrace is how much longer than asked a run may last before it is hung.
const fioGrace = 60 * time.Second

// runFio lets one client work and returns its report.
func runFio(ctx context.Context, w Workload, size int64, runtime time.Duration, seed int, socket, output string) (*fioReport, error) {
	ctx, cancel := context.WithTimeout(ctx, runtime+fioGrace)
	defer cancel()
	uri := url.URL{Scheme: "nbd+unix", Path: "/" + exportName, RawQuery: url.Values{"socket": {socket}}.Encode()}
	args := append(w.fioArgs(size, runtime, seed), "--uri="+uri.String(), "--output-format=json", "--output="+output)
	cmd := exec.CommandContext(ctx, "fio", args...)
	own(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("fio: %w%s", err, quoted(out))
	}
	report, err := os.ReadFile(output)
	if err != nil {
		return nil, fmt.Errorf("fio: %w", err)
	}
	return parseFio(report, w.Write)
}

// parseFio reads fio's JSON. What the engine prints before it is skipped.
func parseFio(report []byte, write bool) (*fioReport, error) {
	type side struct {
		TotalIOs int64   `json:"total_ios"`
		IOPS     float64 `json:"iops"`
		Latency  struct {
			Mean       float64          `json:"mean"`
			Percentile map[string]int64 `json:"percentile"`
		} `json:"lat_ns"`
	}
	var doc struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	begin := bytes.IndexByte(report, '{')
	if begin < 0 {
		return nil, fmt.Errorf("fio: its report is no JSON%s", quoted(report))
	}
	if err := json.Unmarshal(report[begin:], &doc); err != nil {
		return nil, fmt.Errorf("fio: its report: %w", err)
	}
	if len(doc.Jobs) != 1 {
		return nil, fmt.Errorf("fio: its report has %d jobs, want 1", len(doc.Jobs))
	}
	job := doc.Jobs[0]
	if job.Error != 0 {
		return nil, fmt.Errorf("fio: its job failed with error %d", job.Error)
	}
	s := job.Read
	if write {
		s = job.Write
	}
	p99, ok := s.Latency.Percentile["99.000000"]
	switch {
	case s.TotalIOs <= 0 || s.IOPS <= 0:
		return nil, errors.New("fio: not one request was answered")
	case !ok:
		return nil, errors.New("fio: its report lacks the 99th percentile of lat_ns: fio 3.7 or newer is needed")
	}
	return &fioReport{s.TotalIOs, s.IOPS, time.Duration(s.Latency.Mean), time.Duration(p99)}, nil
}

// quoted is the end of what a program printed, for an error.
func quoted(out []byte) string {
	s := strings.TrimSpace(string(out))
	if s == "" {
		return ""
	}
	const most = 600
	if len(s) > most {
		s = "…" + s[len(s)-most:]
	}
	return ": " + s
}
