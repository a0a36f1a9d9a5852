package main

import (
	"encoding/json"
	"strings"
	"testing"

	"afterimage/internal/demo"
)

// TestKillDemo runs what the README shows first: the host dies, its disk does
// not.
func TestKillDemo(t *testing.T) {
	var r demo.Report
	out, _ := command(t, statusDone, "demo", "--json")
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%+v", r)
	if !r.Equal || r.AckedAfter <= 0 || r.Survived < r.AckedBefore || r.AckedBefore <= 0 {
		t.Errorf("%+v", r)
	}
	if r.LoggedBytes <= 0 || r.LatestBytes >= r.LoggedBytes || r.ShippedBytes <= 0 {
		t.Errorf("coalescing left %d of %d bytes, %d were shipped", r.LatestBytes, r.LoggedBytes, r.ShippedBytes)
	}
}

// TestKillDemoSabotage: a byte of a stored layer is changed; the failover finds
// it, and names the layer.
func TestKillDemoSabotage(t *testing.T) {
	out, errs := command(t, statusDamaged, "demo", "--sabotage")
	if !strings.Contains(errs, ".layer") {
		t.Errorf("it does not name the layer: %s", errs)
	}
	if !strings.Contains(out, "sabotage: one byte") {
		t.Errorf("%s", out)
	}
}
