package testenv

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Soak is by how much a test that could go on for ever is longer than in CI: the
// variable SOAK, which `make soak` sets; 0: this is CI.
func Soak() int {
	n, err := strconv.Atoi(os.Getenv("SOAK"))
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// Rounds is how many rounds, or seeds, a random test plays: unit, fewer under the race
// detector, with which each takes five to ten times as long, and SOAK times unit with
// either in a soak. A test must find what it is there for in the rounds of unit; those
// under the detector are for races.
func Rounds(unit, race int) int {
	switch n := Soak(); {
	case n > 0:
		return n * unit
	case Race:
		return race
	}
	return unit
}

// Every says which of the cases of an exhaustive test to try, numbered from 1: all of
// them, and under the race detector, out of a soak, every nth, from a random one on,
// that the log names.
func Every(t testing.TB, n int) (first, step int) {
	t.Helper()
	if !Race || Soak() > 0 || n <= 1 {
		return 1, 1
	}
	first = 1 + rand.IntN(n)
	t.Logf("under the race detector: every %dth case, from number %d on", n, first)
	return first, n
}
