// Command citest runs the module's tests in stages and adds them up. What a
// test needs is in its name, and nothing is skipped quietly: each stage runs
// exactly its own tests, and a stage that finds none fails.
//
//	TestReal…    needs real peers (qemu-io, nbdcopy, fio): `make deps`
//	TestKill…    kills processes in the middle of their work, and takes longer
//	TestSim…     plays random histories of both hosts, for a given time (package sim)
//	TestLab…     boots a VM with a kernel of its own (package vmlab): `make deps`
//	TestRoot…    needs root: compiled as the user, run through sudo
//	Test…Allocs  counts allocations: left out under the race detector, whose
//	             pools forget at random
//	all others   need nothing but Go, a shell and what stands beside it (ls, dd)
//
// Random tests play fewer rounds in the stage race than in unit, and exhaustive ones
// try every nth case: package testenv says how many. With SOAK=n in the environment
// (`make soak`) both stages play n times the rounds of unit, and try every case.
//
// Usage: citest [-fuzztime D] unit|race|sim|real|kill|lab|root|fuzz...
//
//	main.go    the stages and the last line      events.go  what go test -json says
//	source.go  which package has which tests     root.go    tests that need root
//	fuzz.go    every fuzz target and its table
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"afterimage/internal/testenv"
)

// A stage is one go test over some packages.
type stage struct {
	name   string
	what   string
	budget time.Duration // what it should take on two cores; for people, not a limit
	prefix string        // of the tests it runs; "" means those with no special prefix
	skip   string        // where prefix is empty: what it leaves out
	args   []string
	env    []string
	soak   []string // of env, in a soak
}

var stages = []stage{
	{name: "unit", what: "tests and fuzz corpora that need nothing but Go", budget: time.Minute, skip: special},
	{name: "race", what: "the same under the race detector", budget: 3 * time.Minute, args: []string{"-race"}, skip: special + "|Allocs$",
		// The detector is C. By itself it makes every process wait a second at
		// its end, and the tests of the commands start hundreds. MODEL_TIME is
		// how long package filter's models of concurrent clients run.
		env: []string{"CGO_ENABLED=1", "GORACE=atexit_sleep_ms=20", "MODEL_TIME=9s"}, soak: []string{"MODEL_TIME=5m"}},
	{name: "sim", what: "random histories of both hosts, simulated", budget: 90 * time.Second, prefix: "TestSim",
		env: []string{"SIM_TIME=60s"}, soak: []string{"SIM_TIME=1h"}},
	{name: "real", what: "real clients and servers", budget: 3 * time.Minute, prefix: "TestReal"},
	{name: "kill", what: "processes killed at their work", budget: 90 * time.Second, prefix: "TestKill"},
	{name: "lab", what: "tests in a VM with a kernel of its own", budget: 5 * time.Minute, prefix: "TestLab"},
	{name: "root", what: "tests that need root", budget: time.Minute, prefix: "TestRoot"},
}

// special matches the names of tests that have a stage of their own.
const special = "^Test(Sim|Real|Kill|Lab|Root)"

// limit ends a package's tests that hang; go test prints every goroutine then.
const (
	limit     = 15 * time.Minute
	soakLimit = 6 * time.Hour
)

// atOnce is how many packages are tested at a time: more than there are cores, for many
// tests wait rather than work.
const atOnce = "3"

func main() {
	fuzzTime := flag.Duration("fuzztime", 5*time.Minute, "how long to run each fuzz target")
	flag.Parse()
	if flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "citest: name the stages to run")
		os.Exit(2)
	}
	src, err := scan(".")
	if err != nil {
		fmt.Fprintln(os.Stderr, "citest:", err)
		os.Exit(1)
	}
	var sum tally
	ok := true
	for _, name := range flag.Args() {
		if name == "fuzz" {
			ok = fuzz(src, *fuzzTime) && ok
			continue
		}
		t, err := runStage(name, src)
		if err != nil {
			fmt.Fprintln(os.Stderr, "citest:", err)
			os.Exit(1)
		}
		sum.add(t)
		ok = ok && t.failed == 0 && t.passed > 0
	}
	if sum.any() {
		fmt.Println(sum)
	}
	if !ok {
		os.Exit(1)
	}
}

func runStage(name string, src *source) (tally, error) {
	for _, s := range stages {
		if s.name != name {
			continue
		}
		fmt.Printf("== %s: %s (budget %v)\n", s.name, s.what, s.budget)
		begun := time.Now()
		t, err := s.run(src)
		if err != nil {
			return t, fmt.Errorf("stage %s: %w", name, err)
		}
		if t.passed+t.failed == 0 {
			fmt.Printf("stage %s has no tests: a name is wrong, or they are gone\n", name)
			t.failed++
		}
		fmt.Printf("== %s: %v in %v\n", s.name, t, time.Since(begun).Round(time.Second))
		return t, nil
	}
	return tally{}, fmt.Errorf("there is no stage %q", name)
}

func (s *stage) run(src *source) (tally, error) {
	if s.prefix == "TestRoot" {
		return runRoot(src)
	}
	soak := testenv.Soak() > 0
	end := limit
	if soak {
		end = soakLimit
	}
	args := []string{"test", "-json", "-timeout", end.String()}
	args = append(args, s.args...)
	if s.prefix == "" {
		if soak {
			args = append(args, "-count=1")
		}
		args = append(args, "-p", atOnce, "-skip", s.skip, "./...")
	} else {
		pkgs := src.packages(s.prefix)
		if len(pkgs) == 0 {
			return tally{}, nil
		}
		// A peer's version is not in the cache's key: never a cached result.
		args = append(args, "-count=1", "-run", "^"+s.prefix)
		args = append(args, pkgs...)
	}
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), s.env...)
	if soak {
		cmd.Env = append(cmd.Env, s.soak...)
	}
	fmt.Println("   go", strings.Join(args, " "))
	return follow(cmd)
}
