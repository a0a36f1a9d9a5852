package replica

import (
	"bytes"
	"errors"
	"log/slog"
	"path/filepath"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

func newSums(t testing.TB, fs hrl.FS) *sums {
	t.Helper()
	path := filepath.Join(tempDir(t), sumsName)
	must(t, createSums(fs, path, wire.VMID{1}))
	s, err := openSums(fs, path, wire.VMID{1}, slog.New(slog.DiscardHandler))
	must(t, err)
	t.Cleanup(func() { _ = s.close() })
	return s
}

func (s *sums) reopen(t testing.TB) *sums {
	t.Helper()
	again, err := openSums(s.fs, s.path, s.vm, slog.New(slog.DiscardHandler))
	must(t, err)
	t.Cleanup(func() { _ = again.close() })
	return again
}

// putOne gives block 5 of page n a checksum.
func (s *sums) putOne(t testing.TB, n int64, state sumState, crc, fold uint32) error {
	t.Helper()
	old, err := s.page(n)
	must(t, err)
	p := *old
	p.set(5, state, crc)
	p.fold = fold
	return errors.Join(s.put(n, &p), s.sync())
}

func (s *sums) expect(t testing.TB, n int64, state sumState, crc, fold uint32) {
	t.Helper()
	p, err := s.page(n)
	must(t, err)
	if p.state(5) != state || p.crcs[5] != crc || p.fold != fold || p.state(4) != sumZero || p.state(6) != sumZero {
		t.Fatalf("page %d: %d, %x, %d, not %d, %x, %d", n, p.state(5), p.crcs[5], p.fold, state, crc, fold)
	}
}

func TestGoldenSums(t *testing.T) {
	p := &sumPage{number: 7, fold: 3}
	p.set(0, sumKnown, 0x11223344)
	p.set(1, sumUnknown, 0)
	p.set(6, sumDamaged, 0)
	p.set(sumPageBlocks-1, sumKnown, 0xa5a5a5a5)
	b := append(sumsHead(wire.VMID{1, 2, 3}), make([]byte, sumPageBytes)...)
	p.encode(b[sumsFirst:], 9, 0x12345678)
	if !bytes.Equal(b, golden(t, "sums", b)) {
		t.Error("the format was changed: raise sumsVersion")
	}
	var q sumPage
	if ok, _ := q.decode(b[sumsFirst:], 9, 0x12345678); !ok || q != *p {
		t.Error("it is not read as it was written")
	}
	if ok, _ := q.decode(b[sumsFirst:], 8, 0x12345678); ok {
		t.Error("it passes for another page")
	}
}

// TestSumsTorn: a write that is torn costs nothing, and is written again.
func TestSumsTorn(t *testing.T) {
	s := newSums(t, hrl.OS)
	s.expect(t, 3, sumZero, 0, 0)
	must(t, s.putOne(t, 3, sumUnknown, 0, 1))
	must(t, s.putOne(t, 3, sumKnown, 77, 1))
	must(t, s.putOne(t, 1000, sumKnown, 8, 1))
	s = s.reopen(t)
	s.expect(t, 3, sumKnown, 77, 1)
	s.expect(t, 1000, sumKnown, 8, 1)
	s.expect(t, 999, sumZero, 0, 0)
	if n, err := s.blocks(); err != nil || n != 1001*sumPageBlocks {
		t.Fatalf("%d blocks, %v", n, err)
	}
	before := make([]byte, 2*sumPageBytes)
	at := int64(sumsFirst + 3*2*sumPageBytes)
	_, err := s.f.ReadAt(before, at)
	must(t, err)
	must(t, s.putOne(t, 3, sumUnknown, 0, 2))
	s.expect(t, 3, sumUnknown, 0, 2)
	after := make([]byte, 2*sumPageBytes)
	_, err = s.f.ReadAt(after, at)
	must(t, err)
	for cut := 1; cut < 2*sumPageBytes; cut += 61 { // as much of the write as is on the disk
		_, err = s.f.WriteAt(append(bytes.Clone(after[:cut]), before[cut:]...), at)
		must(t, err)
		torn := s.reopen(t)
		p, err := torn.page(3)
		must(t, err)
		if p.fold == 2 {
			torn.expect(t, 3, sumUnknown, 0, 2)
		} else {
			torn.expect(t, 3, sumKnown, 77, 1)
		}
		must(t, torn.close())
	}
	// Both slots at once are damage.
	_, err = s.f.WriteAt(bytes.Repeat([]byte{1}, 2*sumPageBytes), at)
	must(t, err)
	var be *BaseError
	if _, err := s.reopen(t).page(3); !errors.As(err, &be) || be.Off != at {
		t.Fatal(err)
	}
}

// TestSumsSyncFails: after a sync that failed the file is made anew before
// anything more is said to be durable.
func TestSumsSyncFails(t *testing.T) {
	fs := newFaultFS(0, false, syscall.EIO)
	s := newSums(t, fs)
	must(t, s.putOne(t, 0, sumKnown, 1, 1))
	must(t, s.putOne(t, 2, sumKnown, 2, 1))
	fs.mu.Lock()
	fs.ops, fs.failAt = 0, 2 // the sync behind the write
	fs.mu.Unlock()
	if err := s.putOne(t, 2, sumKnown, 3, 2); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	old := s.f
	must(t, s.putOne(t, 2, sumKnown, 4, 2))
	if s.f == old || s.failed != nil {
		t.Fatal("the file is the same")
	}
	for _, s := range []*sums{s, s.reopen(t)} {
		s.expect(t, 0, sumKnown, 1, 1)
		s.expect(t, 2, sumKnown, 4, 2)
	}
	// What was written went beside what was there.
	p, err := s.page(2)
	must(t, err)
	_, err = s.f.WriteAt([]byte{1, 2, 3, 4}, sumsFirst+(2*2+p.slot)*sumPageBytes)
	must(t, err)
	s.reopen(t).expect(t, 2, sumKnown, 3, 2)
}

// TestSumsMany: pages that are not in memory are read again.
func TestSumsMany(t *testing.T) {
	s := newSums(t, hrl.OS)
	for n := range int64(2 * sumPagesHeld) {
		must(t, s.putOne(t, n, sumKnown, uint32(n+1), 1))
	}
	for n := range int64(2 * sumPagesHeld) {
		s.expect(t, n, sumKnown, uint32(n+1), 1)
	}
	if len(s.held) > sumPagesHeld {
		t.Fatalf("%d pages are held", len(s.held))
	}
}

// TestBlockSum: a checksum is right however large the base has become.
func TestBlockSum(t *testing.T) {
	p := bytes.Repeat([]byte{1, 2, 3, 4}, 1000)
	whole := append(bytes.Clone(p), make([]byte, sumBlock-len(p))...)
	if blockSum(p) != blockSum(whole) || blockSum(p) == blockSum(whole[1:]) {
		t.Error("a block in part has another checksum")
	}
}

// TestBaseDevice: the base is for reading alone.
func TestBaseDevice(t *testing.T) {
	p := newPrimary(t, 1, "root")
	_, v := accepted(t, p, Options{})
	p.points(v, 1)
	settle(t, v)
	b := v.bases["root"]
	if i := b.Info(); !i.ReadOnly || i.CheapTrim {
		t.Errorf("%+v", i)
	}
	if err := b.Resize(0); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Error(err)
	}
	buf := make([]byte, 512)
	for _, c := range []struct {
		r    blockdev.Request
		want error
	}{
		{blockdev.Request{Op: blockdev.OpWrite, Len: 512, Buf: buf}, blockdev.ErrReadOnly},
		{blockdev.Request{Op: blockdev.OpFlush}, nil},
		{blockdev.Request{Op: blockdev.OpRead, Len: 512, Buf: buf}, nil},
		{blockdev.Request{Op: blockdev.OpRead, Flags: blockdev.FlagNoWait, Len: 512, Buf: buf}, blockdev.ErrWouldBlock},
		{blockdev.Request{Op: blockdev.OpRead, Off: b.Size(), Len: 512, Buf: buf}, blockdev.ErrBounds},
	} {
		if err := blockdev.Do1(b, &c.r); !errors.Is(err, c.want) {
			t.Errorf("%v: %v", c.r.Op, err)
		}
	}
}
