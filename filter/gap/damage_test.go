package gap

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"afterimage/hrl"
)

var updateGolden = flag.Bool("update", false, "write the golden file of the present format version")

// The golden file holds the bytes of FormatVersion. If TestGolden fails, the
// format was changed: raise FormatVersion and make the next version's file with go
// test -run TestGolden -update.
var goldenFile = filepath.Join("testdata", "golden", fmt.Sprintf("v%d", FormatVersion), "map")

const goldenSize = (pageBits+100)*block + 5000 // two pages

// goldenMap is a file, and what are gaps in it.
func goldenMap() (b []byte, want hrl.BlockSet) {
	h := header{state: fileOpen, count: 8, size: goldenSize}
	for i := range h.salt {
		h.salt[i] = byte(i + 1)
	}
	b = make([]byte, fileBytes(goldenSize))
	h.encode(b)
	h.count--
	h.state = fileClean
	h.encode(b[pageBytes:])
	pages := make([]page, 2)
	for _, r := range [][2]int64{{0, 1}, {3, 70}, {30000, pageBits - 30000}, {pageBits, 5}, {pageBits + 100, 1}} {
		for i := r[0]; i < r[0]+r[1]; i++ {
			pages[i/pageBits].set(i%pageBits, 1)
			want.Add(0, i*block, 1)
		}
	}
	if err := writePages(memory(b), saltSeed(h.salt), pages, 0); err != nil {
		panic(err)
	}
	return b, want
}

type memory []byte

func (m memory) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }

func fsWith(b []byte) *volatileFS {
	fs := newVolatileFS()
	fs.dirs[0]["d/gaps"] = &inode{data: slices.Clone(b), pending: map[int64]*versions{}, size: int64(len(b))}
	return fs
}

func TestGolden(t *testing.T) {
	got, want := goldenMap()
	if *updateGolden {
		if err := os.MkdirAll(filepath.Dir(goldenFile), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(goldenFile, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, golden) {
		t.Errorf("the format was changed")
	}
	m, found := open(t, fsWith(golden), goldenSize)
	if found.Kind != Unclean || found.All || found.Why != nil || missing(m, &want) >= 0 || m.blocks != want.Bytes()/block {
		t.Errorf("found %+v, %d bytes of %d", found, m.Bytes(), want.Bytes())
	}
}

// missing is the offset of a gap that the map lacks, or -1.
func missing(m *Map, want *hrl.BlockSet) int64 {
	for off, n, ok := want.Next(0, 0); ok; off, n, ok = want.Next(0, off+n) {
		for end := off + n; off < end && off < m.size; off += block {
			if !m.Has(off, 1) {
				return off
			}
		}
	}
	return -1
}

// TestDamage turns over every byte of a small file in turn, then every sector:
// no gap is lost, and what is wrong is said.
func TestDamage(t *testing.T) {
	whole, want := goldenMap()
	check := func(what string, b []byte, unused bool) {
		t.Helper()
		m, found, err := Open(fsWith(b), "d/gaps", goldenSize, true)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if lost := missing(m, &want); lost >= 0 {
			t.Fatalf("%s: the gap at byte %d is lost", what, lost)
		}
		if (found.Why == nil) != unused {
			t.Fatalf("%s: %+v", what, found)
		}
		m.Close()
	}
	unused := func(at int) bool { return at < headersEnd && at%pageBytes >= headerBytes }
	step := 1
	if raceEnabled {
		step = 13 // nothing here is concurrent
	}
	for i := 0; i < len(whole); i += step {
		if unused(i) && i%50 != 0 {
			continue
		}
		b := slices.Clone(whole)
		b[i] = ^b[i]
		check(fmt.Sprintf("byte %d", i), b, unused(i))
	}
	for s := 0; s < len(whole); s += sectorBytes {
		b := slices.Clone(whole)
		for i := range sectorBytes {
			b[s+i] = ^b[s+i]
		}
		check(fmt.Sprintf("sector at %d", s), b, unused(s))
		clear(b[s : s+sectorBytes])
		check(fmt.Sprintf("sector at %d, zero", s), b, bytes.Equal(b, whole) || unused(s))
		check(fmt.Sprintf("cut off at %d", s), whole[:s], false)
	}
}

func TestDamagedFile(t *testing.T) {
	whole, want := goldenMap()
	header0 := func(change func(*header)) func([]byte) []byte {
		return func(b []byte) []byte {
			var h header
			if err := h.decode(b); err != nil {
				t.Fatal(err)
			}
			change(&h)
			h.encode(b)
			return b
		}
	}
	for _, c := range []struct {
		what   string
		change func(b []byte) []byte
		all    bool
	}{
		{"empty", func(b []byte) []byte { return nil }, true},
		{"half a header", func(b []byte) []byte { return b[:100] }, true},
		{"no second header", func(b []byte) []byte { clear(b[pageBytes:headersEnd]); return b }, true},
		{"no first header", func(b []byte) []byte { clear(b[:pageBytes]); return b }, true},
		{"a bit of the header", func(b []byte) []byte { b[50] ^= 1; return b }, true},
		{"another version", func(b []byte) []byte { b[7]++; return b }, true},
		{"a state", header0(func(h *header) { h.state = 4 }), true},
		{"broken", header0(func(h *header) { h.state = fileBroken }), true},
		{"a size", header0(func(h *header) { h.size = -1 }), true},
		{"a large size", header0(func(h *header) { h.size = sizeMax + 1 }), true},
		{"a size that the file has not", header0(func(h *header) { h.size = sizeMax }), true},
		{"headers the wrong way round", header0(func(h *header) { h.count++ }), true},
		{"a header of another file", header0(func(h *header) { h.salt[3]++ }), true},
		{"no pages", func(b []byte) []byte { return b[:headersEnd] }, true},
		{"half a page", func(b []byte) []byte { return b[:len(b)-1] }, false},
		{"pages exchanged", func(b []byte) []byte {
			return slices.Concat(b[:headersEnd], b[pageOff(1):], b[headersEnd:pageOff(1)])
		}, true},
	} {
		fs := fsWith(c.change(slices.Clone(whole)))
		for range 2 {
			m, found := open(t, fs, goldenSize)
			if found.Kind != Unclean || found.All != c.all || found.Why == nil {
				t.Errorf("%s: %+v", c.what, found)
			}
			if c.all && m.Bytes() != goldenSize || missing(m, &want) >= 0 {
				t.Errorf("%s: %d bytes are gaps", c.what, m.Bytes())
			}
			m.Close()
			if m, found := open(t, fs, goldenSize); found.Kind != Clean || found.Why != nil || missing(m, &want) >= 0 {
				t.Errorf("%s, opened again: %+v", c.what, found)
			} else {
				m.Close()
			}
			fs = fsWith(c.change(slices.Clone(whole)))
		}
	}
}

// FuzzMap opens files. Changes are triples of position (24 bits) and what to
// xor the byte there with. Without new checksums they are damage, and no gap may
// be lost; with them anything goes but to crash, and to ask for more room than the
// file has or the disk needs.
func FuzzMap(f *testing.F) {
	golden, want := goldenMap()
	f.Add([]byte{}, uint16(len(golden)), false)
	f.Add([]byte{0, 0, 0, 1}, uint16(len(golden)), false)
	f.Add([]byte{0, 0x20, 0, 1}, uint16(pageOff(1)), false)
	f.Add([]byte{12, 0, 0, 2, 12, 0x10, 0, 1}, uint16(len(golden)), true)        // states
	f.Add([]byte{29, 0, 0, 0x40, 29, 0x10, 0, 0x40}, uint16(len(golden)), true)  // sizes
	f.Add([]byte{4, 0x20, 0, 1, 0x40, 0x30, 0, 0xff}, uint16(len(golden)), true) // a page's number, bits
	f.Add([]byte{16, 0, 0, 0xf, 26, 0, 0, 0xff}, uint16(headersEnd+100), true)   // counts
	f.Add([]byte{40, 0, 0, 1, 40, 0x10, 0, 1}, uint16(len(golden)), true)        // salts
	f.Fuzz(func(t *testing.T, changes []byte, size uint16, sums bool) {
		b := slices.Clone(golden)
		for ; len(changes) >= 4; changes = changes[4:] {
			at := int(changes[0]) | int(changes[1])<<8 | int(changes[2])<<16
			at %= len(b)
			b[at] ^= changes[3]
			if !sums {
				continue
			}
			if p := b[at/pageBytes*pageBytes:][:pageBytes]; at < headersEnd {
				binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p[12:headerBytes], castagnoli))
			} else {
				putSum(p, saltSeed([16]byte(b[40:])))
			}
		}
		b = b[:min(int(size), len(b))]
		fs := fsWith(b)
		m, _, err := Open(fs, "d/gaps", goldenSize, true)
		if err != nil {
			t.Fatal(err)
		}
		if lost := missing(m, &want); lost >= 0 && !sums {
			t.Fatalf("the gap at byte %d is lost", lost)
		}
		end := int64(0)
		m.Runs(func(off, n int64) {
			if off < end || n <= 0 || off+n > goldenSize {
				t.Fatalf("run of %d bytes at %d", n, off)
			}
			end = off + n
		})
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if n := len(fs.now()["d/gaps"].data); n > len(golden) {
			t.Fatalf("a file of %d bytes", n)
		}
	})
}
