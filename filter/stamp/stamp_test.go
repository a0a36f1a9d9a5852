package stamp

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"afterimage/hrl"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var updateGolden = flag.Bool("update", false, "write the golden file of the present format version")

// testClock stands still until it is set, and ticks when it is told to.
type testClock struct {
	now   time.Time
	ticks chan time.Time
}

func (c *testClock) Now() time.Time { return c.now }
func (c *testClock) Tick(time.Duration) (<-chan time.Time, func()) {
	return c.ticks, func() {}
}

// beat lets the heart beat once, and returns when it has.
func (c *testClock) beat(t *testing.T, s *Stamp, now time.Time) {
	t.Helper()
	c.now = now // the heart waits for the tick
	c.ticks <- now
	<-c.seen(s)
}

// seen is closed when the heart takes the next thing: it has finished with the
// one before.
func (c *testClock) seen(s *Stamp) chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s.err.Load() == nil {
			time.Sleep(time.Millisecond)
		}
		s.err.Store(nil)
	}()
	return done
}

var epoch = time.Unix(1_700_000_000, 123_456_789)

type bench struct {
	t           *testing.T
	image, path string
	clock       *testClock
}

// newBench has an image of 3 MiB, last changed at epoch.
func newBench(t *testing.T) *bench {
	b := &bench{t: t, clock: &testClock{epoch, make(chan time.Time)}}
	b.image = filepath.Join(t.TempDir(), "image")
	b.path = b.image + ".afterimage/stamp"
	b.put(0, bytes.Repeat([]byte("afterimage. "), 1<<18))
	b.touch(epoch)
	return b
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// put writes to the image; its time becomes that of the host.
func (b *bench) put(off int64, p []byte) {
	b.t.Helper()
	f, err := os.OpenFile(b.image, os.O_WRONLY|os.O_CREATE, 0o600)
	b.must(err)
	defer f.Close()
	_, err = f.WriteAt(p, off)
	b.must(err)
}

func (b *bench) touch(mtime time.Time) {
	b.t.Helper()
	b.must(os.Chtimes(b.image, mtime, mtime))
}

func (b *bench) open() (*Stamp, Verdict) {
	b.t.Helper()
	s, v, err := OpenWith(b.path, b.image, b.clock)
	b.must(err)
	b.t.Cleanup(func() { s.Close(false) })
	return s, v
}

func (b *bench) begin() *Stamp {
	b.t.Helper()
	s, _ := b.open()
	b.must(s.Begin())
	return s
}

func TestVerdicts(t *testing.T) {
	replaced := func(b *bench) {
		data, err := os.ReadFile(b.image)
		b.must(err)
		b.must(os.Rename(b.image, b.image+".old"))
		b.put(0, data)
		b.touch(epoch.Add(-time.Hour))
	}
	damage := func(places ...int) func(*bench) {
		return func(b *bench) {
			data, err := os.ReadFile(b.path)
			b.must(err)
			for _, p := range places {
				data[p*recordBytes+30] ^= 1
			}
			b.must(os.WriteFile(b.path, data, 0o600))
		}
	}
	for _, c := range []struct {
		what   string
		clean  bool
		do     func(b *bench)
		kind   Kind
		reason string
	}{
		{"nothing", true, nil, Same, ""},
		{"later", true, func(b *bench) { b.touch(epoch.Add(1)) }, Changed, "last changed"},
		{"earlier", true, func(b *bench) { b.touch(epoch.Add(-1)) }, Changed, "last changed"},
		{"longer", true, func(b *bench) { b.must(os.Truncate(b.image, 4<<20)); b.touch(epoch) }, Changed, "bytes"},
		{"shorter", true, func(b *bench) { b.must(os.Truncate(b.image, 1<<20)); b.touch(epoch) }, Changed, "bytes"},
		{"first byte, same time", true, func(b *bench) { b.put(0, []byte{1}); b.touch(epoch) }, Changed, "first MiB"},
		{"last byte, same time", true, func(b *bench) { b.put(3<<20-1, []byte{1}); b.touch(epoch) }, Changed, "last MiB"},
		{"copied elsewhere whole", true, func(b *bench) { replaced(b); b.touch(epoch) }, Same, ""},
		{"an older copy", true, replaced, Changed, "last changed"},

		{"nothing", false, nil, Same, ""},
		{"our own last writes", false, func(b *bench) { b.touch(epoch.Add(10 * time.Second)) }, Same, ""},
		{"later than ours can be", false, func(b *bench) { b.touch(epoch.Add(10*time.Second + 1)) }, Changed, "after we last"},
		{"times lost with the power", false, func(b *bench) { b.touch(epoch.Add(-time.Hour)) }, Same, ""},
		{"grown by us", false, func(b *bench) { b.must(os.Truncate(b.image, 4<<20)); b.touch(epoch) }, Same, ""},
		{"an older copy", false, replaced, Changed, "another file"},

		{"no stamp", true, func(b *bench) { b.must(os.Remove(b.path)) }, Unknown, "no stamp"},
		{"no stamp", false, func(b *bench) { b.must(os.Remove(b.path)) }, Unknown, "no stamp"},
		{"half a stamp", true, func(b *bench) { b.must(os.Truncate(b.path, 600)) }, Unknown, "not readable"},
		{"one record damaged", true, damage(0), Same, ""},
		{"the other damaged", true, damage(1), Same, ""},
		{"both damaged", true, damage(0, 1), Unknown, "not readable"},
	} {
		t.Run(fmt.Sprintf("%s, clean %v", c.what, c.clean), func(t *testing.T) {
			b := newBench(t)
			s := b.begin()
			b.must(s.Close(c.clean))
			if c.do != nil {
				c.do(b)
			}
			for range 2 { // Open changes nothing
				s, v := b.open()
				if v.Kind != c.kind || v.Compare != (c.kind != Same) || !strings.Contains(v.Reason, c.reason) {
					t.Errorf("%+v", v)
				}
				b.must(s.Close(true))
			}
			b.clock.now = time.Now() // the tests' own writes have the host's time
			s = b.begin()
			b.must(s.Close(true))
			if _, v := b.open(); v.Kind != Same {
				t.Errorf("after that it is %+v", v)
			}
		})
	}
}

// TestVerdictStays: a crash between Open and Begin loses no verdict.
func TestVerdictStays(t *testing.T) {
	b := newBench(t)
	if _, v := b.open(); v.Kind != Unknown || !v.Compare {
		t.Errorf("without a stamp: %+v", v)
	}
	if _, err := os.Stat(b.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open made a stamp: %v", err)
	}
	b.must(b.begin().Close(true))
	b.touch(epoch.Add(time.Hour))
	for range 3 {
		if _, v := b.open(); v.Kind != Changed {
			t.Errorf("%+v", v)
		}
	}
	b.clock.now = epoch.Add(time.Hour)
	b.must(b.begin().Close(false))
	if _, v := b.open(); v.Kind != Same {
		t.Errorf("%+v", v)
	}
}

func TestHeartbeat(t *testing.T) {
	b := newBench(t)
	s := b.begin()
	for i := range 5 {
		now := epoch.Add(time.Duration(i+1) * period)
		b.clock.beat(t, s, now)
		data, err := os.ReadFile(b.path)
		b.must(err)
		r, err := decodeFile(data)
		if err != nil || r.state != stateOpen || !r.beat.Equal(now) || r.count != uint64(i+3) {
			t.Fatalf("%+v, %v", r, err)
		}
		// A torn one leaves the one before.
		data[int(r.count%2)*recordBytes+20] ^= 0xff
		if r, err := decodeFile(data); err != nil || !now.Equal(r.beat.Add(period)) && i > 0 {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	b.touch(epoch.Add(5*period + slack))
	b.must(s.Close(false))
	if _, v := b.open(); v.Kind != Same {
		t.Errorf("%+v", v)
	}
}

func TestHeartbeatFails(t *testing.T) {
	b := newBench(t)
	s := b.begin()
	if s.Err() != nil {
		t.Error(s.Err())
	}
	b.must(os.Rename(b.image, b.image+".away"))
	b.clock.ticks <- epoch
	for end := time.Now().Add(20 * time.Second); s.Err() == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a heartbeat without an image is no error")
		}
	}
	if err := s.Close(true); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("closed as clean: %v", err)
	}
	b.must(os.Rename(b.image+".away", b.image))
	b.touch(epoch.Add(time.Minute))
	if _, v := b.open(); v.Kind != Changed {
		t.Errorf("%+v", v)
	}
}

// TestNotAFile: what has no time of change is not called changed, and gets no
// stamp.
func TestNotAFile(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, image := range []string{"/dev/null", pipe, dir} {
		path := filepath.Join(dir, "x", "stamp")
		s, v, err := Open(path, image)
		if err != nil {
			t.Fatal(err)
		}
		if v.Kind != Unknown || v.Compare || v.Reason == "" {
			t.Errorf("%s: %+v", image, v)
		}
		if err := errors.Join(s.Begin(), s.Close(true), s.Close(true)); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s has a stamp", image)
		}
	}
	if _, _, err := Open(filepath.Join(dir, "stamp"), filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no image: %v", err)
	}
}

// TestSystemClock is a session with the real one; the heart has no time to beat.
func TestSystemClock(t *testing.T) {
	b := newBench(t)
	for _, want := range []Kind{Unknown, Same} {
		s, v, err := Open(b.path, b.image)
		b.must(err)
		if v.Kind != want {
			t.Errorf("%+v", v)
		}
		b.must(s.Begin())
		b.put(100, []byte("written"))
		b.must(s.Close(true))
	}
}

func goldenRecords() (rs [2]record) {
	rs[0] = record{state: stateClean, count: 8, beat: epoch, inode: 77, size: 3 << 20, mtime: epoch.Add(-time.Second)}
	for i := range rs[0].first {
		rs[0].first[i], rs[0].last[i] = byte(i), byte(0x80+i)
	}
	rs[1] = record{state: stateOpen, count: 7, beat: epoch.Add(-period), inode: 77, size: 2 << 20}
	return rs
}

// The golden file holds the bytes of FormatVersion. If TestGolden fails, the
// format was changed: raise FormatVersion and make the next version's file with
// go test -run TestGolden -update.
func TestGolden(t *testing.T) {
	name := filepath.Join("testdata", "golden", fmt.Sprintf("v%d", FormatVersion), "stamp")
	var got [fileBytes]byte
	rs := goldenRecords()
	rs[0].encode(got[:])
	rs[1].encode(got[recordBytes:])
	if *updateGolden {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, got[:], 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(golden, got[:]) {
		t.Error("the format was changed")
	}
	r, err := decodeFile(golden)
	if err != nil || r.state != rs[0].state || !r.mtime.Equal(rs[0].mtime) || !r.beat.Equal(rs[0].beat) ||
		r.first != rs[0].first || r.last != rs[0].last || r.inode != 77 || r.size != 3<<20 {
		t.Errorf("%+v, %v", r, err)
	}
	other := slices.Clone(golden)
	other[7]++
	other[recordBytes+7]++
	if _, err := decodeFile(other); !errors.Is(err, hrl.ErrVersion) {
		t.Errorf("another version: %v", err)
	}
}

// FuzzStamp: what is read without error comes out the same again.
func FuzzStamp(f *testing.F) {
	var b [fileBytes]byte
	rs := goldenRecords()
	rs[0].encode(b[:])
	f.Add(b[:])
	rs[1].encode(b[recordBytes:])
	f.Add(b[:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeFile(data)
		if err != nil {
			return
		}
		var b [fileBytes]byte
		r.encode(b[:])
		if again, err := decodeFile(b[:]); err != nil || again.count != r.count || again.size != r.size {
			t.Errorf("%+v came back as %+v, %v", r, again, err)
		}
	})
}

// TestUnreadableEnds: an image whose ends cannot be compared counts as changed, and is no
// error: the disk is copied, as far as it can be read.
func TestUnreadableEnds(t *testing.T) {
	dir, err := os.Open(t.TempDir()) // every read fails
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	now := facts{regular: true, size: 4 << 20, mtime: time.Unix(1, 0)}
	v, err := judge(&record{state: stateClean, size: now.size, mtime: now.mtime}, dir, now)
	if err != nil || !v.Compare || v.Kind != Changed || v.Reason == "" {
		t.Errorf("%+v, %v", v, err)
	}
}
