package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

const mutantsDir = "internal/sim/mutants"

// mutants plays histories with each mutant, until one goes wrong.
func mutants(names []string, budget time.Duration, third, at int) error {
	all, err := filepath.Glob(filepath.Join(mutantsDir, "*.patch"))
	if err != nil || len(all) == 0 {
		return errors.Join(err, errors.New("no mutants: run it in the module's root"))
	}
	var some []string
	for i, path := range all {
		name := strings.TrimSuffix(filepath.Base(path), ".patch")
		if len(names) > 0 && !slices.Contains(names, name) || third > 0 && i%3 != third-1 {
			continue
		}
		some = append(some, path)
	}
	var mu sync.Mutex
	var bad []string
	var wg sync.WaitGroup
	slots := make(chan bool, max(at, 1))
	for _, path := range some {
		slots <- true
		wg.Go(func() {
			defer func() { <-slots }()
			line, ok := mutant(path, budget)
			mu.Lock()
			defer mu.Unlock()
			fmt.Println(line)
			if !ok {
				bad = append(bad, filepath.Base(path))
			}
		})
	}
	wg.Wait()
	if len(bad) > 0 {
		return fmt.Errorf("%d of %d were not found: %s", len(bad), len(some), strings.Join(bad, ", "))
	}
	return nil
}

// mutant tries one and says how it was found.
func mutant(path string, budget time.Duration) (line string, ok bool) {
	name := strings.TrimSuffix(filepath.Base(path), ".patch")
	dir, err := os.MkdirTemp("", "mutant")
	if err != nil {
		return err.Error(), false
	}
	defer os.RemoveAll(dir)
	if err := copyModule(dir); err != nil {
		return fmt.Sprintf("%-34s cannot be copied: %v", name, err), false
	}
	patch, err := os.Open(path)
	if err != nil {
		return err.Error(), false
	}
	defer patch.Close()
	cmd := exec.Command("patch", "-p1", "--no-backup-if-mismatch", "-s", "-F3")
	cmd.Dir, cmd.Stdin = dir, patch
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Sprintf("%-34s DOES NOT APPLY: %s", name, firstLine(out)), false
	}
	cmd = exec.Command("go", "test", "-c", "-o", "sim.test", "./internal/sim")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Sprintf("%-34s DOES NOT COMPILE: %s", name, firstLine(out)), false
	}
	begin := time.Now()
	var out []byte
	for _, test := range []string{"TestSmall$", "TestSim$"} { // the short one first
		cmd = exec.Command("./sim.test", "-test.run", test, "-test.v", "-test.failfast")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "SIM_TIME="+budget.String())
		if out, err = cmd.CombinedOutput(); err != nil {
			return fmt.Sprintf("%-34s %4.0f s, %s", name, time.Since(begin).Seconds(), why(out)), true
		}
	}
	return fmt.Sprintf("%-34s SURVIVES: %s", name, counts(out)), false
}

var (
	seedLine  = regexp.MustCompile(`(?m)^\s*(?:sim_test.go:\d+: )?(seed \d+: .*)$`)
	countLine = regexp.MustCompile(`(?m)^.*?(\d+ histories, .*)$`)
	panicLine = regexp.MustCompile(`(?m)^(panic: .*|fatal error: .*|seed \d+ does not end)$`)
)

// why is the check that failed, and after how much.
func why(out []byte) string {
	for _, r := range []*regexp.Regexp{seedLine, panicLine} {
		if m := r.FindSubmatch(out); m != nil {
			s := string(m[1])
			if len(s) > 200 {
				s = s[:200] + "..."
			}
			return s + counts(out)
		}
	}
	return "it ended with an error"
}

func counts(out []byte) string {
	if m := countLine.FindSubmatch(out); m != nil {
		parts := strings.SplitN(string(m[1]), ",", 3)
		return " (" + strings.TrimSpace(parts[0]) + "," + parts[1] + ")"
	}
	return ""
}

func firstLine(b []byte) string {
	s, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return s
}

// copyModule copies the module's files: those that git knows or would add.
func copyModule(to string) error {
	out, err := exec.Command("git", "ls-files", "-co", "--exclude-standard", "-z").Output()
	if err != nil {
		return fmt.Errorf("git ls-files: %w", err)
	}
	for _, b := range bytes.Split(out, []byte{0}) {
		path := string(b)
		if path == "" {
			continue
		}
		if err := copyFile(path, filepath.Join(to, path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	st, err := os.Stat(from)
	if err != nil || !st.Mode().IsRegular() {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o777); err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, st.Mode().Perm()|0o200)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
