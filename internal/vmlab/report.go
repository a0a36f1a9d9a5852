package vmlab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// outcomes are what tests in the guest have reported: one test with its
// subtests, or at the root a program with its tests.
type outcomes struct {
	name     string // the last part of it
	action   string // pass, fail or skip; empty: it was never said
	output   strings.Builder
	children []*outcomes
}

// A testEvent is a line of test2json.
type testEvent struct{ Action, Test, Output string }

// parseOutcomes reads the output of a test program.
func parseOutcomes(output string) (*outcomes, error) {
	cmd := exec.Command("go", "tool", "test2json")
	cmd.Stdin = strings.NewReader(output)
	var said bytes.Buffer
	cmd.Stderr = &said
	text, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, said.Bytes())
	}
	root := &outcomes{}
	for line := range bytes.Lines(text) {
		var e testEvent
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("%s has said %q: %w", cmd, line, err)
		}
		root.add(e)
	}
	return root, nil
}

func (o *outcomes) add(e testEvent) {
	at := o
	if e.Test != "" {
		for name := range strings.SplitSeq(e.Test, "/") {
			next := at.child(name)
			if next == nil {
				next = &outcomes{name: name}
				at.children = append(at.children, next)
			}
			at = next
		}
	}
	switch e.Action {
	case "pass", "fail", "skip":
		at.action = e.Action
	case "output":
		// What only frames the rest is said once more by the test out here.
		if s := strings.TrimLeft(e.Output, " "); !strings.HasPrefix(s, "=== ") && !strings.HasPrefix(s, "--- ") {
			at.output.WriteString(e.Output)
		}
	}
}

func (o *outcomes) child(name string) *outcomes {
	for _, c := range o.children {
		if c.name == name {
			return c
		}
	}
	return nil
}

func (o *outcomes) anyFailed() bool {
	for _, c := range o.children {
		if c.action == "fail" || c.anyFailed() {
			return true
		}
	}
	return false
}

// report makes a subtest of it.
func (o *outcomes) report(t *testing.T) {
	t.Run(o.name, func(t *testing.T) { o.into(t) })
}

// into makes t end as it has.
func (o *outcomes) into(t *testing.T) {
	if text := strings.TrimRight(o.output.String(), "\n"); text != "" {
		t.Logf("in the guest:\n%s", text)
	}
	for _, c := range o.children {
		c.report(t)
	}
	switch o.action {
	case "pass":
	case "skip":
		t.Skip("skipped in the guest")
	case "fail":
		t.Fail()
	default:
		t.Error("has not ended in the guest")
	}
}
