package transfer

import (
	"bytes"
	"context"

	"afterimage/blockdev"
)

// A Difference says how far two disks of one size differ.
type Difference struct {
	First   int64 // offset of the first byte that differs; -1 if none does
	Bytes   int64 // how many bytes differ
	Extents int64 // how many runs of neighbouring sectors hold them
}

// Equal reports whether nothing differs.
func (d *Difference) Equal() bool { return d.First < 0 }

// zeroUnit is the grain of finding zeroes in data, in bytes.
const zeroUnit = 64 << 10

// Compare compares two disks of the same size, byte by byte. What both promise
// to be zero is not read. Its errors are of reading, or ctx's.
func Compare(ctx context.Context, a, b blockdev.Device, progress Progress) (Difference, error) {
	size := a.Size()
	c := comparison{
		a: side{dev: a, cursor: runCursor{dev: a, size: size}, span: newSpan()},
		b: side{dev: b, cursor: runCursor{dev: b, size: size}, span: newSpan()},
	}
	c.diff.First = -1
	align := max(a.Info().BlockSize, b.Info().BlockSize, 4096)
	for pos := int64(0); pos < size; {
		if err := context.Cause(ctx); err != nil {
			return c.diff, err
		}
		zeroA, endA, err := c.a.cursor.zeroTo(pos)
		if err != nil {
			return c.diff, err
		}
		zeroB, endB, err := c.b.cursor.zeroTo(pos)
		if err != nil {
			return c.diff, err
		}
		end := min(endA, endB)
		if zeroA && zeroB {
			if end < size {
				end &^= align - 1
			}
			if end > pos {
				progress.add(end - pos)
				pos = end
				continue
			}
			end = pos + 1 // a hole smaller than a block: read the block
		}
		end = min(roundUp(end, align, size), pos+window)
		e := blockdev.Extent{Off: pos, Len: end - pos}
		// Not whole when it was rounded up: then the promise ends earlier.
		if err := c.extent(e, zeroA && endA >= end, zeroB && endB >= end); err != nil {
			return c.diff, err
		}
		progress.add(e.Len)
		pos = end
	}
	return c.diff, nil
}

type side struct {
	dev    blockdev.Device
	cursor runCursor
	span   *span
}

type comparison struct {
	a, b side
	diff Difference
	last int64 // end of the last sector that differed
}

// extent compares e, of which a side that is zero need not be read.
func (c *comparison) extent(e blockdev.Extent, zeroA, zeroB bool) error {
	var pb []byte
	var errB error
	done := make(chan struct{})
	go func() {
		defer close(done)
		pb, errB = c.b.read(e, zeroB)
	}()
	pa, errA := c.a.read(e, zeroA)
	<-done
	if errA != nil {
		return errA
	}
	if errB != nil {
		return errB
	}
	if bytes.Equal(pa, pb) {
		return nil
	}
	for off := int64(0); off < e.Len; off += blockdev.SectorSize {
		end := min(off+blockdev.SectorSize, e.Len)
		if !bytes.Equal(pa[off:end], pb[off:end]) {
			c.sector(e.Off+off, pa[off:end], pb[off:end])
		}
	}
	return nil
}

func (s *side) read(e blockdev.Extent, zero bool) ([]byte, error) {
	if zero {
		clear(s.span.buf[:e.Len])
		return s.span.buf[:e.Len], nil
	}
	return s.span.read(s.dev, e)
}

// sector counts the bytes of a sector that differ.
func (c *comparison) sector(off int64, pa, pb []byte) {
	for i := range pa {
		if pa[i] == pb[i] {
			continue
		}
		if c.diff.First < 0 {
			c.diff.First = off + int64(i)
		}
		c.diff.Bytes++
	}
	if c.diff.Extents == 0 || off != c.last {
		c.diff.Extents++
	}
	c.last = off + int64(len(pa))
}
