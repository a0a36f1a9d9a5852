package hrl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"syscall"
	"testing"
	"time"
)

// memFS is one file for reading.
type memFS struct {
	FS
	data []byte
}

func (m memFS) ReadDir(string) ([]string, error) { return nil, syscall.ENOTDIR }
func (m memFS) Open(string) (File, error)        { return memFile{r: bytes.NewReader(m.data)}, nil }

type memFile struct {
	File
	r *bytes.Reader
}

func (m memFile) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read before the file's beginning")
	}
	return m.r.ReadAt(p, off)
}
func (m memFile) Size() (int64, error) { return m.r.Size(), nil }
func (m memFile) Close() error         { return nil }

// readAll puts a segment's bytes through all that reads.
func readAll(t *testing.T, data []byte) {
	r, err := openSegments(memFS{data: data}, []string{"f"})
	if err != nil {
		return
	}
	defer r.Close()
	findings := r.Verify()
	for _, s := range r.Segments {
		frames, last := 0, s.First-1
		err := r.Each(s, func(f *Frame) error {
			frames++
			last = f.Seq
			if f.At+frameBytes+int64(len(f.Payload)) > int64(len(data)) {
				t.Fatal("a frame beyond the file")
			}
			return nil
		})
		if err != nil || frames != s.Frames || last != s.Last {
			t.Fatalf("%d of %d frames, the last %d of %d: %v", frames, s.Frames, last, s.Last, err)
		}
		if s.Damage == nil {
			back := 0
			all := whole(s)
			if err := r.eachBack(&all, nil, func(*Frame) error { back++; return nil }); err != nil || back != frames {
				t.Fatalf("%d frames forwards, %d backwards: %v", frames, back, err)
			}
		} else if len(findings) == 0 {
			t.Fatal("damage and no finding")
		}
		var set BlockSet
		_ = r.touched(s, Mark{}, []diskState{{name: "root", size: 1 << 30}}, &set)
		for id, d := range s.Disks {
			windows := 0
			_ = s.regions[id].windows(windowRegions, func(lo, hi int64) error { windows++; return nil })
			if windows > 50 { // a disk of more than 3 TiB all touched: slow, not wrong
				continue
			}
			var sum int64
			stats, err := r.Latest(d.Name, func(v *Version) error {
				if v.Len <= 0 || v.Off < 0 || v.Kind == KindWrite && int64(len(v.Data)) != v.Len {
					t.Fatalf("version %+v", v)
				}
				sum += v.Len
				return nil
			})
			if err == nil && sum != stats.LatestBytes {
				t.Fatalf("%d bytes delivered, %d counted", sum, stats.LatestBytes)
			}
		}
	}
}

// fixSums walks the frames and makes every checksum right, so that what lies
// behind them is reached.
func fixSums(b []byte) {
	if len(b) < headerBytes+footerBytes {
		return
	}
	var salt [16]byte
	copy(salt[:], b[32:])
	sd := seed(&salt)
	le := binary.LittleEndian
	le.PutUint32(b[8:], crc32.Update(sd, castagnoli, b[12:headerBytes]))
	for off := headerBytes; off+frameBytes <= len(b)-footerBytes && b[off+4] != 0; {
		n := int(le.Uint32(b[off+8:]))
		if n <= len(b)-off-frameBytes {
			le.PutUint32(b[off+40:], crc32.Checksum(b[off+frameBytes:off+frameBytes+n], castagnoli))
		}
		le.PutUint32(b[off:], crc32.Update(sd, castagnoli, b[off+4:off+frameBytes]))
		if n > len(b) {
			break
		}
		off += int(frameSpan(n))
	}
	foot := b[len(b)-footerBytes:]
	le.PutUint32(foot, crc32.Update(sd, castagnoli, foot[4:32]))
}

// FuzzSegment reads arbitrary bytes, and a sealed segment with arbitrary
// changes whose checksums are right all the same.
func FuzzSegment(f *testing.F) {
	f.Add([]byte{}, true)
	f.Add(trimmed(goldenSegment()[:goldenSegmentBytes-footerBytes]), false)
	f.Add([]byte{0, 0x10, 0, 9}, true)
	defer func(d time.Duration) { scanPause = d }(scanPause)
	scanPause = 0
	f.Fuzz(func(t *testing.T, data []byte, changes bool) {
		if len(data) > 1<<16 {
			return
		}
		if !changes {
			readAll(t, data)
			return
		}
		// Triples of position (16 bits) and what to xor the byte there with.
		b := goldenSegment()
		for ; len(data) >= 3; data = data[3:] {
			b[int(binary.LittleEndian.Uint16(data))%len(b)] ^= data[2]
		}
		fixSums(b)
		readAll(t, b)
	})
}

func FuzzBlockSet(f *testing.F) {
	f.Add([]byte{})
	f.Add(goldenPayload(2, &frameHeader{kind: KindGap}))
	f.Add([]byte{0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		var s BlockSet
		large := false
		err := eachRun(b, func(disk DiskID, off, length int64) {
			if off < 0 || length <= 0 || off+length < 0 || off%BlockBytes != 0 || length%BlockBytes != 0 {
				t.Fatalf("run [%d,+%d)", off, length)
			}
			large = large || off+length > 1<<42
			if !large {
				s.Add(disk, off, length)
			}
		})
		if err != nil || large {
			return
		}
		enc := s.Append(nil)
		if len(enc) > s.encodedMax(0) {
			t.Fatalf("%d bytes of at most %d", len(enc), s.encodedMax(0))
		}
		var back BlockSet
		if err := eachRun(enc, back.Add); err != nil || !bytes.Equal(back.Append(nil), enc) {
			t.Fatalf("%x came back as %x: %v", enc, back.Append(nil), err)
		}
		coarse := boundedSet(&s, 32)
		var wide BlockSet
		if err := eachRun(coarse, wide.Add); err != nil {
			t.Fatal(err)
		}
		s.Runs(func(disk DiskID, off, length int64) {
			if !wide.Has(disk, off) || !wide.Has(disk, off+length-BlockBytes) {
				t.Fatal("a bounded set lacks blocks")
			}
		})
	})
}

type memLOG struct {
	memFile
	b []byte
}

func (m *memLOG) WriteAt(p []byte, off int64) (int, error) { return copy(m.b[off:], p), nil }
func (m *memLOG) Sync() error                              { return nil }
func (m *memLOG) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// FuzzMeta reads arbitrary pages of LOG, and writes the next state of what it got.
func FuzzMeta(f *testing.F) {
	var page [metaPage]byte
	m := goldenMeta()
	m.encode(page[:])
	f.Add(page[:metaBytes], []byte{}, false)
	m.count++
	var next [metaPage]byte
	m.encode(next[:])
	f.Add(page[:metaBytes], next[:metaBytes], true)
	f.Fuzz(func(t *testing.T, a, b []byte, fix bool) {
		file := &memLOG{b: make([]byte, 2*metaPage)}
		copy(file.b[:metaPage], a)
		copy(file.b[metaPage:], b)
		if fix {
			for _, p := range [][]byte{file.b[:metaPage], file.b[metaPage:]} {
				binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p[12:metaBytes], castagnoli))
			}
		}
		m, _, err := readMeta(file)
		if err != nil {
			return
		}
		if m.state != metaOpen && m.state != metaClean && m.state != metaDoubt {
			t.Fatalf("state %d", m.state)
		}
		if m.count == ^uint64(0) {
			return
		}
		m.incarnation++
		if err := writeMeta(file, &m); err != nil {
			t.Fatal(err)
		}
		if got, _, err := readMeta(file); err != nil || got != m {
			t.Fatalf("wrote %+v, read %+v: %v", m, got, err)
		}
	})
}
