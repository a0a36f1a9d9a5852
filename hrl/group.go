package hrl

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// An Entry is one change to be appended.
type Entry struct {
	Kind Kind
	Disk DiskID
	Off  int64 // bytes
	Len  int64 // bytes
	// Data is the payload: the written bytes of a KindWrite, the digest of a
	// KindCopy, nil for a KindZero. It is not copied and must stay as it is
	// until Append has returned, and longer if it returned ErrAbandoned.
	Data []byte

	// Seq is the sequence number the entry was appended with.
	Seq uint64

	sum uint32
}

// GapEntry is an entry which says that the range may have changed without a frame.
func GapEntry(disk DiskID, off, length int64) Entry {
	var s BlockSet
	s.Add(disk, off, length)
	return Entry{Kind: KindGap, Disk: noDisk, Data: s.Append(nil)}
}

// GapsEntry is a GapEntry for a whole set. One that is too large for a frame becomes
// one run for each disk, which holds all of it.
func GapsEntry(set *BlockSet) Entry {
	return Entry{Kind: KindGap, Disk: noDisk, Data: boundedSet(set, groupSpanMax/2)}
}

// UnreadableEntry is an entry which says that the range was to be copied, and cannot be
// read. It is a KindCopy with a digest that nothing has.
func UnreadableEntry(disk DiskID, off, length int64) Entry {
	return Entry{Kind: KindCopy, Disk: disk, Off: off, Len: length, Data: unreadableDigest[:]}
}

// unreadableDigest stands where the digest of what was copied should be.
var unreadableDigest [digestBytes]byte

// ResizeEntry is an entry which says that the disk's size in bytes changed from
// old to size. It stands for a zeroing of all between the two as well.
func ResizeEntry(disk DiskID, old, size int64) Entry {
	lo, hi := min(old, size), max(old, size)
	return Entry{
		Kind: KindResize, Disk: disk, Off: lo, Len: hi - lo,
		Data: binary.LittleEndian.AppendUint64(nil, uint64(size)),
	}
}

// GroupMax is the most entries of a Group.
const GroupMax = 16

// A Group is what is appended at once: all of it lies in one segment, or none
// of it counts. Groups are meant to be used again and again, for they hold the
// memory an append needs. Until Append has returned, a group belongs to the log.
type Group struct {
	Entries []Entry

	// Abandoned is called, on a goroutine of its own, with the reason, if the
	// append that carries the group is later than Options.AppendLimit and
	// this group's goroutine is the one that is stuck in it. Append returns
	// ErrAbandoned there, whenever it returns; whoever is called here carries
	// on instead, and leaves group and payloads to the garbage collector.
	Abandoned func(error)

	seg   *segment // where it was appended; counts the group as unfinished
	err   error
	lead  bool
	wake  chan struct{} // tells a waiting group that it is done, or that it leads
	heads [GroupMax][frameBytes]byte
	span  int64 // bytes in the log
	// Of a cut: what the epoch touched that seals have noted already, the
	// section that nothing has noted yet, and where the frame lies.
	epochSet BlockSet
	section  *section
	place    place
}

// NewGroup returns an empty group.
func NewGroup() *Group {
	return &Group{Entries: make([]Entry, 0, GroupMax), wake: make(chan struct{}, 1)}
}

// Reset empties the group for its next use.
func (g *Group) Reset() {
	clear(g.Entries)
	g.Entries = g.Entries[:0]
	g.seg, g.err, g.lead, g.span, g.section, g.epochSet, g.place = nil, nil, false, 0, nil, BlockSet{}, place{}
}

// Add adds an entry. It panics if there are GroupMax already.
func (g *Group) Add(e Entry) {
	if len(g.Entries) == GroupMax {
		panic("hrl: more than GroupMax entries in a group")
	}
	g.Entries = append(g.Entries, e)
}

// prepare checks the entries and sums their payloads, outside every lock.
func (g *Group) prepare() error {
	if len(g.Entries) == 0 {
		return fmt.Errorf("append of an empty group")
	}
	if len(g.Entries) > GroupMax {
		return fmt.Errorf("append of a group of %d entries: %d are the most", len(g.Entries), GroupMax)
	}
	g.span = 0
	for i := range g.Entries {
		e := &g.Entries[i]
		if err := e.check(); err != nil {
			return fmt.Errorf("append: %w", err)
		}
		e.sum = crc32.Checksum(e.Data, castagnoli)
		g.span += frameSpan(len(e.Data))
	}
	if g.span > groupSpanMax {
		return fmt.Errorf("append of a group of %d bytes: %d are the most", g.span, groupSpanMax)
	}
	return nil
}

// check says what is impossible about the entry.
func (e *Entry) check() error {
	if len(e.Data) > setPayloadMax {
		return fmt.Errorf("a %s of %d bytes", e.Kind, len(e.Data))
	}
	h := frameHeader{kind: e.Kind, disk: e.Disk, payload: uint32(len(e.Data)), off: e.Off, len: e.Len}
	if err := h.check(); err != nil {
		return err
	}
	switch e.Kind {
	case KindResize:
		return checkResize(&h, e.Data)
	case KindGap:
		return eachRun(e.Data, func(DiskID, int64, int64) {})
	}
	return nil
}

// groupSpanMax bounds a group's bytes in the log, so that one fits any segment.
const groupSpanMax = minSegmentBytes / 2
