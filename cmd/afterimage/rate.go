package main

import (
	"regexp"
	"strings"
)

// bitsForm is a rate in bits a second: 8Mbit, 1.5Gbit/s.
var bitsForm = regexp.MustCompile(`(?i)^([0-9.]+ ?[kmgt]?)bit$`)

// parseRate reads a RATE, in bytes a second: a SIZE, or bits as in 8Mbit (those
// are decimal, as lines are sold). Either may end in /s. Its errors are wrong usage.
func parseRate(s string) (int64, error) {
	const form = "write it as 10M (bytes a second) or 8Mbit"
	per := strings.TrimSuffix(s, "/s")
	m := bitsForm.FindStringSubmatch(per)
	if m == nil {
		n, err := parseSize(per)
		if err != nil {
			return 0, withHint(usagef("%q is not a rate", s), form)
		}
		return atLeastOne(s, n)
	}
	size := strings.TrimSpace(m[1])
	if last := size[len(size)-1]; last < '0' || last > '9' {
		size += "B" // decimal
	}
	bits, err := parseSize(size)
	if err != nil {
		return 0, withHint(usagef("%q is not a rate", s), form)
	}
	return atLeastOne(s, bits/8)
}

func atLeastOne(s string, n int64) (int64, error) {
	if n < 1 {
		return 0, withHint(usagef("a rate of %s sends nothing", s), "`afterimage replica pause` stops a replication")
	}
	return n, nil
}
