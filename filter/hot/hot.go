package hot

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"afterimage/hrl"
)

// Options of a map.
type Options struct {
	// Cap is how many bytes of the disk may be hot before Cooling has
	// something to do. It is a soft limit: no writer ever waits for it. Zero
	// means 64 GiB; it is at least 8 extents.
	Cap int64
	// Warm asks for the marks of the last session to be set again, up to
	// Cap, so that a guest that boots does not wait for each of them anew.
	Warm bool
}

const (
	capDefault    = 64 << 30
	capMinExtents = 8
)

var (
	// ErrClosed is returned by a map that has been closed.
	ErrClosed = errors.New("the map of hot extents is closed")
	// ErrUnclean is returned by Close when it was to record that the map is
	// clean, and that would not have been true.
	ErrUnclean = errors.New("the map of hot extents stays unclean")
)

// Map is the durable map of hot extents of one disk. The package's comment
// has the whole story. All methods may be called at once, from any goroutine.
type Map struct {
	fs    hrl.FS
	path  string
	shift uint  // an extent is 1<<shift bytes
	cap   int64 // extents

	// chunks are the cells, of at least so many extents. Grow replaces the slice,
	// never a chunk, with committer held.
	chunks atomic.Pointer[[]*chunk]

	// committer is held by whoever writes to the file: across pwrite and
	// fdatasync. Taken before mu.
	committer sync.Mutex
	file      hrl.File
	head      header
	tx        transaction // the newest; the next is made of it
	buf       [txBytes]byte

	// mu is held for moments, never across a system call. It guards what
	// follows, and every change of a cell's state but that from idle to hot.
	mu      sync.Mutex
	extents int64
	table   bitmap // as the ring says, or the transaction being committed; changed with committer held too
	hot     int64  // marked extents, without ranges
	marks   []run  // for the next commits, in order of arrival
	clears  []run  // likewise
	// clearing is how many extents of a round are not cold yet, whether they
	// are in clears or in a commit.
	clearing int64
	ahead    streams

	wides []*wide // disjoint, in order
	// wideAsked counts changes of wides; a commit has them up to wideTaken,
	// and those up to wideDurable are durable.
	wideAsked, wideTaken, wideDurable uint64

	hand      int64  // where the next sweep begins, an extent
	cooling   bool   // a round is under way
	round     uint64 // changes when one begins, and when Cleared ends it
	forgotten bool   // what Open found is durable elsewhere
	frozen    bool   // nothing is cleared any more
	broken    error
	closed    bool
	stats     counters
}

func (m *Map) unusableLocked() error {
	if m.broken == nil && m.closed {
		return ErrClosed
	}
	return m.broken
}

// Broken is why the map's file could not be written, or nil. A map that is
// broken once stays so: nothing is marked and nothing cleared any more. Its user
// has to see to it that the whole disk will be compared, durably, and may then
// do without the map.
func (m *Map) Broken() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.broken
}

// Forget says that everything Open found has become durable elsewhere, as gaps.
// Until then all of it stays marked; from then on it is cleared like any mark.
func (m *Map) Forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgotten = true
}

// Grow makes room for marks of a disk of size bytes. It returns before anybody
// may write there. A map never shrinks. After an error the map is as it was,
// unless Broken says more.
//
// The table goes to a new ring, behind or before the present one: a crash leaves
// one or the other (see newRing).
func (m *Map) Grow(size int64) error {
	m.committer.Lock()
	defer m.committer.Unlock()
	m.mu.Lock()
	extents, err := extentsFor(size, m.shift)
	if err == nil {
		err = m.unusableLocked()
	}
	if err != nil || extents <= m.extents {
		m.mu.Unlock()
		return err
	}
	c := contents{table: m.table.grown(extents), ranges: m.wideRunsLocked(extents)}
	asked := m.wideAsked
	m.mu.Unlock()
	// The cells come first. Who enters too early is then only not admitted.
	grown := growCells(*m.chunks.Load(), extents)
	m.chunks.Store(&grown)
	h, err := m.newRing(&c, extents)
	if err != nil {
		return fmt.Errorf("grow %s: %w", m.path, err)
	}
	if err := m.storeHeader(h); err != nil {
		err = fmt.Errorf("grow %s: %w", m.path, err)
		m.fail(err)
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.table, m.extents = c.table, extents
	m.tx.number = uint64(h.slots)
	m.wideTaken, m.wideDurable = asked, asked
	return nil
}

// Close ends the map. With clean set the caller says that every disk write has
// ended, and that a sync of the disk and one of the log that began after the
// last of them have succeeded. Then no mark counts any more; they are kept only
// to warm the next session. It returns an error that is ErrUnclean if that
// cannot be: as long as what was found has not been forgotten, after a failed
// sync, and with writers still counted in.
//
// The record is one sector (see storeHeader): a crash before it is durable leaves the
// marks, as if there had been no Close.
func (m *Map) Close(clean bool) error {
	m.committer.Lock()
	defer m.committer.Unlock()
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	err := m.uncleanLocked()
	m.closed = true
	m.mu.Unlock()
	switch {
	case !clean:
		err = nil
	case err == nil:
		h := m.head
		h.state = fileClean
		if err = m.storeHeader(h); err != nil {
			err = fmt.Errorf("record that %s is clean: %w", m.path, err)
		}
	}
	if cerr := m.file.Close(); err == nil {
		err = cerr
	}
	return err
}

func (m *Map) uncleanLocked() error {
	switch {
	case m.broken != nil:
		return fmt.Errorf("%w: %w", ErrUnclean, m.broken)
	case m.frozen:
		return fmt.Errorf("%w: a sync has failed", ErrUnclean)
	case !m.forgotten:
		return fmt.Errorf("%w: what was found is not durable elsewhere", ErrUnclean)
	}
	for _, w := range m.wides {
		if w.writers > 0 {
			return fmt.Errorf("%w: %d writers of a range", ErrUnclean, w.writers)
		}
	}
	for i := range m.extents {
		if n := m.cell(i).Load() / writer; n > 0 {
			return fmt.Errorf("%w: %d writers in extent %d", ErrUnclean, n, i)
		}
	}
	return nil
}
