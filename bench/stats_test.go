package bench

import (
	"math"
	"slices"
	"testing"
)

func TestFigure(t *testing.T) {
	for _, tt := range []struct {
		rounds           []float64
		median, min, max float64
		spread           float64
	}{
		{nil, 0, 0, 0, 0},
		{[]float64{5}, 5, 5, 5, 0},
		{[]float64{4, 2}, 3, 2, 4, 2.0 / 3},
		{[]float64{9, 1, 5}, 5, 1, 9, 8.0 / 5},
		{[]float64{8, 2, 4, 6}, 5, 2, 8, 6.0 / 5},
		{[]float64{0, 0}, 0, 0, 0, 0},
	} {
		given := slices.Clone(tt.rounds)
		f := figure(tt.rounds)
		if f.Median != tt.median || f.Min != tt.min || f.Max != tt.max || f.Spread() != tt.spread {
			t.Errorf("%v: %+v, spread %v", tt.rounds, f, f.Spread())
		}
		if !slices.Equal(tt.rounds, given) || !slices.Equal(f.Rounds, given) {
			t.Errorf("%v: the order of the rounds is lost", given)
		}
	}
}

func TestRatios(t *testing.T) {
	for _, tt := range []struct{ a, b, want []float64 }{
		{nil, nil, []float64{}},
		{[]float64{1, 9}, []float64{2, 3}, []float64{0.5, 3}},
		{[]float64{1, 9, 4}, []float64{2}, []float64{0.5}},
		{[]float64{1}, []float64{0}, []float64{0}},
	} {
		if got := ratios(tt.a, tt.b); !slices.Equal(got, tt.want) {
			t.Errorf("ratios(%v, %v) = %v, want %v", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestBand(t *testing.T) {
	for _, tt := range []struct {
		self      []float64
		low, high float64
	}{
		{nil, 1, 1},
		{[]float64{1, 1}, 1, 1},
		{[]float64{1.25, 0.9}, 0.8, 1.25},
		{[]float64{1.1, 0.5}, 0.5, 2},
		{[]float64{0, 1.25}, 0.8, 1.25}, // a round without a figure says nothing
	} {
		b := band(tt.self)
		if math.Abs(b.Low-tt.low) > 1e-9 || math.Abs(b.High-tt.high) > 1e-9 {
			t.Errorf("band(%v) = %v, want %v to %v", tt.self, b, tt.low, tt.high)
		}
	}
	b := Band{0.8, 1.25}
	for ratio, want := range map[float64]bool{0.79: false, 0.8: true, 1: true, 1.25: true, 1.26: false} {
		if b.Holds(ratio) != want {
			t.Errorf("%v holds %v: %v", b, ratio, !want)
		}
	}
}

func TestOrder(t *testing.T) {
	differ := false
	for seed := range 10 {
		o := order(8, seed)
		if !slices.Equal(o, order(8, seed)) {
			t.Errorf("seed %d gives two orders", seed)
		}
		differ = differ || !slices.Equal(o, order(8, seed+1))
		slices.Sort(o)
		if !slices.Equal(o, []int{0, 1, 2, 3, 4, 5, 6, 7}) {
			t.Errorf("seed %d: not each server once: %v", seed, o)
		}
	}
	if !differ {
		t.Error("every round has the same order")
	}
}
