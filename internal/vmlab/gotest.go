package vmlab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"afterimage/internal/vmlab/guest"
)

// testsDir is where compiled tests lie in the guest; their packages'
// directories, with the test data, lie in sourceDir.
const (
	testsDir  = "/vmlab/tests"
	sourceDir = "/vmlab/src"
)

// A testProgram is the compiled tests of a package.
type testProgram struct {
	pkg     string // its import path
	dir     string // the package here
	program string // the program here
}

func (p testProgram) inside() string    { return testsDir + "/" + p.pkg + ".test" }
func (p testProgram) insideDir() string { return sourceDir + "/" + p.pkg }

// Inside runs the test that calls it in a guest. It returns true there, and the
// test does what it is to do; outside it returns false when that is done, and
// what the guest has reported is in t: the test returns at once.
func Inside(t *testing.T, o Options) bool {
	t.Helper()
	if guest.Inside() {
		return true
	}
	if strings.Contains(t.Name(), "/") {
		t.Fatal("vmlab: Inside must be called by a test, not by a part of one")
	}
	o.Tests = append(o.Tests, ".")
	vm := New(t, o).Boot()
	found := vm.runTest(t, ".", "^"+regexp.QuoteMeta(t.Name())+"$")
	if own := found.child(t.Name()); own != nil {
		own.into(t)
	}
	return false
}

// GoTest runs those tests of a package that match run, in a guest of its own,
// and reports each as a subtest. The package is one as the go command has it,
// seen from the directory of the test.
func GoTest(t *testing.T, pkg, run string, o Options) {
	t.Helper()
	o.Tests = append(o.Tests, pkg)
	New(t, o).Boot().Test(t, pkg, run)
}

// Test is GoTest in this guest, for one of [Options].Tests, with more in its
// environment ("NAME=value").
func (vm *VM) Test(t *testing.T, pkg, run string, env ...string) {
	t.Helper()
	for _, n := range vm.runTest(t, pkg, run, env...).children {
		n.report(t)
	}
}

// StartTest starts tests as Test does and does not wait: for one that the power
// is to be cut under. Nothing is reported.
func (vm *VM) StartTest(pkg, run string, env ...string) *Process {
	vm.t.Helper()
	p, ok := vm.lab.tests[pkg]
	if !ok {
		vm.fatalf("the tests of %s are not among Options.Tests", pkg)
	}
	// With time left to say what hangs.
	limit := max(vm.remaining()-5*time.Second, time.Second)
	return vm.Start(Command{
		Args: []string{
			p.inside(), "-test.v=test2json", "-test.paniconexit0", "-test.run=" + run,
			fmt.Sprintf("-test.timeout=%v", limit),
		},
		Env: env,
		Dir: p.insideDir(),
	})
}

// runTest runs tests and returns what they have reported. What they cannot have
// reported themselves has failed t.
func (vm *VM) runTest(t *testing.T, pkg, run string, env ...string) *outcomes {
	t.Helper()
	r := vm.StartTest(pkg, run, env...).wait()
	found, err := parseOutcomes(r.Stdout)
	if err != nil {
		t.Fatalf("vmlab: the tests' output: %v", err)
	}
	switch {
	case r.Lost:
		t.Errorf("vmlab: the guest has ended under the tests\n%s%s", found.output.String(), r.Stderr)
	case r.Status != 0 && !found.anyFailed():
		t.Errorf("vmlab: the tests ended with status %d\n%s%s", r.Status, found.output.String(), r.Stderr)
	case r.Status == 0 && len(found.children) == 0:
		t.Errorf("vmlab: %s has no test that matches %s", pkg, run)
	case r.Stderr != "":
		t.Logf("vmlab: the tests' standard error:\n%s", r.Stderr)
	}
	return found
}

// compile compiles the tests of a package for the guest.
func (l *Lab) compile(pkg string) {
	l.t.Helper()
	if _, ok := l.tests[pkg]; ok {
		return
	}
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}}\n{{.Dir}}", pkg).Output()
	path, dir, ok := strings.Cut(string(bytes.TrimSpace(out)), "\n")
	if err != nil || !ok {
		l.t.Fatalf("vmlab: go list %s: %v\n%s", pkg, err, out)
	}
	p := testProgram{pkg: path, dir: dir, program: filepath.Join(l.t.TempDir(), "test")}
	if err := goBuild("test", "-c", "-o", p.program, path); err != nil {
		l.t.Fatal(err)
	}
	l.tests[pkg] = p
}

// addTests adds the programs, and the directories that they run in.
func (l *Lab) addTests(w image) error {
	for _, p := range l.tests {
		if w.Has(p.inside()) {
			continue // under two names
		}
		if err := w.tree(p.inside(), p.program); err != nil {
			return err
		}
		if err := w.Dir(p.insideDir()); err != nil {
			return err
		}
		data := filepath.Join(p.dir, "testdata")
		if _, err := os.Stat(data); err != nil {
			continue
		}
		if err := w.tree(p.insideDir()+"/testdata", data); err != nil {
			return err
		}
	}
	return nil
}
