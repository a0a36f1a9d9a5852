package hrl

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"sort"
)

// BlockBytes is the granularity of touched sets and of gaps.
const BlockBytes = 64 << 10

const (
	pageBits  = 4096 * 8 // blocks in a page of a BlockSet: 2 GiB of disk
	pageWords = pageBits / 64
)

// A BlockSet is a set of 64 KiB blocks of several disks. Its zero value is
// empty and ready. It costs 4 KiB for every 2 GiB of a disk of which it holds a
// block, and a pointer for every 2 GiB below that. It is not safe for
// concurrent use.
type BlockSet struct {
	disks []diskBlocks // a VM has few disks: searched one by one
	runs  int          // upper bound of the runs the set holds
}

type diskBlocks struct {
	disk  DiskID
	pages []*[pageWords]uint64
}

// Add puts every block that the range touches into the set.
func (s *BlockSet) Add(disk DiskID, off, length int64) {
	if length <= 0 {
		return
	}
	d := s.disk(disk)
	first, last := off/BlockBytes, (off+length-1)/BlockBytes
	s.runs++
	for b := first; b <= last; {
		page := d.page(b / pageBits)
		i := b % pageBits
		n := min(last-b+1, pageBits-i)
		switch {
		case n == pageBits:
			*page = &fullPage
		case *page == nil:
			*page = new([pageWords]uint64)
			fallthrough
		case *page != &fullPage:
			setBits(*page, i, n)
		}
		b += n
	}
}

// fullPage stands for every page that is full, and is never written: a whole
// disk of any size costs a pointer for every 2 GiB.
var fullPage = func() (p [pageWords]uint64) {
	for i := range p {
		p[i] = ^uint64(0)
	}
	return p
}()

// setBits sets n bits from bit i on.
func setBits(p *[pageWords]uint64, i, n int64) {
	for n > 0 {
		w, at := i/64, i%64
		k := min(n, 64-at)
		p[w] |= (^uint64(0) >> (64 - k)) << at
		i += k
		n -= k
	}
}

func (s *BlockSet) disk(id DiskID) *diskBlocks {
	for i := range s.disks {
		if s.disks[i].disk == id {
			return &s.disks[i]
		}
	}
	s.disks = append(s.disks, diskBlocks{disk: id})
	return &s.disks[len(s.disks)-1]
}

func (d *diskBlocks) page(n int64) **[pageWords]uint64 {
	for int64(len(d.pages)) <= n {
		d.pages = append(d.pages, nil)
	}
	return &d.pages[n]
}

// Has reports whether the set holds the block at byte off of the disk.
func (s *BlockSet) Has(disk DiskID, off int64) bool {
	b := off / BlockBytes
	for i := range s.disks {
		d := &s.disks[i]
		if d.disk == disk && b/pageBits < int64(len(d.pages)) {
			p := d.pages[b/pageBits]
			return p != nil && p[b%pageBits/64]&(1<<(b%64)) != 0
		}
	}
	return false
}

// Remove takes every block that the range touches out of the set.
func (s *BlockSet) Remove(disk DiskID, off, length int64) {
	if length <= 0 {
		return
	}
	d := s.disk(disk)
	first, last := off/BlockBytes, (off+length-1)/BlockBytes
	last = min(last, int64(len(d.pages))*pageBits-1)
	if first <= last {
		s.runs++ // a run may be split
	}
	for b := first; b <= last; {
		page := d.page(b / pageBits)
		i := b % pageBits
		n := min(last-b+1, pageBits-i)
		switch {
		case *page == nil:
		case n == pageBits:
			*page = nil
		default:
			if *page == &fullPage {
				own := fullPage
				*page = &own
			}
			clearBits(*page, i, n)
		}
		b += n
	}
}

// clearBits clears n bits from bit i on.
func clearBits(p *[pageWords]uint64, i, n int64) {
	for n > 0 {
		w, at := i/64, i%64
		k := min(n, 64-at)
		p[w] &^= (^uint64(0) >> (64 - k)) << at
		i += k
		n -= k
	}
}

// Next returns the first run of blocks of the disk that reaches behind byte off,
// from off's block on, in bytes; false if there is none.
func (s *BlockSet) Next(disk DiskID, off int64) (start, length int64, ok bool) {
	var d *diskBlocks
	for i := range s.disks {
		if s.disks[i].disk == disk {
			d = &s.disks[i]
		}
	}
	if d == nil {
		return 0, 0, false
	}
	end := int64(len(d.pages)) * pageBits
	first := d.scan(off/BlockBytes, end, true)
	if first == end {
		return 0, 0, false
	}
	return first * BlockBytes, (d.scan(first, end, false) - first) * BlockBytes, true
}

// scan returns the first block of [b, end) that is in the set, or that is not;
// end if there is none.
func (d *diskBlocks) scan(b, end int64, in bool) int64 {
	for b < end {
		p := d.pages[b/pageBits]
		if p == nil || p == &fullPage {
			if in == (p != nil) {
				return b
			}
			b = (b/pageBits + 1) * pageBits
			continue
		}
		w := p[b%pageBits/64]
		if !in {
			w = ^w
		}
		if w >>= b % 64; w != 0 {
			return b + int64(bits.TrailingZeros64(w))
		}
		b = (b/64 + 1) * 64
	}
	return end
}

// Empty reports whether the set holds nothing. Where blocks were removed, it may
// say no of a set that holds nothing any more.
func (s *BlockSet) Empty() bool { return s.runs == 0 }

// Bytes is how much disk the set's blocks cover.
func (s *BlockSet) Bytes() int64 {
	n := 0
	for i := range s.disks {
		for _, p := range s.disks[i].pages {
			switch p {
			case nil:
			case &fullPage:
				n += pageBits
			default:
				for _, w := range p {
					n += bits.OnesCount64(w)
				}
			}
		}
	}
	return int64(n) * BlockBytes
}

// AddSet puts all of o into the set.
func (s *BlockSet) AddSet(o *BlockSet) {
	o.Runs(func(disk DiskID, off, length int64) { s.Add(disk, off, length) })
}

// Reset empties the set and keeps its memory.
func (s *BlockSet) Reset() {
	for i := range s.disks {
		for n, p := range s.disks[i].pages {
			switch p {
			case nil:
			case &fullPage:
				s.disks[i].pages[n] = nil
			default:
				*p = [pageWords]uint64{}
			}
		}
	}
	s.runs = 0
}

// Runs calls visit for the set's runs of adjacent blocks: by disk in order of
// number, then by offset, both in bytes.
func (s *BlockSet) Runs(visit func(disk DiskID, off, length int64)) {
	order := make([]*diskBlocks, len(s.disks))
	for i := range s.disks {
		order[i] = &s.disks[i]
	}
	sort.Slice(order, func(i, j int) bool { return order[i].disk < order[j].disk })
	for _, d := range order {
		d.runs(func(first, n int64) { visit(d.disk, first*BlockBytes, n*BlockBytes) })
	}
}

// runs visits runs of blocks of one disk.
func (d *diskBlocks) runs(visit func(first, n int64)) {
	first, n := int64(0), int64(0)
	add := func(at, k int64) {
		if n > 0 && first+n == at {
			n += k
			return
		}
		if n > 0 {
			visit(first, n)
		}
		first, n = at, k
	}
	for pi, p := range d.pages {
		if p == nil {
			continue
		}
		if p == &fullPage {
			add(int64(pi)*pageBits, pageBits)
			continue
		}
		for wi, w := range p {
			base := int64(pi)*pageBits + int64(wi)*64
			for w != 0 {
				at := int64(bits.TrailingZeros64(w))
				k := int64(bits.TrailingZeros64(^(w >> at)))
				add(base+at, k)
				if at+k == 64 {
					break
				}
				w &^= (uint64(1)<<k - 1) << at
			}
		}
	}
	if n > 0 {
		visit(first, n)
	}
}

// A block set's bytes, little-endian, are for each disk that has blocks:
//
//	size  field
//	   2  disk
//	   4  runs
//	then for each run two unsigned varints: blocks skipped since the end of
//	the last run (or block 0), blocks in the run (at least 1)
//
// runBytesMax bounds the bytes of one run: block numbers are below 2^47.
const runBytesMax = 14

// encodedMax is an upper bound of the set's length in bytes after n more calls of Add.
func (s *BlockSet) encodedMax(n int) int { return (s.runs+n)*runBytesMax + (len(s.disks)+n)*6 }

// Append appends the set's bytes to b.
func (s *BlockSet) Append(b []byte) []byte {
	last, lastDisk, at := int64(0), noDisk, -1
	s.Runs(func(disk DiskID, off, length int64) {
		if at < 0 || disk != lastDisk {
			last, lastDisk, at = 0, disk, len(b)+2
			b = binary.LittleEndian.AppendUint16(b, uint16(disk))
			b = binary.LittleEndian.AppendUint32(b, 0)
		}
		first, n := off/BlockBytes, length/BlockBytes
		b = binary.AppendUvarint(b, uint64(first-last))
		b = binary.AppendUvarint(b, uint64(n))
		last = first + n
		binary.LittleEndian.PutUint32(b[at:], binary.LittleEndian.Uint32(b[at:])+1)
	})
	return b
}

var errBlockSet = errors.New("a set of blocks that makes no sense")

// blockMax bounds block numbers, so that offsets in bytes stay positive.
const blockMax = 1 << 46

// eachRun reads a block set's bytes without making a set of them, for the
// numbers come from a file and a set costs memory.
func eachRun(b []byte, visit func(disk DiskID, off, length int64)) error {
	for len(b) > 0 {
		if len(b) < 6 {
			return errBlockSet
		}
		disk, runs := DiskID(binary.LittleEndian.Uint16(b)), binary.LittleEndian.Uint32(b[2:])
		b = b[6:]
		last := uint64(0)
		for ; runs > 0; runs-- {
			skip, k := binary.Uvarint(b)
			if k <= 0 {
				return errBlockSet
			}
			n, j := binary.Uvarint(b[k:])
			if j <= 0 || n == 0 || skip > blockMax || n > blockMax || last+skip+n > blockMax {
				return errBlockSet
			}
			b = b[k+j:]
			visit(disk, int64(last+skip)*BlockBytes, int64(n)*BlockBytes)
			last += skip + n
		}
	}
	return nil
}
