package hot

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
)

var updateGolden = flag.Bool("update", false, "write the golden file of the present format version")

// The golden file holds the bytes of FormatVersion, but for the slots nobody
// has used. If TestGolden fails, the format was changed: raise FormatVersion and make
// the next version's file with go test -run TestGolden -update.
var goldenFile = filepath.Join("testdata", "golden", fmt.Sprintf("v%d", FormatVersion), "map")

const goldenExtents = sliceBits + 100 // two slices

// goldenRing is a ring in its second turn, and what is marked in it.
func goldenRing() (b []byte, salt [16]byte, want contents) {
	for i := range salt {
		salt[i] = byte(i + 1)
	}
	slots := slotsFor(goldenExtents)
	b = make([]byte, slots*txBytes)
	c := contents{table: newBitmap(goldenExtents), ranges: []run{{5, 100}}}
	c.table.set(run{16000, 440})
	c.fill(b, &salt, 0)
	t := transaction{number: uint64(slots)}
	for _, us := range [][]update{
		{{run: run{3, 1}}, {run: run{10, 20}}},
		{{run: run{12, 2}, clear: true}, {run: run{16470, 4}}},
		{{run: run{16483, 1}}},
		{},
		{{run: run{16100, 1}, clear: true}},
	} {
		t.number++
		t.updates = us
		for _, u := range us {
			if u.clear {
				c.table.unset(u.run)
			} else {
				c.table.set(u.run)
			}
		}
		c.ranges = append(c.ranges, run{200 * int64(t.number), 70})
		t.ranges = c.ranges
		t.slice = c.slice(t.number)
		t.encode(b[(t.number-1)%uint64(slots)*txBytes:], ringSeed(&salt))
	}
	return b, salt, c
}

func goldenHeader(salt [16]byte) header {
	return header{state: fileOpen, count: 8, extents: goldenExtents, shift: extentShift,
		slots: slotsFor(goldenExtents), off: headersEnd, salt: salt}
}

func TestGolden(t *testing.T) {
	ring, salt, want := goldenRing()
	h := goldenHeader(salt)
	var b [headersEnd]byte
	h.encode(b[:])
	h.count--
	h.encode(b[pageBytes:])
	got := slices.Concat(b[:headerBytes], b[pageBytes:pageBytes+headerBytes], ring[:6*txBytes])
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
	copy(b[:], golden[:headerBytes])
	copy(b[pageBytes:], golden[headerBytes:2*headerBytes])
	copy(ring, golden[2*headerBytes:])
	fs := newVolatileFS()
	fs.dirs[0]["d/hot"] = &inode{data: append(b[:], ring...), pending: map[int64]*versions{}}
	m, found := open(t, fs, goldenExtents*mib, Options{})
	all := slices.Clone(want.table)
	for _, r := range want.ranges {
		all.set(r)
	}
	if found.Kind != Unclean || found.Why != nil || !slices.Equal(found.Hot, m.bytes(all.runs(goldenExtents), goldenExtents*mib)) {
		t.Errorf("found %+v", found)
	}
}

// TestDamage damages each sector of a ring in turn, then every pair of
// transactions: what was marked is read as marked.
func TestDamage(t *testing.T) {
	ring, salt, want := goldenRing()
	part, all := 0, 0
	check := func(what string, b []byte) {
		t.Helper()
		got := readRing(b, &salt, goldenExtents)
		if lost := missing(got, want); lost >= 0 {
			t.Fatalf("%s: extent %d is not marked", what, lost)
		}
		if got.all {
			all++
		} else if got.damage != nil {
			part++
		}
	}
	check("whole", ring)
	if part+all > 0 {
		t.Error("a whole ring is damaged")
	}
	for s := range len(ring) / sectorBytes {
		b := slices.Clone(ring)
		b[s*sectorBytes+s%sectorBytes] ^= 0x10
		check(fmt.Sprintf("sector %d", s), b)
	}
	if part == 0 || all == 0 {
		t.Errorf("damage is never of a part (%d), or never of all (%d)", part, all)
	}
	step := 1
	if raceEnabled {
		step = 7 // nothing here is concurrent
	}
	for i := 0; i < len(ring)/txBytes; i += step {
		for j := range i {
			b := slices.Clone(ring)
			clear(b[i*txBytes : (i+1)*txBytes])
			clear(b[j*txBytes+sectorBytes : (j+1)*txBytes])
			check(fmt.Sprintf("transactions %d and %d", i, j), b)
		}
	}
}

// missing is an extent that is marked in want and not in got, or -1.
func missing(got, want contents) int64 {
	if got.all {
		return -1
	}
	have, need := slices.Clone(got.table), slices.Clone(want.table)
	for _, r := range got.ranges {
		have.set(r)
	}
	for _, r := range want.ranges {
		need.set(r)
	}
	for i := range need {
		if lost := need[i] &^ have[i]; lost != 0 {
			return int64(i)*64 + bitmap{lost}.next(0, 64)
		}
	}
	return -1
}

func TestDamagedFile(t *testing.T) {
	ring, salt, _ := goldenRing()
	whole := make([]byte, headersEnd)
	h := goldenHeader(salt)
	h.encode(whole)
	h.count--
	h.state = fileClean
	h.encode(whole[pageBytes:])
	whole = append(whole, ring...)
	header0 := func(change func(*header)) func([]byte) []byte {
		return func(b []byte) []byte {
			h := goldenHeader(salt)
			change(&h)
			h.encode(b)
			return b
		}
	}
	for _, c := range []struct {
		what   string
		change func(b []byte) []byte
	}{
		{"empty", func(b []byte) []byte { return nil }},
		{"half a header", func(b []byte) []byte { return b[:100] }},
		{"no second header", func(b []byte) []byte { clear(b[pageBytes:headersEnd]); return b }},
		{"no first header", func(b []byte) []byte { clear(b[:pageBytes]); return b }},
		{"a bit of the header", func(b []byte) []byte { b[50] ^= 1; return b }},
		{"another version", func(b []byte) []byte { b[7]++; return b }},
		{"a state", header0(func(h *header) { h.state = 4 })},
		{"broken", header0(func(h *header) { h.state = fileBroken })},
		{"extents", header0(func(h *header) { h.extents = -1 })},
		{"an extent's size", header0(func(h *header) { h.shift = 12 })},
		{"slots", header0(func(h *header) { h.slots-- })},
		{"a ring elsewhere", header0(func(h *header) { h.off = 3 })},
		{"no ring", func(b []byte) []byte { return b[:headersEnd] }},
		{"half a ring", func(b []byte) []byte { return b[:len(b)-1] }},
		{"another ring", header0(func(h *header) { h.salt[3]++ })},
	} {
		fs := newVolatileFS()
		fs.dirs[0]["d/hot"] = &inode{data: c.change(slices.Clone(whole)), pending: map[int64]*versions{}}
		m, found := open(t, fs, goldenExtents*mib, Options{})
		if found.Kind != Unclean || !found.All || found.Why == nil || len(found.Hot) != 1 {
			t.Errorf("%s: %+v", c.what, found)
		}
		m.Close(false)
		if _, found := open(t, fs, goldenExtents*mib, Options{}); found.Why != nil || len(found.Hot) != 1 {
			t.Errorf("%s, opened again: %+v", c.what, found)
		}
	}
	if _, c, err := loadBytes(whole); err != nil || c.all || c.damage != nil {
		t.Errorf("the whole file: %v, %v", err, c.damage)
	}
}

func loadBytes(b []byte) (header, contents, error) {
	fs := newVolatileFS()
	return load(&volatileFile{fs: fs, n: &inode{data: b}})
}

func TestExtentSizeIsOfTheMap(t *testing.T) {
	fs := newVolatileFS()
	b := make([]byte, headersEnd)
	h := header{state: fileOpen, extents: 10, shift: 22, slots: slotsFor(10), off: headersEnd}
	h.encode(b)
	h.encode(b[pageBytes:])
	c := contents{table: newBitmap(10)}
	c.table.set(run{2, 1})
	ring := make([]byte, h.slots*txBytes)
	c.fill(ring, &h.salt, 0)
	fs.dirs[0]["d/hot"] = &inode{data: append(b, ring...), pending: map[int64]*versions{}}
	for range 2 {
		m, found := open(t, fs, 40*mib, Options{})
		if !slices.Equal(found.Hot, runs(8, 4)) || !m.Enter(11*mib, mib) || m.Enter(12*mib, 1) {
			t.Errorf("found %+v", found)
		}
		m.Close(false)
	}
}

// FuzzMap reads rings. Changes are triples of position (24 bits) and what to
// xor the byte there with. Without new checksums they are damage, and nothing
// that was marked may be lost; with them anything goes but to crash.
func FuzzMap(f *testing.F) {
	golden, salt, want := goldenRing()
	f.Add([]byte{}, false)
	f.Add([]byte{0, 0, 0, 1}, false)
	f.Add([]byte{0, 0x50, 0, 1, 0, 0x40, 0, 1}, false) // the newest transaction, and the one before
	f.Add([]byte{0, 0x52, 0, 9}, false)
	f.Add([]byte{12, 0x40, 0, 0xff, 14, 0x40, 0, 0x20}, true) // counts
	f.Add([]byte{4, 0x50, 0, 0xff}, true)                     // numbers
	f.Fuzz(func(t *testing.T, changes []byte, sums bool) {
		b := slices.Clone(golden)
		for ; len(changes) >= 4; changes = changes[4:] {
			at := int(changes[0]) | int(changes[1])<<8 | int(changes[2])<<16
			at %= len(b)
			b[at] ^= changes[3]
			if s := b[at/sectorBytes*sectorBytes:][:sectorBytes]; sums {
				binary.LittleEndian.PutUint32(s, crc32.Update(ringSeed(&salt), castagnoli, s[4:]))
			}
		}
		got := readRing(b, &salt, goldenExtents)
		for _, r := range append(got.table.runs(int64(len(got.table))*64), got.ranges...) {
			if r.first < 0 || r.n <= 0 || r.end() > goldenExtents {
				t.Fatalf("run of %d extents from %d on", r.n, r.first)
			}
		}
		if lost := missing(got, want); lost >= 0 && !sums {
			t.Fatalf("extent %d is not marked", lost)
		}
	})
}

// TestRenamedAndNotSynced: a map is made in place of one that is not readable,
// and its maker dies, or fails, before the new name is durable. The next process
// finds the new file and relies on it; the power cut after that must not bring back
// the old one, which knows nothing of what was marked since.
func TestRenamedAndNotSynced(t *testing.T) {
	for _, how := range []string{"killed", "failed"} {
		fs := newVolatileFS()
		m := fresh(t, fs, 100*mib, Options{})
		write(t, m, 7)
		m.Close(false)

		fs.failAt = fs.ops + 2 // the file opens, and is not readable, for once
		renamed := false
		fs.before = func(op string, _ *volatileFile, _ []byte, _ int64) {
			switch {
			case op == "rename":
				renamed = true
				if how == "failed" {
					fs.failAt = fs.ops + 1
				}
			case op == "syncdir" && renamed && how == "killed":
				runtime.Goexit()
			}
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, _, err := Open(fs, "d/hot", 100*mib, Options{}); err == nil {
				t.Errorf("%s: opened", how)
			}
		})
		wg.Wait()
		fs.kill()

		m = fresh(t, fs, 100*mib, Options{})
		write(t, m, 50)
		for seed := range uint64(8) {
			_, found := open(t, fs.crash(rand.New(rand.NewPCG(seed, 0))), 100*mib, Options{})
			if !covers(found.Hot, 50) {
				t.Errorf("%s: extent 50 is not found: %+v", how, found)
			}
		}
		m.Close(false)
	}
}
