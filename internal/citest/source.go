package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// source knows the names of the special tests and fuzz targets, by package.
type source struct {
	byPackage map[string][]string // "./dir" to function names
}

var funcName = regexp.MustCompile(`(?m)^func ((?:TestSim|TestReal|TestKill|TestLab|TestRoot|Fuzz)\w*)\(`)

// scan reads the test files beneath root, a module.
func scan(root string) (*source, error) {
	src := &source{byPackage: map[string][]string{}}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return enter(root, path, d.Name())
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		pkg := "./" + filepath.ToSlash(filepath.Dir(path))
		for _, m := range funcName.FindAllSubmatch(text, -1) {
			src.byPackage[pkg] = append(src.byPackage[pkg], string(m[1]))
		}
		return nil
	})
	return src, err
}

// enter leaves out what go test leaves out: hidden directories, test data and
// other modules.
func enter(root, path, name string) error {
	if path == root {
		return nil
	}
	if name[0] == '.' || name[0] == '_' || name == "testdata" || name == "bin" {
		return filepath.SkipDir
	}
	if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
		return filepath.SkipDir
	}
	return nil
}

// packages lists the packages that have a function with this prefix, sorted.
func (s *source) packages(prefix string) []string {
	var pkgs []string
	for pkg := range s.byPackage {
		if len(s.names(pkg, prefix)) > 0 {
			pkgs = append(pkgs, pkg)
		}
	}
	slices.Sort(pkgs)
	return pkgs
}

// names lists the functions of a package with this prefix, sorted.
func (s *source) names(pkg, prefix string) []string {
	var names []string
	for _, n := range s.byPackage[pkg] {
		if strings.HasPrefix(n, prefix) {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return names
}
