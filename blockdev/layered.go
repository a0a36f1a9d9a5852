package blockdev

import (
	"fmt"
	"io"
)

// A Layered is a part of a disk's content: an index and a reader. Its methods
// may be called from several goroutines, and what it holds never changes.
type Layered interface {
	// Name is for messages.
	Name() string
	// DiskSize is the size in bytes of the disk of which it is a part.
	DiskSize() int64
	// Lookup returns the first run of [off, off+n) that it has, with Zero set
	// where that is known to read as zero; false if it has nothing there.
	Lookup(off, n int64) (Run, bool, error)
	// ReadAt reads what it has, as Lookup tells.
	io.ReaderAt
}

// foldChunk is how much Fold reads at once.
const foldChunk = 1 << 20

// Fold writes all that the layer has into base, gives base the size of the
// layer's disk, and makes it durable. It may be repeated: after a crash, or an
// error, doing it again gives the same, since the layer covers all that is half
// written.
//
// While it runs base is neither what it was nor what it will be, and no layer
// older than this one fits it any more: whoever keeps points retires those that
// need the old base first, durably, and drops the layer from the chain last.
func Fold(base Device, layer Layered) error {
	size := layer.DiskSize()
	if base.Size() != size {
		if err := base.Resize(size); err != nil {
			return fmt.Errorf("fold %s: %w", layer.Name(), err)
		}
	}
	buf := AlignedBuf(foldChunk)
	for off := int64(0); off < size; {
		run, ok, err := layer.Lookup(off, size-off)
		if err != nil {
			return fmt.Errorf("fold: %w", err)
		}
		if !ok {
			break
		}
		if run.Zero {
			err = WriteZeroes(base, run.Extent)
		} else {
			run.Len = min(run.Len, foldChunk)
			p := buf[:run.Len]
			if _, err = layer.ReadAt(p, run.Off); err == nil {
				err = WriteAt(base, p, run.Off)
			}
		}
		if err != nil {
			return fmt.Errorf("fold %s at %v: %w", layer.Name(), run.Extent, err)
		}
		off = run.End()
	}
	if err := Flush(base); err != nil {
		return fmt.Errorf("fold %s: %w", layer.Name(), err)
	}
	return nil
}
