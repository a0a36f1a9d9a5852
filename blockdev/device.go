package blockdev

import (
	"errors"
	"fmt"
)

// SectorSize is the unit of disk sizes and of the replica log, in bytes.
const SectorSize = 512

// Op is what a Request asks for.
type Op uint8

// The commands of a disk.
const (
	OpRead Op = iota + 1
	OpWrite
	OpFlush       // make every finished write durable; Off and Len are zero
	OpTrim        // the content is no longer needed; see Request
	OpWriteZeroes // the range reads as zero afterwards
)

func (op Op) String() string {
	switch op {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpTrim:
		return "trim"
	case OpWriteZeroes:
		return "write-zeroes"
	}
	return fmt.Sprintf("op(%d)", uint8(op))
}

// Flags modify a Request.
type Flags uint8

const (
	// FlagFUA makes this write, trim or zeroing durable before it returns.
	FlagFUA Flags = 1 << iota
	// FlagNoHole makes a zeroing keep or make the space allocated.
	FlagNoHole
	// FlagFastZero makes a zeroing fail with ErrNotSupported, without
	// touching anything, where it would not be faster than writing zeroes.
	FlagFastZero
	// FlagNoWait makes a read fail with ErrWouldBlock, its buffer undefined,
	// where it would have to wait for a disk or a network.
	FlagNoWait
)

// An Extent is the half-open byte range [Off, Off+Len) of a disk, never empty.
type Extent struct{ Off, Len int64 }

// End is the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Overlaps reports whether the two extents share a byte.
func (e Extent) Overlaps(o Extent) bool { return e.Off < o.End() && o.Off < e.End() }

func (e Extent) String() string { return fmt.Sprintf("[%d, +%d)", e.Off, e.Len) }

// A Request is one command on a range of a disk.
//
// A trim zeroes exactly the part of its range that the Device can zero cheaply
// and leaves the rest alone; the Device stores what it zeroed in Done, so that
// a log can say exactly that (an empty Done: nothing was changed).
type Request struct {
	Op    Op
	Flags Flags
	Off   int64  // bytes
	Len   int64  // bytes; len(Buf) for reads and writes
	Buf   []byte // what to write, or where to read to; nil for the other ops

	// Err is the outcome, valid when the request is finished. It wraps one of
	// this package's errors or a system error.
	Err error
	// Done is what an OpTrim really zeroed; valid when it finished without
	// error, and zero for every other op.
	Done Extent

	// Stolen is set by a Queue that had to finish the request while something
	// (an append to a hung log) may still read Buf: the owner must leave the
	// buffer to the garbage collector and never use it again.
	Stolen bool

	// Owner is told when a Queue has finished the request. A Device ignores it.
	Owner Completer
	// Cookie is the owner's, to know the request again.
	Cookie uint64
	// Arrived is when the request came in, as Monotonic tells it; a Queue
	// fails what has waited unbegun for too long. Zero: it may wait for ever.
	Arrived int64
}

// Extent is the request's range. It must not be called on a flush.
func (r *Request) Extent() Extent { return Extent{r.Off, r.Len} }

// Info describes a Device. All but Size stay the same while it is open.
type Info struct {
	Name      string // for messages: a path, a URI
	ReadOnly  bool
	BlockSize int64 // every offset, length and size is a multiple of it: 1, 512 or 4096
	// MemAlign is the alignment in bytes that buffers of reads and writes
	// need; 1 for everything but O_DIRECT. Buffers from AlignedBuf have it.
	MemAlign int
	// Preferred is the transfer size below which a write costs a
	// read-modify-write; a power of two, at least 512.
	Preferred int64
	// Slow says that reads and writes usually wait (O_DIRECT, network): they
	// belong on a worker, never on the goroutine that receives requests.
	Slow bool
	// CheapZero says that OpWriteZeroes does not write the zeroes one by one.
	CheapZero bool
	// CheapTrim says that OpTrim does something.
	CheapTrim  bool
	Rotational bool
}

// A Device is a disk. Its methods may be called from several goroutines.
type Device interface {
	Info() Info
	// Size is the disk's present size in bytes.
	Size() int64
	// Do performs the requests of a batch and returns when all are finished,
	// each with its own Err. The batch has no order: requests of one batch
	// must not overlap unless all are reads, and a flush in it covers only
	// what had finished before the call. Requests out of bounds fail with
	// ErrBounds, unaligned ones with ErrAlignment, changes of a read-only
	// device with ErrReadOnly, each without touching anything.
	Do(reqs []*Request)
	// Extents calls visit for consecutive runs that cover [off, off+length),
	// in order, until visit returns false. A run that is neither Hole nor
	// Zero may still be either: those are promises, their absence is not.
	Extents(off, length int64, visit func(Run) bool) error
	// Resize changes the size, in bytes. New space reads as zero. The caller
	// sees to it that nothing else is under way. ErrNotSupported if it cannot.
	Resize(size int64) error
	// Close releases the device without making anything durable: flush
	// first. Any later call fails with ErrClosed.
	Close() error
}

// A CacheDropper is a Device that can forget what it has in memory of a range and need
// not write: the next read then shows what the disk has. After a sync that failed these
// may differ, for Linux takes the pages for written all the same (RULES F6).
type CacheDropper interface {
	DropCache(off, length int64) error
}

// A Run is an extent with what is known of its allocation.
type Run struct {
	Extent
	Hole bool // takes no space
	Zero bool // reads as zero
}

// Errors that callers branch on. Devices wrap them with names and ranges.
var (
	ErrBounds       = errors.New("beyond the end of the disk")
	ErrAlignment    = errors.New("not aligned to the disk's block size")
	ErrReadOnly     = errors.New("the disk is read-only")
	ErrNotSupported = errors.New("not supported by this disk")
	ErrWouldBlock   = errors.New("would have to wait")
	ErrClosed       = errors.New("the disk is closed")
	ErrInUse        = errors.New("in use by another process")
)

// Check says whether the request is one that a disk with this description and
// size can be asked: known op, in bounds, aligned, buffer as long as it says,
// allowed. It returns nil or an error that wraps ErrBounds, ErrAlignment,
// ErrReadOnly or ErrNotSupported.
func (r *Request) Check(info *Info, size int64) error {
	switch r.Op {
	case OpFlush:
		return nil
	case OpRead, OpWrite:
		if int64(len(r.Buf)) != r.Len {
			return fmt.Errorf("%s of %d bytes with a buffer of %d: %w", r.Op, r.Len, len(r.Buf), ErrNotSupported)
		}
	case OpTrim, OpWriteZeroes:
	default:
		return fmt.Errorf("%s: %w", r.Op, ErrNotSupported)
	}
	if r.Op != OpRead && info.ReadOnly {
		return ErrReadOnly
	}
	if r.Off < 0 || r.Len < 0 || r.Off > size || r.Len > size-r.Off {
		return fmt.Errorf("%s of %d bytes at %d of a disk of %d: %w", r.Op, r.Len, r.Off, size, ErrBounds)
	}
	if b := info.BlockSize; b > 1 && (r.Off%b != 0 || r.Len%b != 0) {
		return fmt.Errorf("%s of %d bytes at %d, blocks of %d: %w", r.Op, r.Len, r.Off, b, ErrAlignment)
	}
	return nil
}

// Do1 performs one request and returns its error.
func Do1(d Device, r *Request) error {
	d.Do([]*Request{r})
	return r.Err
}

// ReadAt fills p from the disk at byte off.
func ReadAt(d Device, p []byte, off int64) error {
	return Do1(d, &Request{Op: OpRead, Off: off, Len: int64(len(p)), Buf: p})
}

// WriteAt writes p to the disk at byte off.
func WriteAt(d Device, p []byte, off int64) error {
	return Do1(d, &Request{Op: OpWrite, Off: off, Len: int64(len(p)), Buf: p})
}

// Flush makes everything durable that had finished when it was called.
func Flush(d Device) error { return Do1(d, &Request{Op: OpFlush}) }

// WriteZeroes makes the extent read as zero, by a hole where that is possible.
func WriteZeroes(d Device, e Extent) error {
	return Do1(d, &Request{Op: OpWriteZeroes, Off: e.Off, Len: e.Len})
}

// Trim zeroes the part of the extent that can be zeroed cheaply and returns it.
func Trim(d Device, e Extent) (Extent, error) {
	r := Request{Op: OpTrim, Off: e.Off, Len: e.Len}
	err := Do1(d, &r)
	return r.Done, err
}
