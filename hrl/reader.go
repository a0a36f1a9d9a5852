package hrl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"
)

// Segments are segments of one log, opened for reading, oldest first.
type Segments struct {
	fs       FS
	Segments []*Segment
	unused   []string // segment files in which nothing counts
	buf      []byte   // of scans and walks, one at a time
	headers  bool     // read no more than headers and the disks they are followed by
	closed   func()   // called by Close; may be nil
	healed   Mark     // gaps and copies before it do not count
	// copiesKept says that copies are no changes: see Options.CopiesKept.
	copiesKept bool
}

// A Segment is one opened segment.
type Segment struct {
	Path        string
	Incarnation uint64
	Ordinal     uint64
	First       uint64    // sequence number of its first sequenced frame
	Last        uint64    // of its last; First-1: it has none
	Created     time.Time // a label
	Sealed      bool
	AfterLoss   bool  // appends before it failed; its gap frame says what is missing
	End         int64 // bytes that count
	Frames      int
	Disks       []Disk // in order of DiskID
	// Damage is a *CorruptError if bytes that must count cannot be read. What
	// lies before End is good all the same.
	Damage error

	head    segmentHeader
	seed    uint32
	gap     bool      // a gap frame was seen
	prev    uint32    // bytes of the last frame before End
	regions []regions // of each disk, what the frames touch
	// firstCut and lastCut are epochs: what cut there is lies between them.
	// Without one lastCut is 0, which is no epoch.
	firstCut, lastCut uint64
	newest            foundCut // the last cut before End; its epoch may be less than lastCut
	f                 File

	known *stretch // what an open log knows of it; nil: nothing
	from  int64    // where the frames begin that are read
	limit int64    // nothing is read from here on
}

// A Disk is a disk as a segment names it.
type Disk struct {
	Name string
	Size int64 // bytes, at the segment's end
}

// A Frame is one frame of a segment. It and its payload are valid only until
// the visitor that was given it returns.
type Frame struct {
	Kind    Kind
	Disk    DiskID // meaningful within its segment; see Segment.Disks
	Seq     uint64
	Off     int64  // bytes on the disk
	Len     int64  // bytes on the disk
	Payload []byte // checked against its checksum
	At      int64  // where the frame begins in its segment
	Segment *Segment
}

// ErrNoDisk says that a log does not know a disk.
var ErrNoDisk = errors.New("the log has no disk")

// OpenSegments opens the segments named: files, or directories, of which all
// segments are taken. Damaged ones are opened as far as they are good, with
// Damage set; only an unreadable file, one that is no segment, one of another
// version or of another log than the first is an error. What a running daemon
// appends meanwhile is seen in part.
func OpenSegments(paths ...string) (*Segments, error) { return openSegments(OS, paths) }

func openSegments(fsys FS, paths []string) (*Segments, error) {
	r := &Segments{fs: fsys}
	err := r.open(paths)
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Segments) open(paths []string) error {
	for _, p := range paths {
		names, err := r.fs.ReadDir(p)
		if errors.Is(err, syscall.ENOTDIR) {
			if err := r.add(p, true); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		isLog := false
		for _, n := range names {
			isLog = isLog || n == metaName
			if strings.HasSuffix(n, segmentSuffix) {
				isLog = true
				if err := r.add(filepath.Join(p, n), false); err != nil {
					return err
				}
			}
		}
		if !isLog && len(names) > 0 {
			return fmt.Errorf("%s holds no replica log", p)
		}
	}
	r.sort()
	return r.catchUp()
}

// catchUp looks again at what a daemon has changed since it was read: a tail
// that has been sealed meanwhile, of which but a part was seen, and a spare that
// has become a segment. Without that, segments read later would not be the
// continuation of those read before.
func (r *Segments) catchUp() error {
	if r.headers || len(r.Segments) == 0 {
		return nil
	}
	unused := r.unused
	r.unused = nil
	for _, p := range unused {
		if err := r.add(p, false); err != nil {
			return err
		}
	}
	r.sort()
	for i, s := range r.Segments[:len(r.Segments)-1] {
		next := r.Segments[i+1]
		if s.Damage != nil || s.Sealed || next.Incarnation != s.Incarnation || next.AfterLoss || next.First == s.Last+1 {
			continue
		}
		again := &Segment{Path: s.Path, f: s.f} // its log's knowledge is outdated
		if again.readHeader() != nil {
			continue
		}
		again, err := r.scanLive(again)
		if err != nil {
			return err
		}
		r.Segments[i] = again
	}
	return nil
}

func (r *Segments) sort() {
	sort.SliceStable(r.Segments, func(i, j int) bool {
		a, b := r.Segments[i], r.Segments[j]
		if a.Incarnation != b.Incarnation {
			return a.Incarnation < b.Incarnation
		}
		return a.Ordinal < b.Ordinal
	})
}

// add opens one file. named says that the user named it, so that it has to be
// a segment.
func (r *Segments) add(path string, named bool) error {
	return r.addSegment(&Segment{Path: path}, named)
}

// addSegment is add for a segment of which something is known.
func (r *Segments) addSegment(s *Segment, named bool) error {
	path := s.Path
	f, err := r.fs.Open(path)
	if err != nil {
		return err
	}
	s.f = f
	err = s.readHeader()
	switch {
	case errors.Is(err, errUnused) && !named, err == nil && s.head.state == segmentFree:
		r.unused = append(r.unused, path)
		return f.Close()
	case errors.Is(err, ErrVersion):
		f.Close()
		return fmt.Errorf("segment %s: %w", path, err)
	case err != nil && named:
		f.Close()
		return fmt.Errorf("%s: %w", path, err)
	case err != nil:
		s.Damage = &CorruptError{path, 0, err}
	case r.otherLog(s) != "":
		f.Close()
		return fmt.Errorf("%s and %s belong to different logs", r.otherLog(s), path)
	case r.headers:
		r.readDisks(s)
	default:
		if s, err = r.scanLive(s); err != nil {
			f.Close()
			return err
		}
	}
	r.Segments = append(r.Segments, s)
	return nil
}

// otherLog returns the path of a segment of another log than that of s.
func (r *Segments) otherLog(s *Segment) string {
	for _, o := range r.Segments {
		if o.head.state != segmentInUse {
			continue // its header is damaged
		}
		if o.head.log != s.head.log {
			return o.Path
		}
		break
	}
	return ""
}

// scanTries and scanPause are for a segment that a daemon is just writing, or
// using anew, so that a moment later nothing is wrong any more with what looked
// damaged: a frame that was half there when it was read, and whole, with others
// behind it, when those were looked for.
const scanTries = 3

var scanPause = 2 * time.Millisecond // a variable so that fuzzing need not wait

// scanLive scans the segment, and again if it looks damaged but may only be
// alive: damage is what is found in the same place scanTries times.
func (r *Segments) scanLive(s *Segment) (*Segment, error) {
	for try, end := 1, int64(0); ; try++ {
		if err := r.scan(s); err != nil || s.Damage == nil || s.Sealed || s.known != nil {
			return s, err // what is known to have been written is not being written
		}
		if s.End > end {
			try, end = 1, s.End
		}
		if try >= scanTries {
			return s, nil
		}
		time.Sleep(scanPause)
		again := &Segment{Path: s.Path, f: s.f}
		if again.readHeader() != nil {
			return s, nil
		}
		s = again
	}
}

func (s *Segment) readHeader() error {
	var b [headerBytes]byte
	n, err := s.f.ReadAt(b[:], 0)
	if n < len(b) {
		if err == io.EOF {
			// Made, and not yet given its size.
			err = fmt.Errorf("%d bytes are too short for a segment: %w", n, errUnused)
		}
		return err
	}
	if err := s.head.decode(&b); err != nil {
		return err
	}
	s.seed = seed(&s.head.salt)
	s.Incarnation, s.Ordinal = s.head.incarnation, s.head.ordinal
	s.First, s.Last = s.head.first, s.head.first-1
	s.Created = time.Unix(0, s.head.created)
	s.from, s.limit = headerBytes, s.head.size
	s.AfterLoss = s.head.flags&segmentAfterLoss != 0
	return nil
}

// Close closes the segments' files.
func (r *Segments) Close() error {
	var err error
	for _, s := range r.Segments {
		if s.f != nil {
			if cerr := s.f.Close(); err == nil {
				err = cerr
			}
		}
	}
	if r.closed != nil {
		r.closed()
		r.closed = nil
	}
	return err
}

// scan goes through the segment's frames, from the start or from where its log says,
// and finds how far it is good. A segment that was not sealed simply ends with its last good frame,
// unless good frames follow behind it: then what lies between is damage.
func (r *Segments) scan(s *Segment) error {
	size, err := s.f.Size()
	if err != nil {
		return err
	}
	limit := min(size, s.head.size) - footerBytes
	var foot segmentFooter
	sealed := false
	if s.begin(); s.known != nil {
		limit = min(limit, s.known.end)
		s.limit = limit
	} else if foot, sealed = s.readFooter(); sealed {
		limit = min(limit, foot.end)
	}
	w := window{r: r, s: s}
	off := s.from
	var damage error
	for off < limit {
		h, p, err := w.frame(off, limit, false, nil)
		if err == nil {
			err = s.accept(h, p, off)
		}
		if err != nil {
			if sealed || s.known != nil || r.moreFrames(s, off+frameAlign, limit) {
				damage = err
				s.Sealed = sealed
			}
			break
		}
		off += h.span()
		s.prev = uint32(h.span())
		s.Frames++
		if h.kind == KindSeal {
			s.Sealed = true
			break
		}
	}
	s.End, s.limit = off, off
	switch {
	case damage != nil:
		s.Damage = &CorruptError{s.Path, off, damage}
	case sealed && (off != foot.end || s.Last != foot.last || !s.Sealed):
		s.Damage = &CorruptError{s.Path, off, errors.New("the seal says that more follows")}
	case s.AfterLoss && !s.gap:
		s.Damage = &CorruptError{s.Path, off, errors.New("it ends before the gap frame that says what is missing")}
	case size != s.head.size:
		s.Damage = &CorruptError{s.Path, off, fmt.Errorf("the file has %d bytes, not %d", size, s.head.size)}
	}
	return nil
}

func (s *Segment) readFooter() (segmentFooter, bool) {
	var b [footerBytes]byte
	var foot segmentFooter
	if n, _ := s.f.ReadAt(b[:], s.head.size-footerBytes); n < len(b) {
		return foot, false
	}
	ok := foot.decode(&b, s.seed) == nil && foot.seal >= headerBytes &&
		foot.end > foot.seal && foot.end <= s.head.size-footerBytes
	return foot, ok
}

// Disk returns the number by which the segment's frames know the disk.
func (s *Segment) Disk(name string) (DiskID, bool) {
	for id, d := range s.Disks {
		if d.Name == name {
			return DiskID(id), true
		}
	}
	return noDisk, false
}

// accept checks that the frame can follow the one before it, and takes note of
// what concerns the segment.
func (s *Segment) accept(h *frameHeader, payload []byte, off int64) error {
	if h.prev != s.prev {
		return fmt.Errorf("a frame after one of %d bytes says %d", s.prev, h.prev)
	}
	want := s.Last
	if h.kind.sequenced() {
		want++
	}
	if h.seq != want {
		return fmt.Errorf("frame %d where %d was due", h.seq, want)
	}
	if s.AfterLoss && !s.gap && h.kind != KindDisk && h.kind != KindGap {
		return fmt.Errorf("a %s frame where the gap frame was due that says what is missing", h.kind)
	}
	switch h.kind {
	case KindDisk:
		if int(h.disk) != len(s.Disks) {
			return fmt.Errorf("disk %d where disk %d was due", h.disk, len(s.Disks))
		}
		if len(s.Disks) == disksMax || len(payload) > diskNameMax {
			return fmt.Errorf("disk %d has a name of %d bytes: too much", h.disk, len(payload))
		}
		s.Disks = append(s.Disks, Disk{string(payload), h.len})
		s.regions = append(s.regions, regions{})
	case KindWrite, KindZero, KindCopy, KindResize:
		if int(h.disk) >= len(s.Disks) {
			return fmt.Errorf("frame %d is of a disk that the segment does not name", h.seq)
		}
		if h.kind == KindResize {
			if err := checkResize(h, payload); err != nil {
				return err
			}
			s.Disks[h.disk].Size = int64(binary.LittleEndian.Uint64(payload))
		}
		s.regions[h.disk].add(h.off, h.len)
	case KindCut:
		var c cutPayload
		if err := c.decode(payload); err != nil {
			return err
		}
		if s.lastCut == 0 {
			s.firstCut, s.lastCut = c.epoch, c.epoch
		}
		s.firstCut, s.lastCut = min(s.firstCut, c.epoch), max(s.lastCut, c.epoch)
		s.newest.note(&c, off+h.span(), h.span())
		s.newest.sizes = s.newest.sizes[:0]
		for _, d := range s.Disks {
			s.newest.sizes = append(s.newest.sizes, d.Size)
		}
	case KindGap:
		err := eachRun(payload, func(disk DiskID, off, length int64) {
			if int(disk) < len(s.Disks) {
				s.regions[disk].add(off, min(length, max(s.Disks[disk].Size-off, 0)))
			}
		})
		if err != nil {
			return err
		}
		s.gap = true
	case KindTouched, KindSeal:
		if err := eachRun(payload, func(DiskID, int64, int64) {}); err != nil {
			return err
		}
	}
	s.Last = h.seq
	return nil
}

// checkResize checks that the new size in the payload is one of the two that
// the header's range lies between.
func checkResize(h *frameHeader, payload []byte) error {
	size := int64(binary.LittleEndian.Uint64(payload))
	if size != h.off && size != h.off+h.len {
		return fmt.Errorf("a resize to %d bytes of the range from %d to %d", size, h.off, h.off+h.len)
	}
	return nil
}

// readDisks reads no more of the segment than the disks it names at its start.
func (r *Segments) readDisks(s *Segment) {
	w := window{r: r, s: s}
	for off := int64(headerBytes); ; {
		h, p, err := w.frame(off, s.head.size, false, nil)
		if err != nil || h.kind != KindDisk || s.accept(h, p, off) != nil {
			return
		}
		off += h.span()
		s.prev = uint32(h.span())
	}
}

// emptyChunk is how much is looked at together for whether there is anything, a
// multiple of frameAlign.
const emptyChunk = 4096

// moreFrames reports whether a good frame begins anywhere in [off, limit).
func (r *Segments) moreFrames(s *Segment, off, limit int64) bool {
	w := window{r: r, s: s}
	for ; off+frameBytes <= limit; off += emptyChunk {
		b, err := w.load(off, min(limit-off, emptyChunk+frameBytes), false)
		if err != nil {
			return false
		}
		// A frame's header does not begin with zeroes, and a new segment is full of them.
		step := b[:min(len(b), emptyChunk)]
		if zeroes(step) {
			continue
		}
		for i := 0; i < len(step) && i+frameBytes <= len(b); i += frameAlign {
			if frameAt(b[i:], s.seed) {
				return true
			}
		}
	}
	return false
}

// Each calls visit for the segment's frames in order, until it returns an error.
func (r *Segments) Each(s *Segment, visit func(*Frame) error) error {
	w := window{r: r, s: s}
	var f Frame
	for off := s.from; off < s.End; {
		h, p, err := w.frame(off, s.End, false, nil)
		if err != nil {
			return &CorruptError{s.Path, off, err}
		}
		f = Frame{h.kind, h.disk, h.seq, h.off, h.len, p, off, s}
		if err := visit(&f); err != nil {
			return err
		}
		off += h.span()
	}
	return nil
}

// Gap calls visit for the runs of blocks that a gap, touched or seal frame names.
func (f *Frame) Gap(visit func(disk DiskID, off, length int64)) error {
	return eachRun(f.Payload, visit)
}

// Cut returns what a cut frame says: the epoch it ended, when and how.
func (f *Frame) Cut() (epoch uint64, at time.Time, kind CutKind, err error) {
	var c cutPayload
	err = c.decode(f.Payload)
	return c.epoch, time.Unix(0, c.time), c.kind, err
}

// touched adds to set what the segment's frames behind the mark changed, copied (unless
// that is kept elsewhere) or named as lost, with disks numbered as in disks.
func (r *Segments) touched(s *Segment, behind Mark, disks []diskState, set *BlockSet) error {
	if s.Damage != nil {
		return s.Damage
	}
	renumber := make([]int, len(s.Disks))
	for i, d := range s.Disks {
		renumber[i] = -1
		for id := range disks {
			if disks[id].name == d.Name {
				renumber[i] = id
			}
		}
	}
	add := func(disk DiskID, off, length int64) {
		if int(disk) < len(renumber) && renumber[disk] >= 0 && off < diskBytesMax {
			set.Add(DiskID(renumber[disk]), off, min(length, diskBytesMax-off))
		}
	}
	return r.Each(s, func(f *Frame) error {
		if (Mark{s.Incarnation, f.Seq}).before(behind) {
			return nil
		}
		switch f.Kind {
		case KindCopy:
			if !r.copiesKept || bytes.Equal(f.Payload, unreadableDigest[:]) {
				add(f.Disk, f.Off, f.Len)
			}
		case KindWrite, KindZero, KindResize:
			add(f.Disk, f.Off, f.Len)
		case KindGap:
			return f.Gap(add)
		}
		return nil
	})
}
