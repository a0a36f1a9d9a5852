//go:build !race

package ship_test

import "time"

// loadPause keeps the load at what a fast disk takes, not at what memory does.
const loadPause = time.Millisecond

// dependencyPoints is how many points TestShipDependency opens.
const dependencyPoints = 100
