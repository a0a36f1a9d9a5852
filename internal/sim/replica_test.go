package sim

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"afterimage/blockdev"
)

// TestKilledThenPowerCut ends the replica in each operation of taking a point, starts it,
// and cuts its power: what it then listed stays listed (seed 899 of FOUND.md).
func TestKilledThenPowerCut(t *testing.T) {
	keys := newKeys(t)
	warm(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for k := range 300 {
		n, seed := 1+k/5, uint64(k%5)
		var wrong error
		var trace []string
		synctest.Test(t, func(t *testing.T) {
			const block = 64 << 10
			w := newWorld(t, seed, keys, diskSpec{3 * block, blockdev.Info{BlockSize: 512}})
			w.plain = true
			defer func() {
				w.close()
				wrong, trace = w.err, w.trace
			}()
			w.startReplica(0)
			w.startPrimary(0)
			w.letter('w')
			w.letter('a')
			w.letter('o')
			w.sec.proc.DieAfter(n)
			_, _ = w.sync(time.Second / 2)
			for _, power := range []bool{false, true} {
				w.crashReplica(power)
				w.startReplica(0)
			}
			if !w.failed() {
				w.finish()
			}
		})
		if wrong != nil {
			t.Fatalf("operation %d, seed %d: %s", n, seed, report(0, wrong, trace))
		}
	}
}
