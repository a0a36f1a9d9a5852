//go:build race

package ship_test

import "time"

// loadPause slows the load down: under the race detector reading the log takes ten
// times as long as writing it.
const loadPause = 10 * time.Millisecond

// dependencyPoints is how many points TestShipDependency opens.
const dependencyPoints = 30
