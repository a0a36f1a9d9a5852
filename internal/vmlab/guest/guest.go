// Package guest is for programs that may run inside the VM lab's guest.
package guest

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"

	"afterimage/internal/vmlab/wire"
)

// Inside reports whether this program runs in the guest.
func Inside() bool { return os.Getenv(wire.GuestVariable) != "" }

var events = sync.OnceValue(func() *os.File {
	// A child that inherits it would keep the lab waiting for its end.
	syscall.CloseOnExec(wire.EventFD)
	return os.NewFile(wire.EventFD, "events")
})

// Event tells the test outside that something has happened, in one line. It is
// on its way when Event returns, and gets lost if the power is cut before it is
// out: what a test has heard of has happened, and not the other way round.
//
// It panics where it cannot tell: the test would wait in vain.
func Event(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	if strings.ContainsRune(line, '\n') {
		panic(fmt.Sprintf("guest: the event %q is more than a line", line))
	}
	if !Inside() {
		panic(fmt.Sprintf("guest: the event %q, but this is no guest of a VM lab", line))
	}
	if _, err := events().WriteString(line + "\n"); err != nil {
		panic(fmt.Sprintf("guest: the event %q: %v", line, err))
	}
}
