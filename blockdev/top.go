package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
)

const (
	// topBlock is what a bit of a presence map stands for, in bytes. Smaller
	// writes take the rest of the block from below.
	topBlock = 4096
	// topPage is the unit in which a presence map is made durable, in bytes.
	topPage = 4096
	// topVersion is the version of the presence map.
	topVersion = 1
	// topMapSuffix names the presence map after the top.
	topMapSuffix = ".map"
)

// Top is what was written over a disk that itself is never written: a sparse
// file with the blocks, each at its place, and a presence map that says which
// of them it has. A block that is zeroed or trimmed is present, and zero.
//
// # The presence map
//
// The map is a file of one page of header and two bitmaps, each rounded up to
// pages, a bit for every 4 KiB of the disk, the lowest bit first:
//
//	byte  size  field of the header, little-endian
//	   0     7  magic "AIM-TOP"
//	   7     1  version
//	   8     4  crc    CRC-32C of bytes 12 to 4095
//	  12     4  zero
//	  16     8  size   of the disk, in bytes
//	  24     8  zero
//	  32    32  under  what the top lies over, as its maker was told
//	  64    32  life   what the opener was told identifies boot and mounts
//	  96  4000  zero
//
// "Written" is the first bitmap: a bit is set in it when the block's bytes have
// been written to the data file, before the request is answered. Neither is synced.
// "Durable" is the second: a flush sets those bits in it whose blocks were
// written before it began, after it has synced the data.
//
// So after a kill, in the same life, the written bitmap is right: what was answered
// is in the page cache, data and bit both, and a bit whose data are not there
// cannot be, as it is set later. After a power cut (another life) the
// kernel may have written a bit and not its block, so the written bitmap counts for
// nothing; the durable one is right: the data of each of its bits were on the
// disk before the bit was given to the kernel, and of all that a flush had
// confirmed both are on the disk. It is then copied over the other. A bit is
// never cleared otherwise, so of a torn page every byte, old or new, is right;
// that is why the bitmaps need no checksum.
type Top struct {
	name     string
	size     int64
	data     Device // size rounded up to topBlock
	presence Device

	// order keeps a block from being changed while another request copies it up
	// from below: held shared by changes that need no copying.
	order sync.RWMutex

	// mu guards what follows. It is taken after order and flushing, and is held
	// across the small writes of the written bitmap, so that those of one byte
	// of it follow one another.
	mu      sync.RWMutex
	written []byte
	dirty   map[int64]bool // pages of written that are not durable
	failed  error          // of a flush: what was written before it is unknown for good

	flushing sync.Mutex // one flush at a time
}

var topTable = crc32.MakeTable(crc32.Castagnoli)

// ErrTop says that a top belongs to another disk, or is none.
var ErrTop = errors.New("not the top of this disk")

// CreateTop makes an empty top for a disk of size bytes in the file path and
// path+".map", neither of which may exist. Under names what it will lie over: it
// is opened over nothing else.
//
// A crash after step
//
//  1. data file made: leaves it, empty
//  2. map file made: the same, and a map without header
//  3. header synced: leaves the top
//
// What the first two leave cannot be opened and was never written: remove it.
func CreateTop(path string, size int64, under, life [32]byte) error {
	blocks := (size + topBlock - 1) / topBlock
	if size <= 0 || size%SectorSize != 0 {
		return fmt.Errorf("create top %s of %d bytes: %w", path, size, ErrAlignment)
	}
	if err := CreateFile(path, blocks*topBlock); err != nil {
		return err
	}
	if err := CreateFile(path+topMapSuffix, topMapBytes(size)); err != nil {
		return err
	}
	f, err := OpenFile(path+topMapSuffix, FileOptions{Raw: true})
	if err != nil {
		return err
	}
	err = formatTop(f, size, under, life)
	return errors.Join(err, f.Close())
}

func formatTop(presence Device, size int64, under, life [32]byte) error {
	h := topHeader{size: size, under: under, life: life}
	var b [topPage]byte
	h.encode(&b)
	// No more than the first sector ever differs: a power cut leaves the old
	// header or the new one.
	if err := WriteAt(presence, b[:SectorSize], 0); err != nil {
		return err
	}
	return Flush(presence)
}

// OpenTop opens a top that CreateTop made for a disk of that size over the same,
// else it fails with ErrTop. Life identifies boot and mounts: if it is not that
// of the last time, what was not flushed is taken as lost.
func OpenTop(path string, size int64, under, life [32]byte) (*Top, error) {
	data, err := OpenFile(path, FileOptions{Raw: true})
	if err != nil {
		return nil, err
	}
	presence, err := OpenFile(path+topMapSuffix, FileOptions{Raw: true})
	if err != nil {
		return nil, errors.Join(err, data.Close())
	}
	t, err := newTop(filepath.Base(path), data, presence, size, under, life)
	if err != nil {
		return nil, errors.Join(err, presence.Close(), data.Close())
	}
	return t, nil
}

// RemoveTop removes what there is of the files of a top.
func RemoveTop(path string) error {
	var errs []error
	for _, name := range []string{path + topMapSuffix, path} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

type topHeader struct {
	size        int64
	under, life [32]byte
}

func (h *topHeader) encode(b *[topPage]byte) {
	*b = [topPage]byte{}
	copy(b[:], "AIM-TOP")
	b[7] = topVersion
	binary.LittleEndian.PutUint64(b[16:], uint64(h.size))
	copy(b[32:], h.under[:])
	copy(b[64:], h.life[:])
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:], topTable))
}

func (h *topHeader) decode(b *[topPage]byte) error {
	switch {
	case string(b[:7]) != "AIM-TOP":
		return fmt.Errorf("it has no header: %w", ErrTop)
	case b[7] != topVersion:
		return fmt.Errorf("its map has version %d, this is %d: %w", b[7], topVersion, ErrTop)
	case binary.LittleEndian.Uint32(b[8:]) != crc32.Checksum(b[12:], topTable):
		return fmt.Errorf("the header of its map is damaged: %w", ErrTop)
	}
	h.size = int64(binary.LittleEndian.Uint64(b[16:]))
	h.under, h.life = [32]byte(b[32:]), [32]byte(b[64:])
	return nil
}

// topBitmapBytes is the length of one bitmap of a disk, in whole pages.
func topBitmapBytes(size int64) int64 {
	const perPage = topPage * 8 * topBlock
	return (size + perPage - 1) / perPage * topPage
}

func topMapBytes(size int64) int64 { return topPage + 2*topBitmapBytes(size) }

// newTop opens a top on the devices that hold it, which it then owns.
func newTop(name string, data, presence Device, size int64, under, life [32]byte) (*Top, error) {
	t := &Top{name: name, size: size, data: data, presence: presence, dirty: make(map[int64]bool)}
	fail := func(err error) (*Top, error) { return nil, fmt.Errorf("open top %s: %w", name, err) }
	if have := (size + topBlock - 1) / topBlock * topBlock; data.Size() != have || presence.Size() != topMapBytes(size) {
		return fail(fmt.Errorf("%d bytes and a map of %d are not those of a disk of %d: %w", data.Size(), presence.Size(), size, ErrTop))
	}
	var b [topPage]byte
	if err := ReadAt(presence, b[:], 0); err != nil {
		return fail(err)
	}
	var h topHeader
	if err := h.decode(&b); err != nil {
		return fail(err)
	}
	if h.size != size || h.under != under {
		return fail(ErrTop)
	}
	n := topBitmapBytes(size)
	t.written = make([]byte, n)
	if h.life == life {
		if err := ReadAt(presence, t.written, topPage); err != nil {
			return fail(err)
		}
		durable := make([]byte, n)
		if err := ReadAt(presence, durable, topPage+n); err != nil {
			return fail(err)
		}
		for i := range t.written {
			if t.written[i] != durable[i] {
				t.dirty[int64(i)/topPage] = true
			}
		}
		return t, nil
	}
	// A crash in between leaves the old life, and this is done again.
	if err := ReadAt(presence, t.written, topPage+n); err != nil {
		return fail(err)
	}
	if err := WriteAt(presence, t.written, topPage); err != nil {
		return fail(err)
	}
	if err := Flush(presence); err != nil {
		return fail(err)
	}
	if err := formatTop(presence, size, under, life); err != nil {
		return fail(err)
	}
	return t, nil
}

// Name is for messages.
func (t *Top) Name() string { return t.name }

// Present returns how many bytes of the disk the top has.
func (t *Top) Present() int64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := 0
	for i := 0; i < len(t.written); i += 8 {
		n += bits.OnesCount64(binary.LittleEndian.Uint64(t.written[i:]))
	}
	return int64(n) * topBlock
}

// Close closes the top's files. Nothing is made durable by that.
func (t *Top) Close() error { return errors.Join(t.data.Close(), t.presence.Close()) }

func (t *Top) hasLocked(block int64) bool { return t.written[block/8]>>(block%8)&1 != 0 }

// run returns how many of the n bytes at off are alike, and whether they are
// present.
func (t *Top) run(off, n int64) (int64, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	block, end := off/topBlock, (off+n-1)/topBlock+1
	present := t.hasLocked(block)
	same, word := byte(0), uint64(0)
	if present {
		same, word = 0xff, ^word
	}
	for block++; block < end; {
		switch i := block / 8; {
		case block%64 == 0 && block+64 <= end && binary.LittleEndian.Uint64(t.written[i:]) == word:
			block += 64
		case block%8 == 0 && block+8 <= end && t.written[i] == same:
			block += 8
		case t.hasLocked(block) == present:
			block++
		default:
			end = block
		}
	}
	return min(off+n, end*topBlock) - off, present
}

// set notes that the blocks [first, end) have been written.
func (t *Top) set(first, end int64) error {
	if first >= end {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	lo, hi := int64(-1), int64(0) // bytes that changed
	for block := first; block < end; {
		i := block / 8
		mask := byte(0xff) << (block % 8)
		if end < (i+1)*8 {
			mask &= 0xff >> ((i+1)*8 - end)
		}
		if t.written[i]&mask != mask {
			t.written[i] |= mask
			t.dirty[i/topPage] = true
			if lo < 0 {
				lo = i
			}
			hi = i + 1
		}
		block = (i + 1) * 8
	}
	if lo < 0 {
		return nil
	}
	lo, hi = lo/SectorSize*SectorSize, (hi+SectorSize-1)/SectorSize*SectorSize
	if err := WriteAt(t.presence, t.written[lo:hi], topPage+lo); err != nil {
		return fmt.Errorf("note what was written: %w", err)
	}
	return nil
}

// flush makes durable what had been written when it began, data before bits.
func (t *Top) flush() error {
	t.flushing.Lock()
	defer t.flushing.Unlock()
	t.mu.Lock()
	failed := t.failed
	pages := make(map[int64][]byte, len(t.dirty))
	for p := range t.dirty {
		pages[p] = append([]byte(nil), t.written[p*topPage:(p+1)*topPage]...)
	}
	clear(t.dirty)
	t.mu.Unlock()
	if failed != nil {
		return failed
	}
	err := Flush(t.data)
	for p, b := range pages {
		if err == nil {
			err = WriteAt(t.presence, b, topPage+int64(len(t.written))+p*topPage)
		}
	}
	if err == nil && len(pages) > 0 {
		err = Flush(t.presence)
	}
	if err != nil {
		// A later sync that succeeds says nothing about these data, so no bit
		// may be set any more on its word. After a restart it is the filter's
		// latch that knows of this (rule R9).
		t.mu.Lock()
		t.failed = fmt.Errorf("an earlier flush failed: %w", err)
		t.mu.Unlock()
	}
	return err
}

// below reads what lies under the top.
type below func(p []byte, off int64) error

// begin returns when the edges of the range can be written: they are whole
// blocks, or present already, or were copied up by it. The caller calls end
// when the range is written and noted.
func (t *Top) begin(e Extent, from below) (end func(), err error) {
	t.order.RLock()
	if len(t.torn(e)) == 0 {
		return t.order.RUnlock, nil
	}
	t.order.RUnlock()
	t.order.Lock()
	for _, block := range t.torn(e) {
		if err := t.copyUp(block, from); err != nil {
			t.order.Unlock()
			return nil, err
		}
	}
	return t.order.Unlock, nil
}

// torn returns the blocks of which e has but a part, and the top nothing.
func (t *Top) torn(e Extent) (blocks []int64) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	first, last := e.Off/topBlock, (e.End()-1)/topBlock
	if e.Off%topBlock != 0 && !t.hasLocked(first) {
		blocks = append(blocks, first)
	}
	// Beyond the disk's end there is nothing to keep.
	if e.End()%topBlock != 0 && e.End() != t.size && !t.hasLocked(last) && (len(blocks) == 0 || last != first) {
		blocks = append(blocks, last)
	}
	return blocks
}

func (t *Top) copyUp(block int64, from below) error {
	p := AlignedBuf(topBlock)
	off := block * topBlock
	if err := from(p[:min(topBlock, t.size-off)], off); err != nil {
		return err
	}
	if err := WriteAt(t.data, p, off); err != nil {
		return err
	}
	return t.set(block, block+1)
}

// write writes p at off, both in bytes, in sectors.
func (t *Top) write(p []byte, off int64, from below) error {
	e := Extent{off, int64(len(p))}
	end, err := t.begin(e, from)
	if err != nil {
		return err
	}
	defer end()
	if err := WriteAt(t.data, p, off); err != nil {
		return err
	}
	return t.set(e.Off/topBlock, (e.End()-1)/topBlock+1)
}

// zero makes e read as zero, in blocks that are present.
func (t *Top) zero(e Extent, flags Flags, from below) error {
	if flags&FlagFastZero != 0 && (flags&FlagNoHole != 0 || !t.data.Info().CheapZero) {
		return fmt.Errorf("fast zeroing: %w", ErrNotSupported)
	}
	end, err := t.begin(e, from)
	if err != nil {
		return err
	}
	defer end()
	if err := Do1(t.data, &Request{Op: OpWriteZeroes, Flags: flags & FlagNoHole, Off: e.Off, Len: e.Len}); err != nil {
		return err
	}
	return t.set(e.Off/topBlock, (e.End()-1)/topBlock+1)
}

// trim zeroes the whole blocks of e, if that is cheap, and returns them.
func (t *Top) trim(e Extent) (Extent, error) {
	first, end := (e.Off+topBlock-1)/topBlock, e.End()/topBlock
	if !t.data.Info().CheapTrim || first >= end {
		return Extent{}, nil
	}
	done := Extent{first * topBlock, (end - first) * topBlock}
	t.order.RLock()
	defer t.order.RUnlock()
	if err := WriteZeroes(t.data, done); err != nil {
		return Extent{}, err
	}
	return done, t.set(first, end)
}
