package faultdev

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/blockdev/devtest"
	"afterimage/internal/testenv"
)

const size = 1 << 20

func TestConformanceWithoutFaults(t *testing.T) {
	devtest.Run(t, func(t *testing.T) blockdev.Device { return New(blockdev.NewMem(size)) }, devtest.Options{})
}

func TestConformanceVolatile(t *testing.T) {
	devtest.Run(t, func(t *testing.T) blockdev.Device { return volatile(t, blockdev.NewMem(size)) }, devtest.Options{Steps: 100})
}

func volatile(t *testing.T, d blockdev.Device) *Volatile {
	t.Helper()
	v, err := NewVolatile(d)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func bytesOf(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func write(t *testing.T, d blockdev.Device, off int64, b byte, n int, flags blockdev.Flags) error {
	t.Helper()
	return blockdev.Do1(d, &blockdev.Request{Op: blockdev.OpWrite, Flags: flags, Off: off, Len: int64(n), Buf: bytesOf(b, n)})
}

func read(t *testing.T, d blockdev.Device, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := blockdev.ReadAt(d, p, off); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestFailAt(t *testing.T) {
	for k, fired := 1, true; fired; k++ {
		d := FailAt(k, blockdev.NewMem(size))
		failures := 0
		for i := range 5 {
			if err := write(t, d, int64(i)*4096, 1, 4096, 0); err != nil {
				failures++
				if i != k-1 || !errors.Is(err, syscall.EIO) {
					t.Errorf("k=%d: write %d failed: %v", k, i, err)
				}
				if got := read(t, d.Device, int64(i)*4096, 4096); !bytes.Equal(got, bytesOf(0, 4096)) {
					t.Errorf("k=%d: the write that failed was done", k)
				}
			}
		}
		if fired = d.Fired(); fired != (failures == 1) || fired != (k <= 5) {
			t.Fatalf("k=%d: fired %v, %d failures", k, fired, failures)
		}
	}
}

func TestRules(t *testing.T) {
	d := New(blockdev.NewMem(size))
	d.Add(Rule{Op: blockdev.OpWrite, Within: blockdev.Extent{Off: 8192, Len: 1}, Err: syscall.ENOSPC, Partial: 1024})
	d.Add(Rule{Op: blockdev.OpFlush, Times: 1, Err: syscall.EIO})
	if err := write(t, d, 0, 1, 8192, 0); err != nil {
		t.Errorf("a write beside the rule's range: %v", err)
	}
	for range 2 {
		if err := write(t, d, 4096, 2, 8192, 0); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a write in the rule's range: %v", err)
		}
	}
	want := append(append(bytesOf(1, 4096), bytesOf(2, 1024)...), bytesOf(1, 3072)...)
	if got := read(t, d, 0, 8192); !bytes.Equal(got, want) {
		t.Error("a partial write did not do exactly its part")
	}
	if err := blockdev.Flush(d); !errors.Is(err, syscall.EIO) {
		t.Errorf("first flush: %v", err)
	}
	if err := blockdev.Flush(d); err != nil {
		t.Errorf("second flush: %v", err)
	}
	if n := d.Strikes(); n != 3 {
		t.Errorf("%d strikes", n)
	}
	// The others of a batch are done.
	reqs := []*blockdev.Request{
		{Op: blockdev.OpWrite, Off: 8192, Len: 512, Buf: bytesOf(3, 512)},
		{Op: blockdev.OpWrite, Off: 16384, Len: 512, Buf: bytesOf(3, 512)},
	}
	d.Do(reqs)
	if reqs[0].Err == nil || reqs[1].Err != nil {
		t.Errorf("batch: %v, %v", reqs[0].Err, reqs[1].Err)
	}
	d.Reset()
	if err := write(t, d, 8192, 1, 512, 0); err != nil {
		t.Errorf("after Reset: %v", err)
	}
}

func TestHang(t *testing.T) {
	d := New(blockdev.NewMem(size))
	d.Add(Rule{Op: blockdev.OpWrite, Times: 1, Hang: true})
	done := make(chan error)
	go func() { done <- write(t, d, 0, 1, 4096, 0) }()
	testenv.Until(t, "the write hangs", func() bool { return d.Hanging() == 1 })
	if err := write(t, d, 4096, 1, 4096, 0); err != nil {
		t.Errorf("beside a hung write: %v", err)
	}
	if got := read(t, d, 0, 4096); !bytes.Equal(got, bytesOf(0, 4096)) {
		t.Error("the hung write is done already")
	}
	d.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := read(t, d, 0, 4096); !bytes.Equal(got, bytesOf(1, 4096)) {
		t.Error("the write that was let go is not done")
	}
}

// outcomes is what a sector may hold after a crash, by many seeds.
func outcomes(t *testing.T, v *Volatile, off int64) map[byte]bool {
	t.Helper()
	seen := make(map[byte]bool)
	for seed := range uint64(200) {
		p := read(t, v.Crash(seed), off, sector)
		if !bytes.Equal(p, bytesOf(p[0], sector)) {
			t.Fatalf("sector at %d is torn", off)
		}
		seen[p[0]] = true
	}
	return seen
}

func expect(t *testing.T, v *Volatile, off int64, want ...byte) {
	t.Helper()
	seen := outcomes(t, v, off)
	for _, b := range want {
		if !seen[b] {
			t.Errorf("sector at %d: never %d after a crash, only %v", off, b, seen)
		}
		delete(seen, b)
	}
	if len(seen) > 0 {
		t.Errorf("sector at %d: %v after a crash, which cannot be", off, seen)
	}
}

func TestCrash(t *testing.T) {
	faults := New(blockdev.NewMem(size))
	v := volatile(t, faults)
	write(t, v, 0, 1, 2*sector, 0)
	expect(t, v, 0, 0, 1)
	write(t, v, 0, 2, sector, 0)
	expect(t, v, 0, 0, 1, 2)
	expect(t, v, sector, 0, 1)
	if err := blockdev.Flush(v); err != nil {
		t.Fatal(err)
	}
	expect(t, v, 0, 2)
	expect(t, v, sector, 1)
	if v.Unsettled() != 0 {
		t.Errorf("%d sectors unsettled after a flush", v.Unsettled())
	}

	write(t, v, 0, 3, sector, blockdev.FlagFUA)
	expect(t, v, 0, 3)
	write(t, v, 0, 4, sector, 0)
	write(t, v, sector, 5, sector, blockdev.FlagFUA)
	expect(t, v, 0, 3, 4)
	expect(t, v, sector, 5)

	// Trims and zeroes are writes.
	if _, err := blockdev.Trim(v, blockdev.Extent{Off: sector, Len: sector}); err != nil {
		t.Fatal(err)
	}
	expect(t, v, sector, 5, 0)
	if err := blockdev.WriteZeroes(v, blockdev.Extent{Off: 0, Len: sector}); err != nil {
		t.Fatal(err)
	}
	expect(t, v, 0, 3, 4, 0)

	// A flush in the batch of a write does not cover it.
	blockdev.Flush(v)
	v.Do([]*blockdev.Request{
		{Op: blockdev.OpWrite, Off: 0, Len: sector, Buf: bytesOf(6, sector)},
		{Op: blockdev.OpFlush},
	})
	expect(t, v, 0, 0, 6)
}

func TestCrashAfterFailures(t *testing.T) {
	faults := New(blockdev.NewMem(size))
	v := volatile(t, faults)
	write(t, v, 0, 1, sector, 0)
	faults.Add(Rule{Op: blockdev.OpFlush, Times: 1, Err: syscall.EIO})
	if err := blockdev.Flush(v); err == nil {
		t.Fatal("the flush succeeded")
	}
	if err := blockdev.Flush(v); err != nil {
		t.Fatal(err)
	}
	expect(t, v, 0, 0, 1) // the second flush claims success without the data
	write(t, v, 0, 2, sector, 0)
	if err := blockdev.Flush(v); err != nil {
		t.Fatal(err)
	}
	expect(t, v, 0, 2)

	faults.Add(Rule{Op: blockdev.OpWrite, Times: 1, Err: syscall.EIO})
	write(t, v, 0, 3, sector, 0)
	if err := blockdev.Flush(v); err != nil {
		t.Fatal(err)
	}
	expect(t, v, 0, 2, 3) // the write that failed may have happened
}

func TestCrashBesideAHungWrite(t *testing.T) {
	faults := New(blockdev.NewMem(size))
	v := volatile(t, faults)
	faults.Add(Rule{Op: blockdev.OpWrite, Times: 1, Hang: true})
	done := make(chan error)
	go func() { done <- write(t, v, 0, 1, sector, 0) }()
	testenv.Until(t, "the write hangs", func() bool { return faults.Hanging() == 1 })
	if err := blockdev.Flush(v); err != nil {
		t.Fatal(err)
	}
	expect(t, v, 0, 0, 1)
	faults.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	expect(t, v, 0, 0, 1)
}
