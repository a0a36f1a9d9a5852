package replica

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"path/filepath"
	"sync"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// sumsVersion is the version of the checksums beside a base. A reader refuses
// any other.
const sumsVersion = 1

const (
	sumBlock      = 64 << 10 // bytes of the base that a checksum covers
	sumsHeadBytes = 64
	sumPageBytes  = 4096
	sumPageBlocks = 960
	sumsFirst     = sumPageBytes // where the pages begin
	sumPagesHeld  = 256
)

// A sumState says what is known of a block of the base.
type sumState byte

const (
	sumZero    sumState = iota // it reads as zero
	sumKnown                   // it has the checksum
	sumUnknown                 // a fold may be changing it
	sumDamaged                 // it was found damaged; nothing covers all of it
)

// Sums are the checksums of a base, one for each 64 KiB of it, in a file of a
// header, and two slots for each page. All numbers are little-endian. The
// header, in the first 4 KiB:
//
//	byte  size  field
//	   0     7  magic "AIM-SUM"
//	   7     1  version
//	   8     4  crc    CRC-32C of bytes 12 to 63
//	  12     4  block  bytes of the base a checksum covers: 65536
//	  16    16  vm     UUID
//	  32    32  zero
//
// Page n lies at byte 4096 + 8192 n and again 4096 further: whichever of the two
// is whole and has the higher number counts, and the other one is written next,
// so that a write that is torn costs nothing. A page where neither was written
// says that its blocks read as zero.
//
//	  0     4  crc     CRC-32C of bytes 4 to 4095, seeded by the header's
//	  4     4  page    n
//	  8     4  number  one more with each write of the page, from 1
//	 12     4  fold    the fold that wrote it, from 1
//	 16   240  states  of 960 blocks, 2 bits each, the lowest first: 0 zero,
//	                   1 known, 2 unknown, 3 damaged
//	256  3840  sums    CRC-32C of each block; 0 where it is not known. A block
//	                   beyond the end of the base, or in part, is taken as if
//	                   zeroes followed
//
// A fold writes each page that it touches twice: with its blocks unknown before
// it changes the base, with their checksums afterwards. So a page that has
// unknown blocks and belongs to a fold that was finished, as the journal counts
// them, has lost its other slot: that is damage.
//
// The header has nothing that is not known from elsewhere: where it rots it is
// written again.
//
// Sums are read by many and written by one fold at a time: put and renew are
// called with base.mu held, page with base.mu held shared.
type sums struct {
	fs   hrl.FS
	path string
	vm   wire.VMID
	f    hrl.File
	seed uint32

	failed error // of a sync: the file must be made anew before it is written again

	mu   sync.Mutex         // of held; the last of all locks
	held map[int64]*sumPage // used last, in no order; a page in it never changes
}

type sumPage struct {
	number, fold uint32
	slot         int64 // 0 or 1, where it stands; -1: nowhere
	states       [sumPageBlocks / 4]byte
	crcs         [sumPageBlocks]uint32
}

func (p *sumPage) state(i int64) sumState { return sumState(p.states[i/4] >> (2 * (i % 4)) & 3) }

func (p *sumPage) set(i int64, s sumState, crc uint32) {
	p.states[i/4] = p.states[i/4]&^(3<<(2*(i%4))) | byte(s)<<(2*(i%4))
	p.crcs[i] = crc
}

func sumsHead(vm wire.VMID) []byte {
	b := make([]byte, sumPageBytes)
	copy(b, "AIM-SUM")
	b[7] = sumsVersion
	binary.LittleEndian.PutUint32(b[12:], sumBlock)
	copy(b[16:], vm[:])
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:sumsHeadBytes], castagnoli))
	return b
}

// createSums makes the checksums of an empty base, synced; the directory is not.
func createSums(fs hrl.FS, path string, vm wire.VMID) error {
	f, err := fs.Create(path)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(sumsHead(vm), 0); err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func openSums(fs hrl.FS, path string, vm wire.VMID, warn *slog.Logger) (*sums, error) {
	_ = fs.Remove(path + newSuffix)
	f, err := fs.Edit(path)
	if err != nil {
		return nil, err
	}
	s := &sums{fs: fs, path: path, vm: vm, f: f, held: map[int64]*sumPage{}}
	if err := s.readHead(warn); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

func (s *sums) readHead(warn *slog.Logger) error {
	want := sumsHead(s.vm)[:sumsHeadBytes]
	s.seed = binary.LittleEndian.Uint32(want[8:])
	b := make([]byte, sumsHeadBytes)
	if n, err := s.f.ReadAt(b, 0); n < len(b) && err != io.EOF {
		return fmt.Errorf("read %s: %w", s.path, err)
	}
	switch {
	case string(b) == string(want):
		return nil
	case string(b[:7]) == "AIM-SUM" && b[7] != sumsVersion:
		return fmt.Errorf("%s: %w: version %d, this is %d", s.path, hrl.ErrVersion, b[7], sumsVersion)
	case binary.LittleEndian.Uint32(b[8:]) == crc32.Checksum(b[12:], castagnoli):
		return &BaseError{s.path, 0, errors.New("its header is that of another VM")}
	}
	warn.Warn("the header of checksums was damaged and is written again: check the disk of this host", "file", s.path)
	if _, err := s.f.WriteAt(want, 0); err != nil {
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	return s.sync()
}

// page returns a page, which is not to be changed.
func (s *sums) page(n int64) (*sumPage, error) {
	s.mu.Lock()
	p := s.held[n]
	s.mu.Unlock()
	if p != nil {
		return p, nil
	}
	at := sumsFirst + n*2*sumPageBytes
	b := make([]byte, 2*sumPageBytes)
	got, err := s.f.ReadAt(b, at)
	if size, serr := s.f.Size(); got < len(b) && (serr != nil || at+int64(got) < size) {
		return nil, fmt.Errorf("read %s at byte %d: %w", s.path, at, err)
	}
	best, bad := &sumPage{slot: -1}, 0
	for slot := range int64(2) {
		p := &sumPage{slot: slot}
		switch ok, empty := p.decode(b[slot*sumPageBytes:][:sumPageBytes], n, s.seed); {
		case ok && p.number > best.number:
			best = p
		case !ok && !empty:
			bad++
		}
	}
	if bad == 2 {
		return nil, &BaseError{s.path, at, errChecksum}
	}
	s.hold(n, best)
	return best, nil
}

// blocks is of how many blocks something may be known.
func (s *sums) blocks() (int64, error) {
	size, err := s.f.Size()
	if err != nil {
		return 0, err
	}
	pages := max(0, size-sumsFirst+2*sumPageBytes-1) / (2 * sumPageBytes)
	return pages * sumPageBlocks, nil
}

// hold makes p the page n, in memory; nil: it must be read again.
func (s *sums) hold(n int64, p *sumPage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, n)
	for k := range s.held {
		if len(s.held) < sumPagesHeld {
			break
		}
		delete(s.held, k)
	}
	if p != nil {
		s.held[n] = p
	}
}

func (p *sumPage) decode(b []byte, n int64, seed uint32) (ok, empty bool) {
	le := binary.LittleEndian
	if zeroes(b) {
		return false, true
	}
	if le.Uint32(b) != crc32.Update(seed, castagnoli, b[4:]) || int64(le.Uint32(b[4:])) != n {
		return false, false
	}
	p.number, p.fold = le.Uint32(b[8:]), le.Uint32(b[12:])
	copy(p.states[:], b[16:256])
	for i := range p.crcs {
		p.crcs[i] = le.Uint32(b[256+4*i:])
	}
	return p.number > 0, false
}

func (p *sumPage) encode(b []byte, n int64, seed uint32) {
	le := binary.LittleEndian
	le.PutUint32(b[4:], uint32(n))
	le.PutUint32(b[8:], p.number)
	le.PutUint32(b[12:], p.fold)
	copy(b[16:256], p.states[:])
	for i, c := range p.crcs {
		le.PutUint32(b[256+4*i:], c)
	}
	le.PutUint32(b, crc32.Update(seed, castagnoli, b[4:]))
}

// put writes a page that has taken the place of the one that page returned. It
// is durable after sync. After an error the file has the old one or the new one.
func (s *sums) put(n int64, p *sumPage) error {
	if s.failed != nil {
		if err := s.renew(); err != nil {
			return err
		}
		// Renewing has put all pages into the first slot.
		p.slot = min(p.slot, 0)
	}
	p.number++
	p.slot = (p.slot + 1) % 2
	b := make([]byte, sumPageBytes)
	p.encode(b, n, s.seed)
	s.hold(n, nil)
	if _, err := s.f.WriteAt(b, sumsFirst+(n*2+p.slot)*sumPageBytes); err != nil {
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	s.hold(n, p)
	return nil
}

// sync makes durable what was put, unless an earlier sync has failed: then it
// must be renew.
func (s *sums) sync() error {
	if err := s.f.Sync(); err != nil {
		s.failed = err
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	return nil
}

// renew makes the file anew after a sync of it has failed: which of its pages
// are on the disk nobody knows, but what is read of them is right.
//
// A crash before the rename leaves the old file and what the disk has of it:
// blocks that the base's fold has not touched, or unknown ones. After it the
// new one is there, whole.
func (s *sums) renew() error {
	if err := s.writeNew(); err != nil {
		return fmt.Errorf("%s cannot be written since %w: %w", s.path, s.failed, err)
	}
	return nil
}

func (s *sums) writeNew() error {
	size, err := s.f.Size()
	if err != nil {
		return err
	}
	tmp := s.path + newSuffix
	_ = s.fs.Remove(tmp)
	f, err := s.fs.Create(tmp)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(sumsHead(s.vm), 0)
	b := make([]byte, sumPageBytes)
	for n := int64(0); err == nil && sumsFirst+n*2*sumPageBytes < size; n++ {
		var p *sumPage
		if p, err = s.page(n); err != nil || p.slot < 0 {
			continue
		}
		p.encode(b, n, s.seed)
		_, err = f.WriteAt(b, sumsFirst+n*2*sumPageBytes)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = s.fs.Rename(tmp, s.path)
	}
	if err == nil {
		err = s.fs.SyncDir(filepath.Dir(s.path))
	}
	if err != nil {
		_ = s.fs.Remove(tmp)
		return errors.Join(err, f.Close())
	}
	_ = s.f.Close() // nothing of it counts any more
	s.mu.Lock()
	defer s.mu.Unlock()
	s.f, s.failed, s.held = f, nil, map[int64]*sumPage{} // they were in other slots
	return nil
}

func (s *sums) close() error { return s.f.Close() }
