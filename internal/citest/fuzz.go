package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"time"
)

// fuzzArgs bound what a target may spend on making one interesting input
// shorter: by default a minute, in which nothing new is tried. Two workers, so
// that the table of one machine says something beside that of another.
var fuzzArgs = []string{"-parallel", "2", "-fuzzminimizetime", "10x"}

// A fuzzed is a row of the table.
type fuzzed struct {
	target string
	// As go test says them last. Inputs are "interesting" if they reached code
	// that no earlier one had: its measure of coverage.
	execs, fresh, corpus string
	findings             int
	took                 time.Duration
	broken               bool // ended with an error that is no finding
}

var (
	progressLine = regexp.MustCompile(`execs: (\d+) .*new interesting: (\d+) \(total: (\d+)\)`)
	crasherLine  = regexp.MustCompile(`(?m)^\s*Failing input written to `)
	// seedLine is an input of the corpus that fails already.
	seedLine = regexp.MustCompile(`(?m)^\s*failure while testing seed corpus entry: `)
	// lateLine is how the fuzzer at times ends by itself when its time is up in
	// the middle of an input: no failure of the target.
	lateLine = regexp.MustCompile(`(?m)^\s*context deadline exceeded$`)
)

// summarize reads what go test has printed; failed says that it ended so.
func summarize(target string, out []byte, failed bool) fuzzed {
	r := fuzzed{target: target, execs: "0", fresh: "0", corpus: "0"}
	for _, m := range progressLine.FindAllSubmatch(out, -1) {
		r.execs, r.fresh, r.corpus = string(m[1]), string(m[2]), string(m[3])
	}
	if failed {
		r.findings = len(crasherLine.FindAll(out, -1)) + len(seedLine.FindAll(out, -1))
		r.broken = r.findings == 0 && !lateLine.Match(out)
	}
	return r
}

// fuzz runs every fuzz target of the module, one after the other, and prints a
// table; false if any found something. A crasher is left in the package's
// testdata, to be committed.
func fuzz(src *source, each time.Duration) bool {
	var rows []fuzzed
	ok := true
	for _, pkg := range src.packages("Fuzz") {
		for _, name := range src.names(pkg, "Fuzz") {
			fmt.Printf("== fuzz %s %s for %v\n", pkg, name, each)
			args := append([]string{"test", "-run", "^$", "-fuzz", "^" + name + "$", "-fuzztime", each.String()}, fuzzArgs...)
			cmd := exec.Command("go", append(args, pkg)...)
			cmd.Stderr = os.Stderr
			begun := time.Now()
			out, err := cmd.Output()
			r := summarize(pkg[2:]+"."+name, out, err != nil)
			r.took = time.Since(begun)
			if r.findings > 0 || r.broken {
				ok = false
				os.Stdout.Write(bytes.TrimSpace(out))
				fmt.Printf("\n%v\n", err)
			}
			rows = append(rows, r)
		}
	}
	if len(rows) == 0 {
		fmt.Println("no fuzz target found")
		return false
	}
	fmt.Printf("%-40s %11s %15s %12s %8s %6s\n", "target", "executions", "new interesting", "total corpus", "findings", "time")
	for _, r := range rows {
		findings := fmt.Sprint(r.findings)
		if r.broken {
			findings = "broken"
		}
		fmt.Printf("%-40s %11s %15s %12s %8s %6v\n", r.target, r.execs, r.fresh, r.corpus, findings, r.took.Round(time.Second))
	}
	fmt.Println("total corpus: the inputs that together reach all the code that was reached")
	return ok
}
