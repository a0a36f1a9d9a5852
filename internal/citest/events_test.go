package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestFollow(t *testing.T) {
	const pass = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"pass","Package":"p","Test":"TestA"}
`
	tests := []struct {
		name, events, ci string
		exit             string
		want             tally
	}{
		{name: "pass", events: pass + `{"Action":"pass","Package":"p"}`, want: tally{passed: 1}},
		{name: "a parent of subtests does not count", want: tally{passed: 1}, events: `
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestA/x"}
{"Action":"pass","Package":"p","Test":"TestA/x"}
{"Action":"pass","Package":"p","Test":"TestA"}`},
		{name: "a failed subtest counts once", exit: "1", want: tally{passed: 1, failed: 1}, events: `
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestA/x"}
{"Action":"run","Package":"p","Test":"TestA/y"}
{"Action":"pass","Package":"p","Test":"TestA/x"}
{"Action":"fail","Package":"p","Test":"TestA/y"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p"}`},
		{name: "a package that dies without a failed test", exit: "1", want: tally{passed: 1, failed: 1},
			events: pass + `{"Action":"fail","Package":"p"}`},
		{name: "a package that dies in a test", exit: "1", want: tally{passed: 1, failed: 1}, events: pass + `
{"Action":"run","Package":"p","Test":"TestB"}
{"Action":"run","Package":"p","Test":"TestB/x"}
{"Action":"output","Package":"p","Test":"TestB/x","Output":"panic: why\n"}
{"Action":"fail","Package":"p"}`},
		{name: "does not build", exit: "1", want: tally{failed: 1}, events: `
{"ImportPath":"p [p.test]","Action":"build-output","Output":"p.go:1: no\n"}
{"ImportPath":"p [p.test]","Action":"build-fail"}
{"Action":"fail","Package":"p","FailedBuild":"p [p.test]"}`},
		{name: "skip", events: `{"Action":"skip","Package":"p","Test":"TestA"}`, want: tally{skipped: 1}},
		{name: "skip in CI", ci: "true", events: `{"Action":"skip","Package":"p","Test":"TestA"}`, want: tally{failed: 1}},
		{name: "a package without tests", events: `{"Action":"skip","Package":"p"}`},
		{name: "go itself fails", exit: "1", events: "no such package", want: tally{failed: 1}},
		{name: "go fails after all passed", exit: "1", events: pass, want: tally{passed: 1, failed: 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("CI", tt.ci)
			exit := tt.exit
			if exit == "" {
				exit = "0"
			}
			got, err := follow(exec.Command("sh", "-c", `printf '%s\n' "$0"; exit "$1"`, tt.events, exit))
			if err != nil || got != tt.want {
				t.Errorf("got %v, %v; want %v", got, err, tt.want)
			}
		})
	}
}

func TestScan(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":                 "module m",
		"a/a_test.go":            "func TestRealX(t *testing.T) {\nfunc FuzzY(f *testing.F) {\nfunc TestZ(",
		"a/a.go":                 "func TestRealInNoTest(",
		"a/testdata/b_test.go":   "func TestRealInTestdata(",
		"tools/go.mod":           "module other",
		"tools/x/x_test.go":      "func TestRealInOtherModule(",
		".hidden/a_test.go":      "func TestRealHidden(",
		"b/c/kill_test.go":       "func TestKillIt(",
		"b/c/commented_test.go":  "// func TestKillComment(",
		"b/c/indented_test.go":   "\tfunc TestKillIndented(",
		"b/c/more_test.go":       "func TestKillAnother(",
		"b/c/TestKillThis.notgo": "func TestKillThis(",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(root)
	src, err := scan(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		prefix, pkg string
		names       []string
	}{
		{"TestReal", "./a", []string{"TestRealX"}},
		{"Fuzz", "./a", []string{"FuzzY"}},
		{"TestKill", "./b/c", []string{"TestKillAnother", "TestKillIt"}},
	} {
		pkgs := src.packages(tt.prefix)
		if len(pkgs) != 1 || pkgs[0] != tt.pkg {
			t.Errorf("%s: packages %q, want %q", tt.prefix, pkgs, tt.pkg)
			continue
		}
		got := src.names(tt.pkg, tt.prefix)
		if len(got) != len(tt.names) {
			t.Errorf("%s: %q, want %q", tt.prefix, got, tt.names)
			continue
		}
		for i := range got {
			if got[i] != tt.names[i] {
				t.Errorf("%s: %q, want %q", tt.prefix, got, tt.names)
			}
		}
	}
	if pkgs := src.packages("TestRoot"); len(pkgs) != 0 {
		t.Errorf("TestRoot: packages %q, want none", pkgs)
	}
}
