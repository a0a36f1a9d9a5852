package blockdev

import (
	"time"

	"golang.org/x/sys/unix"
)

// started and startedAt are one moment, for time and for CLOCK_MONOTONIC.
var (
	started   = time.Now()
	startedAt = clockMonotonic()
)

func clockMonotonic() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic("the system has no monotonic clock: " + err.Error())
	}
	return ts.Nano()
}

// Monotonic is CLOCK_MONOTONIC in nanoseconds, the clock of Request.Arrived. It
// takes no system call.
func Monotonic() int64 { return startedAt + int64(time.Since(started)) }
