package shim

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/internal/testenv"
)

// TestRootImageAndLogFull: on the file system of a sparse image the log never takes the room
// that the image needs: it leaves a reserve, and when there is none any more it gives up
// all that it has, before a guest's write fails (RULES F5). What it had are gaps.
func TestRootImageAndLogFull(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.Need(t, "mkfs.ext4")
	testenv.Need(t, "mount")
	const mib = 1 << 20
	for _, kind := range []string{"tmpfs", "ext4"} {
		for _, batch := range []int{1, 8} {
			t.Run(fmt.Sprintf("%s, %d at once", kind, batch), func(t *testing.T) {
				dir := t.TempDir()
				mount := []string{"-t", "tmpfs", "-o", "size=160M", "none", dir}
				if kind == "ext4" {
					backing := filepath.Join(t.TempDir(), "backing")
					if err := blockdev.CreateFile(backing, 200*mib); err != nil {
						t.Fatal(err)
					}
					if out, err := exec.Command("mkfs.ext4", "-q", "-m", "0", backing).CombinedOutput(); err != nil {
						t.Fatalf("%v: %s", err, out)
					}
					mount = []string{"-o", "loop", backing, dir}
				}
				if out, err := exec.Command("mount", mount...).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				t.Cleanup(func() {
					if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
						t.Errorf("%v: %s", err, out)
					}
				})
				var fs unix.Statfs_t
				if err := unix.Statfs(dir, &fs); err != nil {
					t.Fatal(err)
				}
				free := int64(fs.Bavail) * int64(fs.Bsize)
				image := filepath.Join(dir, "vm.raw")
				if err := blockdev.CreateFile(image, 1<<30); err != nil {
					t.Fatal(err)
				}
				dev, err := blockdev.OpenFile(image, blockdev.FileOptions{Raw: true})
				if err != nil {
					t.Fatal(err)
				}
				vm, err := OpenVM(t.Context(), VMOptions{Name: "vm", Disks: []VMDisk{{Name: "root", Image: image, Device: dev}},
					Warn: slog.New(slog.DiscardHandler), AppendLimit: -1})
				if err != nil {
					t.Fatal(err)
				}
				defer vm.Close()
				if _, err := vm.StartLog(t.Context(), LogOptions{Dir: filepath.Join(dir, "log"), Quota: 1 << 30, SegmentBytes: 4 * mib}); err != nil {
					t.Fatal(err)
				}
				d := vm.Disks()[0]
				b := &bench{t: t, vm: vm}
				// First the same place, so that the log grows as far as it may.
				for i := range 300 {
					if err := b.do(blockdev.Request{Op: blockdev.OpWrite, Len: mib, Buf: bytes.Repeat([]byte{byte(i)}, mib)}); err != nil {
						t.Fatalf("write %d: %v", i, err)
					}
				}
				st := vm.Log().Stats()
				if err := unix.Statfs(dir, &fs); err != nil {
					t.Fatal(err)
				}
				left, total := int64(fs.Bavail)*int64(fs.Bsize), int64(fs.Blocks)*int64(fs.Bsize)
				if st.SegmentBytes < free/2 || st.Reclaimed == 0 || st.Failed > 0 || left < total/10-mib {
					t.Errorf("the log has %d bytes of %d, %d are left: %+v", st.SegmentBytes, free, left, st)
				}
				// Now new places, until the image has all there is.
				written := int64(0)
				for written < free {
					reqs := make([]*blockdev.Request, batch)
					for i := range reqs {
						n := int64(mib / batch)
						reqs[i] = &blockdev.Request{Op: blockdev.OpWrite, Off: written + int64(i)*n, Len: n, Buf: bytes.Repeat([]byte{1}, int(n))}
					}
					if err := b.doAll(reqs); err != nil {
						if !errors.Is(err, syscall.ENOSPC) {
							t.Fatal(err)
						}
						break
					}
					written += mib
				}
				// What lies beside the image, and the file system's own, take some.
				if want := free - 6*mib; written < want {
					t.Errorf("the image got %d bytes, without a log it would be more than %d: %+v", written, want, vm.Log().Stats())
				}
				missing := int64(0)
				d.Gaps(func(_, length int64) { missing += length })
				if missing < written-64*mib {
					t.Errorf("%d bytes are gaps of %d written", missing, written)
				}
				got := make([]byte, mib)
				for off := int64(0); off < written; off += mib {
					if err := blockdev.ReadAt(dev, got, off); err != nil || got[0] != 1 || got[mib-1] != 1 {
						t.Fatalf("at %d: %d, %v", off, got[0], err)
					}
				}
				if st := vm.Log().Stats(); st.SegmentBytes != 0 {
					t.Errorf("the log has %d bytes still", st.SegmentBytes)
				}
				if _, err := vm.Log().Cut(hrl.CutCrash); err == nil {
					t.Error("a cut in a log without room")
				}
			})
		}
	}
}

// several waits for a number of requests.
type several struct{ left chan struct{} }

func (s several) Complete(reqs []*blockdev.Request) {
	for range reqs {
		s.left <- struct{}{}
	}
}
func (s several) Gone() bool { return false }

// doAll submits requests together, and returns their errors.
func (b *bench) doAll(reqs []*blockdev.Request) error {
	s := several{make(chan struct{}, len(reqs))}
	for _, r := range reqs {
		r.Owner = s
	}
	b.vm.Disks()[0].Submit(reqs)
	var errs []error
	for range reqs {
		<-s.left
	}
	for _, r := range reqs {
		errs = append(errs, r.Err)
	}
	return errors.Join(errs...)
}
