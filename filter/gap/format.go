package gap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"afterimage/hrl"
)

// FormatVersion is the version of the map's file.
const FormatVersion = 1

const (
	pageBytes   = 4096
	sectorBytes = 512

	headerBytes = 128
	headersEnd  = 2 * pageBytes // pages lie behind it

	bitsAt    = 8
	pageWords = (pageBytes - bitsAt) / 8
	pageBits  = pageWords * 64 // blocks in a page: 2044 MiB of disk

	// sizeMax bounds a disk: 256 TiB, whose map is 513 MiB.
	sizeMax = 1 << 48
)

var (
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	magic       = [7]byte{'A', 'I', 'M', '-', 'G', 'A', 'P'}
	errChecksum = errors.New("checksum does not match")
	errHeader   = errors.New("header")
)

// The states of a map's file. Whatever else is found there reads as all gaps.
const (
	fileOpen   = 1 // or not closed
	fileClean  = 2 // closed, everything durable
	fileBroken = 3 // a write or sync failed
)

// header says of what disk the map is, and how its last session ended. The
// file begins with two pages of 4 KiB, each with one header in its first sector;
// the valid one with the greater count is the present one, and a change goes to
// the other, so a crash leaves one or the other. Both are written when the file
// is made, so one that is not valid may have been the present one.
// Little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-GAP"
//	   7     1  version
//	   8     4  crc    CRC-32C of bytes 12 to 127
//	  12     4  state  1 open (or was not closed), 2 closed, 3 broken
//	  16     8  count  of changes of the header; odd in the second page
//	  24     8  size   of the disk in bytes
//	  32     4  block  bytes that a bit stands for: 65536
//	  36     4  zero
//	  40    16  salt   of the file; seeds the checksums of its pages
//	  56    72  zero
type header struct {
	state uint32
	count uint64
	size  int64
	salt  [16]byte
}

func (h *header) encode(b []byte) {
	clear(b[:headerBytes])
	copy(b, magic[:])
	b[7] = FormatVersion
	le := binary.LittleEndian
	le.PutUint32(b[12:], h.state)
	le.PutUint64(b[16:], h.count)
	le.PutUint64(b[24:], uint64(h.size))
	le.PutUint32(b[32:], hrl.BlockBytes)
	copy(b[40:], h.salt[:])
	le.PutUint32(b[8:], crc32.Checksum(b[12:headerBytes], castagnoli))
}

// decode also checks that what the header says can be.
func (h *header) decode(b []byte) error {
	if [7]byte(b[:7]) != magic {
		return errors.New("not a map of gaps")
	}
	if b[7] != FormatVersion {
		return fmt.Errorf("%w: version %d, this is %d", hrl.ErrVersion, b[7], FormatVersion)
	}
	le := binary.LittleEndian
	if le.Uint32(b[8:]) != crc32.Checksum(b[12:headerBytes], castagnoli) {
		return errChecksum
	}
	h.state = le.Uint32(b[12:])
	h.count = le.Uint64(b[16:])
	h.size = int64(le.Uint64(b[24:]))
	copy(h.salt[:], b[40:])
	block := le.Uint32(b[32:])
	switch {
	case h.state < fileOpen || h.state > fileBroken:
		return fmt.Errorf("state %d is unknown", h.state)
	case h.size < 0 || h.size > sizeMax:
		return fmt.Errorf("a disk of %d bytes", h.size)
	case block != hrl.BlockBytes:
		return fmt.Errorf("blocks of %d bytes", block)
	}
	return nil
}

func blocksFor(size int64) int64    { return (size + hrl.BlockBytes - 1) / hrl.BlockBytes }
func pagesFor(size int64) int64     { return (blocksFor(size) + pageBits - 1) / pageBits }
func pageOff(p int64) int64         { return headersEnd + p*pageBytes }
func fileBytes(size int64) int64    { return pageOff(pagesFor(size)) }
func saltSeed(salt [16]byte) uint32 { return crc32.Update(0, castagnoli, salt[:]) }

// A page of the file has the bits of 32704 blocks. Little-endian:
//
//	byte  size  field
//	   0     4  crc     CRC-32C of bytes 4 to 4095, seeded by the salt
//	   4     4  number  of the page, from 0
//	   8  4088  bits    1: a gap. Behind the end of the disk they say nothing:
//	                    a shrinking disk leaves them
func putBits(b []byte, number int64, bits *words) {
	le := binary.LittleEndian
	le.PutUint32(b[4:], uint32(number))
	if bits == nil {
		clear(b[bitsAt:pageBytes])
		return
	}
	for i, w := range bits {
		le.PutUint64(b[bitsAt+8*i:], w)
	}
}

func putSum(b []byte, seed uint32) {
	binary.LittleEndian.PutUint32(b, crc32.Update(seed, castagnoli, b[4:pageBytes]))
}

// getPage reads the bits of the first n blocks of a page; nil if there are
// none. Beyond says that there are others behind them.
func getPage(b []byte, seed uint32, number, n int64) (bits *words, beyond bool, err error) {
	le := binary.LittleEndian
	if le.Uint32(b) != crc32.Update(seed, castagnoli, b[4:pageBytes]) {
		return nil, false, errChecksum
	}
	if got := int64(le.Uint32(b[4:])); got != number {
		return nil, false, fmt.Errorf("it says that it is page %d", got)
	}
	for i := range int64(pageWords) {
		w := le.Uint64(b[bitsAt+8*i:])
		kept := w
		if left := n - i*64; left < 64 {
			kept &= 1<<max(left, 0) - 1
		}
		beyond = beyond || kept != w
		if kept != 0 {
			if bits == nil {
				bits = new(words)
			}
			bits[i] = kept
		}
	}
	return bits, beyond, nil
}
