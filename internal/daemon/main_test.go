package daemon

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails if a goroutine outlives the tests: every one has an owner.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
