package hot

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
	headersEnd  = 2 * pageBytes // rings lie behind it

	txBytes     = pageBytes
	txSectors   = txBytes / sectorBytes
	sectorHead  = 12
	partBytes   = sectorBytes - sectorHead
	bodyBytes   = txSectors * partBytes
	rangesMax   = 32
	updatesMax  = 211
	sliceBytes  = 2048
	sliceWords  = sliceBytes / 8
	sliceBits   = sliceBytes * 8 // extents in a slice
	rangesAt    = 8
	updatesAt   = rangesAt + rangesMax*8
	sliceAt     = updatesAt + updatesMax*8
	clearFlag   = 1 << 31
	ringSpare   = 64        // transactions beyond one for each slice
	extentsMax  = 1<<31 - 1 // what 31 bits count: 2 PiB of 1 MiB
	extentShift = 20        // of a map made by this version
)

// Together they are all there is in a transaction.
const _ = uint(sliceAt+sliceBytes-bodyBytes) + uint(bodyBytes-sliceAt-sliceBytes)

var (
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	magic       = [7]byte{'A', 'I', 'M', '-', 'H', 'O', 'T'}
	errChecksum = errors.New("checksum does not match")
)

// The states of a map's file. Whatever else is found there reads as all hot.
const (
	fileOpen   = 1 // or not closed cleanly
	fileClean  = 2 // no mark counts; they tell what the last session had hot
	fileBroken = 3 // a commit failed
)

// header says in which state the map is, and where its ring lies. The file
// begins with two pages of 4 KiB, each with one header in its first sector; the
// valid one with the greater count is the present one, and a change goes to the
// other. Both are written when the map is made, so one that is not valid may
// have been the present one. Little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-HOT"
//	   7     1  version
//	   8     4  crc      CRC-32C of bytes 12 to 127
//	  12     4  state    1 open (or was not closed), 2 closed cleanly, 3 broken
//	  16     8  count    of changes of the header
//	  24     8  extents  that the ring has marks of
//	  32     4  shift    an extent is 1<<shift bytes; never changes
//	  36     4  slots    transactions in the ring
//	  40     8  off      where in the file the ring begins
//	  48    16  salt     of this ring; seeds the checksums of its transactions
//	  64    64  zero
type header struct {
	state   uint32
	count   uint64
	extents int64
	shift   uint32
	slots   int64
	off     int64
	salt    [16]byte
}

func (h *header) encode(b []byte) {
	clear(b[:headerBytes])
	copy(b, magic[:])
	b[7] = FormatVersion
	le := binary.LittleEndian
	le.PutUint32(b[12:], h.state)
	le.PutUint64(b[16:], h.count)
	le.PutUint64(b[24:], uint64(h.extents))
	le.PutUint32(b[32:], h.shift)
	le.PutUint32(b[36:], uint32(h.slots))
	le.PutUint64(b[40:], uint64(h.off))
	copy(b[48:], h.salt[:])
	le.PutUint32(b[8:], crc32.Checksum(b[12:headerBytes], castagnoli))
}

// decode also checks that what the header says can be, but not against the file.
func (h *header) decode(b []byte) error {
	if [7]byte(b[:7]) != magic {
		return errors.New("not a map of hot extents")
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
	h.extents = int64(le.Uint64(b[24:]))
	h.shift = le.Uint32(b[32:])
	h.slots = int64(le.Uint32(b[36:]))
	h.off = int64(le.Uint64(b[40:]))
	copy(h.salt[:], b[48:])
	switch {
	case h.state < fileOpen || h.state > fileBroken:
		return fmt.Errorf("state %d is unknown", h.state)
	case h.extents < 0 || h.extents > extentsMax:
		return fmt.Errorf("%d extents", h.extents)
	case h.shift < 16 || h.shift > 22:
		return fmt.Errorf("extents of 1<<%d bytes", h.shift)
	case h.slots != slotsFor(h.extents):
		return fmt.Errorf("%d transactions for %d extents", h.slots, h.extents)
	case h.off < headersEnd || h.off%pageBytes != 0 || h.off > 1<<50:
		return fmt.Errorf("a ring at byte %d", h.off)
	}
	return nil
}

func slicesFor(extents int64) int64 { return max(1, (extents+sliceBits-1)/sliceBits) }

// slotsFor is the length of a ring. The oldest transaction is overwritten by
// the one being committed, and all younger ones together hold every slice.
func slotsFor(extents int64) int64 { return slicesFor(extents) + ringSpare }

// A run is n extents, from extent first on.
type run struct{ first, n int64 }

func (r run) end() int64 { return r.first + r.n }

type update struct {
	run
	clear bool
}

// A transaction is one commit. Number n, counted from 1, is in slot
// (n-1) mod slots of its ring and has slice (n-1) mod slices of the table, as it
// is after the updates; the updates change what other slices say. Little-endian:
//
//	byte  size  field of each of the 8 sectors
//	   0     4  crc     CRC-32C of bytes 4 to 511, seeded by the ring's salt
//	   4     8  number  the transaction's, times 8, plus the sector's place in it
//	  12   500  its part of the body
//
//	byte  size  field of the body of 4000 bytes
//	   0     2  updates  how many, at most 211
//	   2     2  ranges   how many, at most 32
//	   4     4  zero
//	   8   256  ranges   all that there are: first extent (4), extents (4)
//	 264  1688  updates  first extent (4), extents (4; bit 31: cleared, not set)
//	1952  2048  slice    a bit for each of 16384 extents, 1: marked
//
// Each sector is checked by itself, because a disk writes no less: a transaction
// that a power cut tore has whole sectors of two numbers, and is thereby told
// from one that was damaged later (see readRing).
type transaction struct {
	number  uint64
	updates []update
	ranges  []run
	slice   [sliceWords]uint64
}

func ringSeed(salt *[16]byte) uint32 { return crc32.Update(0, castagnoli, salt[:]) }

func (t *transaction) encode(b []byte, seed uint32) {
	var body [bodyBytes]byte
	le := binary.LittleEndian
	le.PutUint16(body[0:], uint16(len(t.updates)))
	le.PutUint16(body[2:], uint16(len(t.ranges)))
	for i, r := range t.ranges {
		le.PutUint32(body[rangesAt+8*i:], uint32(r.first))
		le.PutUint32(body[rangesAt+8*i+4:], uint32(r.n))
	}
	for i, u := range t.updates {
		n := uint32(u.n)
		if u.clear {
			n |= clearFlag
		}
		le.PutUint32(body[updatesAt+8*i:], uint32(u.first))
		le.PutUint32(body[updatesAt+8*i+4:], n)
	}
	for i, w := range t.slice {
		le.PutUint64(body[sliceAt+8*i:], w)
	}
	for s := range txSectors {
		p := b[s*sectorBytes : (s+1)*sectorBytes]
		le.PutUint64(p[4:], t.number*txSectors+uint64(s))
		copy(p[sectorHead:], body[s*partBytes:])
		le.PutUint32(p, crc32.Update(seed, castagnoli, p[4:]))
	}
}

// sectorNumber is the number of the transaction that the sector belongs to, or 0
// if it is damaged.
func sectorNumber(p []byte, place int, seed uint32) uint64 {
	le := binary.LittleEndian
	n := le.Uint64(p[4:])
	if le.Uint32(p) != crc32.Update(seed, castagnoli, p[4:sectorBytes]) || n%txSectors != uint64(place) {
		return 0
	}
	return n / txSectors
}

// decode reads a transaction whose sectors have been checked, of a ring that
// has marks of so many extents.
func (t *transaction) decode(b []byte, extents int64) error {
	var body [bodyBytes]byte
	for s := range txSectors {
		copy(body[s*partBytes:(s+1)*partBytes], b[s*sectorBytes+sectorHead:])
	}
	le := binary.LittleEndian
	t.number = le.Uint64(b[4:]) / txSectors
	t.updates, t.ranges = t.updates[:0], t.ranges[:0]
	updates, ranges := int(le.Uint16(body[0:])), int(le.Uint16(body[2:]))
	if updates > updatesMax || ranges > rangesMax {
		return fmt.Errorf("%d updates and %d ranges", updates, ranges)
	}
	inside := func(r run) bool { return r.n > 0 && r.end() <= extents }
	for p := body[rangesAt:]; ranges > 0; ranges, p = ranges-1, p[8:] {
		r := run{int64(le.Uint32(p)), int64(le.Uint32(p[4:]))}
		if !inside(r) {
			return fmt.Errorf("range of %d extents from %d on", r.n, r.first)
		}
		t.ranges = append(t.ranges, r)
	}
	for p := body[updatesAt:]; updates > 0; updates, p = updates-1, p[8:] {
		n := le.Uint32(p[4:])
		u := update{run{int64(le.Uint32(p)), int64(n &^ clearFlag)}, n&clearFlag != 0}
		if !inside(u.run) {
			return fmt.Errorf("update of %d extents from %d on", u.n, u.first)
		}
		t.updates = append(t.updates, u)
	}
	for i := range t.slice {
		t.slice[i] = le.Uint64(body[sliceAt+8*i:])
	}
	return nil
}
