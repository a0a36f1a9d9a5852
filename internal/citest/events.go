package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// A tally counts tests; of a test with subtests only the subtests count.
type tally struct{ passed, failed, skipped int }

func (t *tally) add(o tally) {
	t.passed += o.passed
	t.failed += o.failed
	t.skipped += o.skipped
}

func (t tally) any() bool { return t != tally{} }

func (t tally) String() string {
	s := fmt.Sprintf("%d passed, %d failed", t.passed, t.failed)
	if t.skipped > 0 {
		s += fmt.Sprintf(", %d skipped", t.skipped)
	}
	return s
}

// event is a line of go test -json, and of go build -json in between.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build-output
	Test        string
	Output      string
	Elapsed     float64 // seconds
	FailedBuild string
}

type testID struct{ pkg, test string }

// follower adds up the events of one run, and keeps what a test printed until
// it is known whether anyone must see it.
type follower struct {
	tally
	output  map[testID]*strings.Builder
	running map[testID]bool // begun, not ended
	parent  map[testID]bool // has subtests
	blamed  map[testID]bool // a subtest has failed: it is counted already
	build   map[string]*strings.Builder
	noSkips bool
}

// follow runs a command that prints test events and adds them up.
func follow(cmd *exec.Cmd) (tally, error) {
	f := follower{
		output:  map[testID]*strings.Builder{},
		running: map[testID]bool{},
		parent:  map[testID]bool{},
		blamed:  map[testID]bool{},
		build:   map[string]*strings.Builder{},
		// In CI everything is there that a test can ask for.
		noSkips: os.Getenv("CI") != "",
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return f.tally, err
	}
	if err := cmd.Start(); err != nil {
		return f.tally, err
	}
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil {
				f.event(&e)
			} else {
				os.Stdout.Write(line)
			}
		}
		if err != nil {
			break
		}
	}
	if err := cmd.Wait(); err != nil && f.failed == 0 {
		// Whatever it was, it is not a success.
		fmt.Printf("FAIL %s: %v\n", cmd, err)
		f.failed++
	}
	return f.tally, nil
}

func (f *follower) event(e *event) {
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "run":
		f.running[id] = true
		if p, ok := id.parent(); ok {
			f.parent[p] = true
		}
	case "output":
		f.keep(id).WriteString(e.Output)
	case "build-output":
		b := f.build[e.ImportPath]
		if b == nil {
			b = new(strings.Builder)
			f.build[e.ImportPath] = b
		}
		b.WriteString(e.Output)
	case "pass":
		delete(f.running, id)
		f.finish(e, id)
	case "skip":
		delete(f.running, id)
		f.skip(e, id)
	case "fail":
		delete(f.running, id)
		f.fail(e, id)
	}
}

func (f *follower) finish(e *event, id testID) {
	switch {
	case e.Test == "":
		fmt.Printf("   ok   %-40s %6.1fs\n", e.Package, e.Elapsed)
	case !f.parent[id]:
		f.passed++
	}
	delete(f.output, id)
}

func (f *follower) skip(e *event, id testID) {
	if e.Test == "" { // a package without tests
		delete(f.output, id)
		return
	}
	if !f.noSkips {
		f.skipped++
		fmt.Printf("   skip %s %s\n", e.Package, e.Test)
		delete(f.output, id)
		return
	}
	fmt.Printf("   in CI a test that skips has failed:\n")
	f.fail(e, id)
}

func (f *follower) fail(e *event, id testID) {
	whole := testID{pkg: e.Package}
	switch {
	case e.Test == "" && e.FailedBuild != "":
		fmt.Printf("   FAIL %s does not build\n", e.Package)
		if b := f.build[e.FailedBuild]; b != nil {
			fmt.Print(b)
		}
		f.failed++
	case e.Test == "":
		fmt.Printf("   FAIL %-40s %6.1fs\n", e.Package, e.Elapsed)
		// A process that dies says why in the output of whatever test it was in.
		unfinished := f.unfinished(e.Package)
		for _, id := range unfinished {
			fmt.Printf("   FAIL %s %s has not ended\n", id.pkg, id.test)
			f.print(id)
		}
		if !f.blamed[whole] {
			f.print(id)
			f.failed += max(1, len(unfinished))
		}
	default:
		fmt.Printf("   FAIL %s %s\n", e.Package, e.Test)
		f.print(id)
		if !f.blamed[id] {
			f.failed++
		}
		f.blamed[whole] = true
		if p, ok := id.parent(); ok {
			f.blamed[p] = true
		}
	}
}

func (f *follower) keep(id testID) *strings.Builder {
	b := f.output[id]
	if b == nil {
		b = new(strings.Builder)
		f.output[id] = b
	}
	return b
}

// unfinished lists the tests of a package that have begun and not ended, but
// not those of which a subtest has not ended.
func (f *follower) unfinished(pkg string) []testID {
	var ids []testID
	for id := range f.running {
		if id.pkg != pkg {
			continue
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(f.running)), func(o testID) bool {
			return o.pkg == pkg && strings.HasPrefix(o.test, id.test+"/")
		}) {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b testID) int { return strings.Compare(a.test, b.test) })
	return ids
}

func (f *follower) print(id testID) {
	if b := f.output[id]; b != nil {
		fmt.Print(b)
	}
	delete(f.output, id)
}

// parent is the test that this one is a subtest of.
func (id testID) parent() (testID, bool) {
	i := strings.LastIndexByte(id.test, '/')
	if i < 0 {
		return testID{}, false
	}
	return testID{id.pkg, id.test[:i]}, true
}
