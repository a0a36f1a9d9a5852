//go:build !race

package ship_test

import "time"

// loadPause keeps the load at what a fast disk takes, not at what memory does.
const loadPause = time.Millisecond
