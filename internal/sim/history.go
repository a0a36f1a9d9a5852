package sim

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"afterimage/blockdev"
)

// history plays the history of a seed and returns what it did, and what was wrong.
func history(t *testing.T, seed uint64, keys *keys, steps int) (out Stats, trace []string, wrong error) {
	synctest.Test(t, func(t *testing.T) {
		w := newHistory(t, seed, keys)
		defer func() {
			w.close()
			w.stats.Histories = 1
			out, trace, wrong = w.stats, w.trace, w.err
		}()
		w.play(steps)
		if !w.failed() {
			w.finish()
		}
	})
	return out, trace, wrong
}

// newHistory makes the world of a seed.
func newHistory(t *testing.T, seed uint64, keys *keys) *world {
	w := newWorld(t, seed, keys)
	r := w.rng
	var specs []diskSpec
	for i := range 1 + r.IntN(3) {
		s := diskSpec{size: int64(8+r.IntN(12)) * (64 << 10)}
		s.info = blockdev.Info{BlockSize: 512, CheapZero: true, CheapTrim: r.IntN(3) > 0, Slow: r.IntN(3) == 0}
		if i == 0 && r.IntN(3) == 0 {
			s.size = int64(11+r.IntN(8)) << 20 // more extents than may be hot
		}
		if i > 0 {
			s.size += int64(r.IntN(4)) * 4096
		}
		if i > 0 && r.IntN(3) == 0 {
			s.info.BlockSize = 4096
		}
		specs = append(specs, s)
	}
	id := w.id
	w = newWorld(t, seed, keys, specs...)
	w.id = id
	w.keep = 2 + r.IntN(5)
	w.quota = int64(20+4*r.IntN(8)) << 20
	w.every = []time.Duration{time.Hour, 20 * time.Millisecond, 200 * time.Millisecond, 2 * time.Second}[r.IntN(4)]
	return w
}

// warm makes what the product makes once for all: it must not belong to a bubble.
func warm(t *testing.T) {
	if err := warmLayers(); err != nil {
		t.Fatal(err)
	}
}

// report is what is printed of a history that went wrong.
func report(seed uint64, wrong error, trace []string) string {
	if n := len(trace); n > 400 {
		trace = trace[n-400:]
	}
	return fmt.Sprintf("seed %d: %v\n%s\nseed %d: %v", seed, wrong, strings.Join(trace, "\n"), seed, wrong)
}
