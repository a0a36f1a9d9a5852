package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestReadme runs the sessions of the README: what stands after "$ " is run,
// what follows is what it prints, wherever the sockets are.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Chdir(dir)
	here := strings.NewReplacer("bin/afterimage", "afterimage", "/run/", dir+"/")
	ran := 0
	for i, block := range strings.Split(string(text), "```") {
		if i%2 == 0 || !strings.HasPrefix(block, "\n$ ") {
			continue
		}
		for _, step := range strings.Split(block, "\n$ ")[1:] {
			line, want, _ := strings.Cut(here.Replace(step), "\n")
			p := startCommand(t, exec.Command("sh", "-c", "exec "+line))
			for want := range strings.Lines(strings.TrimSpace(want)) {
				if got := p.line(); got != strings.TrimSpace(want) {
					t.Errorf("%s prints %q, the README says %q", line, got, want)
				}
			}
			if strings.Contains(line, " serve ") {
				continue // runs on, for what follows; killed at the end
			}
			if status := p.wait(); status != 0 {
				t.Errorf("%s: exit status %d: %s", line, status, &p.stderr)
			}
			ran++
		}
	}
	if ran == 0 {
		t.Error("the README has no session")
	}
}
