package bench

import (
	"math"
	"slices"
)

// A Figure is one quantity over the rounds.
type Figure struct {
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	Rounds []float64 `json:"rounds"` // in the order of the rounds
}

// figure sums up what the rounds gave; it is zero if there was none.
func figure(rounds []float64) Figure {
	if len(rounds) == 0 {
		return Figure{Rounds: []float64{}}
	}
	return Figure{median(rounds), slices.Min(rounds), slices.Max(rounds), rounds}
}

// median is the middle value, or the mean of the middle two.
func median(xs []float64) float64 {
	s := slices.Sorted(slices.Values(xs))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// Spread is how far the rounds lie apart, as a share of the median.
func (f Figure) Spread() float64 {
	if f.Median == 0 {
		return 0
	}
	return (f.Max - f.Min) / f.Median
}

// ratios divides round by round, so that what slows a whole round cancels out.
func ratios(a, b []float64) []float64 {
	r := make([]float64, min(len(a), len(b)))
	for i := range r {
		if b[i] > 0 {
			r[i] = a[i] / b[i]
		}
	}
	return r
}

// A Band is the range of ratios that this machine gives for equal servers.
type Band struct {
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

// band is made from the ratios of a server to itself: the one furthest from 1,
// either way. It is symmetric, since which of the two was the slower is chance.
func band(self []float64) Band {
	far := 0.0
	for _, r := range self {
		if r > 0 {
			far = max(far, math.Abs(math.Log(r)))
		}
	}
	return Band{math.Exp(-far), math.Exp(far)}
}

// Holds says that a ratio may be chance.
func (b Band) Holds(ratio float64) bool { return b.Low <= ratio && ratio <= b.High }
