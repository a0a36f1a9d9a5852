package stamp

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"afterimage/hrl"
)

// FormatVersion is the version of the stamp's file.
const FormatVersion = 1

const (
	stateOpen  = 1 // or not ended cleanly
	stateClean = 2

	recordBytes = 512 // a sector, so it is written whole or not at all
	fileBytes   = 2 * recordBytes
	usedBytes   = 128
)

var (
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	magic       = [7]byte{'A', 'I', 'M', '-', 'I', 'M', 'G'}
	errChecksum = errors.New("checksum does not match")
)

// A record is what is known of the image. The file has two places of 512 bytes;
// the valid record with the greater count is the present one, and the next goes
// to the other place, count mod 2. Little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-IMG"
//	   7     1  version
//	   8     4  crc    CRC-32C of bytes 12 to 127
//	  12     4  state  1 open (or did not end cleanly), 2 clean
//	  16     8  count  of records
//	  24     8  beat   when it was written, nanoseconds since 1970
//	  32     8  inode  of the image
//	  40     8  size   of the image in bytes
//	  48     8  mtime  of the image, nanoseconds since 1970; valid in state 2
//	  56    32  first  SHA-256 of the first MiB, or of all there is; valid in state 2
//	  88    32  last   SHA-256 of the last MiB, or of all there is; valid in state 2
//	 120   392  zero
type record struct {
	state       uint32
	count       uint64
	beat        time.Time
	inode       uint64
	size        int64
	mtime       time.Time
	first, last [sha256.Size]byte
}

func (r *record) encode(b []byte) {
	clear(b[:recordBytes])
	copy(b, magic[:])
	b[7] = FormatVersion
	le := binary.LittleEndian
	le.PutUint32(b[12:], r.state)
	le.PutUint64(b[16:], r.count)
	le.PutUint64(b[24:], uint64(r.beat.UnixNano()))
	le.PutUint64(b[32:], r.inode)
	le.PutUint64(b[40:], uint64(r.size))
	if r.state == stateClean {
		le.PutUint64(b[48:], uint64(r.mtime.UnixNano()))
		copy(b[56:], r.first[:])
		copy(b[88:], r.last[:])
	}
	le.PutUint32(b[8:], crc32.Checksum(b[12:usedBytes], castagnoli))
}

func (r *record) decode(b []byte) error {
	if [7]byte(b[:7]) != magic {
		return errors.New("not the stamp of an image")
	}
	if b[7] != FormatVersion {
		return fmt.Errorf("%w: version %d, this is %d", hrl.ErrVersion, b[7], FormatVersion)
	}
	le := binary.LittleEndian
	if le.Uint32(b[8:]) != crc32.Checksum(b[12:usedBytes], castagnoli) {
		return errChecksum
	}
	r.state = le.Uint32(b[12:])
	r.count = le.Uint64(b[16:])
	r.beat = time.Unix(0, int64(le.Uint64(b[24:])))
	r.inode = le.Uint64(b[32:])
	r.size = int64(le.Uint64(b[40:]))
	r.mtime = time.Unix(0, int64(le.Uint64(b[48:])))
	copy(r.first[:], b[56:])
	copy(r.last[:], b[88:])
	if r.state != stateOpen && r.state != stateClean {
		return fmt.Errorf("state %d is unknown", r.state)
	}
	return nil
}

// decodeFile returns the present record. Both places are written before the
// image is, so a bad one holds at worst the newest heartbeat, or that the end
// was clean: the other is older, and asks for no less.
func decodeFile(b []byte) (record, error) {
	if len(b) != fileBytes {
		return record{}, fmt.Errorf("%d bytes", len(b))
	}
	var r [2]record
	err0, err1 := r[0].decode(b), r[1].decode(b[recordBytes:])
	switch {
	case err0 != nil && err1 != nil:
		return record{}, err0
	case err0 != nil:
		return r[1], nil
	case err1 != nil || r[0].count > r[1].count:
		return r[0], nil
	}
	return r[1], nil
}
