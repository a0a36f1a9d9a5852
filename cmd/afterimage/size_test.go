package main

import (
	"strconv"
	"testing"
)

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want int64 // -1: refused
	}{
		{"0", 0}, {"1", 1}, {"512", 512}, {"512b", 512}, {"512B", 512}, {"007", 7},
		{"1K", 1024}, {"1k", 1024}, {"1KiB", 1024}, {"1kib", 1024}, {"1kB", 1000}, {"1KB", 1000},
		{"2M", 2 << 20}, {"2MiB", 2 << 20}, {"2MB", 2e6},
		{"3G", 3 << 30}, {"3 GiB", 3 << 30}, {"3GB", 3e9},
		{"4T", 4 << 40}, {"4TB", 4e12}, {"5P", 5 << 50}, {"7E", 7 << 60}, {"9EB", 9e18},
		{"1.5G", 3 << 29}, {"0.5K", 512}, {"1.000", 1}, {"0.001kB", 1},
		{"9223372036854775807", 1<<63 - 1}, {"8191P", 8191 << 50},

		{"9223372036854775808", -1}, {"8E", -1}, {"9999999999999999999E", -1}, {"8388608T", -1},
		{"-1", -1}, {"-1G", -1}, {"+1", -1}, {"", -1}, {"K", -1}, {".5G", -1}, {"1.", -1}, {"1.K", -1},
		{"0.1K", -1}, {"0.3", -1}, {"1e3", -1}, {"0x10", -1}, {"1/2", -1}, {"1_000", -1}, {"1,5G", -1},
		{"1X", -1}, {"1KK", -1}, {"1iB", -1}, {"1GiBs", -1}, {"1  G", -1}, {" 1G", -1}, {"1G ", -1}, {"1G\n", -1},
		{"Inf", -1}, {"NaN", -1}, {"１", -1}, {"10000000000000000000", -1},
	} {
		got, err := parseSize(tt.in)
		switch {
		case err == nil && got != tt.want:
			t.Errorf("%q: got %d, want %d", tt.in, got, tt.want)
		case err != nil && tt.want >= 0:
			t.Errorf("%q: %v, want %d", tt.in, err, tt.want)
		case err != nil && statusOf(err) != statusUsage:
			t.Errorf("%q: exit status %d, want %d", tt.in, statusOf(err), statusUsage)
		}
	}
}

func TestParseDiskSize(t *testing.T) {
	for in, ok := range map[string]bool{
		"512": true, "1K": true, "20G": true, "0.5K": true,
		"0": false, "1": false, "511": false, "513": false, "1kB": false, "1MB": false, "1GB": true,
	} {
		if _, err := parseDiskSize(in); (err == nil) != ok {
			t.Errorf("%q: %v", in, err)
		}
	}
}

// FuzzParseSize checks that no input makes a negative size, that what is
// accepted survives being written out in bytes, and that a unit only scales.
func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "1.5G", "20 GiB", "9EB", "8E", "-1", "0.001kB", "1e9", "99999999999999999999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if err != nil {
			if n != 0 {
				t.Fatalf("%q: %d with error %v", s, n, err)
			}
			return
		}
		if n < 0 {
			t.Fatalf("%q: %d", s, n)
		}
		if again, err := parseSize(strconv.FormatInt(n, 10)); err != nil || again != n {
			t.Fatalf("%q is %d bytes, which is read as %d, %v", s, n, again, err)
		}
	})
}
