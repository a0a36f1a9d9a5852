package hrl

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"afterimage/blockdev"
)

var updateGolden = flag.Bool("update", false, "write the golden files of the present format version")

// The golden files hold the bytes of FormatVersion. If TestGolden fails, the
// format was changed: raise FormatVersion and make the next version's files with
// go test -run TestGolden -update.
var goldenDir = filepath.Join("testdata", "golden", fmt.Sprintf("v%d", FormatVersion))

const goldenSegmentBytes = headerBytes + 8192 + footerBytes

func golden16(first byte) (b [16]byte) {
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func goldenMeta() meta {
	m := meta{state: metaOpen, count: 7, incarnation: 3, log: golden16(1), ordinal: 9, begun: 8, synced: 7, syncedSeq: 123456, oldest: 4}
	copy(m.life[:], "0123456789abcdef0123456789abcdef")
	return m
}

// goldenFrames are frames of every kind.
func goldenFrames() []frameHeader {
	return []frameHeader{
		{kind: KindDisk, disk: 0, len: 1 << 20},
		{kind: KindDisk, disk: 1, len: 8 << 20},
		{kind: KindGap, disk: noDisk},
		{kind: KindWrite, disk: 0, off: 4096, len: 1024},
		{kind: KindZero, disk: 1, off: 0, len: 4 << 20},
		{kind: KindCopy, disk: 0, off: 64 << 10, len: 64 << 10},
		{kind: KindResize, disk: 1, off: 8 << 20, len: 1 << 20},
		{kind: KindCut, disk: noDisk},
		{kind: KindTouched, disk: noDisk},
		{kind: KindWrite, disk: 1, off: 512, len: 512},
		{kind: KindSeal, disk: noDisk},
	}
}

func goldenPayload(i int, h *frameHeader) []byte {
	switch h.kind {
	case KindDisk:
		return []byte([]string{"root", "data"}[h.disk])
	case KindWrite:
		return bytes.Repeat([]byte{byte(0x10 + i)}, int(h.len))
	case KindCopy:
		sum := sha256.Sum256([]byte("copied"))
		return sum[:]
	case KindResize:
		return ResizeEntry(h.disk, h.off, h.off+h.len).Data
	case KindCut:
		var b [cutPayloadBytes]byte
		(&cutPayload{epoch: 5, time: 1700000000123456789, kind: CutApp}).encode(&b)
		return b[:]
	case KindGap, KindTouched, KindSeal:
		var s BlockSet
		s.Add(0, 0, 1)
		s.Add(0, 300*BlockBytes, 3*BlockBytes)
		s.Add(1, int64(i)<<20, 5<<20)
		return s.Append(nil)
	}
	return nil
}

// goldenSegment is a sealed segment, far smaller than a Log makes them.
func goldenSegment() []byte {
	head := segmentHeader{
		state: segmentInUse, log: golden16(1), salt: golden16(0x80), incarnation: 3, ordinal: 8, first: 42,
		size: goldenSegmentBytes, created: 1700000000000000000, flags: segmentAfterLoss,
	}
	s := segment{head: head, seed: seed(&head.salt), last: head.first - 1, size: head.size}
	b := make([]byte, headerBytes)
	head.encode((*[headerBytes]byte)(b))
	var foot segmentFooter
	for i, h := range goldenFrames() {
		if h.kind.sequenced() {
			s.last++
		}
		foot.seal = int64(len(b))
		b = s.appendNote(b, h, goldenPayload(i, &h))
	}
	foot.end, foot.last = int64(len(b)), s.last
	b = append(b, make([]byte, goldenSegmentBytes-len(b))...)
	foot.encode((*[footerBytes]byte)(b[goldenSegmentBytes-footerBytes:]), s.seed)
	return b
}

// trimmed leaves out what is zero in the end.
func trimmed(b []byte) []byte { return bytes.TrimRight(b, "\x00") }

func TestGolden(t *testing.T) {
	var page [metaPage]byte
	m := goldenMeta()
	m.encode(page[:])
	seg := goldenSegment()
	set := goldenPayload(2, &frameHeader{kind: KindGap})
	for name, b := range map[string][]byte{
		"LOG.page":       page[:metaBytes],
		"segment.frames": trimmed(seg[:goldenSegmentBytes-footerBytes]),
		"segment.footer": trimmed(seg[goldenSegmentBytes-footerBytes:]),
		"blockset":       set,
	} {
		path := filepath.Join(goldenDir, name+".hex")
		if *updateGolden {
			if err := os.MkdirAll(goldenDir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, hexLines(b), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(hexLines(b), want) {
			t.Errorf("%s: encoded to other bytes than version %d has", name, FormatVersion)
		}
	}
}

func hexLines(b []byte) []byte {
	var out bytes.Buffer
	for len(b) > 0 {
		n := min(32, len(b))
		fmt.Fprintf(&out, "%x\n", b[:n])
		b = b[n:]
	}
	return out.Bytes()
}

func readGolden(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(goldenDir, name+".hex"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(string(bytes.ReplaceAll(text, []byte("\n"), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestGoldenDecode reads the golden files through the reader.
func TestGoldenDecode(t *testing.T) {
	var m meta
	if err := m.decode(readGolden(t, "LOG.page")); err != nil || m != goldenMeta() {
		t.Fatalf("LOG: %+v, %v", m, err)
	}
	file := make([]byte, goldenSegmentBytes)
	copy(file, readGolden(t, "segment.frames"))
	copy(file[goldenSegmentBytes-footerBytes:], readGolden(t, "segment.footer"))
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "1"+segmentSuffix), file, 0o600); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, dir)
	if f := r.Verify(); len(f) > 0 || len(r.Segments) != 1 {
		t.Fatalf("findings: %v", f)
	}
	s := r.Segments[0]
	if !s.Sealed || !s.AfterLoss || s.Incarnation != 3 || s.Ordinal != 8 || s.First != 42 || s.Last != 47 ||
		!s.Created.Equal(time.Unix(1700000000, 0)) || s.head.log != golden16(1) {
		t.Fatalf("segment: %+v", s)
	}
	frames := goldenFrames()
	i := 0
	err := r.Each(s, func(f *Frame) error {
		h := frames[i]
		if f.Kind != h.kind || f.Disk != h.disk || f.Off != h.off || f.Len != h.len || !bytes.Equal(f.Payload, goldenPayload(i, &h)) {
			t.Errorf("frame %d: %+v", i, f)
		}
		if f.Kind == KindCut {
			if epoch, at, kind, err := f.Cut(); epoch != 5 || at.UnixNano() != 1700000000123456789 || kind != CutApp || err != nil {
				t.Errorf("cut: %d %v %v %v", epoch, at, kind, err)
			}
		}
		i++
		return nil
	})
	if err != nil || i != len(frames) {
		t.Fatalf("%d frames: %v", i, err)
	}
	dev := blockdev.NewMem(8 << 20)
	_, err = r.Replay("data", dev, nil)
	b := make([]byte, 1024)
	if rerr := blockdev.ReadAt(dev, b, 0); rerr != nil {
		t.Fatal(rerr)
	}
	if dev.Size() != 9<<20 || b[511] != 0 || b[512] != 0x19 || b[1023] != 0x19 {
		t.Fatalf("replayed to %d bytes, %x: %v", dev.Size(), b[510:514], err)
	}
}
