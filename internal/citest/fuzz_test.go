package main

import "testing"

func TestSummarize(t *testing.T) {
	const progress = "fuzz: elapsed: 0s, gathering baseline coverage: 0/12 completed\n" +
		"fuzz: elapsed: 3s, execs: 102 (34/sec), new interesting: 1 (total: 13)\n" +
		"fuzz: elapsed: 6s, execs: 2204 (700/sec), new interesting: 7 (total: 19)\n"
	for _, tt := range []struct {
		name, out string
		failed    bool
		want      fuzzed
	}{
		{"good", progress + "PASS\n", false, fuzzed{execs: "2204", fresh: "7", corpus: "19"}},
		{"killed before it began", "", true, fuzzed{execs: "0", fresh: "0", corpus: "0", broken: true}},
		{"a crasher", progress + "--- FAIL: FuzzX (6.2s)\n    --- FAIL: FuzzX (0.00s)\n        x_test.go:5: no\n    \n" +
			"    Failing input written to testdata/fuzz/FuzzX/0123\n    To re-run:\n", true,
			fuzzed{execs: "2204", fresh: "7", corpus: "19", findings: 1}},
		{"a failing seed", "failure while testing seed corpus entry: FuzzX/seed#0\n--- FAIL: FuzzX (0.01s)\n", true,
			fuzzed{execs: "0", fresh: "0", corpus: "0", findings: 1}},
		{"out of time", progress + "--- FAIL: FuzzX (6.1s)\n    context deadline exceeded\nFAIL\n", true,
			fuzzed{execs: "2204", fresh: "7", corpus: "19"}},
		{"does not build", "FAIL\tp [build failed]\n", true, fuzzed{execs: "0", fresh: "0", corpus: "0", broken: true}},
	} {
		if got := summarize("", []byte(tt.out), tt.failed); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}
