package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// covered are the packages that the histories have to reach.
var covered = []string{"afterimage/hrl", "afterimage/hrl/ship", "afterimage/hrl/replica", "afterimage/filter"}

// cover plays histories and prints, of each package, how many per cent of the
// statements they reach.
func cover(budget time.Duration, least float64) error {
	deps, err := exec.Command("go", "list", "-deps", "-test", "./internal/sim").Output()
	if err != nil {
		return fmt.Errorf("go list: %w", err)
	}
	for _, p := range covered {
		if !slices.Contains(strings.Fields(string(deps)), p) {
			return fmt.Errorf("the simulator does not link %s", p)
		}
	}
	dir, err := os.MkdirTemp("", "cover")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	profile := filepath.Join(dir, "profile")
	cmd := exec.Command("go", "test", "-count=1", "-timeout=0", "-run", "TestSim$|TestSmall$|TestFound$", "-v", "-coverpkg="+strings.Join(covered, ","),
		"-coverprofile="+profile, "./internal/sim")
	cmd.Env = append(os.Environ(), "SIM_TIME="+budget.String())
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("the histories go wrong: %w\n%s", err, out)
	}
	fmt.Println(strings.TrimSpace(counts(out)))
	percent, err := read(profile)
	if err != nil {
		return err
	}
	var low []error
	for _, p := range covered {
		fmt.Printf("%-28s %5.1f %%\n", p, percent[p])
		if percent[p] < least {
			low = append(low, fmt.Errorf("%s: %.1f %% are reached, %.0f %% are to be", p, percent[p], least))
		}
	}
	return errors.Join(low...)
}

// read adds up a profile: of each package the statements that were reached, in per
// cent.
func read(profile string) (map[string]float64, error) {
	f, err := os.Open(profile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	type block struct {
		n   int
		hit bool
	}
	blocks := map[string]block{}
	for s := bufio.NewScanner(f); s.Scan(); {
		// afterimage/hrl/cut.go:29.51,31.2 3 1
		fields := strings.Fields(s.Text())
		if len(fields) != 3 {
			continue
		}
		n, err1 := strconv.Atoi(fields[1])
		hits, err2 := strconv.Atoi(fields[2])
		if err1 != nil || err2 != nil {
			return nil, fmt.Errorf("%s: %q", profile, s.Text())
		}
		b := blocks[fields[0]]
		blocks[fields[0]] = block{n, b.hit || hits > 0}
	}
	all, hit := map[string]int{}, map[string]int{}
	for where, b := range blocks {
		file, _, _ := strings.Cut(where, ":")
		pkg := filepath.Dir(file)
		all[pkg] += b.n
		if b.hit {
			hit[pkg] += b.n
		}
	}
	out := map[string]float64{}
	for p, n := range all {
		out[p] = 100 * float64(hit[p]) / float64(n)
	}
	return out, nil
}
