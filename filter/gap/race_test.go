//go:build race

package gap

const raceEnabled = true
