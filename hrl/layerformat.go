package hrl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
)

// LayerVersion is the version of the layer format. A reader refuses any other.
const LayerVersion = 3

const (
	layerHeaderBytes  = 512
	layerFrameBytes   = 32 // a frame's header; its stored data follow
	layerPageBytes    = 4096
	layerEntryBytes   = 32
	layerPageEntries  = layerPageBytes/layerEntryBytes - 1
	layerTrailerBytes = 128

	// LayerDataMax is the most raw bytes of a frame. A frame does not cross a
	// multiple of it.
	LayerDataMax = 64 << 10
)

// A layer is what changed on one disk between two cuts, immutable, in a file:
//
//	header    512 bytes
//	frames    data, sorted by their place on the disk
//	index     pages of 4 KiB, sorted: extents with data, and extents of zeroes and
//	          unreadable ones, which are nowhere else
//	trailer   the last 128 bytes, from which the rest is found
//
// Every checksum of a layer but the header's is seeded by the header's, so that
// nothing of another layer passes for a part of this one.

// LayerInfo is what a layer's header says.
type LayerInfo struct {
	VM         [16]byte // UUID
	Generation uint64   // of Q
	// PGeneration is that of P: a new generation begins over the last point of
	// the one before. 0 with a zero P.
	PGeneration uint64
	Disk        string
	P, Q        Position
	Size        int64     // bytes of the disk at Q
	PTime       time.Time // a label; zero if not known
	QTime       time.Time // a label
	Kind        CutKind   // of Q
}

// The header, little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-LYR"
//	   7     1  version
//	   8     4  crc         CRC-32C of bytes 12 to 511
//	  12     1  kind        CutKind of q
//	  13     1  name bytes  at least 1
//	  14     2  zero
//	  16    16  vm          UUID
//	  32     8  generation
//	  40     8  p           incarnation; the layer holds what changed after the cut p
//	  48     8  p           epoch; both 0: the log's beginning
//	  56     8  q           incarnation; up to the cut q
//	  64     8  q           epoch
//	  72     8  size        bytes of the disk at q
//	  80     8  p time      wall clock, nanoseconds since 1970, a label only; 0: not known
//	  88     8  q time
//	  96     8  p generation  of the cut p; at most that of q
//	 104   152  zero
//	 256   255  name        of the disk; zeroes follow
//	 511     1  zero
func (l *LayerInfo) encode(b *[layerHeaderBytes]byte) {
	*b = [layerHeaderBytes]byte{}
	copy(b[:], layerMagic[:])
	b[7] = LayerVersion
	b[12], b[13] = byte(l.Kind), byte(len(l.Disk))
	copy(b[16:], l.VM[:])
	le := binary.LittleEndian
	for i, v := range []uint64{
		l.Generation, l.P.Incarnation, l.P.Epoch, l.Q.Incarnation, l.Q.Epoch,
		uint64(l.Size), labelNanos(l.PTime), labelNanos(l.QTime), l.PGeneration,
	} {
		le.PutUint64(b[32+8*i:], v)
	}
	copy(b[256:511], l.Disk)
	le.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
}

var (
	layerMagic   = [7]byte{'A', 'I', 'M', '-', 'L', 'Y', 'R'}
	trailerMagic = [7]byte{'A', 'I', 'M', '-', 'L', 'T', 'R'}
)

func labelNanos(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixNano())
}

func nanosLabel(n uint64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(n))
}

var errReserved = errors.New("reserved bytes set")

func (l *LayerInfo) decode(b *[layerHeaderBytes]byte) error {
	if [7]byte(b[:7]) != layerMagic {
		return errors.New("not a layer")
	}
	if b[7] != LayerVersion {
		return fmt.Errorf("%w: version %d, this is %d", ErrVersion, b[7], LayerVersion)
	}
	le := binary.LittleEndian
	if le.Uint32(b[8:]) != crc32.Checksum(b[12:], castagnoli) {
		return fmt.Errorf("header: %w", errChecksum)
	}
	name := int(b[13])
	*l = LayerInfo{
		Kind: CutKind(b[12]), VM: [16]byte(b[16:]), Generation: le.Uint64(b[32:]),
		P:    Position{le.Uint64(b[40:]), le.Uint64(b[48:])},
		Q:    Position{le.Uint64(b[56:]), le.Uint64(b[64:])},
		Size: int64(le.Uint64(b[72:])), PTime: nanosLabel(le.Uint64(b[80:])), QTime: nanosLabel(le.Uint64(b[88:])),
		PGeneration: le.Uint64(b[96:]),
		Disk:        string(b[256 : 256+min(name, diskNameMax)]),
	}
	if b[14] != 0 || b[15] != 0 || !zeroes(b[104:256]) || !zeroes(b[256+name:]) {
		return fmt.Errorf("header: %w", errReserved)
	}
	return l.check()
}

// check says what is impossible about the description. Writer and reader use
// the same.
func (l *LayerInfo) check() error {
	switch {
	case l.Kind != CutCrash && l.Kind != CutApp:
		return fmt.Errorf("header: cut of kind %d is unknown", l.Kind)
	case len(l.Disk) == 0 || len(l.Disk) > diskNameMax:
		return fmt.Errorf("header: a disk's name of %d bytes is impossible", len(l.Disk))
	case l.PGeneration > l.Generation:
		return fmt.Errorf("header: generation %d does not come before generation %d", l.PGeneration, l.Generation)
	case l.PGeneration == l.Generation && !l.P.Before(l.Q):
		return fmt.Errorf("header: cut %v does not come before cut %v", l.P, l.Q)
	case l.Size < 0 || l.Size > diskBytesMax || l.Size%sectorBytes != 0:
		return fmt.Errorf("header: a disk of %d bytes is impossible", l.Size)
	}
	return nil
}

// zeroes reports whether b is zero throughout: then each byte is what the one before
// it is, which is compared as memory is.
func zeroes(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

// layerFrame stands before stored data, little-endian:
//
//	byte  size  field
//	   0     4  crc     CRC-32C of bytes 4 to 31, seeded by the layer's
//	   4     1  coding  1 as it is, 2 zstd
//	   5     3  zero
//	   8     8  off     bytes on the disk
//	  16     4  raw     bytes on the disk, at most 64 KiB
//	  20     4  stored  bytes that follow; zeroes up to a multiple of 8 follow them
//	  24     4  sum     CRC-32C of the stored bytes, seeded by the layer's
//	  28     4  zero
type layerFrame struct {
	coding      byte
	off         int64
	raw, stored uint32
	sum         uint32
}

const (
	codingRaw  = 1
	codingZstd = 2
)

func (f *layerFrame) encode(b []byte, seed uint32) {
	b = b[:layerFrameBytes]
	clear(b)
	le := binary.LittleEndian
	b[4] = f.coding
	le.PutUint64(b[8:], uint64(f.off))
	le.PutUint32(b[16:], f.raw)
	le.PutUint32(b[20:], f.stored)
	le.PutUint32(b[24:], f.sum)
	le.PutUint32(b[0:], crc32.Update(seed, castagnoli, b[4:]))
}

func (f *layerFrame) decode(b []byte, seed uint32) error {
	b = b[:layerFrameBytes]
	le := binary.LittleEndian
	if le.Uint32(b) != crc32.Update(seed, castagnoli, b[4:]) {
		return fmt.Errorf("frame header: %w", errChecksum)
	}
	*f = layerFrame{b[4], int64(le.Uint64(b[8:])), le.Uint32(b[16:]), le.Uint32(b[20:]), le.Uint32(b[24:])}
	switch {
	case !zeroes(b[5:8]) || !zeroes(b[28:]):
		return fmt.Errorf("frame header: %w", errReserved)
	case f.coding != codingRaw && f.coding != codingZstd:
		return fmt.Errorf("frame header: coding %d is unknown", f.coding)
	case f.coding == codingRaw && f.stored != f.raw, f.stored == 0, f.stored > f.raw, f.raw > LayerDataMax:
		return fmt.Errorf("frame header: %d bytes stored as %d are impossible", f.raw, f.stored)
	}
	return nil
}

// layerSpan is how many bytes of the file a frame takes.
func layerSpan(stored uint32) int64 {
	return layerFrameBytes + (int64(stored)+frameAlign-1)&^(frameAlign-1)
}

// A page of the index, little-endian:
//
//	byte  size  field
//	   0     4  crc      CRC-32C of bytes 4 to 4095, seeded by the layer's
//	   4     4  entries  1 to 127; only the last page may have fewer than 127
//	   8     8  number   of the page, from 0
//	  16    16  zero
//	  32        entries of 32 bytes; zeroes follow:
//	            0  8  off     bytes on the disk; sorted, and no two overlap
//	            8  8  len     bytes on the disk
//	           16  8  pos     where the frame begins in the file; 0: zeroes
//	           24  4  stored  bytes the frame stores
//	           28  4  flags   1: unreadable; pos is 0
type layerEntry struct {
	off, len int64
	pos      int64
	stored   uint32
	// unreadable says that the primary could not read the extent at the cut: the
	// layer has nothing there, what lies below it shows, and that is not what the
	// disk held (RULES G5).
	unreadable bool
}

const entryUnreadable = 1 // a flag

func (e *layerEntry) end() int64 { return e.off + e.len }

func putEntry(page []byte, i int, e *layerEntry) {
	b := page[layerEntryBytes*(i+1):]
	le := binary.LittleEndian
	le.PutUint64(b[0:], uint64(e.off))
	le.PutUint64(b[8:], uint64(e.len))
	le.PutUint64(b[16:], uint64(e.pos))
	le.PutUint32(b[24:], e.stored)
	flags := uint32(0)
	if e.unreadable {
		flags = entryUnreadable
	}
	le.PutUint32(b[28:], flags)
}

// entryAt returns entry i of a page that was checked.
func entryAt(page []byte, i int) layerEntry {
	b := page[layerEntryBytes*(i+1):]
	le := binary.LittleEndian
	return layerEntry{int64(le.Uint64(b)), int64(le.Uint64(b[8:])), int64(le.Uint64(b[16:])), le.Uint32(b[24:]), b[28]&entryUnreadable != 0}
}

func pageEntries(page []byte) int { return int(binary.LittleEndian.Uint32(page[4:])) }

// sealPage completes a page of n entries.
func sealPage(page []byte, number int64, n int, seed uint32) {
	le := binary.LittleEndian
	le.PutUint32(page[4:], uint32(n))
	le.PutUint64(page[8:], uint64(number))
	clear(page[16:layerEntryBytes])
	clear(page[layerEntryBytes*(n+1):])
	le.PutUint32(page, crc32.Update(seed, castagnoli, page[4:]))
}

// checkPage checks a page of the index of a layer with this trailer, of a disk
// of size bytes: every number in it is safe to use afterwards.
func checkPage(page []byte, number int64, t *layerTrailer, size int64, seed uint32) error {
	le := binary.LittleEndian
	if le.Uint32(page) != crc32.Update(seed, castagnoli, page[4:]) {
		return fmt.Errorf("index page: %w", errChecksum)
	}
	n := int64(le.Uint32(page[4:]))
	if got := le.Uint64(page[8:]); got != uint64(number) || n != min(layerPageEntries, t.entries-number*layerPageEntries) {
		return fmt.Errorf("index page %d with %d entries where page %d was due", got, n, number)
	}
	if !zeroes(page[16:layerEntryBytes]) || !zeroes(page[layerEntryBytes*(n+1):]) {
		return fmt.Errorf("index page: %w", errReserved)
	}
	last := int64(0)
	for i := range int(n) {
		e := entryAt(page, i)
		bad := e.off < last || e.len <= 0 || e.off > size || e.len > size-e.off || e.off%sectorBytes != 0 || e.len%sectorBytes != 0
		if e.pos == 0 {
			bad = bad || e.stored != 0
		} else {
			bad = bad || e.len > LayerDataMax || e.stored == 0 || int64(e.stored) > e.len ||
				e.pos < layerHeaderBytes || e.pos%frameAlign != 0 || e.pos > t.index || layerSpan(e.stored) > t.index-e.pos
		}
		flags := le.Uint32(page[layerEntryBytes*(i+1)+28:])
		if bad || flags&^entryUnreadable != 0 || flags != 0 && e.pos != 0 {
			return fmt.Errorf("index page: entry %d is impossible", i)
		}
		last = e.end()
	}
	return nil
}

// The trailer, little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-LTR"
//	   7     1  version
//	   8     4  crc      CRC-32C of bytes 12 to 127, seeded by the layer's
//	  12     4  zero
//	  16     8  index    where the first index page begins: the end of the frames
//	  24     8  entries  of the index
//	  32     8  data     bytes on the disk of entries with data
//	  40     8  zeroes   bytes on the disk of entries of zeroes
//	  48     8  size     bytes of the whole file
//	  56     8  lost     bytes on the disk of unreadable entries
//	  64    64  zero
type layerTrailer struct {
	index, entries int64
	data, zero     int64
	size           int64
	lost           int64
}

func (t *layerTrailer) pages() int64 { return (t.entries + layerPageEntries - 1) / layerPageEntries }

func (t *layerTrailer) encode(b *[layerTrailerBytes]byte, seed uint32) {
	*b = [layerTrailerBytes]byte{}
	copy(b[:], trailerMagic[:])
	b[7] = LayerVersion
	le := binary.LittleEndian
	for i, v := range []int64{t.index, t.entries, t.data, t.zero, t.size, t.lost} {
		le.PutUint64(b[16+8*i:], uint64(v))
	}
	le.PutUint32(b[8:], crc32.Update(seed, castagnoli, b[12:]))
}

func (t *layerTrailer) decode(b *[layerTrailerBytes]byte, seed uint32, file int64) error {
	le := binary.LittleEndian
	if [7]byte(b[:7]) != trailerMagic || b[7] != LayerVersion {
		return errors.New("no trailer at its end")
	}
	if le.Uint32(b[8:]) != crc32.Update(seed, castagnoli, b[12:]) {
		return fmt.Errorf("trailer: %w", errChecksum)
	}
	if !zeroes(b[12:16]) || !zeroes(b[64:]) {
		return fmt.Errorf("trailer: %w", errReserved)
	}
	at := func(i int) int64 { return int64(le.Uint64(b[16+8*i:])) }
	*t = layerTrailer{at(0), at(1), at(2), at(3), at(4), at(5)}
	switch {
	case t.size != file:
		return fmt.Errorf("the file has %d bytes, not %d", file, t.size)
	case t.index < layerHeaderBytes || t.index > file-layerTrailerBytes || t.index%frameAlign != 0,
		t.entries < 0 || t.entries > diskBytesMax/sectorBytes,
		t.index+t.pages()*layerPageBytes+layerTrailerBytes != file,
		t.data < 0 || t.zero < 0 || t.lost < 0 || t.data > diskBytesMax || t.zero > diskBytesMax || t.lost > diskBytesMax:
		return errors.New("trailer: impossible numbers")
	}
	return nil
}

// A LayerError says that a layer is damaged.
type LayerError struct {
	Layer string // its path
	Off   int64  // bytes into the file where the damage is
	Err   error
}

func (e *LayerError) Error() string {
	return fmt.Sprintf("layer %s is damaged at byte %d: %v", e.Layer, e.Off, e.Err)
}

// Unwrap returns the reason.
func (e *LayerError) Unwrap() error { return e.Err }

// Is makes errors.Is(err, ErrDamaged) true.
func (e *LayerError) Is(target error) bool { return target == ErrDamaged }

// Hint says what to do.
func (e *LayerError) Hint() string {
	return "fetch the layer again from a host that has it whole; until then the points that need it are damaged"
}
