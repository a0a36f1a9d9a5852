package hot

import "math/bits"

// bitmap is the table: a bit for each extent, in whole slices.
type bitmap []uint64

func newBitmap(extents int64) bitmap { return make(bitmap, slicesFor(extents)*sliceWords) }

func (b bitmap) has(i int64) bool { return b[i/64]&(1<<(i%64)) != 0 }

func (b bitmap) set(r run)   { b.each(r, func(w *uint64, mask uint64) { *w |= mask }) }
func (b bitmap) unset(r run) { b.each(r, func(w *uint64, mask uint64) { *w &^= mask }) }

func (b bitmap) each(r run, change func(w *uint64, mask uint64)) {
	for i := r.first; i < r.end(); {
		n := min(64-i%64, r.end()-i)
		change(&b[i/64], ^uint64(0)>>(64-n)<<(i%64))
		i += n
	}
}

// next is the first extent from i on, before end, that is marked; end if none is.
func (b bitmap) next(i, end int64) int64 {
	for i < end {
		if w := b[i/64] >> (i % 64); w != 0 {
			return min(i+int64(bits.TrailingZeros64(w)), end)
		}
		i += 64 - i%64
	}
	return end
}

// runs returns what is marked of the first n extents.
func (b bitmap) runs(n int64) []run {
	var out []run
	for i := b.next(0, n); i < n; i = b.next(i+1, n) {
		out = appendExtent(out, i)
	}
	return out
}

// appendExtent adds an extent to runs, to the last one if it goes on from there.
func appendExtent(rs []run, i int64) []run {
	if n := len(rs); n > 0 && rs[n-1].end() == i {
		rs[n-1].n++
		return rs
	}
	return append(rs, run{i, 1})
}

func count(rs []run) (n int64) {
	for _, r := range rs {
		n += r.n
	}
	return n
}

// grown is a copy with room for so many extents.
func (b bitmap) grown(extents int64) bitmap {
	g := newBitmap(extents)
	copy(g, b)
	return g
}
