package stamp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Clock is the time as a Stamp sees it, for tests to set.
type Clock interface {
	Now() time.Time
	// Tick sends now and then, about every d, until stop is called.
	Tick(d time.Duration) (tick <-chan time.Time, stop func())
}

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }
func (systemClock) Tick(d time.Duration) (<-chan time.Time, func()) {
	t := time.NewTicker(d)
	return t.C, t.Stop
}

// Stamp is the identity stamp of an image, in a file beside it.
type Stamp struct {
	path, image string
	clock       Clock
	regular     bool

	// file and record are, one after the other, of who opens and begins, of
	// the heart, and, when that has ended, of who closes.
	file   *os.File
	record record // the present one
	closed bool

	err atomic.Pointer[error] // of the last heartbeat; a disk that hangs holds up nobody who asks

	stop chan struct{} // closed by Close
	done chan struct{} // closed by the heart, when it has ended; nil: not begun
}

// Open reads the stamp of an image and says whether somebody else has changed
// the image. It changes nothing. The caller holds the lock on the image.
func Open(path, image string) (*Stamp, Verdict, error) { return OpenWith(path, image, systemClock{}) }

// OpenWith is Open with another clock.
func OpenWith(path, image string, c Clock) (*Stamp, Verdict, error) {
	s := &Stamp{path: path, image: image, clock: c, stop: make(chan struct{})}
	v, err := s.open()
	if err != nil {
		return nil, Verdict{}, fmt.Errorf("whether %s was changed: %w", image, err)
	}
	return s, v, nil
}

func (s *Stamp) open() (Verdict, error) {
	// O_NONBLOCK, for whatever it is: it may be a pipe.
	f, err := os.OpenFile(s.image, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return Verdict{}, err
	}
	defer f.Close()
	now, err := factsOf(f)
	if err != nil {
		return Verdict{}, err
	}
	if s.regular = now.regular; !s.regular {
		return Verdict{Kind: Unknown, Reason: "it is not a regular file: nothing tells when it was changed"}, nil
	}
	b, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return Verdict{Kind: Unknown, Compare: true, Reason: "it has no stamp yet"}, nil
	}
	if err != nil {
		return Verdict{}, err
	}
	if s.record, err = decodeFile(b); err != nil {
		return Verdict{Kind: Unknown, Compare: true, Reason: fmt.Sprintf("its stamp is not readable: %v", err)}, nil
	}
	return judge(&s.record, f, now)
}

// Begin makes the stamp say that the image is in use, durably, and starts its
// heart. Whatever the verdict asked for is durable before; the image is written
// only after it. For what is not a regular file it does nothing.
func (s *Stamp) Begin() error {
	if !s.regular || s.done != nil {
		return nil
	}
	if err := s.begin(); err != nil {
		return fmt.Errorf("stamp of %s: %w", s.image, err)
	}
	s.done = make(chan struct{})
	tick, stop := s.clock.Tick(period)
	go func() {
		defer close(s.done)
		defer stop()
		for {
			select {
			case <-s.stop:
				return
			case <-tick:
				s.beat()
			}
		}
	}()
	return nil
}

func (s *Stamp) begin() error {
	dir := filepath.Dir(s.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	r := record{state: stateOpen, count: s.record.count + 1}
	err = s.refresh(&r)
	var b [fileBytes]byte
	for range 2 {
		r.encode(b[r.count%2*recordBytes:])
		r.count++
	}
	r.count--
	if err == nil {
		err = f.Truncate(fileBytes)
	}
	if err == nil {
		_, err = f.WriteAt(b[:], 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = syncDirs(dir)
	}
	if err != nil {
		f.Close()
		return err
	}
	s.file, s.record = f, r
	return nil
}

// syncDirs makes the name of the stamp durable, and that of its directory.
func syncDirs(dir string) error {
	for _, d := range []string{dir, filepath.Dir(dir)} {
		f, err := os.Open(d)
		if err != nil {
			return err
		}
		err = f.Sync()
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// refresh takes the time and which file the image is. It never waits for the
// image's data.
func (s *Stamp) refresh(r *record) error {
	var st unix.Stat_t
	if err := unix.Stat(s.image, &st); err != nil {
		return &os.PathError{Op: "stat", Path: s.image, Err: err}
	}
	r.beat, r.inode, r.size = s.clock.Now(), st.Ino, st.Size
	return nil
}

// beat is one heartbeat. Its error is kept for Err.
func (s *Stamp) beat() {
	r := s.record
	err := s.refresh(&r)
	if err == nil {
		err = s.store(r)
	}
	s.err.Store(&err)
}

// store makes r the present record: it goes over the one before the
// present.
func (s *Stamp) store(r record) error {
	r.count++
	var b [recordBytes]byte
	r.encode(b[:])
	if _, err := s.file.WriteAt(b[:], int64(r.count%2)*recordBytes); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(s.file.Fd())); err != nil {
		return &os.PathError{Op: "fdatasync", Path: s.path, Err: err}
	}
	s.record = r
	return nil
}

// Err is why the last heartbeat failed, or nil.
func (s *Stamp) Err() error {
	if err := s.err.Load(); err != nil {
		return *err
	}
	return nil
}

// Close stops the heart, and waits for it. With clean set the caller says that
// the disk has been synced and that nothing of ours will write to it any more:
// the stamp then says how the image is left. If that cannot be recorded, the
// stamp stays open. Begin and Close are called one after the other; Close may be
// called twice.
func (s *Stamp) Close(clean bool) error {
	if s.done == nil || s.closed {
		return nil
	}
	s.closed = true
	close(s.stop)
	<-s.done
	var err error
	if clean {
		if err = s.recordClean(); err != nil {
			err = fmt.Errorf("stamp of %s: %w", s.image, err)
		}
	}
	if cerr := s.file.Close(); err == nil {
		err = cerr
	}
	return err
}

func (s *Stamp) recordClean() error {
	f, err := os.Open(s.image)
	if err != nil {
		return err
	}
	defer f.Close()
	// Not for the data, which is durable, but for the time: were it lost, the
	// image would look changed.
	if err := f.Sync(); err != nil {
		return err
	}
	now, err := factsOf(f)
	if err != nil {
		return err
	}
	r := record{state: stateClean, count: s.record.count, beat: s.clock.Now(), inode: now.inode, size: now.size, mtime: now.mtime}
	if r.first, r.last, err = digest(f, now.size); err != nil {
		return err
	}
	return s.store(r)
}
