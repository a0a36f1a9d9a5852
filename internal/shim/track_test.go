package shim

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/filter"
	"afterimage/filter/hot"
	"afterimage/hrl"
	"afterimage/internal/testenv"
)

// A bench is a VM with one disk, of which it can be said when it lives another life.
type bench struct {
	t          *testing.T
	image, log string
	life       byte
	vm         *VM
	found      filter.Recovered
}

const diskMiB = 64

func newBench(t *testing.T) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{t: t, image: filepath.Join(dir, "vm.raw"), log: filepath.Join(dir, "log")}
	if err := blockdev.CreateFile(b.image, diskMiB<<20); err != nil {
		t.Fatal(err)
	}
	b.start()
	return b
}

func (b *bench) open() {
	b.t.Helper()
	dev, err := blockdev.OpenFile(b.image, blockdev.FileOptions{Raw: true})
	if err != nil {
		b.t.Fatal(err)
	}
	b.vm, err = OpenVM(b.t.Context(), VMOptions{
		Name: "vm", Disks: []VMDisk{{Name: "root", Image: b.image, Device: dev}}, Warn: slog.New(slog.DiscardHandler),
		AppendLimit: -1, Life: func(string) ([32]byte, error) { return [32]byte{b.life}, nil },
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) start() {
	b.t.Helper()
	b.open()
	found, err := b.vm.StartLog(b.t.Context(), LogOptions{Dir: b.log})
	if err != nil {
		b.t.Fatal(err)
	}
	b.found = found[0]
}

// settled waits until the cooler has done what was asked of it at the start.
func (b *bench) settled() {
	b.t.Helper()
	testenv.Until(b.t, "what was found is cooled", func() bool { return b.hot().Ranges == 0 })
}

func (b *bench) hot() *hot.Stats { return b.vm.Disks()[0].Stats().Hot }

type asking chan struct{}

func (a asking) Complete([]*blockdev.Request) { close(a) }
func (a asking) Gone() bool                   { return false }

func (b *bench) do(r blockdev.Request) error {
	b.t.Helper()
	done := make(asking)
	r.Owner = done
	b.vm.Disks()[0].Submit([]*blockdev.Request{&r})
	<-done
	return r.Err
}

func (b *bench) write(off int64, c byte) {
	b.t.Helper()
	if err := b.do(blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: 4096, Buf: bytes.Repeat([]byte{c}, 4096)}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) kill() {
	b.t.Helper()
	if err := b.vm.Abort(); err != nil {
		b.t.Fatal(err)
	}
}

// powerCut ends the VM as a power cut does, of which the disk has lost nothing.
func (b *bench) powerCut() {
	b.t.Helper()
	b.kill()
	b.life++
}

// gaps are the first bytes of the blocks that are gaps.
func (b *bench) gaps() []int64 {
	var out []int64
	b.vm.Disks()[0].Gaps(func(off, length int64) {
		for ; length > 0; off, length = off+hrl.BlockBytes, length-hrl.BlockBytes {
			out = append(out, off)
		}
	})
	return out
}

// TestPowerCutGaps: after a power cut what was hot or logged is a gap, and nothing
// else; it stays one over more power cuts, kills and clean ends, until a replica has it.
func TestPowerCutGaps(t *testing.T) {
	b := newBench(t)
	b.settled()
	b.write(3<<20, 1)
	b.write(40<<20, 2)
	if s := b.hot(); s.HotExtents != 2 {
		t.Fatalf("%d extents are hot", s.HotExtents)
	}
	b.powerCut()
	b.start()
	want := func(when string, extents ...int64) {
		t.Helper()
		gaps := b.gaps()
		in := map[int64]bool{}
		for _, e := range extents {
			for off := e << 20; off < (e+1)<<20; off += hrl.BlockBytes {
				in[off] = true
			}
		}
		for _, g := range gaps {
			if !in[g] {
				t.Errorf("%s: byte %d is a gap", when, g)
			}
		}
		if len(gaps) != len(in) {
			t.Errorf("%s: %d blocks are gaps, not %d", when, len(gaps), len(in))
		}
	}
	if !b.found.Evidence || b.found.Whole != nil {
		t.Fatalf("%+v", b.found)
	}
	want("after a power cut", 3, 40)
	b.write(50<<20, 3)
	b.powerCut()
	b.start()
	want("after another", 3, 40, 50)
	b.kill()
	b.start()
	if b.found.Found != hrl.RecoverKill || b.found.Evidence || b.found.Whole != nil {
		t.Fatalf("%+v", b.found)
	}
	want("after a kill", 3, 40, 50)
	if err := b.vm.Close(); err != nil {
		t.Fatal(err)
	}
	b.start()
	if b.found.Found != hrl.RecoverClean {
		t.Fatalf("%+v", b.found)
	}
	want("after a clean end", 3, 40, 50)
	b.kill()
}

// TestChangedImage: an image that somebody else has changed is compared whole.
func TestChangedImage(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, b *bench)
		whole  bool
	}{
		{"nothing", func(*testing.T, *bench) {}, false},
		{"written", func(t *testing.T, b *bench) {
			f, err := os.OpenFile(b.image, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte{1}, 30<<20); err != nil {
				t.Fatal(err)
			}
			f.Close()
			later := time.Now().Add(time.Minute)
			if err := os.Chtimes(b.image, later, later); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"the maps removed", func(t *testing.T, b *bench) {
			if err := os.RemoveAll(b.image + besideSuffix); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"the gaps removed", func(t *testing.T, b *bench) {
			if err := os.Remove(filepath.Join(b.image+besideSuffix, gapsName)); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		for _, clean := range []bool{true, false} {
			t.Run(c.name, func(t *testing.T) {
				b := newBench(t)
				b.settled()
				b.write(3<<20, 1)
				if clean {
					if err := b.vm.Close(); err != nil {
						t.Fatal(err)
					}
				} else {
					b.kill()
				}
				c.change(t, b)
				b.start()
				if (b.found.Whole != nil) != c.whole {
					t.Errorf("clean %v: %+v", clean, b.found)
				}
				b.kill()
			})
		}
	}
}

// TestUntrackedIsMadeDurable: what was written before the log was there has no mark, so
// it is durable before anything is copied of it.
func TestUntrackedIsMadeDurable(t *testing.T) {
	b := newBench(t)
	if err := b.vm.StopLog(); err != nil {
		t.Fatal(err)
	}
	b.write(5<<20, 1)
	flushes := b.vm.Disks()[0].Stats().Stages["flush"].Count
	if _, err := b.vm.StartLog(t.Context(), LogOptions{Dir: b.log}); err != nil {
		t.Fatal(err)
	}
	if n := b.vm.Disks()[0].Stats().Stages["flush"].Count; n <= flushes {
		t.Error("what was written without the log was not made durable")
	}
	b.kill()
}

// TestCleanLogVouches: a log that was closed cleanly vouches for the disk, whatever the
// map says that could not be closed as clean.
func TestCleanLogVouches(t *testing.T) {
	b := newBench(t)
	b.settled()
	b.write(7<<20, 1)
	b.vm.cooler.freeze()
	if err := b.vm.Close(); err != nil {
		t.Fatal(err)
	}
	b.life++
	b.start()
	if b.found.Found != hrl.RecoverClean || b.found.Whole != nil {
		t.Errorf("%+v", b.found)
	}
	b.kill()
}

// TestTerabyte: after a power cut under a disk of 1 TiB (sparse) of which 300 extents
// were hot, reads are answered and writes are tracked at once. It prints how fast.
func TestTerabyte(t *testing.T) {
	dir := t.TempDir()
	b := &bench{t: t, image: filepath.Join(dir, "vm.raw"), log: filepath.Join(dir, "log")}
	if err := blockdev.CreateFile(b.image, 1<<40); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.settled()
	for i := range int64(300) {
		b.write(i*3<<30, 1)
	}
	b.powerCut()
	begin := time.Now()
	b.start()
	started := time.Since(begin)
	buf := make([]byte, 4096)
	if err := b.do(blockdev.Request{Op: blockdev.OpRead, Off: 3 << 30, Len: 4096, Buf: buf}); err != nil {
		t.Fatal(err)
	}
	read := time.Since(begin)
	b.write(500<<30, 2)
	t.Logf("opened in %v, first read answered after %v, first write tracked after %v", started, read, time.Since(begin))
	if b.found.Whole != nil || b.found.GapBytes > 400<<20 {
		t.Errorf("%+v", b.found)
	}
	b.kill()
}
