package main

import (
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) {
	const day = 24 * time.Hour
	for in, want := range map[string]time.Duration{
		"1s": time.Second, "90s": 90 * time.Second, "5m": 5 * time.Minute, "1h30m": 90 * time.Minute, "0": 0, "1.5h": 90 * time.Minute,
		"1d": day, "1.5d": 36 * time.Hour, "2w": 14 * day, "1w2d": 9 * day, "1d12h": 36 * time.Hour, "1w1d1h1m1s": 8*day + time.Hour + time.Minute + time.Second,
		"0d": 0, "10000d": 10000 * day,
	} {
		if got, err := parseDuration(in); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", "x", "5", "-5m", "+5m", "-1d", "1d-1h", "1d+1h", "d", "1d1d", "1d1w", "1h1d", "1 d", "1D", "1,5d", "1e3d", "999999w", "106752d", "106751d24h", "9999999d",
	} {
		if got, err := parseDuration(in); err == nil || got != 0 || statusOf(err) != statusUsage {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"1w2d3h", "1.5d", "106751d", "-1h", "1d1d", "9999999999h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseDuration(s)
		if d < 0 || err != nil && d != 0 {
			t.Fatalf("%q: %v, %v", s, d, err)
		}
		if again, err2 := parseDuration(d.String()); err == nil && (err2 != nil || again != d) {
			t.Fatalf("%q is %v, which is read as %v, %v", s, d, again, err2)
		}
	})
}

func TestParseRate(t *testing.T) {
	for in, want := range map[string]int64{
		"1": 1, "10M": 10 << 20, "10MB": 10e6, "10M/s": 10 << 20, "1.5K": 1536,
		"8Mbit": 1e6, "8mbit": 1e6, "8Mbit/s": 1e6, "8 Mbit": 1e6, "1Gbit": 125e6, "100kbit": 12500, "8bit": 1, "1.5Mbit": 187500,
	} {
		if got, err := parseRate(in); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "0", "0Mbit", "7bit", "-1", "bit", "Mbit", ".Mbit", "8Xbit", "8MBbit", "8Mbits", "8Mbps", "fast", "auto", "1/s/s", "9999999Tbit"} {
		if got, err := parseRate(in); err == nil || got != 0 || statusOf(err) != statusUsage {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
}

func TestParseKeep(t *testing.T) {
	for in, want := range map[string]int{"last=1": 1, "last=24": 24, "last=10000": 10000} {
		if got, err := parseKeep(in); err != nil || got != want {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "24", "last", "last=", "last=0", "last=-1", "last=+1", "last=1.5", "last=10001", "1h:all", "1h:all,24h:1h", "LAST=3"} {
		if _, err := parseKeep(in); statusOf(err) != statusUsage || hintOf(err) == "" {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestParsePoint(t *testing.T) {
	for in, want := range map[string][3]string{
		"web@1.2.3/root":       {"web", "1.2.3", "root"},
		"web@latest/data.1":    {"web", "latest", "data.1"},
		"a.b-c@branch-1/disk_": {"a.b-c", "branch-1", "disk_"},
	} {
		vm, point, disk, err := parsePointDisk(in)
		if err != nil || [3]string{vm, point, disk} != want {
			t.Errorf("%q: %q %q %q, %v", in, vm, point, disk, err)
		}
	}
	for _, in := range []string{"", "web", "web@1.2.3", "web/root", "@1.2.3/root", "web@/root", "web@1.2.3/", "web@1@2/root", "web@1.2.3/a/b", "../x@1/root", "web@1.2.3/.."} {
		if vm, point, disk, err := parsePointDisk(in); statusOf(err) != statusUsage {
			t.Errorf("%q: %q %q %q, %v", in, vm, point, disk, err)
		}
	}
	for _, in := range []string{"", "web", "@1", "web@", "web@1/root", "web@@1"} {
		if _, _, err := parsePoint(in); statusOf(err) != statusUsage {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestAdminSocket(t *testing.T) {
	a := &app{}
	t.Setenv("AFTERIMAGE_ADMIN", "/e")
	if got := a.adminSocket(); got != "/e" {
		t.Error(got)
	}
	a.admin = "/f"
	if got := a.adminSocket(); got != "/f" {
		t.Error(got)
	}
}
