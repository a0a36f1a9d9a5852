package transfer

import (
	"context"
	"fmt"
	"sync"

	"afterimage/blockdev"
)

// Copied says what a copy has written.
type Copied struct {
	Data  int64 // bytes written as data
	Zeros int64 // bytes that are zero, and holes where the target can have them
}

// CopyOptions modify a copy. The zero value is right for any target.
type CopyOptions struct {
	// TargetZero says that the target reads as zero already: a new file.
	TargetZero bool
	Progress   Progress
}

const (
	copyWorkers = 4
	// zeroingMax bounds one zeroing, in bytes: less than what an NBD request
	// can say, and not so much that nothing is heard for long.
	zeroingMax = 1 << 30
)

// Copy makes the beginning of dst, which must be at least as large as src,
// equal to src and durable. Zeroes are not written as data: holes stay holes,
// and zeroes in data become some. After an error dst is partly written.
func Copy(ctx context.Context, dst, src blockdev.Device, opts CopyOptions) (Copied, error) {
	size := src.Size()
	if dst.Size() < size {
		return Copied{}, fmt.Errorf("%s has %d bytes, %s has %d: %w",
			dst.Info().Name, dst.Size(), src.Info().Name, size, blockdev.ErrBounds)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c := copying{dst: dst, src: src, opts: opts}
	c.align = max(src.Info().BlockSize, dst.Info().BlockSize, 4096)

	work := make(chan piece)
	var wg sync.WaitGroup
	for range copyWorkers {
		wg.Go(func() {
			s := newSpan()
			for p := range work {
				if err := c.piece(p, s); err != nil {
					cancel(err) // the first one counts
					return
				}
				opts.Progress.add(p.Len)
			}
		})
	}
	err := c.pieces(size, func(p piece) bool {
		select {
		case work <- p:
			return true
		case <-ctx.Done():
			return false
		}
	})
	close(work)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err == nil {
		if err = blockdev.Flush(dst); err != nil {
			err = fmt.Errorf("make %s durable: %w", dst.Info().Name, err)
		}
	}
	return c.total, err
}

// A piece of the source: a run of zeroes, or at most a window of data.
type piece struct {
	blockdev.Extent
	zero bool
}

type copying struct {
	dst, src blockdev.Device
	opts     CopyOptions
	align    int64

	mu    sync.Mutex // guards total
	total Copied
}

// pieces calls yield for consecutive pieces of the source until it says no.
func (c *copying) pieces(size int64, yield func(piece) bool) error {
	cursor := runCursor{dev: c.src, size: size}
	for pos := int64(0); pos < size; {
		zero, end, err := cursor.zeroTo(pos)
		if err != nil {
			return err
		}
		if zero {
			end = min(end, pos+zeroingMax)
			if end < size {
				end &^= c.align - 1
			}
			zero = end > pos
			if !zero {
				end = pos + 1 // a hole smaller than a block: copy the block
			}
		}
		if !zero {
			end = min(roundUp(end, c.align, size), pos+window)
		}
		if !yield(piece{blockdev.Extent{Off: pos, Len: end - pos}, zero}) {
			return nil
		}
		pos = end
	}
	return nil
}

// piece copies one piece with the memory of s.
func (c *copying) piece(p piece, s *span) error {
	var done Copied
	if p.zero {
		done.Zeros = p.Len
		c.zero(s, p.Extent)
	} else {
		buf, err := s.read(c.src, p.Extent)
		if err != nil {
			return err
		}
		done = c.data(s, p.Off, buf)
	}
	if err := s.do(c.dst); err != nil {
		return err
	}
	c.mu.Lock()
	c.total.Data += done.Data
	c.total.Zeros += done.Zeros
	c.mu.Unlock()
	return nil
}

// zero adds the zeroing of e, where one is needed.
func (c *copying) zero(s *span, e blockdev.Extent) {
	if !c.opts.TargetZero {
		s.add(blockdev.Request{Op: blockdev.OpWriteZeroes, Off: e.Off, Len: e.Len})
	}
}

// data adds the writes and zeroings of buf, which belongs at off: neighbouring
// units of one kind go together.
func (c *copying) data(s *span, off int64, buf []byte) Copied {
	var done Copied
	unit := func(i int) ([]byte, int) {
		end := min(i+zeroUnit, len(buf))
		return buf[i:end], end
	}
	for i := 0; i < len(buf); {
		p, end := unit(i)
		zero := isZero(p)
		for end < len(buf) {
			p, next := unit(end)
			if isZero(p) != zero || !zero && next-i > requestMax {
				break
			}
			end = next
		}
		e := blockdev.Extent{Off: off + int64(i), Len: int64(end - i)}
		if zero {
			done.Zeros += e.Len
			c.zero(s, e)
		} else {
			done.Data += e.Len
			s.add(blockdev.Request{Op: blockdev.OpWrite, Off: e.Off, Len: e.Len, Buf: buf[i:end]})
		}
		i = end
	}
	return done
}
