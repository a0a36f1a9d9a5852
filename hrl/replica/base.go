package replica

import (
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

const (
	baseName = "base.raw"
	sumsName = "base.sums"
)

// A base is a disk's base.raw and the checksums beside it. As a blockdev.Device
// it is for reading, by any number of overlays: each block is checked when it is
// read for the first time since the store was opened. Only a fold writes it.
type base struct {
	disk string
	path string
	dev  blockdev.Device
	sums *sums

	// damaged is told of blocks that are not what they were. It is called
	// without locks, perhaps often for one block.
	damaged func(block int64, err error)

	// mu is held shared while a block's state is looked at and the block is
	// read, exclusively while states or the size change: whoever finds a
	// checksum and then other bytes has found damage, not a fold.
	mu    sync.RWMutex
	folds uint32          // that the journal counts
	seen  []atomic.Uint64 // a bit for each block that was checked; beyond it none was
}

// createBase makes the files of an empty base in dir, durably but for the name
// of dir itself.
func createBase(fs hrl.FS, dir string, vm wire.VMID) error {
	if err := fs.MkdirAll(dir); err != nil {
		return err
	}
	// What a crash has left of an earlier try was never used.
	_ = fs.Remove(filepath.Join(dir, baseName))
	_ = fs.Remove(filepath.Join(dir, sumsName))
	f, err := fs.Create(filepath.Join(dir, baseName))
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := createSums(fs, filepath.Join(dir, sumsName), vm); err != nil {
		return err
	}
	return fs.SyncDir(dir)
}

// openDevice is how base.raw is opened; tests put faults in between.
type openDevice func(path string) (blockdev.Device, error)

func openRaw(path string) (blockdev.Device, error) {
	// It is raw whatever the guest put at its beginning.
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{Raw: true})
	if err != nil {
		return nil, err
	}
	return f, nil
}

func openBase(fs hrl.FS, open openDevice, dir, disk string, vm wire.VMID, folds uint32, warn *slog.Logger) (*base, error) {
	s, err := openSums(fs, filepath.Join(dir, sumsName), vm, warn)
	if isMissing(err) {
		return nil, &BaseError{filepath.Join(dir, sumsName), 0, errors.New("the file is missing")}
	}
	if err != nil {
		return nil, err
	}
	b := &base{disk: disk, path: filepath.Join(dir, baseName), sums: s, folds: folds}
	if b.dev, err = open(b.path); err != nil {
		if isMissing(err) {
			err = &BaseError{b.path, 0, errors.New("the file is missing")}
		}
		return nil, errors.Join(err, s.close())
	}
	b.forget(b.dev.Size())
	return b, nil
}

// forget has every block checked again. mu is held, or nobody else has b.
func (b *base) forget(size int64) { b.seen = make([]atomic.Uint64, (blocks(size)+63)/64) }

func blocks(size int64) int64 { return (size + sumBlock - 1) / sumBlock }

func (b *base) checkedLocked(block int64) bool {
	return block/64 < int64(len(b.seen)) && b.seen[block/64].Load()>>(block%64)&1 != 0
}

func (b *base) checkLocked(block int64, on bool) {
	switch {
	case block/64 >= int64(len(b.seen)):
	case on:
		b.seen[block/64].Or(1 << (block % 64))
	default:
		b.seen[block/64].And(^uint64(1 << (block % 64)))
	}
}

// Info implements blockdev.Device.
func (b *base) Info() blockdev.Info {
	i := b.dev.Info()
	i.ReadOnly, i.CheapTrim, i.CheapZero = true, false, false
	return i
}

// Size implements blockdev.Device.
func (b *base) Size() int64 { return b.dev.Size() }

// Resize implements blockdev.Device.
func (b *base) Resize(int64) error { return fmt.Errorf("%s: resize: %w", b.path, blockdev.ErrReadOnly) }

// Close implements blockdev.Device.
func (b *base) Close() error { return errors.Join(b.dev.Close(), b.sums.close()) }

// Do implements blockdev.Device. A read that would not wait is never possible:
// the block may have to be checked.
func (b *base) Do(reqs []*blockdev.Request) {
	info := b.Info()
	for _, r := range reqs {
		r.Done = blockdev.Extent{}
		switch r.Err = r.Check(&info, b.Size()); {
		case r.Err != nil || r.Op == blockdev.OpFlush:
		case r.Flags&blockdev.FlagNoWait != 0:
			r.Err = blockdev.ErrWouldBlock
		default:
			r.Err = b.read(r.Buf, r.Off)
		}
	}
}

// read fills p with what is at off, checked.
func (b *base) read(p []byte, off int64) error {
	for len(p) > 0 {
		n := b.checkedRun(off, int64(len(p)))
		if n > 0 {
			if err := blockdev.ReadAt(b.dev, p[:n], off); err != nil {
				return err
			}
			p, off = p[n:], off+n
			continue
		}
		block := off / sumBlock
		n = min(int64(len(p)), (block+1)*sumBlock-off)
		bad, err := b.readBlock(p[:n], off)
		if bad {
			b.damaged(block, err)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// checkedRun is how many of the n bytes at off lie in blocks that were checked.
func (b *base) checkedRun(off, n int64) int64 {
	b.mu.RLock()
	defer b.mu.RUnlock()
	end := off
	for end < off+n && b.checkedLocked(end/sumBlock) {
		end = (end/sumBlock + 1) * sumBlock
	}
	return min(end-off, n)
}

// readBlock fills p with what is at off, all in one block, and checks it. bad
// says that the error is damage of that block.
func (b *base) readBlock(p []byte, off int64) (bad bool, err error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	block := off / sumBlock
	start := block * sumBlock
	have := min(sumBlock, b.dev.Size()-start)
	if off-start+int64(len(p)) > have {
		return false, fmt.Errorf("%s: read of %d bytes at %d: %w", b.path, len(p), off, blockdev.ErrBounds)
	}
	whole := p
	if int64(len(p)) != have {
		whole = make([]byte, have)
	}
	if err := blockdev.ReadAt(b.dev, whole, start); err != nil {
		return false, err
	}
	checked, bad, err := b.checkBlockLocked(block, whole)
	if err != nil {
		return bad, err
	}
	b.checkLocked(block, checked)
	copy(p, whole[off-start:])
	return false, nil
}

// checkBlockLocked compares a block's bytes with what is known of it; mu is held.
// checked says that something was known, bad that the error is damage of the
// block.
func (b *base) checkBlockLocked(block int64, p []byte) (checked, bad bool, err error) {
	page, err := b.sums.page(block / sumPageBlocks)
	if err != nil {
		return false, errors.Is(err, hrl.ErrDamaged), err
	}
	i := block % sumPageBlocks
	switch page.state(i) {
	case sumZero:
		if !zeroes(p) {
			err = b.bad(block, errors.New("data where the base was zero"))
		}
	case sumKnown:
		if blockSum(p) != page.crcs[i] {
			err = b.bad(block, errChecksum)
		}
	case sumDamaged:
		err = b.bad(block, errors.New("it was found damaged before"))
	case sumUnknown:
		if page.fold > b.folds {
			return false, false, nil
		}
		err = &BaseError{b.sums.path, sumsFirst + block/sumPageBlocks*2*sumPageBytes, errors.New("the last checksums of this page are gone")}
	}
	return err == nil, err != nil, err
}

func (b *base) bad(block int64, err error) error { return &BaseError{b.path, block * sumBlock, err} }

// blockSum is the checksum of a block; one in part is taken as if zeroes
// followed, so that it stays right when the base grows.
func blockSum(p []byte) uint32 {
	sum := crc32.Checksum(p, castagnoli)
	if len(p) < sumBlock {
		sum = crc32.Update(sum, castagnoli, make([]byte, sumBlock-len(p)))
	}
	return sum
}

// Extents implements blockdev.Device. What the file system says is a hole, and
// the checksums know is none, is given as data, so that it is read and found.
func (b *base) Extents(off, length int64, visit func(blockdev.Run) bool) error {
	var failed error
	err := b.dev.Extents(off, length, func(r blockdev.Run) bool {
		if !r.Zero && !r.Hole {
			return visit(r)
		}
		for r.Len > 0 {
			n, lost, err := b.lost(r.Extent)
			if err != nil {
				failed = err
				return false
			}
			part := r
			part.Len = n
			if lost {
				part.Hole, part.Zero = false, false
			}
			if !visit(part) {
				return false
			}
			r.Off, r.Len = r.Off+n, r.Len-n
		}
		return true
	})
	if err == nil {
		err = failed
	}
	return err
}

// lost says whether e, a hole, begins with whole blocks that should have data,
// and for how many bytes the answer is the same.
func (b *base) lost(e blockdev.Extent) (n int64, lost bool, err error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for n < e.Len {
		at := e.Off + n
		block := at / sumBlock
		page, err := b.sums.page(block / sumPageBlocks)
		if err != nil {
			return 0, false, err
		}
		to := min((block+1)*sumBlock, e.End())
		// Of a block in part the hole may be right.
		here := at == block*sumBlock && to == (block+1)*sumBlock && page.state(block%sumPageBlocks) == sumKnown
		if page.slot < 0 { // nothing is known of any block of the page
			to = min((block/sumPageBlocks+1)*sumPageBlocks*sumBlock, e.End())
		}
		if n > 0 && here != lost {
			return n, lost, nil
		}
		lost, n = here, to-e.Off
	}
	return n, lost, nil
}
