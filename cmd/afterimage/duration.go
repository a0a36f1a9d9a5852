package main

import (
	"regexp"
	"strconv"
	"time"
)

// daysForm is a number of days or weeks before the rest of a duration.
var daysForm = regexp.MustCompile(`^([0-9]{1,6}(?:\.[0-9]{1,9})?)([dw])`)

// parseDuration reads a duration as Go writes it, before which there may be weeks
// (w) and days (d): 30s, 5m, 1d12h, 2w. Its errors are wrong usage.
func parseDuration(s string) (time.Duration, error) {
	const form = "write it as 30s, 5m, 1h30m, 1d or 2w"
	bad := withHint(usagef("%q is not a duration", s), form)
	var sum time.Duration
	rest := s
	for last := ""; ; {
		m := daysForm.FindStringSubmatch(rest)
		if m == nil {
			break
		}
		unit := 24 * time.Hour
		if m[2] == "w" {
			unit *= 7
		}
		if last == m[2] || last == "d" {
			return 0, bad // twice, or a week after a day
		}
		last = m[2]
		n, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return 0, bad
		}
		if n *= float64(unit); n > float64(1<<62)-float64(sum) {
			return 0, usagef("%q is longer than anybody waits", s)
		}
		sum += time.Duration(n)
		rest = rest[len(m[0]):]
	}
	if rest == "" && s != "" {
		return sum, nil
	}
	d, err := time.ParseDuration(rest)
	if err != nil || d < 0 || rest[0] == '-' || rest[0] == '+' {
		return 0, bad
	}
	if d > 1<<63-1-sum {
		return 0, usagef("%q is longer than anybody waits", s)
	}
	return sum + d, nil
}
