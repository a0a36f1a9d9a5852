package hrl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"
)

// metaName is the file of a log that says which log it is.
const metaName = "LOG"

// meta is what the file LOG says. The file has two pages of 4 KiB; the valid
// one with the greater count is the present one, and a change is written to
// the other and synced, so that a torn write leaves the old state. Little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-LOG"
//	   7     1  version
//	   8     4  crc   CRC-32C of bytes 12 to 127
//	  12     4  state 1 open (or was not closed), 2 closed cleanly, 3 open after a
//	                  power cut, and what that made doubtful is not in the log yet
//	  16     8  count of changes of this file
//	  24     8  incarnation  the newest that was ever taken
//	  32    16  log   UUID
//	  48    32  life  what the opener was told identifies boot and mounts
//	  80     8  ordinal  the next segment's, at least; valid in state 2
//	  88     8  begun    the newest segment that was begun, as far as that was noted;
//	                     0: not at all. A log whose segments end before it has lost some
//	  96     8  synced   number of the newest segment that a sync has made durable,
//	                     those before it with it; 0: none
//	 104     8  seq      up to which sequence number that one is durable
//	 112     8  oldest   number of the oldest segment that counts: those before it
//	                     were released or reclaimed; 0: not noted
//	 120     8  zero
type meta struct {
	state       uint32
	count       uint64
	incarnation uint64
	log         [16]byte
	life        [32]byte
	ordinal     uint64
	begun       uint64
	synced      uint64
	syncedSeq   uint64
	oldest      uint64
}

// metaVersion is the version of LOG.
const metaVersion = 2

const (
	metaOpen  = 1
	metaClean = 2
	metaDoubt = 3

	metaPage  = 4096
	metaBytes = 128
)

var metaMagic = [7]byte{'A', 'I', 'M', '-', 'L', 'O', 'G'}

func (m *meta) encode(b []byte) {
	clear(b[:metaBytes])
	copy(b, metaMagic[:])
	b[7] = metaVersion
	le := binary.LittleEndian
	le.PutUint32(b[12:], m.state)
	le.PutUint64(b[16:], m.count)
	le.PutUint64(b[24:], m.incarnation)
	copy(b[32:], m.log[:])
	copy(b[48:], m.life[:])
	le.PutUint64(b[80:], m.ordinal)
	le.PutUint64(b[88:], m.begun)
	le.PutUint64(b[96:], m.synced)
	le.PutUint64(b[104:], m.syncedSeq)
	le.PutUint64(b[112:], m.oldest)
	le.PutUint32(b[8:], crc32.Checksum(b[12:metaBytes], castagnoli))
}

func (m *meta) decode(b []byte) error {
	if [7]byte(b[:7]) != metaMagic {
		return errors.New("not the LOG file of a replica log")
	}
	if b[7] != metaVersion {
		return fmt.Errorf("%w: version %d, this is %d", ErrVersion, b[7], metaVersion)
	}
	le := binary.LittleEndian
	if le.Uint32(b[8:]) != crc32.Checksum(b[12:metaBytes], castagnoli) {
		return errChecksum
	}
	m.state = le.Uint32(b[12:])
	m.count = le.Uint64(b[16:])
	m.incarnation = le.Uint64(b[24:])
	copy(m.log[:], b[32:])
	copy(m.life[:], b[48:])
	m.ordinal = le.Uint64(b[80:])
	m.begun = le.Uint64(b[88:])
	m.synced = le.Uint64(b[96:])
	m.syncedSeq = le.Uint64(b[104:])
	m.oldest = le.Uint64(b[112:])
	if m.state < metaOpen || m.state > metaDoubt {
		return fmt.Errorf("state %d is unknown", m.state)
	}
	return nil
}

// readMeta reads the newer valid page of an open LOG file. half says that the
// other page was written once and is bad: it may have been the newer one.
func readMeta(f File) (m meta, half bool, err error) {
	var b [2 * metaPage]byte
	if n, err := f.ReadAt(b[:], 0); n < len(b) {
		return meta{}, false, fmt.Errorf("read %s: %w", metaName, err)
	}
	m, err = decodeMeta(&b)
	for _, p := range [][]byte{b[:metaBytes], b[metaPage : metaPage+metaBytes]} {
		var other meta
		half = half || err == nil && [metaBytes]byte(p) != [metaBytes]byte{} && other.decode(p) != nil
	}
	return m, half, err
}

func decodeMeta(b *[2 * metaPage]byte) (meta, error) {
	var m [2]meta
	err0, err1 := m[0].decode(b[:metaPage]), m[1].decode(b[metaPage:])
	switch {
	case err0 != nil && err1 != nil:
		return meta{}, fmt.Errorf("%s: both copies are bad: %w", metaName, err0)
	case errors.Is(err0, ErrVersion):
		return meta{}, err0
	case errors.Is(err1, ErrVersion):
		return meta{}, err1
	case err0 != nil:
		return m[1], nil
	case err1 != nil || m[0].count > m[1].count:
		return m[0], nil
	}
	return m[1], nil
}

// writeMeta makes m durable in the page that does not hold the present state.
func writeMeta(f File, m *meta) error {
	if err := noteMeta(f, m); err != nil {
		return err
	}
	return f.Sync()
}

// noteMeta is writeMeta for what a kill must not lose, and a power cut may.
func noteMeta(f File, m *meta) error {
	m.count++
	var b [metaPage]byte
	m.encode(b[:])
	_, err := f.WriteAt(b[:], int64(m.count%2)*metaPage)
	return err
}

// createMeta makes the LOG file of a new log.
func createMeta(fs FS, dir string, m *meta) error {
	var b [2 * metaPage]byte
	m.count++
	m.encode(b[int64(m.count%2)*metaPage:])
	return writeNew(fs, filepath.Join(dir, metaName), b[:])
}
