package hrl

import (
	"math/bits"
	"sort"
)

const (
	// regionBytes is the part of a disk that one page of a coverage set
	// describes: 16 MiB, a bit for each sector.
	regionBytes   = 16 << 20
	regionSectors = regionBytes / sectorBytes
	regionWords   = regionSectors / 64

	// windowRegions is how many regions a window of the address space may
	// have: 4096 pages, 16 MiB of memory, 64 GiB of touched disk.
	windowRegions = 4096
)

// regions is the set of regions of one disk that frames touch.
type regions struct{ bits []uint64 }

func (r *regions) add(off, length int64) {
	if length <= 0 {
		return
	}
	first, last := off/regionBytes, (off+length-1)/regionBytes
	if n := int(last/64) + 1 - len(r.bits); n > 0 {
		r.bits = append(r.bits, make([]uint64, n)...)
	}
	for g := first; g <= last; {
		n := min(last-g+1, 64-g%64)
		r.bits[g/64] |= (^uint64(0) >> (64 - n)) << (g % 64)
		g += n
	}
}

// any reports whether a region of the set lies in [lo, hi), which windows gave.
func (r *regions) any(lo, hi int64) bool {
	for g := lo / regionBytes; g*regionBytes < hi && g/64 < int64(len(r.bits)); {
		w := r.bits[g/64] >> (g % 64)
		if w != 0 {
			return (g+int64(bits.TrailingZeros64(w)))*regionBytes < hi
		}
		g += 64 - g%64
	}
	return false
}

func (r *regions) addAll(o *regions) {
	for len(r.bits) < len(o.bits) {
		r.bits = append(r.bits, 0)
	}
	for i, w := range o.bits {
		r.bits[i] |= w
	}
}

// windows calls visit for ranges of the disk, in order, that together hold all
// the regions and each at most max of them.
func (r *regions) windows(max int, visit func(lo, hi int64) error) error {
	n, lo, last := 0, int64(0), int64(-1)
	for i, w := range r.bits {
		for ; w != 0; w &= w - 1 {
			g := int64(i*64 + bits.TrailingZeros64(w))
			if n == max {
				if err := visit(lo*regionBytes, (last+1)*regionBytes); err != nil {
					return err
				}
				n = 0
			}
			if n == 0 {
				lo = g
			}
			n, last = n+1, g
		}
	}
	if n == 0 {
		return nil
	}
	return visit(lo*regionBytes, (last+1)*regionBytes)
}

// A coverage is the set of sectors of one window that have been seen.
type coverage struct {
	lo, hi int64 // bytes
	pages  map[int64]*[regionWords]uint64
	free   []*[regionWords]uint64
	near   int64 // the region of nearPage
	page   *[regionWords]uint64
}

// fullRegion stands for every page that was filled at once, and is never
// written: zeroing a large disk is one frame, and must not take long here.
var fullRegion = func() (p [regionWords]uint64) {
	for i := range p {
		p[i] = ^uint64(0)
	}
	return p
}()

// reset empties the set for a window.
func (c *coverage) reset(lo, hi int64) {
	if c.pages == nil {
		c.pages = make(map[int64]*[regionWords]uint64)
	}
	for _, p := range c.pages {
		if p != &fullRegion {
			*p = [regionWords]uint64{}
			c.free = append(c.free, p)
		}
	}
	clear(c.pages)
	c.lo, c.hi, c.page = lo, hi, nil
}

func (c *coverage) region(g int64) *[regionWords]uint64 {
	if c.page != nil && c.near == g {
		return c.page
	}
	p := c.pages[g]
	if p == nil {
		if n := len(c.free); n > 0 {
			p, c.free = c.free[n-1], c.free[:n-1]
		} else {
			p = new([regionWords]uint64)
		}
		c.pages[g] = p
	}
	c.near, c.page = g, p
	return p
}

// A span is a range of bytes of a disk.
type span struct{ off, len int64 }

// take adds the range, as far as it lies in the window, to the set, and appends
// to runs what of it was not in the set before, in order.
func (c *coverage) take(off, length int64, runs []span) []span {
	lo, hi := max(off, c.lo), min(off+length, c.hi)
	first := len(runs)
	for lo < hi {
		g := lo / regionBytes
		end := min(hi, (g+1)*regionBytes)
		if end-lo == regionBytes && c.pages[g] == nil {
			c.pages[g] = &fullRegion
			if m := len(runs); m > first && runs[m-1].off+runs[m-1].len == lo {
				runs[m-1].len += regionBytes
			} else {
				runs = append(runs, span{lo, regionBytes})
			}
			lo = end
			continue
		}
		p := c.region(g)
		if p == &fullRegion {
			lo = end
			continue
		}
		base := g * regionBytes
		at, to := (lo-base)/sectorBytes, (end-base)/sectorBytes
		for at < to {
			w, i := at/64, at%64
			n := min(64-i, to-at)
			mask := (^uint64(0) >> (64 - n)) << i
			fresh := mask &^ p[w]
			p[w] |= mask
			for fresh != 0 {
				z := int64(bits.TrailingZeros64(fresh))
				k := int64(bits.TrailingZeros64(^(fresh >> z)))
				o := base + (w*64+z)*sectorBytes
				if m := len(runs); m > first && runs[m-1].off+runs[m-1].len == o {
					runs[m-1].len += k * sectorBytes
				} else {
					runs = append(runs, span{o, k * sectorBytes})
				}
				if z+k == 64 {
					break
				}
				fresh &^= (uint64(1)<<k - 1) << z
			}
			at += n
		}
		lo = end
	}
	return runs
}

// sortSpans sorts the ranges and joins those that touch.
func sortSpans(s []span) []span {
	sort.Slice(s, func(i, j int) bool { return s[i].off < s[j].off })
	out := s[:0]
	for _, r := range s {
		if n := len(out); n > 0 && r.off <= out[n-1].off+out[n-1].len {
			out[n-1].len = max(out[n-1].len, r.off+r.len-out[n-1].off)
			continue
		}
		out = append(out, r)
	}
	return out
}
