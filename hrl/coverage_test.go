package hrl

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestCoverageModel: take gives exactly the sectors of the window that were not
// taken before, in order and joined.
func TestCoverageModel(t *testing.T) {
	const disk = 6 * regionBytes
	rng := rand.New(rand.NewPCG(1, 2))
	var c coverage
	for round := range 40 {
		sector := func() int64 { return rng.Int64N(disk/sectorBytes + 1) }
		lo, hi := int64(0), int64(disk)
		if round > 0 {
			a, b := sector(), sector()
			lo, hi = min(a, b)*sectorBytes, max(a, b)*sectorBytes
		}
		c.reset(lo, hi)
		seen := make([]bool, disk/sectorBytes)
		for range 60 {
			off := sector()
			n := rng.Int64N(200)
			switch rng.IntN(8) {
			case 0: // whole regions, exactly
				off = rng.Int64N(6) * regionSectors
				n = rng.Int64N(3) * regionSectors
			case 1:
				n = rng.Int64N(disk / sectorBytes)
			case 2: // across the window's edges
				off = max(0, []int64{lo, hi}[rng.IntN(2)]/sectorBytes-rng.Int64N(100))
			}
			n = min(n, disk/sectorBytes-off)
			var want []span
			for s := max(off, lo/sectorBytes); s < min(off+n, hi/sectorBytes); s++ {
				if seen[s] {
					continue
				}
				seen[s] = true
				if m := len(want); m > 0 && want[m-1].off+want[m-1].len == s*sectorBytes {
					want[m-1].len += sectorBytes
				} else {
					want = append(want, span{s * sectorBytes, sectorBytes})
				}
			}
			before := []span{{1, 2}} // must stay
			got := c.take(off*sectorBytes, n*sectorBytes, before)
			if got[0] != before[0] || !slices.Equal(got[1:], want) {
				t.Fatalf("round %d, window [%d,%d): take(%d, %d) = %v, not %v", round, lo, hi, off, n, got[1:], want)
			}
		}
	}
}

// TestRegions: the set against a map, its windows hold every region once, in
// order and never more than the limit, and any agrees.
func TestRegions(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var r, other regions
		model := map[int64]bool{}
		for range rng.IntN(12) {
			off := rng.Int64N(300*regionBytes/sectorBytes) * sectorBytes
			n := rng.Int64N(80 * regionBytes)
			if rng.IntN(2) == 0 {
				n = rng.Int64N(3)
			}
			to := &r
			if rng.IntN(3) == 0 {
				to = &other
			}
			to.add(off, n)
			for g := off / regionBytes; n > 0 && g <= (off+n-1)/regionBytes; g++ {
				model[g] = true
			}
		}
		r.addAll(&other)
		limit := 1 + rng.IntN(50)
		end, found := int64(0), 0
		err := r.windows(limit, func(lo, hi int64) error {
			if lo < end || hi <= lo {
				t.Fatalf("window [%d,%d) after %d", lo, hi, end)
			}
			n := 0
			for g := lo / regionBytes; g < hi/regionBytes; g++ {
				if model[g] {
					n++
				}
				if got := r.any(g*regionBytes, (g+1)*regionBytes); got != model[g] {
					t.Fatalf("any of region %d: %v", g, got)
				}
			}
			if n == 0 || n > limit || !r.any(lo, hi) {
				t.Fatalf("window with %d regions, limit %d", n, limit)
			}
			for g := end / regionBytes; g < lo/regionBytes; g++ {
				if model[g] {
					t.Fatalf("region %d is in no window", g)
				}
			}
			if r.any(end, lo) {
				t.Fatal("any finds a region between windows")
			}
			end, found = hi, found+n
			return nil
		})
		if err != nil || found != len(model) {
			t.Fatalf("windows hold %d regions of %d: %v", found, len(model), err)
		}
	}
}

// TestBlockSetModel: the set against a map of blocks, and its bytes read back.
func TestBlockSetModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	type block struct {
		disk DiskID
		n    int64
	}
	var s BlockSet
	for range 10 {
		model := map[block]bool{}
		for range rng.IntN(20) {
			disk := DiskID(rng.IntN(3))
			off, n := rng.Int64N(3*pageBits*BlockBytes), rng.Int64N(40*BlockBytes)
			if rng.IntN(10) == 0 {
				n = rng.Int64N(2 * pageBits * BlockBytes) // whole pages among them
			}
			s.Add(disk, off, n)
			for b := off / BlockBytes; n > 0 && b <= (off+n-1)/BlockBytes; b++ {
				model[block{disk, b}] = true
			}
		}
		enc := s.Append(nil)
		if len(enc) > s.encodedMax(0) {
			t.Fatalf("%d bytes, %d were said to be the most", len(enc), s.encodedMax(0))
		}
		var back BlockSet
		if err := eachRun(enc, back.Add); err != nil {
			t.Fatal(err)
		}
		for _, set := range []*BlockSet{&s, &back} {
			if set.Bytes() != int64(len(model))*BlockBytes {
				t.Fatalf("%d bytes, not %d blocks", set.Bytes(), len(model))
			}
			set.Runs(func(disk DiskID, off, length int64) {
				for b := off; b < off+length; b += BlockBytes {
					if !model[block{disk, b / BlockBytes}] || !set.Has(disk, b) {
						t.Fatalf("block %d of disk %d is too much", b/BlockBytes, disk)
					}
				}
			})
		}
		s.Reset()
		if !s.Empty() || s.Bytes() != 0 || s.Append(nil) != nil {
			t.Fatal("not empty after Reset")
		}
	}
}

// TestLargeDisk: all of the largest disk costs little.
func TestLargeDisk(t *testing.T) {
	var s BlockSet
	s.Add(0, 0, diskBytesMax)
	if s.Bytes() != diskBytesMax || len(s.Append(nil)) > 32 {
		t.Fatalf("%d bytes", s.Bytes())
	}
}
