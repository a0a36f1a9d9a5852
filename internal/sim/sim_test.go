package sim

import (
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"
)

// TestSim plays random histories; see Budget.
func TestSim(t *testing.T) {
	st := Run(t, BudgetFromEnv(t))
	t.Log(st)
}

// longer are sequences that found something, or find a mutant.
var longer = []string{
	"waxcra", // a restart among copies
	"waxka",  // a kill before the log has said what it lacks
	"woFaka", "woxaFaka", "waxbDa", "waxbDka", "wagbDa", "wagbkaa", "wagbpaa", "wagbKa", "wagbPa", "wasoka", "wasopa", "wasozKa", "watgbta",
	"woaBaFka", "waBaFka", // a failed sync, and the log no longer has what it was of
	"waAa", "wafAakA",
}

// TestSmall plays all sequences of SIM_SMALL letters, else of two; SIM_SEQUENCE is
// the only one that is played.
func TestSmall(t *testing.T) {
	n := 2
	if s := os.Getenv("SIM_SMALL"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	keys := newKeys(t)
	warm(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	var sum Stats
	play := func(s string) bool {
		defer watchdog(0)()
		st, trace, wrong := short(t, s, keys)
		sum.add(&st)
		if wrong != nil {
			t.Errorf("%s\nagain: SIM_SEQUENCE=%s go test -run TestSmall ./internal/sim", report(0, wrong, trace), s)
		}
		return wrong == nil
	}
	begin := time.Now()
	if s := os.Getenv("SIM_SEQUENCE"); s != "" {
		play(s)
	} else {
		for _, s := range longer {
			play(s)
		}
		sequences(n, play)
	}
	t.Log(sum, time.Since(begin).Round(time.Millisecond))
}

// TestFound replays what FOUND.md has.
func TestFound(t *testing.T) {
	keys := newKeys(t)
	warm(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for _, s := range []string{"waxcra", "waxka"} {
		if _, trace, wrong := short(t, s, keys); wrong != nil {
			t.Errorf("sequence %s: %s", s, report(0, wrong, trace))
		}
	}
}
