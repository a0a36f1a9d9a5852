package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// runRoot compiles the tests that need root as the present user and runs them
// as root, directly or through sudo. Without sudo they fail, by name.
func runRoot(src *source) (tally, error) {
	const prefix = "TestRoot"
	var sum tally
	via, err := becomeRoot()
	if err != nil {
		for _, pkg := range src.packages(prefix) {
			for _, name := range src.names(pkg, prefix) {
				fmt.Printf("   FAIL %s %s: %v\n", pkg, name, err)
				sum.failed++
			}
		}
		return sum, nil
	}
	for _, pkg := range src.packages(prefix) {
		t, err := runRootPackage(pkg, prefix, via)
		if err != nil {
			return sum, err
		}
		sum.add(t)
	}
	return sum, nil
}

// becomeRoot returns what to put before a command so that it runs as root.
func becomeRoot() ([]string, error) {
	if os.Geteuid() == 0 {
		return nil, nil
	}
	if _, err := exec.LookPath("sudo"); err != nil {
		return nil, fmt.Errorf("needs root: run as root, or install sudo")
	}
	via := []string{"sudo"}
	if st, err := os.Stdin.Stat(); err != nil || st.Mode()&os.ModeCharDevice == 0 {
		via = append(via, "-n") // nobody is there to be asked for a password
	}
	if out, err := exec.Command(via[0], append(via[1:], "true")...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("needs root: %s", strings.TrimSpace(string(out)))
	}
	return append(via, "env", "PATH="+os.Getenv("PATH"), "CI="+os.Getenv("CI")), nil
}

func runRootPackage(pkg, prefix string, via []string) (tally, error) {
	bin, err := filepath.Abs(filepath.Join("bin", "test", strings.ReplaceAll(pkg[2:], "/", "-")+".test"))
	if err != nil {
		return tally{}, err
	}
	compile := exec.Command("go", "test", "-c", "-o", bin, pkg)
	compile.Stdout, compile.Stderr = os.Stdout, os.Stderr
	if err := compile.Run(); err != nil {
		fmt.Printf("   FAIL %s does not build\n", pkg)
		return tally{failed: 1}, nil
	}
	args := append([]string{"tool", "test2json", "-t", "-p", pkg}, via...)
	args = append(args, bin, "-test.v=test2json", "-test.count=1", "-test.timeout="+limit.String(), "-test.run=^"+prefix)
	cmd := exec.Command("go", args...)
	cmd.Dir = filepath.FromSlash(pkg)
	return follow(cmd)
}
