package hrl

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Options say how a log is kept. The zero value is good for use.
type Options struct {
	FS FS // nil: OS
	// SegmentBytes is the size of a segment file; 0: 64 MiB. A multiple of
	// 4096, at least 4 MiB, at most 1 GiB.
	SegmentBytes int64
	// Spares is how many segments are kept ready; 0: 2.
	Spares int
	// Quota is how many bytes of segments the log may have, spares included;
	// 0: no limit. At the quota the oldest segment is reclaimed, and what its
	// frames changed becomes a gap. At least five segments. What a start adds
	// over it (new spares, and what its recovery logs) goes with the next roll.
	Quota int64
	// Reclaimed is called before the frames of a segment are given up, with
	// the blocks they touched, so that the caller stores them as gaps first,
	// durably; with an error they stay. It must be set if Quota is, and must not
	// call the Log.
	Reclaimed func(*BlockSet) error
	// Room says whether so many bytes more may be taken of the log's file system; nil:
	// as long as it has them. Where it says no, the log is as at its quota, but for the
	// few segments that it cannot do without (see GiveUp).
	Room func(bytes int64) bool
	// CopiesKept says that whoever makes copies remembers them beside the log, as gaps,
	// until a replica has acknowledged them. Else they count as changes wherever the
	// log tells what changed of what it has from earlier incarnations.
	CopiesKept bool
	// Prewrite writes a new segment full of zeroes before it is used, so that
	// appends find their blocks allocated and written. It doubles what a
	// segment costs the first time and saves at every later use, so it is for
	// logs whose segments are recycled.
	Prewrite bool
	// AppendLimit is how long an append may take before its changes become a
	// gap; 0: 50 ms, negative: for ever.
	AppendLimit time.Duration
	// Life identifies the boot of the host and the mounts of the log and of
	// the disks. Only if it is what it was at the last Open can a log that was
	// not closed be that of a killed process rather than of a lost page cache
	// (RULES E8).
	Life [32]byte
}

func (o *Options) fill() error {
	if o.FS == nil {
		o.FS = OS
	}
	if o.SegmentBytes == 0 {
		o.SegmentBytes = 64 << 20
	}
	if o.SegmentBytes%4096 != 0 || o.SegmentBytes < minSegmentBytes || o.SegmentBytes > maxSegmentBytes {
		return fmt.Errorf("segments of %d bytes: a multiple of 4096 from 4 MiB to 1 GiB is needed", o.SegmentBytes)
	}
	if o.Spares == 0 {
		o.Spares = 2
	}
	if o.Spares < 0 {
		return fmt.Errorf("%d spare segments: at least one is needed", o.Spares)
	}
	if o.Quota != 0 && o.Quota < 5*o.SegmentBytes {
		return fmt.Errorf("a quota of %d bytes: at least five segments of %d are needed", o.Quota, o.SegmentBytes)
	}
	if o.Quota != 0 && o.Reclaimed == nil {
		return fmt.Errorf("a quota needs somebody who stores the gaps")
	}
	if o.AppendLimit == 0 {
		o.AppendLimit = 50 * time.Millisecond
	}
	return nil
}

// Recovery says in what state Open found the log.
type Recovery int

const (
	// RecoverNew: there was none; it begins now.
	RecoverNew Recovery = iota
	// RecoverClean: it was closed, log and disks durable.
	RecoverClean
	// RecoverKill: its process ended without closing it, in this life: what
	// was appended is there, and the disk may lack the newest frames.
	RecoverKill
	// RecoverPowerCut: anything else. The log's frames are evidence of what
	// was changed, and disk and log may disagree in both directions (rule R7).
	RecoverPowerCut
)

func (r Recovery) String() string {
	return [...]string{"new", "clean", "kill", "power cut"}[r]
}

// Errors of appends. The changes of a group that was refused with any error
// but ErrClosed and a malformed group are remembered by the log as a gap.
var (
	ErrClosed    = errors.New("the log is closed")
	ErrLate      = errors.New("the append was later than its limit")
	ErrAbandoned = errors.New("the append was later than its limit and somebody else carries on")
	ErrNoSegment = errors.New("no segment is ready")
)

// A Log is an open replica log. Its methods may be called from several
// goroutines; Append and Cut must not be called after Close.
type Log struct {
	dir      string
	opt      Options
	fs       FS
	metaFile File
	// metaMu guards meta, once the log is open, but for the log's and the
	// incarnation's number, which stay. It is held while meta is written.
	metaMu   sync.Mutex
	meta     meta
	recovery Recovery
	first    uint64 // number of the first segment of this incarnation
	// lacks is what of the oldest part was missing when the log was opened although it
	// was not given up. Guarded by metaMu.
	lacks error
	known []Disk // that earlier incarnations logged

	keeper keeper

	giving sync.Mutex // held by GiveUp; taken before mu

	// mu guards everything below. It is never held across a system call.
	mu    sync.Mutex
	room  sync.Cond // a spare came, or spareErr changed, or the log closes
	disks []diskState

	busy   bool     // a goroutine leads
	queue  []*Group // waiting for the next append; queue[0] is the leader's when it leads
	op     *op      // the append under way, or nil
	opFree *op
	opID   uint64
	stuck  int // abandoned appends that have not returned

	tail    *segment
	spares  []*segment
	sealed  []*segment // in order; those of earlier incarnations first
	ordinal uint64     // of the next segment
	begun   uint64     // newest ordinal whose segment has a header
	seq     uint64     // of the last sequenced frame
	epoch   uint64     // the open one's number
	touched BlockSet   // of the open epoch: sections that ended with their segment
	freeSec *section   // an empty section kept for the next cut
	lost    BlockSet   // changes no frame holds and no gap frame names yet
	surplus []string   // as a segment's: the next tail's gap frame names what they touched
	lossy   bool       // appends failed since the tail was begun

	spareErr error // why appends are refused: there is no spare, or suspect is set
	// suspect says that an append has failed, and nothing has worked since. No tail is
	// begun before retryAt, which is pause after the failure; returned is when the log
	// last came back from such a time. See backOffLocked.
	suspect  bool
	retryAt  time.Time
	pause    time.Duration
	returned time.Time
	given    int64  // how often GiveUp has given room
	starved  bool   // a disk had no room, and there was none to spare since
	readers  int    // no segment is reclaimed while there are any
	reading  []Mark // of those readers that read only what lies behind a mark
	needless Mark   // what lies before it is needed no more
	closed   bool
	ended    bool // Close has done its part
	released bool // the files are closed
	watching bool // the watchdog runs

	stats Stats
}

type diskState struct {
	name string
	size int64
}

// A section is the set of blocks touched by consecutive frames of one segment.
type section struct {
	set    BlockSet
	frames int
}

// Stats are counts since Open.
type Stats struct {
	Appends  int64 `json:"appends"`        // system calls that appended
	Groups   int64 `json:"groups"`         // groups appended
	Frames   int64 `json:"frames"`         // frames appended
	Bytes    int64 `json:"bytes"`          // bytes appended, headers included
	Late     int64 `json:"late_appends"`   // appends let go because they hung
	Failed   int64 `json:"failed_appends"` // appends refused or failed
	Segments int   `json:"segments"`       // in use, whatever incarnation
	Spares   int   `json:"spare_segments"`
	// SegmentBytes is what segments and spares take.
	SegmentBytes int64 `json:"segment_bytes"`
	// Reclaimed counts segments given up at the quota.
	Reclaimed int64 `json:"reclaimed_segments"`
	// Released counts segments that nothing needed any more.
	Released int64 `json:"released_segments"`
	Cuts     int64 `json:"cuts"`
}

// Open opens the log in dir, making it if there is none (the directory must
// then be empty or absent), takes a new incarnation, and says in what state it
// found it. The caller holds the locks of the disks by then: nobody else may
// write them between the recovery and the first append. It fails with ErrLocked if
// another process has the log open, with ErrVersion if a newer or older
// afterimage wrote it, and in every case before anything was changed.
func Open(dir string, opt Options) (*Log, Recovery, error) {
	if err := opt.fill(); err != nil {
		return nil, 0, err
	}
	l := &Log{dir: dir, opt: opt, fs: opt.FS, epoch: 1, readers: 1}
	l.room.L = &l.mu
	if err := l.open(); err != nil {
		for _, s := range l.spares {
			s.f.Close()
		}
		if l.metaFile != nil {
			l.metaFile.Close()
		}
		return nil, 0, fmt.Errorf("open log %s: %w", dir, err)
	}
	l.keeper.start(l)
	return l, l.recovery, nil
}

func (l *Log) open() error {
	if err := l.fs.MkdirAll(l.dir); err != nil {
		return err
	}
	path := filepath.Join(l.dir, metaName)
	f, err := l.fs.Edit(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := l.create(); err != nil {
			return err
		}
		f, err = l.fs.Edit(path)
		l.recovery = RecoverNew
	} else {
		l.recovery = -1
	}
	if err != nil {
		return err
	}
	l.metaFile = f
	if err := f.Lock(); err != nil {
		return err
	}
	// Read only now: another process may have created or changed it.
	var half bool
	if l.meta, half, err = readMeta(f); err != nil {
		return err
	}
	if half {
		// The newer state may be the one that is gone: the log may not have
		// been closed, and one more incarnation may have been taken.
		l.meta.state, l.meta.life = metaOpen, [32]byte{}
		l.meta.incarnation++
	}
	if l.recovery != RecoverNew {
		switch {
		case l.meta.state == metaClean:
			l.recovery = RecoverClean
		case l.meta.life == l.opt.Life && !half && l.meta.state != metaDoubt:
			l.recovery = RecoverKill
		default:
			l.recovery = RecoverPowerCut
		}
	}
	if err := l.adopt(); err != nil {
		return err
	}
	// Rule R8: durable before the first append.
	l.meta.incarnation++
	l.meta.state = metaOpen
	if l.recovery == RecoverPowerCut {
		l.meta.state = metaDoubt
	}
	l.meta.life = l.opt.Life
	return writeMeta(f, &l.meta)
}

// create makes the LOG file of a new log in an empty directory.
func (l *Log) create() error {
	names, err := l.fs.ReadDir(l.dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n != metaName+".new" && n != "lost+found" {
			return fmt.Errorf("the directory holds %q but no log: give an empty one, or one that does not exist", n)
		}
	}
	m := meta{state: metaClean, life: l.opt.Life, ordinal: 1}
	if _, err := rand.Read(m.log[:]); err != nil {
		return err
	}
	return createMeta(l.fs, l.dir, &m)
}

// adopt takes up the segments that earlier incarnations left. It reads their
// headers alone, for a log can be large and a guest waits.
func (l *Log) adopt() error {
	a := &Segments{fs: l.fs, headers: true}
	defer a.Close()
	if err := a.open([]string{l.dir}); err != nil {
		return err
	}
	l.ordinal = max(1, l.meta.ordinal)
	newest := uint64(0)
	l.known = a.Disks()
	for _, s := range a.Segments {
		if s.Damage != nil && errors.Is(s.Damage, ErrVersion) {
			return s.Damage
		}
		seg := &segment{path: s.Path, size: s.head.size, head: s.head}
		// What a killed process appended may still be in memory alone.
		seg.unsynced = s.head.ordinal >= l.meta.synced
		if s.head.log != l.meta.log && s.Damage == nil {
			return fmt.Errorf("segment %s belongs to another log", s.Path)
		}
		l.sealed = append(l.sealed, seg)
		l.ordinal = max(l.ordinal, s.head.ordinal+1)
		newest = max(newest, s.head.ordinal)
		l.meta.incarnation = max(l.meta.incarnation, s.head.incarnation)
	}
	if newest < l.meta.begun && l.meta.begun >= l.meta.oldest && l.recovery != RecoverNew {
		// Somebody has removed what was logged last: the log can vouch for
		// nothing, as after a power cut.
		l.recovery = RecoverPowerCut
	}
	if len(l.sealed) > 0 && l.recovery != RecoverNew {
		o := l.sealed[0].head.ordinal
		if oldest := max(l.meta.oldest, 1); o > oldest && l.sealed[0].head.flags&segmentAfterLoss == 0 {
			l.lacks = fmt.Errorf("%w: its oldest segment is number %d, not %d", ErrDamaged, o, oldest)
		}
	}
	l.begun = max(newest, l.meta.begun)
	l.first = l.ordinal
	for _, path := range a.unused {
		seg, err := l.reopenSpare(path)
		if err != nil {
			return err
		}
		if seg != nil {
			l.spares = append(l.spares, seg)
		}
	}
	return nil
}

// reopenSpare opens a segment that nothing in it counts for. One of another
// size (the option changed, or it was never finished) is removed.
func (l *Log) reopenSpare(path string) (*segment, error) {
	f, err := l.fs.Edit(path)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err == nil && size != l.opt.SegmentBytes {
		f.Close()
		return nil, l.fs.Remove(path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &segment{path: path, f: f, size: size}, nil
}

// Dir is the log's directory.
func (l *Log) Dir() string { return l.dir }

// ID is the log's UUID.
func (l *Log) ID() [16]byte { return l.meta.log }

// Incarnation is the number of this opening of the log.
func (l *Log) Incarnation() uint64 { return l.meta.incarnation }

// AddDisk names a disk whose changes will be appended, and its present size in
// bytes, and returns the number entries know it by. It must come before the
// first append: every segment begins with the disks of the log.
func (l *Log) AddDisk(name string, size int64) (DiskID, error) {
	if name == "" || len(name) > diskNameMax || strings.ContainsAny(name, "/\x00") {
		return 0, fmt.Errorf("disk name %q: 1 to 255 bytes without a slash are needed", name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if size < 0 || size > diskBytesMax || size%sectorBytes != 0 {
		return 0, fmt.Errorf("disk %s: %d bytes are no multiple of %d up to 1 PiB", name, size, sectorBytes)
	}
	if len(l.disks) == disksMax {
		return 0, fmt.Errorf("disk %s: a log has at most %d disks", name, disksMax)
	}
	if l.seq != 0 || l.tail != nil {
		return 0, fmt.Errorf("disk %s: added after the first append", name)
	}
	for _, d := range l.disks {
		if d.name == name {
			return 0, fmt.Errorf("disk %s: added twice", name)
		}
	}
	l.disks = append(l.disks, diskState{name, size})
	return DiskID(len(l.disks) - 1), nil
}

// Known returns the disks that earlier incarnations logged and segments still
// name, with the sizes they had.
func (l *Log) Known() []Disk { return l.known }

// Recovered says that the recovery is done: what it found doubtful is durable as gaps,
// and the segments of earlier incarnations may be reclaimed. Until it has returned, a
// power cut stays a power cut, however often the process is killed and started again
// (RULES E4); then what is older than this incarnation counts no more, and goes. With
// an error nothing has changed.
func (l *Log) Recovered() error {
	l.metaMu.Lock()
	err := l.settleLocked()
	l.metaMu.Unlock()
	if err != nil {
		return fmt.Errorf("log %s: %w", l.dir, err)
	}
	l.mu.Lock()
	l.readers--
	if l.recovery == RecoverPowerCut {
		l.needless = Mark{l.meta.incarnation, 0}
	}
	l.mu.Unlock()
	l.keeper.kick()
	return nil
}

// settleLocked ends the doubt; metaMu is held.
func (l *Log) settleLocked() error {
	if l.meta.state != metaDoubt {
		return nil
	}
	l.lacks = nil
	before := l.meta
	l.meta.state, l.meta.oldest, l.meta.synced, l.meta.syncedSeq = metaOpen, l.first, 0, 0
	err := writeMeta(l.metaFile, &l.meta)
	if err != nil {
		before.count = l.meta.count
		l.meta = before
	}
	return err
}

// Ready waits until the log can take an append, and says why it cannot if it
// cannot: its disk is full, or read-only.
func (l *Log) Ready() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.spares) == 0 && l.tail == nil {
		switch {
		case l.closed:
			return ErrClosed
		case l.spareErr != nil:
			return fmt.Errorf("log %s has no room for changes: %w", l.dir, l.spareErr)
		}
		l.room.Wait()
	}
	return nil
}

// Segments opens the log's segments of earlier incarnations for reading, for
// the recovery. The caller closes what it gets, before it calls Recovered.
func (l *Log) Segments() (*Segments, error) {
	l.mu.Lock()
	var paths []string
	for _, s := range l.sealed {
		if s.head.incarnation != l.meta.incarnation {
			paths = append(paths, s.path)
		}
	}
	l.mu.Unlock()
	if len(paths) == 0 {
		return &Segments{}, nil
	}
	r := &Segments{fs: l.fs}
	for _, p := range paths {
		// A header that cannot be read is damage, as it is for a directory.
		if err := r.add(p, false); err != nil {
			r.Close()
			return nil, err
		}
	}
	l.metaMu.Lock()
	oldest := l.meta.oldest
	l.metaMu.Unlock()
	// A power cut may have torn those that count no more.
	r.Segments = slices.DeleteFunc(r.Segments, func(s *Segment) bool {
		gone := s.Damage != nil && s.Ordinal > 0 && s.Ordinal < oldest
		if gone {
			s.f.Close()
		}
		return gone
	})
	r.sort()
	return r, nil
}

// Stats returns the counts so far.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Segments, s.Spares = len(l.sealed), len(l.spares)
	for _, all := range [][]*segment{l.sealed, l.spares} {
		for _, g := range all {
			s.SegmentBytes += g.size
		}
	}
	if l.tail != nil {
		s.Segments++
		s.SegmentBytes += l.tail.size
	}
	return s
}

// LostBytes is how many bytes of disk the log knows it lacks, in blocks of 64
// KiB, and has not yet been able to say so in a gap frame.
func (l *Log) LostBytes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost.Bytes()
}
