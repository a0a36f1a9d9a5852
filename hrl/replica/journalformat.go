package replica

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// journalVersion is the version of the journal, of its bytes and of what stands
// in its records. A reader refuses any other.
const journalVersion = 2

const (
	journalHeadBytes = 64
	journalMarkAt    = 512 // in a sector of its own
	journalMarkBytes = 32
	journalFirst     = 1024 // where the records begin
	recordHeadBytes  = 16
	recordAlign      = 8
	recordMax        = 256 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	errChecksum = errors.New("wrong checksum")
	errReserved = errors.New("reserved bytes set")
)

// A journal is a file: a header, a mark, and from byte 1024 on the records, each
// behind the one before. All numbers are little-endian.
//
// The header:
//
//	byte  size  field
//	   0     7  magic "AIM-RJN"
//	   7     1  version
//	   8     4  crc   CRC-32C of bytes 12 to 63
//	  12     4  zero
//	  16    16  salt  drawn for this file; its CRC-32C seeds all other checksums,
//	                  so that nothing that lay in another file passes for a part of it
//	  32    16  vm    UUID
//	  48    16  zero
//
// The mark, at byte 512, says how far the records were durable when it was
// written, which is after they were synced. It is not synced itself: it may say
// less than is there, never more. A record that the mark counts and that is bad
// was damaged later; one that it does not count may have been torn.
//
//	 0     4  crc   CRC-32C of bytes 4 to 31, seeded
//	 4     4  zero
//	 8     8  seq   of the last record that is durable
//	16    16  zero
//
// A record, at a multiple of 8:
//
//	 0     4  crc   CRC-32C of bytes 4 to the payload's end, seeded
//	 4     4  len   payload bytes, 1 to 256 MiB
//	 8     8  seq   1 for the first, then one more each
//	16        payload: a record in JSON; zeroes follow up to a multiple of 8
type journalHead struct {
	salt [16]byte
	vm   wire.VMID
}

func (h *journalHead) seed() uint32 { return crc32.Checksum(h.salt[:], castagnoli) }

func (h *journalHead) encode(b []byte) {
	b = b[:journalHeadBytes]
	clear(b)
	copy(b, "AIM-RJN")
	b[7] = journalVersion
	copy(b[16:], h.salt[:])
	copy(b[32:], h.vm[:])
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
}

func (h *journalHead) decode(b []byte) error {
	switch {
	case len(b) < journalFirst:
		return errors.New("too short for a journal")
	case string(b[:7]) != "AIM-RJN":
		return errors.New("not a journal")
	case b[7] != journalVersion:
		return fmt.Errorf("%w: version %d, this is %d", hrl.ErrVersion, b[7], journalVersion)
	case binary.LittleEndian.Uint32(b[8:]) != crc32.Checksum(b[12:journalHeadBytes], castagnoli):
		return fmt.Errorf("header: %w", errChecksum)
	case !zeroes(b[12:16]) || !zeroes(b[48:journalHeadBytes]):
		return fmt.Errorf("header: %w", errReserved)
	}
	h.salt, h.vm = [16]byte(b[16:32]), wire.VMID(b[32:48])
	return nil
}

func zeroes(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func encodeMark(seq uint64, seed uint32) []byte {
	b := make([]byte, journalMarkBytes)
	binary.LittleEndian.PutUint64(b[8:], seq)
	binary.LittleEndian.PutUint32(b, crc32.Update(seed, castagnoli, b[4:]))
	return b
}

// decodeMark returns 0 for a mark that was torn.
func decodeMark(b []byte, seed uint32) uint64 {
	if b = b[:journalMarkBytes]; binary.LittleEndian.Uint32(b) != crc32.Update(seed, castagnoli, b[4:]) {
		return 0
	}
	return binary.LittleEndian.Uint64(b[8:])
}

// encodeRecord returns the bytes of a record, with its padding.
func encodeRecord(r *record, seq uint64, seed uint32) ([]byte, error) {
	payload, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if len(payload) > recordMax {
		return nil, fmt.Errorf("a record of %d bytes: %d are the most", len(payload), recordMax)
	}
	n := recordHeadBytes + len(payload)
	b := make([]byte, (n+recordAlign-1)/recordAlign*recordAlign)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(payload)))
	binary.LittleEndian.PutUint64(b[8:], seq)
	copy(b[recordHeadBytes:], payload)
	binary.LittleEndian.PutUint32(b, crc32.Update(seed, castagnoli, b[4:n]))
	return b, nil
}

// recordAt returns payload, sequence number and whole length of the record at
// the beginning of b.
func recordAt(b []byte, seed uint32) (payload []byte, seq uint64, span int, err error) {
	if len(b) < recordHeadBytes {
		return nil, 0, 0, errors.New("cut short")
	}
	n := int64(binary.LittleEndian.Uint32(b[4:]))
	span64 := (recordHeadBytes + n + recordAlign - 1) / recordAlign * recordAlign
	if n == 0 || n > recordMax || span64 > int64(len(b)) {
		return nil, 0, 0, fmt.Errorf("a record of %d bytes where %d are left", n, len(b))
	}
	end := recordHeadBytes + int(n)
	if binary.LittleEndian.Uint32(b) != crc32.Update(seed, castagnoli, b[4:end]) {
		return nil, 0, 0, errChecksum
	}
	if !zeroes(b[end:span64]) {
		return nil, 0, 0, errReserved
	}
	return b[recordHeadBytes:end], binary.LittleEndian.Uint64(b[8:]), int(span64), nil
}

// A parsed journal is what its bytes say.
type parsed struct {
	head  journalHead
	state *state
	seq   uint64 // of the last record
	end   int64  // the byte behind it
	torn  bool   // something stands behind it that was never acknowledged
}

// parseJournal reads a whole journal. Damage gives a *JournalError, together with
// what could be read before it. Only a bad record with nothing valid behind it,
// and that the mark does not count, is taken for one that a crash tore.
func parseJournal(path string, b []byte) (*parsed, error) {
	p := &parsed{state: new(state), end: journalFirst}
	bad := func(err error) (*parsed, error) { return p, &JournalError{path, p.end, err} }
	if err := p.head.decode(b); errors.Is(err, hrl.ErrVersion) {
		return p, fmt.Errorf("journal %s: %w", path, err)
	} else if err != nil {
		p.end = 0
		return bad(err)
	}
	seed := p.head.seed()
	for p.end < int64(len(b)) {
		payload, seq, span, err := recordAt(b[p.end:], seed)
		if err == nil && seq != p.seq+1 {
			return bad(fmt.Errorf("record %d where record %d was due", seq, p.seq+1))
		}
		if err != nil {
			if decodeMark(b[journalMarkAt:], seed) > p.seq || behind(b[p.end:], p.seq, seed) {
				return bad(err)
			}
			p.torn = true
			break
		}
		if p.state, err = applyPayload(p.state, payload, p.seq == 0); err != nil {
			return bad(err)
		}
		p.seq, p.end = seq, p.end+int64(span)
	}
	switch {
	case decodeMark(b[journalMarkAt:], seed) > p.seq:
		return bad(errors.New("records are missing at its end"))
	case p.seq == 0:
		return bad(errors.New("it has no record"))
	case p.state.VM != p.head.vm:
		return bad(errors.New("its header and its records name different VMs"))
	}
	return p, nil
}

func applyPayload(s *state, payload []byte, first bool) (*state, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return s, err
	}
	if first != (r.Kind == kindState) {
		return s, fmt.Errorf("a record of kind %.40q at the wrong place", r.Kind)
	}
	next, err := s.apply(&r)
	if err != nil {
		return s, err
	}
	return next, nil
}

// behind reports whether a later record stands anywhere in b.
func behind(b []byte, seq uint64, seed uint32) bool {
	for at := recordAlign; at+recordHeadBytes <= len(b); at += recordAlign {
		// The number is looked at first: it is cheaper than a checksum.
		if n := binary.LittleEndian.Uint64(b[at+8:]); n <= seq || n > seq+uint64(len(b)) {
			continue
		}
		if _, _, _, err := recordAt(b[at:], seed); err == nil {
			return true
		}
	}
	return false
}
