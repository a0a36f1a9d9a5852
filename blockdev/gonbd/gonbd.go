// Package gonbd joins this program's disks with those of go-nbd
// (github.com/pojntfx/go-nbd): any of its backends can be served and replicated
// here, and any Device can be a backend there.
package gonbd

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/pojntfx/go-nbd/pkg/backend"

	"afterimage/blockdev"
)

// device is a backend as a Device.
type device struct {
	b      backend.Backend
	size   int64
	closed atomic.Bool
	info   blockdev.Info
}

// FromBackend returns the backend as a Device. Its size is asked once; it must
// be a multiple of blockdev.SectorSize. A backend knows neither trim nor
// zeroing nor FUA: a trim does nothing, zeroes are written, and FUA is a Sync
// of the whole backend. A backend has nothing to close either.
func FromBackend(b backend.Backend) (blockdev.Device, error) {
	size, err := b.Size()
	if err != nil {
		return nil, fmt.Errorf("ask a go-nbd backend for its size: %w", err)
	}
	if size < 0 || size%blockdev.SectorSize != 0 {
		return nil, fmt.Errorf("a go-nbd backend of %d bytes, no multiple of %d: %w", size, blockdev.SectorSize, blockdev.ErrAlignment)
	}
	return &device{b: b, size: size, info: blockdev.Info{
		Name: "go-nbd backend", BlockSize: 1, MemAlign: 1, Preferred: 4096,
		Slow: true, // nothing says whether it waits
	}}, nil
}

func (d *device) Info() blockdev.Info { return d.info }

func (d *device) Size() int64 { return d.size }

func (d *device) Do(reqs []*blockdev.Request) {
	for _, r := range reqs {
		r.Done = blockdev.Extent{}
		r.Err = d.do(r)
	}
}

func (d *device) do(r *blockdev.Request) error {
	if d.closed.Load() {
		return d.closedError()
	}
	if err := r.Check(&d.info, d.size); err != nil {
		return fmt.Errorf("%s: %w", d.info.Name, err)
	}
	var err error
	switch r.Op {
	case blockdev.OpRead:
		if r.Flags&blockdev.FlagNoWait != 0 {
			return blockdev.ErrWouldBlock
		}
		err = whole(d.b.ReadAt, r.Buf, r.Off)
	case blockdev.OpWrite:
		err = whole(d.b.WriteAt, r.Buf, r.Off)
	case blockdev.OpFlush:
		err = d.b.Sync()
	case blockdev.OpWriteZeroes:
		if r.Flags&blockdev.FlagFastZero != 0 {
			return fmt.Errorf("%s: fast zeroing: %w", d.info.Name, blockdev.ErrNotSupported)
		}
		for off, end := r.Off, r.Off+r.Len; off < end && err == nil; off += int64(len(zeroes)) {
			err = whole(d.b.WriteAt, zeroes[:min(int64(len(zeroes)), end-off)], off)
		}
	case blockdev.OpTrim:
		return nil
	}
	if err == nil && r.Op != blockdev.OpRead && r.Flags&blockdev.FlagFUA != 0 {
		err = d.b.Sync()
	}
	if err != nil {
		e := &blockdev.IOError{Name: d.info.Name, Op: r.Op, Err: err}
		if r.Op != blockdev.OpFlush {
			e.Extent = r.Extent()
		}
		return e
	}
	return nil
}

var zeroes = make([]byte, 64<<10)

// whole is a ReadAt or WriteAt that must do all of p. An EOF is no error for a
// read that came to the end of the disk with the last of p.
func whole(at func([]byte, int64) (int, error), p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := at(p, off)
	switch {
	case n == len(p) && (err == nil || errors.Is(err, io.EOF)):
		return nil
	case err == nil, errors.Is(err, io.EOF):
		return fmt.Errorf("%d of %d bytes: %w", n, len(p), io.ErrUnexpectedEOF)
	}
	return err
}

// Extents implements blockdev.Device: all is data, as far as one can know.
func (d *device) Extents(off, length int64, visit func(blockdev.Run) bool) error {
	if d.closed.Load() {
		return d.closedError()
	}
	if off < 0 || length < 0 || off > d.size || length > d.size-off {
		return fmt.Errorf("%s: extents of %d bytes at %d of a disk of %d: %w", d.info.Name, length, off, d.size, blockdev.ErrBounds)
	}
	if length > 0 {
		visit(blockdev.Run{Extent: blockdev.Extent{Off: off, Len: length}})
	}
	return nil
}

func (d *device) Resize(int64) error {
	if d.closed.Load() {
		return d.closedError()
	}
	return fmt.Errorf("%s: resize: %w", d.info.Name, blockdev.ErrNotSupported)
}

func (d *device) Close() error {
	if d.closed.Swap(true) {
		return d.closedError()
	}
	return nil
}

func (d *device) closedError() error { return fmt.Errorf("%s: %w", d.info.Name, blockdev.ErrClosed) }

// toBackend is a Device as a backend.
type toBackend struct{ dev blockdev.Device }

// ToBackend returns the Device as a backend. Offsets and lengths must be
// multiples of its block size, buffers may lie anywhere in memory. Closing the
// Device is the caller's.
func ToBackend(dev blockdev.Device) backend.Backend { return toBackend{dev} }

// ReadAt implements io.ReaderAt.
func (b toBackend) ReadAt(p []byte, off int64) (int, error) {
	size := b.dev.Size()
	if off >= size && len(p) > 0 {
		return 0, io.EOF
	}
	n := len(p)
	if left := size - off; off >= 0 && int64(n) > left {
		n = int(left)
	}
	buf := p[:n]
	if b.dev.Info().MemAlign > 1 {
		buf = blockdev.AlignedBuf(n)
	}
	if err := blockdev.ReadAt(b.dev, buf, off); err != nil {
		return 0, err
	}
	copy(p, buf)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements io.WriterAt.
func (b toBackend) WriteAt(p []byte, off int64) (int, error) {
	buf := p
	if b.dev.Info().MemAlign > 1 {
		buf = blockdev.AlignedBuf(len(p))
		copy(buf, p)
	}
	if err := blockdev.WriteAt(b.dev, buf, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Size implements backend.Backend.
func (b toBackend) Size() (int64, error) { return b.dev.Size(), nil }

// Sync implements backend.Backend.
func (b toBackend) Sync() error { return blockdev.Flush(b.dev) }
