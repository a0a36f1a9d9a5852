package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"time"
)

// progressLine is what go test says while it fuzzes. "Interesting" inputs are
// those that reached code no earlier one had: its measure of coverage.
var progressLine = regexp.MustCompile(`execs: (\d+) .*new interesting: (\d+) \(total: (\d+)\)`)

// fuzz runs every fuzz target of the module and prints a table; false if any
// found something. A crasher is left in the package's testdata, to be committed.
func fuzz(src *source, each time.Duration) bool {
	type row struct{ target, execs, found, total, findings string }
	rows := []row{}
	ok := true
	for _, pkg := range src.packages("Fuzz") {
		for _, name := range src.names(pkg, "Fuzz") {
			fmt.Printf("== fuzz %s %s for %v\n", pkg, name, each)
			cmd := exec.Command("go", "test", "-run", "^$", "-fuzz", "^"+name+"$", "-fuzztime", each.String(), pkg)
			cmd.Stderr = os.Stderr
			out, err := cmd.Output()
			r := row{pkg[2:] + "." + name, "0", "0", "0", "0"}
			for _, m := range progressLine.FindAllSubmatch(out, -1) {
				r.execs, r.found, r.total = string(m[1]), string(m[2]), string(m[3])
			}
			if err != nil {
				ok = false
				r.findings = "1" // the fuzzer stops at the first
				os.Stdout.Write(bytes.TrimSpace(out))
				fmt.Println()
			}
			rows = append(rows, r)
		}
	}
	if len(rows) == 0 {
		fmt.Println("no fuzz target found")
		return false
	}
	fmt.Printf("%-50s %12s %16s %12s %9s\n", "target", "executions", "new interesting", "interesting", "findings")
	for _, r := range rows {
		fmt.Printf("%-50s %12s %16s %12s %9s\n", r.target, r.execs, r.found, r.total, r.findings)
	}
	return ok
}
