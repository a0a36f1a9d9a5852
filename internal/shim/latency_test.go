package shim

import (
	"bufio"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/internal/testenv"
)

// fuseRoot and fuseDir name, in the environment, what a process of the test shows where.
const (
	fuseRoot = "AFTERIMAGE_TEST_FUSE_ROOT"
	fuseDir  = "AFTERIMAGE_TEST_FUSE_DIR"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(fuseRoot); root != "" {
		serveFUSE(root, os.Getenv(fuseDir))
		return
	}
	os.Exit(m.Run())
}

// serveFUSE shows a directory under another name until it is unmounted.
func serveFUSE(root, dir string) {
	fatal := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	top, err := fs.NewLoopbackRoot(root)
	fatal(err)
	srv, err := fs.Mount(dir, top, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "none", Name: "loopback"}})
	fatal(err)
	fmt.Println("mounted")
	srv.Wait()
}

// startFUSE shows root at dir from a process of its own, and returns that.
func startFUSE(t *testing.T, root, dir string) *os.Process {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatalf("this test needs FUSE in the kernel: %v", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), fuseRoot+"="+root, fuseDir+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // which frees whoever hangs
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Unmount(dir, syscall.MNT_DETACH)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "mounted\n" {
		t.Fatalf("the FUSE server said %q: %v", line, err)
	}
	return cmd.Process
}

// badFS is the host's file system, on which appends fail while told to.
type badFS struct {
	hrl.FS
	bad atomic.Bool
}

type badFile struct {
	hrl.File
	fs *badFS
}

func (b *badFS) Create(path string) (hrl.File, error) { return b.file(b.FS.Create(path)) }
func (b *badFS) Edit(path string) (hrl.File, error)   { return b.file(b.FS.Edit(path)) }

func (b *badFS) file(f hrl.File, err error) (hrl.File, error) {
	if err != nil {
		return nil, err
	}
	return &badFile{f, b}, nil
}

func (f *badFile) WritevAt(bufs [][]byte, off int64) (int64, error) {
	if f.fs.bad.Load() {
		return 0, syscall.EIO
	}
	return f.File.WritevAt(bufs, off)
}

const (
	loadClients = 4
	loadPause   = 500 * time.Microsecond
	loadTime    = 1500 * time.Millisecond
)

// load writes 4 KiB at random places, from several clients that pause between two writes,
// and returns how long the writes took, shortest first. Any that fails fails the test.
func (b *bench) load() []time.Duration {
	var mu sync.Mutex
	var all []time.Duration
	var clients sync.WaitGroup
	for c := range loadClients {
		clients.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(c), 1))
			took := make([]time.Duration, 0, 10000)
			for end := time.Now().Add(loadTime); time.Now().Before(end); time.Sleep(loadPause) {
				r := blockdev.Request{Op: blockdev.OpWrite, Off: rng.Int64N(diskMiB<<20/4096) * 4096, Len: 4096, Buf: make([]byte, 4096)}
				begin := time.Now()
				done := make(asking)
				r.Owner = done
				go b.vm.Disks()[0].Submit([]*blockdev.Request{&r}) // it may stay in a hung append
				<-done
				if err := r.Err; err != nil {
					b.t.Errorf("a guest's write failed: %v", err)
					return
				}
				took = append(took, time.Since(begin))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
		})
	}
	clients.Wait()
	slices.Sort(all)
	return all
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// TestRootGuestLatency prints how long guests' writes take while the log is well, full,
// failing, hanging, or being collapsed. It asserts no times: the machine has other things to
// do. But no write fails, and what a log that is known to be bad costs is known: at most
// one append each time it comes back may be late.
func TestRootGuestLatency(t *testing.T) {
	testenv.NeedRoot(t)
	dir, err := os.MkdirTemp("/dev/shm", "latency")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	behind, hung := filepath.Join(dir, "behind"), filepath.Join(dir, "fuse")
	for _, d := range []string{behind, hung} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	server := startFUSE(t, behind, hung)
	for _, c := range []struct {
		name  string
		log   string
		quota int64
		fs    *badFS
		begin func(b *bench) (end func())
		check func(st hrl.Stats) bool
	}{
		{
			name: "full", log: filepath.Join(dir, "full"), quota: 40 << 20,
			begin: func(b *bench) func() {
				for range 50 {
					if err := b.do(blockdev.Request{Op: blockdev.OpWrite, Len: 1 << 20, Buf: make([]byte, 1<<20)}); err != nil {
						t.Fatal(err)
					}
				}
				return func() {}
			},
			check: func(st hrl.Stats) bool { return st.Reclaimed > 5 },
		},
		{
			name: "failing", log: filepath.Join(dir, "failing"), quota: 256 << 20, fs: &badFS{FS: hrl.OS},
			begin: func(b *bench) func() {
				bad := b.vm.opt.FS.(*badFS)
				bad.bad.Store(true)
				return func() { bad.bad.Store(false) }
			},
			check: func(st hrl.Stats) bool { return st.Failed > 0 && st.Late == 0 },
		},
		{
			name: "hanging", log: filepath.Join(hung, "log"), quota: 256 << 20,
			begin: func(b *bench) func() {
				if err := server.Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				// Whatever goes wrong, nothing of the test hangs for ever.
				timer := time.AfterFunc(20*time.Second, func() { _ = server.Signal(syscall.SIGCONT) })
				return func() { timer.Stop(); _ = server.Signal(syscall.SIGCONT) }
			},
			check: func(st hrl.Stats) bool { return st.Late == 1 },
		},
		{
			name: "collapsing", log: filepath.Join(dir, "collapsing"), quota: 256 << 20,
			begin: func(b *bench) func() {
				quit, done := make(chan struct{}), make(chan struct{})
				go func() { // as ship does it once for each outage
					defer close(done)
					for {
						select {
						case <-quit:
							return
						case <-time.After(100 * time.Millisecond):
						}
						if _, err := b.vm.Log().Cut(hrl.CutCrash); err != nil {
							t.Error(err)
							return
						}
						touched, err := b.vm.Log().Evidence(hrl.Mark{})
						if err != nil {
							t.Error(err)
							return
						}
						b.vm.gap(touched)
						if err := b.vm.syncGaps(); err != nil {
							t.Error(err)
							return
						}
					}
				}()
				return func() { close(quit); <-done }
			},
			check: func(st hrl.Stats) bool { return st.Failed == 0 },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := &bench{t: t, image: filepath.Join(dir, c.name+".raw"), log: c.log}
			if err := blockdev.CreateFile(b.image, diskMiB<<20); err != nil {
				t.Fatal(err)
			}
			dev, err := blockdev.OpenFile(b.image, blockdev.FileOptions{Raw: true})
			if err != nil {
				t.Fatal(err)
			}
			o := VMOptions{Name: "vm", Disks: []VMDisk{{Name: "root", Image: b.image, Device: dev}}, Warn: slog.New(slog.DiscardHandler)}
			if c.fs != nil {
				o.FS = c.fs
			}
			if b.vm, err = OpenVM(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			if _, err := b.vm.StartLog(t.Context(), LogOptions{Dir: b.log, Quota: c.quota, SegmentBytes: 4 << 20}); err != nil {
				t.Fatal(err)
			}
			for off := int64(0); off < diskMiB<<20; off += 1 << 20 { // so that all is allocated and marked
				if err := b.do(blockdev.Request{Op: blockdev.OpWrite, Off: off, Len: 1 << 20, Buf: make([]byte, 1<<20)}); err != nil {
					t.Fatal(err)
				}
			}
			before := b.load()
			end := c.begin(b)
			during := b.load()
			st := b.vm.Log().Stats()
			end()
			ratio := float64(quantile(during, 0.999)) / float64(quantile(before, 0.999))
			t.Logf("%-10s  before: p50 %v p99 %v p99.9 %v of %d   during: p50 %v p99 %v p99.9 %v max %v of %d   p99.9 ×%.2f", c.name,
				quantile(before, 0.5), quantile(before, 0.99), quantile(before, 0.999), len(before),
				quantile(during, 0.5), quantile(during, 0.99), quantile(during, 0.999), during[len(during)-1], len(during), ratio)
			if !c.check(st) {
				t.Errorf("the log was not %s as it should: %+v", c.name, st)
			}
			_ = b.vm.Close() // a log that has failed may have no room to say what it lacks
		})
	}
}
