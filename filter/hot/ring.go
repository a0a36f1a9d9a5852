package hot

import (
	"errors"
	"fmt"
)

// contents is what a ring says: the marks, and the ranges.
type contents struct {
	table  bitmap
	ranges []run
	all    bool  // it cannot be told what is marked: everything is
	damage error // why, or why parts of the table are marked as a whole
}

// fill makes every slot of a ring a transaction without updates, numbered
// from 1 on, so that whatever is not a transaction later is damage.
func (c *contents) fill(b []byte, salt *[16]byte, slot int64) {
	seed := ringSeed(salt)
	t := transaction{ranges: c.ranges}
	for ; len(b) > 0; b, slot = b[txBytes:], slot+1 {
		t.number = uint64(slot + 1)
		t.slice = c.slice(t.number)
		t.encode(b[:txBytes], seed)
	}
}

// slice is the part of the table that the transaction of that number has.
func (c *contents) slice(number uint64) [sliceWords]uint64 {
	at := int64((number - 1) % uint64(len(c.table)/sliceWords))
	return [sliceWords]uint64(c.table[at*sliceWords:])
}

// slotOf is what a slot holds.
type slotOf struct {
	newest, oldest uint64 // numbers in its sectors; 0: one of them is damaged
}

func (s slotOf) whole(n uint64) bool { return s.newest == n && s.oldest == n }

// look reads slot i of the ring.
func look(ring []byte, i int, seed uint32) slotOf {
	b, slots := ring[i*txBytes:(i+1)*txBytes], uint64(len(ring)/txBytes)
	s := slotOf{oldest: ^uint64(0)}
	for place := range txSectors {
		n := sectorNumber(b[place*sectorBytes:(place+1)*sectorBytes], place, seed)
		if n == 0 || (n-1)%slots != uint64(i) {
			return slotOf{}
		}
		s.newest, s.oldest = max(s.newest, n), min(s.oldest, n)
	}
	return s
}

// readRing reads a ring of slotsFor(extents) transactions.
//
// Commits are made one after the other, each durable before the next begins.
// With N the newest whole number, the slots therefore hold, from N backwards,
//
//	N  N-1  ...  N-slots+2  and in the last one  N-slots+1
//	                                         or  N-slots+1 and N+1, torn
//
// A torn N+1 was being written when the power went: nobody was told that it was
// durable, so nothing depends on what it says. Everything else is damage. Of a damaged
// transaction within the series it is not known which extents it marked, so
// every slice that has not been rewritten since reads as marked. In the last slot
// damage may be an N+1 that was durable: then everything is marked. So a mark
// that was durable is never lost, whichever sectors are damaged.
func readRing(b []byte, salt *[16]byte, extents int64) contents {
	slots := uint64(len(b) / txBytes)
	seed := ringSeed(salt)
	c := contents{table: newBitmap(extents)}
	found := make([]slotOf, slots)
	var newest uint64
	for i := range found {
		found[i] = look(b, i, seed)
		if n := found[i].newest; found[i].whole(n) {
			newest = max(newest, n)
		}
	}
	if newest < slots {
		// Not even what the ring was filled with is there.
		c.all, c.damage = true, errors.New("no transaction is readable")
		return c
	}
	oldest := newest - slots + 1
	if last := found[newest%slots]; !last.whole(oldest) && (last.newest != newest+1 || last.oldest != oldest) {
		c.all, c.damage = true, fmt.Errorf("transaction %d: %w", newest+1, errChecksum)
		return c
	}
	// From first on, every slice comes once; from from on, nothing is damaged.
	slices := uint64(slicesFor(extents))
	first := newest - slices + 1
	from := first
	txs := make([]transaction, slices)
	for n := newest; n >= first; n-- {
		err := errChecksum
		if at := (n - 1) % slots; found[at].whole(n) {
			err = txs[n-first].decode(b[at*txBytes:(at+1)*txBytes], extents)
		}
		if err != nil {
			c.damage = fmt.Errorf("transaction %d: %w", n, err)
			from = n + 1
			break
		}
	}
	if from > newest {
		c.all = true // the ranges are not known either
		return c
	}
	for n := from; n <= newest; n++ {
		t := &txs[n-first]
		at := (n - 1) % slices
		copy(c.table[at*sliceWords:], t.slice[:])
		for _, u := range t.updates {
			if u.clear {
				c.table.unset(u.run)
			} else {
				c.table.set(u.run)
			}
		}
		c.ranges = t.ranges
	}
	for n := first; n < from; n++ {
		c.table.set(run{int64((n-1)%slices) * sliceBits, sliceBits})
	}
	// The last slice may reach beyond the disk.
	c.table.unset(run{extents, int64(len(c.table))*64 - extents})
	return c
}
