package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"afterimage/hrl/wire"
	"afterimage/internal/admin"
)

// TestHistoryGaps: both hosts say that there is no history between two points, and why.
func TestHistoryGaps(t *testing.T) {
	a, b := twoHosts(t)
	uri := a.add("web", 8<<20, "root")[0]
	useDisk(t, dial(t, uri), 0, 1)
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h", "--keep", "last=9")
	first := a.do("replica", "sync", "web")[0]
	for _, h := range []*hostProcess{a, b} {
		if out := strings.Join(h.do("replica", "status", "web", "--json"), ""); !strings.Contains(out, `"history_gaps": []`) && !strings.Contains(out, `"history_gaps":[]`) {
			t.Errorf("%s, without a gap: %s", filepath.Base(h.dir), out)
		}
	}
	var vm admin.VM
	a.decode(&vm, "vm", "show", "web")
	a.kill()
	if err := os.RemoveAll(vm.Disks[0].LogDir); err != nil {
		t.Fatal(err)
	}
	a.start()
	useDisk(t, dial(t, uri), 1<<20, 2)
	second := a.do("replica", "sync", "web")[0]
	useDisk(t, dial(t, uri), 2<<20, 3)
	third := a.do("replica", "sync", "web")[0]
	for _, h := range []*hostProcess{a, b} {
		host := filepath.Base(h.dir)
		var points []admin.Point
		h.decode(&points, "point", "list", "web")
		if len(points) != 3 || points[0].ID != first || points[1].ID != second || points[2].ID != third {
			t.Fatalf("%s: points %+v", host, points)
		}
		gap := points[1].Gap
		if points[0].Gap != nil || points[2].Gap != nil || gap == nil || gap.Reason != wire.GapLogLost || !gap.From.Equal(points[0].Time) || !gap.To.Equal(points[1].Time) ||
			gap.DurationSeconds != gap.To.Sub(gap.From).Seconds() {
			t.Errorf("%s: gaps %+v, %+v, %+v", host, points[0].Gap, gap, points[2].Gap)
		}
		var st admin.Replication
		h.decode(&st, "replica", "status", "web")
		if len(st.HistoryGaps) != 1 || gap == nil || st.HistoryGaps[0] != *gap {
			t.Errorf("%s: status has the gaps %+v", host, st.HistoryGaps)
		}
		for _, line := range h.do("point", "list", "web") {
			if has := strings.Contains(line, "no history for "); has != strings.HasPrefix(line, second) || has && !strings.Contains(line, "before it (log lost)") {
				t.Errorf("%s: %s", host, line)
			}
		}
		if out := strings.Join(h.do("replica", "status", "web"), "\n"); strings.Count(out, "no history ") != 1 || !strings.Contains(out, "(log lost)") {
			t.Errorf("%s: status: %s", host, out)
		}
	}
}
