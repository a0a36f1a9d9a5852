package hot

import "sync/atomic"

// A cell is one extent in memory: its state, and how many writers are counted
// in. Both are one word, so that a writer counts itself in and looks in one
// step, and whoever takes hot away can do so only while nobody is counted in
// (RULES D1).
//
//	         Mark            committed
//	cold ──────────▶ marking ──────────▶ hot ◀───────────── Enter
//	  ▲                                   │                   │
//	  │ committed             Cooling, and nobody counted in  │
//	  │                                   ▼                   │
//	clearing ◀─────────────────────────── idle ───────────────┘
//	          Cleared, and still idle
//
// Only hot and idle admit writers, and idle ceases to be by doing so. The way
// from idle to hot is Enter's, without a lock; every other is taken with Map.mu held.
const (
	cold = iota
	marking
	hot
	idle
	clearing

	stateMask = 7
	writer    = 8 // one of them counted in
)

const (
	chunkShift = 16
	chunkCells = 1 << chunkShift // 256 KiB, of which the kernel gives only what is touched
)

type chunk [chunkCells]atomic.Uint32

// growCells returns the chunks for so many extents; those that exist stay where
// they are, for writers are counted in them.
func growCells(chunks []*chunk, extents int64) []*chunk {
	grown := append([]*chunk(nil), chunks...)
	for int64(len(grown))<<chunkShift < extents {
		grown = append(grown, new(chunk))
	}
	return grown
}

func (m *Map) cell(i int64) *atomic.Uint32 {
	return &(*m.chunks.Load())[i>>chunkShift][i&(chunkCells-1)]
}

// turn changes the state, whoever is counted in, and reports whether it was from.
func turn(c *atomic.Uint32, from, to uint32) bool {
	for {
		v := c.Load()
		if v&stateMask != from {
			return false
		}
		if c.CompareAndSwap(v, v&^stateMask|to) {
			return true
		}
	}
}

// turnUnused is turn for a cell that nobody is counted into at that instant.
func turnUnused(c *atomic.Uint32, from, to uint32) bool { return c.CompareAndSwap(from, to) }
