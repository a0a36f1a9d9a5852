package simfs

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"slices"
)

const (
	sector    = 512
	pageBytes = 4096
)

// An inode is a file or a disk, whatever its name. It knows of every sector what a
// power cut may leave: what is durable, and what was written since.
type inode struct {
	size    int64
	durable int64           // the size that a power cut leaves at the least
	pages   map[int64]*page // what processes see; absent: zeroes
	pending map[int64]*cell // by sector; absent: what is seen is durable
	failed  bool            // a sync failed: pages may go back to what is on the platter
	user    *Process        // who has it locked
}

type page [pageBytes]byte

// A cell is a sector of which more than one version may be on the platter.
type cell struct {
	durable  []byte // nil: zeroes
	versions []version
}

type version struct {
	data []byte // nil: zeroes
	end  uint64 // the clock when its write had ended; 0: it has not
	lost bool   // a sync that should have made it durable failed
}

func newInode() *inode {
	return &inode{pages: map[int64]*page{}, pending: map[int64]*cell{}}
}

// read fills p with what is seen at off; beyond the end there are zeroes.
func (n *inode) read(p []byte, off int64) {
	for len(p) > 0 {
		at := off % pageBytes
		k := min(int64(len(p)), pageBytes-at)
		if pg := n.pages[off/pageBytes]; pg != nil {
			copy(p[:k], pg[at:])
		} else {
			clear(p[:k])
		}
		p, off = p[k:], off+k
	}
}

// store changes what is seen; a nil p of n bytes are zeroes.
func (n *inode) store(p []byte, off, length int64) {
	for length > 0 {
		at := off % pageBytes
		k := min(length, pageBytes-at)
		pg := n.pages[off/pageBytes]
		switch {
		case p == nil && k == pageBytes:
			delete(n.pages, off/pageBytes)
		case p == nil && pg == nil:
		default:
			if pg == nil {
				pg = new(page)
				n.pages[off/pageBytes] = pg
			}
			if p == nil {
				clear(pg[at : at+k])
			} else {
				copy(pg[at:], p[:k])
			}
		}
		if p != nil {
			p = p[k:]
		}
		off, length = off+k, length-k
	}
}

// write changes the range and remembers, of every sector, a version more. It
// returns the number by which end and makeDurable know it.
func (n *inode) write(p []byte, off, length int64, end uint64) {
	if length == 0 {
		return
	}
	if n.blank(p, off, length) {
		n.size = max(n.size, off+length)
		return
	}
	if p != nil {
		p = slices.Clone(p)
	}
	first, last := off/sector, (off+length-1)/sector
	var whole []byte
	if p != nil || off%sector != 0 || length%sector != 0 {
		whole = make([]byte, (last-first+1)*sector)
	}
	for s := first; s <= last; s++ {
		if n.pending[s] == nil {
			old := make([]byte, sector)
			n.read(old, s*sector)
			if zero(old) {
				old = nil
			}
			n.pending[s] = &cell{durable: old}
		}
	}
	n.store(p, off, length)
	n.size = max(n.size, off+length)
	if whole != nil {
		n.read(whole, first*sector)
	}
	for s := first; s <= last; s++ {
		v := version{end: end}
		if whole != nil {
			v.data = whole[(s-first)*sector : (s-first+1)*sector]
		}
		c := n.pending[s]
		c.versions = append(c.versions, v)
	}
}

// blank reports whether zeroes are written to what never was anything else.
func (n *inode) blank(p []byte, off, length int64) bool {
	if length < 64<<10 || p != nil && !zero(p) {
		return false
	}
	for at := off; at < off+length; at += pageBytes {
		if n.pages[at/pageBytes] != nil {
			return false
		}
	}
	for s := off / sector; s*sector < off+length && len(n.pending) > 0; s++ {
		if n.pending[s] != nil {
			return false
		}
	}
	return n.pages[(off+length-1)/pageBytes] == nil
}

// ended says that the write whose versions have no end yet has ended at clock. A
// range has one such write at a time, or it does not matter which.
func (n *inode) ended(off, length int64, clock uint64) {
	for s := off / sector; s*sector < off+length; s++ {
		c := n.pending[s]
		if c == nil {
			continue
		}
		for i := range c.versions {
			if c.versions[i].end == 0 {
				c.versions[i].end = clock
				break
			}
		}
	}
}

// settle makes durable what had ended at start, in a range.
func (n *inode) settle(off, length int64, start uint64) {
	if int64(len(n.pending))*sector < length {
		for s := range n.pending {
			if s*sector < off+length && (s+1)*sector > off {
				n.settleSector(s, start)
			}
		}
		return
	}
	for s := off / sector; s*sector < off+length; s++ {
		n.settleSector(s, start)
	}
}

func (n *inode) settleSector(s int64, start uint64) {
	c := n.pending[s]
	if c == nil {
		return
	}
	for i := len(c.versions) - 1; i >= 0; i-- {
		v := &c.versions[i]
		if v.end == 0 || v.end > start || v.lost {
			continue
		}
		c.durable = v.data
		if c.versions = c.versions[i+1:]; len(c.versions) == 0 {
			delete(n.pending, s)
		}
		return
	}
}

// lose is a sync that failed: none of what was written before will be made durable
// by a later one.
func (n *inode) lose() {
	n.failed = n.failed || len(n.pending) > 0
	for _, c := range n.pending {
		for i := range c.versions {
			c.versions[i].lost = true
		}
	}
}

// resize changes the size, durably at once.
func (n *inode) resize(size int64) {
	if size < n.size {
		if at := size % pageBytes; at != 0 {
			n.store(nil, size, min(pageBytes-at, n.size-size))
		}
		maps.DeleteFunc(n.pages, func(k int64, _ *page) bool { return k*pageBytes >= size })
		maps.DeleteFunc(n.pending, func(s int64, _ *cell) bool { return s*sector >= size })
	}
	n.size, n.durable = size, size
}

// powerCut leaves of every sector one version, and knows it for durable.
func (n *inode) powerCut(rng *rand.Rand) {
	size := n.size
	if n.size > n.durable && rng.IntN(3) == 0 {
		size = n.durable
	}
	// All or nothing is as likely as anything between.
	style := rng.IntN(4)
	for _, s := range slices.Sorted(maps.Keys(n.pending)) {
		c := n.pending[s]
		keep := rng.IntN(len(c.versions) + 1)
		switch {
		case style == 0:
			keep = 0
		case style == 1:
			keep = len(c.versions)
		}
		n.revert(s, c, keep)
	}
	clear(n.pending)
	n.resize(size)
	n.failed, n.user = false, nil
}

// evict drops pages whose writing back has failed: what is on the platter shows.
// The others are written back after all.
func (n *inode) evict(rng *rand.Rand) {
	if !n.failed {
		return
	}
	n.failed = false
	none := rng.IntN(3) == 0
	for _, s := range slices.Sorted(maps.Keys(n.pending)) {
		c := n.pending[s]
		k := len(c.versions) - 1
		if c.versions[k].lost && !none && rng.IntN(2) == 0 {
			n.revert(s, c, rng.IntN(k+1))
			delete(n.pending, s)
			continue
		}
		for i := range c.versions {
			c.versions[i].lost = false
		}
	}
}

func (n *inode) revert(s int64, c *cell, keep int) {
	b := c.durable
	if keep > 0 {
		b = c.versions[keep-1].data
	}
	n.store(b, s*sector, sector)
}

func (n *inode) clone() *inode {
	c := &inode{size: n.size, durable: n.durable, pages: make(map[int64]*page, len(n.pages)), pending: map[int64]*cell{}}
	for k, p := range n.pages {
		q := *p
		c.pages[k] = &q
	}
	return c
}

var zeroes [64 << 10]byte

func zero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroes))
		if !bytes.Equal(p[:n], zeroes[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
