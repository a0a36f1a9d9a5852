package hrl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// FormatVersion is the version of all formats of this package. A reader refuses any
// other; before 1.0 nothing converts old data.
const FormatVersion = 1

const (
	headerBytes = 4096 // a segment's header; frames follow
	footerBytes = 4096 // a segment's last page: where its seal is
	frameBytes  = 48   // a frame's header; its payload follows
	frameAlign  = 8    // frames begin at multiples of it

	// PayloadMax is the most payload bytes a frame may have. A guest's request
	// up to this size is one frame, so no cut can tear it (RULES A8).
	PayloadMax = 1 << 20

	// setPayloadMax is the most payload bytes of a frame that carries a set
	// of blocks.
	setPayloadMax = 16 << 20

	// sectorBytes is the granularity of changes.
	sectorBytes = 512
	// diskBytesMax is the largest disk: 1 PiB.
	diskBytesMax = 1 << 50
	// disksMax is the most disks of a log.
	disksMax = 1024
	// diskNameMax is the most bytes of a disk's name.
	diskNameMax = 255

	minSegmentBytes = 4 << 20
	maxSegmentBytes = 1 << 30
)

// Kind says what a frame is.
type Kind uint8

// The kinds of frames. The first four are changes and take a sequence number,
// as does KindCut; the others are notes for the reader and repeat the number of the
// last frame that took one.
const (
	KindWrite   Kind = iota + 1 // [Off, Off+Len) now holds the payload
	KindZero                    // [Off, Off+Len) now reads as zero
	KindCopy                    // [Off, Off+Len) was copied; the payload is the SHA-256 of its bytes, which lie elsewhere; zeroes: it cannot be read
	KindResize                  // the disk's size changed between Off and Off+Len, which reads as zero; payload: new size
	KindCut                     // ends an epoch; payload: cutPayload
	KindGap                     // the payload's blocks may have changed, up to here, without a frame
	KindDisk                    // names a disk; Len is its size; payload: its name
	KindTouched                 // payload: blocks touched by the frames since the last such frame or the segment's start
	KindSeal                    // as KindTouched, and the last frame of the segment
)

func (k Kind) String() string {
	names := [...]string{"", "write", "zero", "copy", "resize", "cut", "gap", "disk", "touched", "seal"}
	if int(k) < len(names) && k > 0 {
		return names[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// sequenced reports whether frames of the kind take a sequence number.
func (k Kind) sequenced() bool { return k >= KindWrite && k <= KindCut }

// A DiskID names a disk within one log.
type DiskID uint16

// noDisk is the DiskID of frames that concern the whole VM.
const noDisk DiskID = 0xffff

// castagnoli is the CRC-32C table; every checksum of the package uses it.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrVersion is returned for data of another version of the format.
var ErrVersion = errors.New("written by another version of afterimage")

var errChecksum = errors.New("checksum does not match")

// A CorruptError says that a segment is damaged.
type CorruptError struct {
	Segment string // its path
	Off     int64  // bytes into the segment where the damage begins
	Err     error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("segment %s is damaged at byte %d: %v", e.Segment, e.Off, e.Err)
}

// Unwrap returns the reason.
func (e *CorruptError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *CorruptError) Hint() string {
	return "the frames from there to the segment's end cannot be trusted: whatever they changed has to be copied again"
}

// segmentHeader is a segment's first page, little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-HRL"
//	   7     1  version
//	   8     4  crc      CRC-32C of bytes 12 to 4095, seeded by salt
//	  12     4  state    1 in use, 2 free: nothing in it counts
//	  16    16  log      the log's UUID
//	  32    16  salt     drawn anew at each use of the segment; seeds all its checksums
//	  48     8  incarnation
//	  56     8  ordinal  of the segment in its log: the previous one's plus one
//	  64     8  first    sequence number its first frame has
//	  72     8  size     bytes of the segment file
//	  80     8  created  wall clock, nanoseconds since 1970; a label only
//	  88     4  flags    1: appends before this segment failed; the gap frame that
//	                     follows its disk frames says what is missing
//	  92  4004  zero
type segmentHeader struct {
	state       uint32
	log         [16]byte
	salt        [16]byte
	incarnation uint64
	ordinal     uint64
	first       uint64
	size        int64
	created     int64
	flags       uint32
}

const (
	segmentInUse = 1
	segmentFree  = 2

	segmentAfterLoss = 1 // a flag
)

var segmentMagic = [7]byte{'A', 'I', 'M', '-', 'H', 'R', 'L'}

// seed is what the checksums of a segment with this salt begin with.
func seed(salt *[16]byte) uint32 { return crc32.Update(0, castagnoli, salt[:]) }

func (h *segmentHeader) encode(b *[headerBytes]byte) {
	*b = [headerBytes]byte{}
	copy(b[:], segmentMagic[:])
	b[7] = FormatVersion
	le := binary.LittleEndian
	le.PutUint32(b[12:], h.state)
	copy(b[16:], h.log[:])
	copy(b[32:], h.salt[:])
	le.PutUint64(b[48:], h.incarnation)
	le.PutUint64(b[56:], h.ordinal)
	le.PutUint64(b[64:], h.first)
	le.PutUint64(b[72:], uint64(h.size))
	le.PutUint64(b[80:], uint64(h.created))
	le.PutUint32(b[88:], h.flags)
	le.PutUint32(b[8:], crc32.Update(seed(&h.salt), castagnoli, b[12:]))
}

// errUnused is returned by decode for a page of zeroes: a segment that was
// prepared and never written.
var errUnused = errors.New("never used")

func (h *segmentHeader) decode(b *[headerBytes]byte) error {
	if *b == [headerBytes]byte{} {
		return errUnused
	}
	if [7]byte(b[:7]) != segmentMagic {
		return errors.New("not a segment of a replica log")
	}
	if b[7] != FormatVersion {
		return fmt.Errorf("%w: version %d, this is %d", ErrVersion, b[7], FormatVersion)
	}
	le := binary.LittleEndian
	copy(h.salt[:], b[32:])
	if le.Uint32(b[8:]) != crc32.Update(seed(&h.salt), castagnoli, b[12:]) {
		return fmt.Errorf("header: %w", errChecksum)
	}
	h.state = le.Uint32(b[12:])
	copy(h.log[:], b[16:])
	h.incarnation = le.Uint64(b[48:])
	h.ordinal = le.Uint64(b[56:])
	h.first = le.Uint64(b[64:])
	h.size = int64(le.Uint64(b[72:]))
	h.created = int64(le.Uint64(b[80:]))
	h.flags = le.Uint32(b[88:])
	if h.state != segmentInUse && h.state != segmentFree {
		return fmt.Errorf("header: state %d is unknown", h.state)
	}
	if h.size < headerBytes+footerBytes || h.size > maxSegmentBytes {
		return fmt.Errorf("header: a segment of %d bytes is impossible", h.size)
	}
	return nil
}

// segmentFooter is a sealed segment's last page, little-endian:
//
//	byte  size  field
//	   0     4  crc   CRC-32C of bytes 4 to 31, seeded by the segment's salt
//	   4     4  zero
//	   8     8  seal  where the seal frame begins
//	  16     8  end   where it ends: the bytes of the segment that count
//	  24     8  last  sequence number of the last frame that took one
//	  32  4064  zero
type segmentFooter struct {
	seal, end int64
	last      uint64
}

func (f *segmentFooter) encode(b *[footerBytes]byte, seed uint32) {
	*b = [footerBytes]byte{}
	le := binary.LittleEndian
	le.PutUint64(b[8:], uint64(f.seal))
	le.PutUint64(b[16:], uint64(f.end))
	le.PutUint64(b[24:], f.last)
	le.PutUint32(b[0:], crc32.Update(seed, castagnoli, b[4:32]))
}

func (f *segmentFooter) decode(b *[footerBytes]byte, seed uint32) error {
	le := binary.LittleEndian
	if le.Uint32(b[0:]) != crc32.Update(seed, castagnoli, b[4:32]) {
		return errChecksum
	}
	f.seal = int64(le.Uint64(b[8:]))
	f.end = int64(le.Uint64(b[16:]))
	f.last = le.Uint64(b[24:])
	return nil
}

// frameHeader stands before every payload, little-endian:
//
//	byte  size  field
//	   0     4  crc      CRC-32C of bytes 4 to 47, seeded by the segment's salt
//	   4     1  kind
//	   5     1  zero
//	   6     2  disk     0xffff: the whole VM
//	   8     4  payload  bytes after the header; zeroes up to a multiple of 8 follow
//	  12     4  prev     bytes of the whole previous frame, 0 for the first:
//	                     frames can be walked backwards
//	  16     8  seq      the previous sequenced frame's plus one, if this one is sequenced
//	  24     8  off      bytes on the disk
//	  32     8  len      bytes on the disk
//	  40     4  sum      CRC-32C of the payload, not seeded: the header's covers it
//	  44     4  zero
type frameHeader struct {
	kind    Kind
	disk    DiskID
	payload uint32
	prev    uint32
	seq     uint64
	off     int64
	len     int64
	sum     uint32
}

func (h *frameHeader) encode(b *[frameBytes]byte, seed uint32) {
	le := binary.LittleEndian
	b[4] = byte(h.kind)
	b[5] = 0
	le.PutUint16(b[6:], uint16(h.disk))
	le.PutUint32(b[8:], h.payload)
	le.PutUint32(b[12:], h.prev)
	le.PutUint64(b[16:], h.seq)
	le.PutUint64(b[24:], uint64(h.off))
	le.PutUint64(b[32:], uint64(h.len))
	le.PutUint32(b[40:], h.sum)
	le.PutUint32(b[44:], 0)
	le.PutUint32(b[0:], crc32.Update(seed, castagnoli, b[4:]))
}

// decode reads a header and checks it: its checksum, and that every number in
// it is one that a writer can have written. The payload's bytes are not looked at.
func (h *frameHeader) decode(b []byte, seed uint32) error {
	b = b[:frameBytes]
	le := binary.LittleEndian
	if !frameAt(b, seed) {
		return errFrame
	}
	*h = frameHeader{
		kind:    Kind(b[4]),
		disk:    DiskID(le.Uint16(b[6:])),
		payload: le.Uint32(b[8:]),
		prev:    le.Uint32(b[12:]),
		seq:     le.Uint64(b[16:]),
		off:     int64(le.Uint64(b[24:])),
		len:     int64(le.Uint64(b[32:])),
		sum:     le.Uint32(b[40:]),
	}
	if b[5] != 0 || le.Uint32(b[44:]) != 0 {
		return h.bad("reserved bytes set")
	}
	return h.check()
}

func (h *frameHeader) bad(what string) error {
	return fmt.Errorf("frame header: %s frame with %s", h.kind, what)
}

// check says what is impossible about the header. Writer and reader use the
// same check, so nothing can be appended that reads as damage.
func (h *frameHeader) check() error {
	if h.kind < KindWrite || h.kind > KindSeal {
		return fmt.Errorf("frame header: kind %d is unknown", h.kind)
	}
	limit := uint32(PayloadMax)
	if h.kind == KindGap || h.kind == KindTouched || h.kind == KindSeal {
		limit = setPayloadMax
	}
	if h.payload > limit {
		return h.bad("too long a payload")
	}
	if h.off < 0 || h.len < 0 || h.off > diskBytesMax || h.len > diskBytesMax-h.off || h.off%sectorBytes != 0 || h.len%sectorBytes != 0 {
		return h.bad("an impossible range")
	}
	switch h.kind {
	case KindWrite:
		if int64(h.payload) != h.len {
			return h.bad("a payload of another length than its range")
		}
	case KindZero:
		if h.payload != 0 {
			return h.bad("a payload")
		}
	case KindCopy:
		if h.payload != digestBytes {
			return h.bad("no digest")
		}
	case KindResize:
		if h.payload != 8 {
			return h.bad("no size")
		}
	}
	return nil
}

var errFrame = fmt.Errorf("frame header: %w", errChecksum)

// frameAt reports whether b begins with a frame header of the segment with this
// seed. It is cheap where there is none.
func frameAt(b []byte, seed uint32) bool {
	b = b[:frameBytes]
	return b[4] != 0 && b[5] == 0 && binary.LittleEndian.Uint32(b) == crc32.Update(seed, castagnoli, b[4:])
}

// digestBytes is the length of the SHA-256 in a copy frame.
const digestBytes = 32

// span is the length of the whole frame in the segment.
func (h *frameHeader) span() int64 { return frameSpan(int(h.payload)) }

func frameSpan(payload int) int64 {
	return frameBytes + (int64(payload)+frameAlign-1)&^(frameAlign-1)
}

// A CutKind says what a cut promises beyond the order of writes.
type CutKind uint8

const (
	// CutCrash is the state a crash of the VM would have left.
	CutCrash CutKind = 1
	// CutApp was made while applications in the guest held still.
	CutApp CutKind = 2
)

// cutPayload is what a cut frame carries, little-endian:
//
//	byte  size  field
//	   0     8  epoch  number within the incarnation, from 1
//	   8     8  time   wall clock, nanoseconds since 1970; a label only
//	  16     1  kind   CutKind
//	  17     7  zero
type cutPayload struct {
	epoch uint64
	time  int64
	kind  CutKind
}

const cutPayloadBytes = 24

func (c *cutPayload) encode(b *[cutPayloadBytes]byte) {
	*b = [cutPayloadBytes]byte{}
	binary.LittleEndian.PutUint64(b[0:], c.epoch)
	binary.LittleEndian.PutUint64(b[8:], uint64(c.time))
	b[16] = byte(c.kind)
}

func (c *cutPayload) decode(b []byte) error {
	if len(b) != cutPayloadBytes {
		return fmt.Errorf("cut of %d bytes, not %d", len(b), cutPayloadBytes)
	}
	c.epoch = binary.LittleEndian.Uint64(b[0:])
	c.time = int64(binary.LittleEndian.Uint64(b[8:]))
	c.kind = CutKind(b[16])
	if c.kind != CutCrash && c.kind != CutApp {
		return fmt.Errorf("cut of kind %d is unknown", c.kind)
	}
	return nil
}
