// Package outside has tests with a guest that fail, each in its own way. The
// lab's own tests run them and look at what they say.
package outside

import (
	"testing"
	"time"

	"afterimage/internal/vmlab"
)

func TestGood(t *testing.T) { vmlab.GoTest(t, "../inside", "TestGood", vmlab.Options{}) }

func TestBad(t *testing.T) { vmlab.GoTest(t, "../inside", "TestGood|TestBad", vmlab.Options{}) }

func TestDies(t *testing.T) { vmlab.GoTest(t, "../inside", "TestDies", vmlab.Options{}) }

func TestNone(t *testing.T) { vmlab.GoTest(t, "../inside", "TestNobody", vmlab.Options{}) }

// TestPanics is as good as its guest's kernel is.
func TestPanics(t *testing.T) {
	vm := vmlab.New(t, vmlab.Options{Programs: []string{"sh"}}).Boot()
	vm.Run("sh", "-c", "echo c >/proc/sysrq-trigger")
}

func TestOverdue(t *testing.T) {
	vm := vmlab.New(t, vmlab.Options{Programs: []string{"sleep"}, Timeout: 8 * time.Second}).Boot()
	vm.Run("sleep", "1000")
}

func TestNoModule(t *testing.T) {
	vmlab.New(t, vmlab.Options{Modules: []string{"nosuch"}})
}

func TestBadParameter(t *testing.T) {
	vmlab.New(t, vmlab.Options{Modules: []string{"nbd nbds_max=many"}}).Boot()
}

// TestKilled says that its guest is up, and waits for the end of this process.
func TestKilled(t *testing.T) {
	vm := vmlab.New(t, vmlab.Options{Programs: []string{"sleep"}}).Boot()
	println("up")
	vm.Run("sleep", "1000")
}
