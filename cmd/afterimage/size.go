package main

import (
	"math/big"
	"regexp"
	"strings"

	"afterimage/blockdev"
)

// sizeForm is digits, perhaps a fraction, perhaps a unit. The limits on digits
// keep the arithmetic small; no size that fits needs more.
var sizeForm = regexp.MustCompile(`^([0-9]{1,19}(?:\.[0-9]{1,19})?) ?([a-zA-Z]{0,3})$`)

// sizeUnits is what a unit, in lower case, multiplies by. As in QEMU a lone
// letter is a power of 1024; with a B it is decimal, with iB again binary.
var sizeUnits = map[string]int64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
	"p": 1 << 50, "pib": 1 << 50, "pb": 1e15,
	"e": 1 << 60, "eib": 1 << 60, "eb": 1e18,
}

// parseSize reads a SIZE, in bytes. Its errors are wrong usage.
func parseSize(s string) (int64, error) {
	const form = "write it as 512, 64K, 1.5G, 20GiB or 500MB"
	m := sizeForm.FindStringSubmatch(s)
	if m == nil {
		return 0, withHint(usagef("%q is not a size", s), form)
	}
	unit, ok := sizeUnits[strings.ToLower(m[2])]
	if !ok {
		return 0, withHint(usagef("%q is not a size: there is no unit %s", s, m[2]), form)
	}
	n, _ := new(big.Rat).SetString(m[1])
	n.Mul(n, new(big.Rat).SetInt64(unit))
	if !n.IsInt() {
		return 0, withHint(usagef("%q is not a whole number of bytes", s), form)
	}
	if !n.Num().IsInt64() {
		return 0, usagef("%q is more than any disk can have", s)
	}
	return n.Num().Int64(), nil
}

// parseDiskSize reads a SIZE that a disk can have: whole sectors, not none.
func parseDiskSize(s string) (int64, error) {
	n, err := parseSize(s)
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, usagef("a disk of no bytes cannot be made")
	}
	if n%blockdev.SectorSize != 0 {
		return 0, usagef("a disk of %d bytes is no multiple of %d", n, blockdev.SectorSize)
	}
	return n, nil
}
