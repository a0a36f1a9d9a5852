//go:build race

package testenv

// Race says that the race detector is at work.
const Race = true
