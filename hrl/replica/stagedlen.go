package replica

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"afterimage/hrl"
)

// Beside each layer that is being received, DIGEST.part, lies DIGEST.len, which
// says how much of it is durable (RULES H4: after a power cut the length of the
// file itself says nothing). It is written, and synced, after the bytes that it
// counts have been synced, into one of two slots in turn, so that a write that is
// torn leaves the count before it. Slots lie at byte 0 and 512, little-endian:
//
//	byte  size  field
//	   0     7  magic "AIM-LEN"
//	   7     1  version
//	   8     4  crc     CRC-32C of bytes 12 to 39
//	  12     4  zero
//	  16     8  number  one more with each write
//	  24     8  size    bytes of the whole layer
//	  32     8  synced  bytes that are durable
const (
	lenVersion   = 1
	lenSlotBytes = 40
	lenSlotAt    = 512
	lenSuffix    = ".len"
	partSuffix   = ".part"
	layerSuffix  = ".layer"
)

type stagedLen struct {
	number       uint64
	size, synced int64
}

func (l *stagedLen) encode() []byte {
	b := make([]byte, lenSlotBytes)
	copy(b, "AIM-LEN")
	b[7] = lenVersion
	le := binary.LittleEndian
	le.PutUint64(b[16:], l.number)
	le.PutUint64(b[24:], uint64(l.size))
	le.PutUint64(b[32:], uint64(l.synced))
	le.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}

// decode reports whether the slot counts. One of another version does not: the
// layer is then fetched again.
func (l *stagedLen) decode(b []byte) bool {
	le := binary.LittleEndian
	if string(b[:7]) != "AIM-LEN" || b[7] != lenVersion || le.Uint32(b[8:]) != crc32.Checksum(b[12:lenSlotBytes], castagnoli) || !zeroes(b[12:16]) {
		return false
	}
	*l = stagedLen{le.Uint64(b[16:]), int64(le.Uint64(b[24:])), int64(le.Uint64(b[32:]))}
	return l.number > 0 && l.size > 0 && l.synced >= 0 && l.synced <= l.size
}

// readLen returns what the file says, or false if it says nothing.
func readLen(fs hrl.FS, path string) (best stagedLen, ok bool, err error) {
	f, err := fs.Open(path)
	if isMissing(err) {
		return best, false, nil
	}
	if err != nil {
		return best, false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b := make([]byte, 2*lenSlotAt)
	n, rerr := f.ReadAt(b, 0)
	if size, err := f.Size(); err != nil || int64(n) < min(size, int64(len(b))) {
		return best, false, errors.Join(rerr, err)
	}
	for at := 0; at < len(b); at += lenSlotAt {
		var l stagedLen
		if l.decode(b[at:]) && l.number > best.number {
			best, ok = l, true
		}
	}
	return best, ok, nil
}

// writeLen makes durable how much is.
func writeLen(f hrl.File, l stagedLen) error {
	if _, err := f.WriteAt(l.encode(), int64(l.number%2)*lenSlotAt); err != nil {
		return err
	}
	return f.Sync()
}
