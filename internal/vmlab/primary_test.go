package vmlab

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"afterimage/internal/testenv"
)

const primaryPackage = "./testdata/primary"

// TestLabPrimaryPowerCut cuts the power under a VM that is replicated, again and again,
// of a disk that loses what was not flushed: what the guest had flushed is there, only
// what was hot or in the log is compared, and the next point equals the disk.
func TestLabPrimaryPowerCut(t *testing.T) {
	rounds := 3
	if n := testenv.Soak(); n > 0 {
		rounds = 20 * n
	}
	lab := New(t, Options{
		Modules: []string{"ext4"}, Tests: []string{primaryPackage}, MemoryMB: 1024, Timeout: 10 * time.Minute,
		Drives: []Drive{{Name: "data", Volatile: NewVolatileDisk(t, formattedOf(t, 512<<20))}},
	})
	for round := 1; round <= rounds; round++ {
		env := fmt.Sprintf("ROUND=%d", round)
		p := lab.Boot().StartTest(primaryPackage, "TestLoad", env)
		flushed, points, want := 0, 0, 2+rand.N(3)
		for e := range p.Events() {
			if e == "point" {
				points++
			}
			_, _ = fmt.Sscanf(e, "flushed %d", &flushed)
			if points > want && flushed > 0 {
				break
			}
		}
		time.Sleep(rand.N(300 * time.Millisecond))
		lab.running.PowerCut()
		for e := range p.Events() {
			_, _ = fmt.Sscanf(e, "flushed %d", &flushed)
		}
		if r := p.Wait(); !r.Lost {
			t.Fatalf("round %d had ended: %+v", round, r)
		}
		vm := lab.Boot()
		vm.Test(t, primaryPackage, "TestAfter", env, fmt.Sprintf("FLUSHED=%d", flushed))
		vm.PowerOff()
		if t.Failed() {
			t.Fatalf("round %d, %d writes flushed", round, flushed)
		}
		t.Logf("round %d: %d writes were flushed, %d points listed", round, flushed, points)
	}
}
