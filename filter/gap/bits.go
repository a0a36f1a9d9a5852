package gap

import "math/bits"

type words = [pageWords]uint64

// page is the bits of 32704 blocks in memory. Map.mu guards it.
type page struct {
	bits *words // nil: none; &full: all
	n    int64  // bits that are set
	// changed counts the Adds that set a bit here; what they set up to number
	// written is in the file.
	changed, written uint64
	// stale says that the file's page differs in a way that nobody waits for:
	// it has bits that were removed.
	stale bool
}

// full stands for every page with all bits set, and is never written: a whole
// disk costs no more memory than an empty one.
var full = func() (w words) {
	for i := range w {
		w[i] = ^uint64(0)
	}
	return w
}()

// set sets n bits from bit i on. It returns how many
// were not set before.
func (p *page) set(i, n int64) (added int64) {
	switch {
	case n <= 0 || p.bits == &full:
		return 0
	case p.bits == nil && n < pageBits:
		p.bits = new(words)
	}
	if n == pageBits {
		added = n - p.n
	} else {
		for k := int64(0); n > 0; i, n = i+k, n-k {
			k = min(n, 64-i%64)
			fresh := mask(i, k) &^ p.bits[i/64]
			p.bits[i/64] |= fresh
			added += int64(bits.OnesCount64(fresh))
		}
	}
	if p.n += added; p.n == pageBits {
		p.bits = &full
	}
	return added
}

// unset returns how many bits were set before.
func (p *page) unset(i, n int64) (removed int64) {
	switch {
	case n <= 0 || p.bits == nil:
		return 0
	case p.bits == &full && n < pageBits:
		own := full
		p.bits = &own
	}
	if n == pageBits {
		removed = p.n
	} else {
		for k := int64(0); n > 0; i, n = i+k, n-k {
			k = min(n, 64-i%64)
			gone := mask(i, k) & p.bits[i/64]
			p.bits[i/64] &^= gone
			removed += int64(bits.OnesCount64(gone))
		}
	}
	if p.n -= removed; p.n == 0 {
		p.bits = nil
	}
	return removed
}

// mask has the k bits from bit i of a page on, which lie in one word.
func mask(i, k int64) uint64 { return ^uint64(0) >> (64 - k) << (i % 64) }

// adopt takes what was read of the file; nil if that is nothing.
func (p *page) adopt(w *words) {
	p.bits, p.n = w, 0
	if w == nil {
		return
	}
	for _, x := range w {
		p.n += int64(bits.OnesCount64(x))
	}
	if p.n == pageBits {
		p.bits = &full
	}
}

// scan returns the first bit of [i, end) that is set, or that is not; end if
// there is none.
func (p *page) scan(i, end int64, set bool) int64 {
	switch {
	case p.bits == nil && set, p.bits == &full && !set:
		return end
	case p.bits == nil, p.bits == &full:
		return i
	}
	for i < end {
		w := p.bits[i/64]
		if !set {
			w = ^w
		}
		if w >>= i % 64; w != 0 {
			return min(i+int64(bits.TrailingZeros64(w)), end)
		}
		i = (i/64 + 1) * 64
	}
	return end
}
