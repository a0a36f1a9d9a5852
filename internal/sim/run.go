package sim

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"testing"
	"time"

	"afterimage/hrl"
	"afterimage/internal/sim/simfs"
)

// Budget says how many histories are played.
type Budget struct {
	Seed  uint64        // the only one, if set
	First uint64        // else from this one on
	Seeds int           // so many; 0: as many as Time allows
	Time  time.Duration // and no longer than that
	Steps int
}

// BudgetFromEnv is what SIM_SEED, SIM_SEEDS, SIM_FIRST, SIM_TIME and SIM_STEPS say.
func BudgetFromEnv(t testing.TB) Budget {
	num := func(name string, d uint64) uint64 {
		s := os.Getenv(name)
		if s == "" {
			return d
		}
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	b := Budget{
		Seed: num("SIM_SEED", 0), First: num("SIM_FIRST", 1), Seeds: int(num("SIM_SEEDS", 0)),
		Steps: int(num("SIM_STEPS", 120)), Time: 4 * time.Second,
	}
	if s := os.Getenv("SIM_TIME"); s != "" {
		var err error
		if b.Time, err = time.ParseDuration(s); err != nil {
			t.Fatalf("SIM_TIME: %v", err)
		}
	}
	return b
}

// Run plays histories until the budget is used up or one goes wrong.
func Run(t *testing.T, b Budget) Stats {
	t.Helper()
	keys := newKeys(t)
	warm(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	var sum Stats
	start := time.Now()
	for seed := b.First; ; seed++ {
		if b.Seed != 0 {
			seed = b.Seed
		}
		done := watchdog(seed)
		st, trace, wrong := history(t, seed, keys, b.Steps)
		done()
		sum.add(&st)
		if wrong != nil {
			t.Errorf("%s\nagain: SIM_SEED=%d go test -run 'TestSim$' ./internal/sim\n%v", report(seed, wrong, trace), seed, sum)
			return sum
		}
		if b.Seed != 0 || b.Seeds > 0 && sum.Histories >= b.Seeds || b.Seeds == 0 && time.Since(start) > b.Time {
			return sum
		}
	}
}

// historyMax is how long a history may take, of real time: one that takes longer
// waits for something that will never come.
const historyMax = time.Minute

// watchdog ends the process, naming the seed, if a history does not end.
func watchdog(seed uint64) (done func()) {
	timer := time.AfterFunc(historyMax, func() {
		buf := make([]byte, 1<<20)
		fmt.Fprintf(os.Stderr, "seed %d does not end\n%s\n", seed, buf[:runtime.Stack(buf, true)])
		os.Exit(3)
	})
	return func() { timer.Stop() }
}

// warmLayers writes and reads a layer, so that the decoder they share is made.
func warmLayers() error {
	p := simfs.New(0).Start(0, nil)
	if err := p.MkdirAll("/warm"); err != nil {
		return err
	}
	w, err := hrl.NewLayerWriter(p, "/warm", hrl.LayerInfo{
		Generation: 1, Disk: "disk", Q: hrl.Position{Incarnation: 1, Epoch: 1}, Size: 64 << 10, Kind: hrl.CutCrash,
	})
	if err != nil {
		return err
	}
	if err := w.Data(0, make([]byte, 64<<10)); err != nil {
		return err
	}
	f, err := w.Commit()
	if err != nil {
		return err
	}
	l, err := hrl.OpenLayer(p, f.Path)
	if err != nil {
		return err
	}
	if err := l.Verify(); err != nil {
		return err
	}
	return l.Close()
}
