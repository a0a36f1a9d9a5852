package demo

import (
	"fmt"
	"time"

	"github.com/dustin/go-humanize"

	"afterimage/internal/admin"
)

// A Report is what the demo found. Sizes are bytes.
type Report struct {
	DiskBytes    int64   `json:"disk_bytes"`
	FileSystem   bool    `json:"file_system"` // ext4 in its first half
	FsckRun      bool    `json:"fsck_run"`
	EverySeconds float64 `json:"every_seconds"`

	// Acked is how many writes the guest saw acknowledged, AckedBefore how many of
	// them before the newest point was cut, AckedAfter the others.
	Acked       int64 `json:"acked_writes"`
	AckedBefore int64 `json:"acked_before_cut"`
	AckedAfter  int64 `json:"acked_after_cut"`
	// Survived is how many writes the served disk has.
	Survived int64 `json:"survived_writes"`

	WrittenBytes int64 `json:"written_bytes"` // by the guest
	// LoggedBytes is what the log had of that, LatestBytes what was left when only
	// the newest version of each block counted, ShippedBytes what of it went over
	// the line, compressed: all up to the newest point, without the first copy.
	LoggedBytes  int64 `json:"logged_bytes"`
	LatestBytes  int64 `json:"latest_bytes"`
	ShippedBytes int64 `json:"shipped_bytes"`

	Killed    time.Time `json:"killed"`
	Point     string    `json:"point"`
	PointAge  float64   `json:"point_age_seconds"` // when the host died
	FirstRead float64   `json:"first_read_seconds"`
	Equal     bool      `json:"equal"`
	Verdict   string    `json:"verdict"`

	first *admin.Replication // before the guest wrote
}

// take takes the counters of the replication.
func (r *Report) take(now *admin.Replication) {
	if r.first == nil {
		r.first = now
	}
	r.LoggedBytes = now.LoggedBytes - r.first.LoggedBytes
	r.LatestBytes = now.LatestBytes - r.first.LatestBytes
	r.ShippedBytes = now.ShippedBytes - r.first.ShippedBytes
}

// Rows are the table for people.
func (r *Report) Rows() [][]string {
	size := func(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
	fs := "none (no mkfs.ext4)"
	switch {
	case r.FileSystem && r.FsckRun:
		fs = "unchanged, e2fsck finds nothing"
	case r.FileSystem:
		fs = "unchanged (no e2fsck to ask)"
	}
	return [][]string{
		{"written by the guest", fmt.Sprintf("%s in %s writes", size(r.WrittenBytes), humanize.Comma(r.Acked))},
		{"logged, up to the newest point", size(r.LoggedBytes)},
		{"left after coalescing", size(r.LatestBytes)},
		{"shipped", size(r.ShippedBytes)},
		{"age of the point when the host died", fmt.Sprintf("%.2f s (one every %g s)", r.PointAge, r.EverySeconds)},
		{"acknowledged after it was cut, and lost", humanize.Comma(r.AckedAfter) + " writes"},
		{"time to first read", fmt.Sprintf("%.3f s", r.FirstRead)},
		{"file system", fs},
		{"verdict", r.Verdict},
	}
}
