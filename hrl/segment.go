package hrl

import (
	"crypto/rand"
	"fmt"
	"hash/crc32"
	"sync/atomic"
	"time"
)

// A segment of an open log. Its life:
//
//	        keeper                beginTail            seal, or an append fails
//	absent ────────▶ spare ─────────────▶ tail ─────────────────▶ sealed
//	                   ▲                                             │
//	                   └──────────── reclaimed by the keeper ────────┘
//
// A spare's file still holds what it held before: nothing, or, when it was
// reclaimed, its old frames, which count until the first append into the new
// tail overwrites the old header, the gap frame that makes up for them in the
// same system call.
type segment struct {
	path string
	size int64
	f    File // nil once sealed and closed

	// The rest is set by beginTail; the leader of an append and, after the
	// seal, the keeper alone change it, under Log.mu.
	head segmentHeader
	seed uint32
	end  int64  // bytes that count, without the seal; the next frame goes here
	prev uint32 // bytes of the last frame
	last uint64 // sequence number of the last sequenced frame
	sec  *section
	pre  []byte   // header and first notes, to be written by the first append
	lost BlockSet // what the gap frame in pre names; of a spare, what its old frames touched
	// surplus are files of older segments whose frames lost names too: they are
	// removed once pre is written.
	surplus []string
	places  []place // of its cuts, in order
	broken  bool    // an append failed: what lies behind end does not count
	empty   bool    // broken before it held anything

	unsynced    bool  // written since its last sync
	outstanding int   // abandoned appends that may still write into it
	behind      int64 // bytes handed to write-behind

	// touched is the seal's set of blocks, encoded; nil: not known without
	// reading the segment. noted are the sets that stand in the segment before
	// the seal: of its gap frames, and of the sections that its cuts ended.
	touched []byte
	noted   [][]byte

	// unfinished counts groups whose writes have not ended on the disk.
	// Such a segment is not reclaimed (RULES C3).
	unfinished atomic.Int64
}

// sealReserve is what must stay free behind n more frames: the seal.
func (s *segment) sealReserve(n int) int64 {
	return frameSpan(s.sec.set.encodedMax(n)) + footerBytes
}

// fits reports whether frames of span bytes fit and the seal after them.
func (s *segment) fits(span int64, n int) bool {
	return s.sec.set.encodedMax(n) <= setPayloadMax && s.end+int64(len(s.pre))+span+s.sealReserve(n) <= s.size
}

// beginTailLocked makes the oldest spare the tail. Nothing is written: the
// header goes with the first frames, in one call, so a segment either has a
// header and counts, or does not.
func (l *Log) beginTailLocked() error {
	s := l.spares[0]
	s.head = segmentHeader{
		state: segmentInUse, log: l.meta.log, incarnation: l.meta.incarnation,
		ordinal: l.ordinal, first: l.seq + 1, size: s.size, created: time.Now().UnixNano(),
	}
	if _, err := rand.Read(s.head.salt[:]); err != nil {
		return fmt.Errorf("no random salt: %w", err)
	}
	l.spares = l.spares[:copy(l.spares, l.spares[1:])]
	l.ordinal++
	s.seed = seed(&s.head.salt)
	s.sec = l.takeSectionLocked()
	s.end, s.prev, s.last, s.behind = 0, 0, l.seq, 0
	s.broken, s.empty, s.touched, s.noted, s.places, s.unsynced = false, false, nil, nil, nil, true
	s.lost.AddSet(&l.lost)
	s.surplus = append(s.surplus, l.surplus...)
	l.lost, l.surplus = BlockSet{}, nil
	if l.lossy || !s.lost.Empty() {
		s.head.flags |= segmentAfterLoss
	}
	l.lossy = false

	pre := make([]byte, headerBytes, headerBytes+1024)
	s.head.encode((*[headerBytes]byte)(pre))
	for id, d := range l.disks {
		pre = s.appendNote(pre, frameHeader{kind: KindDisk, disk: DiskID(id), len: d.size}, []byte(d.name))
	}
	if s.head.flags&segmentAfterLoss != 0 {
		// Even if it names nothing: without it a segment torn behind its
		// header would look as if nothing were missing.
		gap := boundedSet(&s.lost, s.size/4)
		s.noted = append(s.noted, gap)
		pre = s.appendNote(pre, frameHeader{kind: KindGap, disk: noDisk}, gap)
	}
	s.pre = pre
	l.tail = s
	l.keeper.kick()
	return nil
}

// appendNote appends a frame that takes no sequence number.
func (s *segment) appendNote(b []byte, h frameHeader, payload []byte) []byte {
	h.payload, h.prev, h.seq = uint32(len(payload)), s.prev, s.last
	h.sum = crc32.Checksum(payload, castagnoli)
	var head [frameBytes]byte
	h.encode(&head, s.seed)
	b = append(b, head[:]...)
	b = append(b, payload...)
	b = append(b, make([]byte, h.span()-frameBytes-int64(len(payload)))...)
	s.prev = uint32(h.span())
	return b
}

// boundedSet is the set's bytes, or, if they are more than limit, those of a
// set that holds it: one run for each disk.
func boundedSet(s *BlockSet, limit int64) []byte {
	b := s.Append(nil)
	if int64(len(b)) <= min(limit, setPayloadMax) {
		return b
	}
	var coarse BlockSet
	first := map[DiskID]int64{}
	s.Runs(func(disk DiskID, off, length int64) {
		if _, ok := first[disk]; !ok {
			first[disk] = off
		}
	})
	s.Runs(func(disk DiskID, off, length int64) {
		if at, ok := first[disk]; ok && off >= at {
			coarse.Add(disk, at, off+length-at)
			first[disk] = off + length
		}
	})
	return coarse.Append(nil)
}

func (l *Log) takeSectionLocked() *section {
	if s := l.freeSec; s != nil {
		l.freeSec = nil
		return s
	}
	return &section{}
}

// endTailLocked ends the tail without a seal after a failed append. The frames
// before it stay valid.
func (l *Log) endTailLocked() {
	s := l.tail
	l.tail = nil
	s.broken = true
	if s.pre != nil {
		// Its header was never written, or only perhaps: it holds nothing
		// that counts, and what it was to tell is still to be told.
		l.lost.AddSet(&s.lost)
		l.surplus = append(l.surplus, s.surplus...)
		s.empty = true
	}
	s.surplus = nil
	s.pre, s.lost = nil, BlockSet{}
	l.suspect = true
	l.backOffLocked(time.Since(l.returned) < healthyAfter)
	l.endSectionLocked(s)
	l.lossy = true
	l.sealed = append(l.sealed, s)
	l.keeper.kick()
}

// endSectionLocked ends the segment's last section, adding it to the epoch's set.
func (l *Log) endSectionLocked(s *segment) {
	s.touched = s.sec.set.Append(nil)
	l.touched.AddSet(&s.sec.set)
	l.giveSectionLocked(s.sec)
	s.sec = nil
}

func (l *Log) giveSectionLocked(s *section) {
	s.set.Reset()
	s.frames = 0
	l.freeSec = s
}

// sealLocked ends the tail for good; the keeper writes the seal.
func (l *Log) sealLocked() {
	s := l.tail
	l.tail = nil
	l.endSectionLocked(s)
	l.sealed = append(l.sealed, s)
	l.keeper.toSeal = append(l.keeper.toSeal, s)
	l.keeper.kick()
}

// writeSeal writes the seal frame and the footer. A crash between the two, or
// within either, leaves a segment that has to be scanned to find its end: no
// frame is lost by it.
//
// A segment ended by a failed append is sealed, too, once that append has
// returned: behind the end may lie whatever the append wrote after all, from
// buffers that were used for something else by then.
func (s *segment) writeSeal() error {
	at := s.end
	b := s.appendNote(nil, frameHeader{kind: KindSeal, disk: noDisk}, s.touched)
	if _, err := s.f.WriteAt(b, at); err != nil {
		return err
	}
	var page [footerBytes]byte
	foot := segmentFooter{seal: at, end: at + int64(len(b)), last: s.last}
	foot.encode(&page, s.seed)
	_, err := s.f.WriteAt(page[:], s.size-footerBytes)
	return err
}
