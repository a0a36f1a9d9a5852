package replica

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"afterimage/blockdev"
	"afterimage/hrl"
)

// Folding a stack of layers into a base.
//
// The caller has made durable that no point below the stack's newest layer will
// be opened again (RULES I1). A crash after step
//
//  1. blocks that the stack has in part were checked: leaves the base as it was
//  2. touched blocks marked unknown, synced: leaves the base as it was, and
//     those blocks unchecked
//  3. base written, synced (blockdev.Fold): leaves the base half written; what is
//     wrong in it is covered by the layers, and unknown
//  4. checksums of touched blocks taken and synced: leaves the new base
//
// After each of them the fold is begun anew, with these layers or with more, and
// ends the same. The caller then records that it has ended, and drops the layers
// last.
//
// What was found damaged in step 1 must not get a new checksum by step 4: such a
// block is recorded as damaged, until a fold covers the whole of it.

// blockSet is a set of a base's blocks.
type blockSet []uint64

func newBlockSet(n int64) blockSet { return make(blockSet, (n+63)/64) }

func (s blockSet) add(block int64) { s[block/64] |= 1 << (block % 64) }

func (s blockSet) has(block int64) bool { return s[block/64]>>(block%64)&1 != 0 }

// next is the first block from block on, or -1.
func (s blockSet) next(block int64) int64 {
	for w := block / 64; w < int64(len(s)); w++ {
		word := s[w]
		if w == block/64 {
			word &= ^uint64(0) << (block % 64)
		}
		if word != 0 {
			return w*64 + int64(bits.TrailingZeros64(word))
		}
	}
	return -1
}

// touched are the blocks that a fold changes.
type touched struct {
	blocks blockSet
	whole  blockSet // those of which it writes every byte
}

// fold folds the stack into the base, as the fold with this number.
func (b *base) fold(s *stack, number uint32) error {
	t, err := b.touched(s)
	if err != nil {
		return err
	}
	if err := b.unknow(s, t, number); err != nil {
		return err
	}
	if err := b.resize(s.DiskSize()); err != nil {
		return err
	}
	if err := blockdev.Fold(b.dev, s); err != nil {
		return err
	}
	return b.learn(s, t, number)
}

// resize gives the base its size before Fold does, so that nobody reads
// meanwhile.
func (b *base) resize(size int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.dev.Size() == size {
		return nil
	}
	if err := b.dev.Resize(size); err != nil {
		return err
	}
	b.forget(size)
	return nil
}

// touched finds out which blocks the fold of the stack changes. Zeroes over what
// is zero change nothing.
func (b *base) touched(s *stack) (*touched, error) {
	size := s.DiskSize()
	known, err := b.sums.blocks()
	if err != nil {
		return nil, err
	}
	n := max(blocks(max(size, b.dev.Size())), known)
	t := &touched{newBlockSet(n), newBlockSet(n)}
	block, covered, data := int64(-1), int64(0), false
	end := func() error {
		if block < 0 {
			return nil
		}
		if !data {
			state, err := b.state(block)
			if err != nil || state == sumZero {
				return err
			}
		}
		t.blocks.add(block)
		if covered == min(sumBlock, size-block*sumBlock) {
			t.whole.add(block)
		}
		return nil
	}
	for off := int64(0); off < size; {
		run, ok, err := s.Lookup(off, size-off)
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		for at := run.Off; at < run.End(); {
			if k := at / sumBlock; k != block {
				if err := end(); err != nil {
					return nil, err
				}
				block, covered, data = k, 0, false
			}
			to := min(run.End(), (block+1)*sumBlock)
			covered += to - at
			data = data || !run.Zero
			at = to
		}
		off = run.End()
	}
	if err := end(); err != nil {
		return nil, err
	}
	return t, b.cutOff(t, size)
}

// cutOff adds what does not lie within the new size: the block at the new end,
// and all behind it. An earlier try may have cut it off already, and not have
// come to their checksums.
func (b *base) cutOff(t *touched, size int64) error {
	shrinks := size < b.dev.Size()
	for k := size / sumBlock; k < int64(len(t.blocks))*64; k++ {
		state, err := b.state(k)
		if err != nil {
			return err
		}
		switch {
		case state == sumZero || t.blocks.has(k):
		case k*sumBlock >= size:
			t.blocks.add(k)
			t.whole.add(k)
		case shrinks || state == sumUnknown:
			t.blocks.add(k)
		}
	}
	return nil
}

// state is that of a block. What is known of none of its page's is damaged.
func (b *base) state(block int64) (sumState, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	p, err := b.sums.page(block / sumPageBlocks)
	if errors.Is(err, hrl.ErrDamaged) {
		return sumDamaged, nil
	}
	if err != nil {
		return 0, err
	}
	return p.state(block % sumPageBlocks), nil
}

// pages calls change for each page with touched blocks, with a copy of it, and
// then puts the copy in its place; at last it makes all of them durable.
func (b *base) pages(s *stack, t *touched, number uint32, change func(page int64, p *sumPage) error) error {
	for block := t.blocks.next(0); block >= 0; {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		n := block / sumPageBlocks
		p, err := b.copyPage(n)
		if err != nil {
			return err
		}
		if err := change(n, p); err != nil {
			return err
		}
		p.fold = number
		if err := b.putPage(n, p, t); err != nil {
			return err
		}
		block = t.blocks.next((n + 1) * sumPageBlocks)
	}
	if b.sums.failed == nil {
		return b.sums.sync() // while others read
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sums.renew()
}

func (b *base) copyPage(n int64) (*sumPage, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	p, err := b.sums.page(n)
	if errors.Is(err, hrl.ErrDamaged) {
		// Both its slots are: no block of it can be trusted before it is written.
		p, err = &sumPage{slot: -1}, nil
		for i := range int64(sumPageBlocks) {
			p.set(i, sumDamaged, 0)
		}
	}
	if err != nil {
		return nil, err
	}
	q := *p
	return &q, nil
}

func (b *base) putPage(n int64, p *sumPage, t *touched) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	t.in(n, func(block int64) { b.checkLocked(block, false) })
	return b.sums.put(n, p)
}

// in calls f for the touched blocks of a page.
func (t *touched) in(page int64, f func(block int64)) {
	for k := t.blocks.next(page * sumPageBlocks); k >= 0 && k < (page+1)*sumPageBlocks; k = t.blocks.next(k + 1) {
		f(k)
	}
}

// unknow makes durable that the touched blocks are unknown, or damaged.
func (b *base) unknow(s *stack, t *touched, number uint32) error {
	size := b.dev.Size()
	buf := make([]byte, sumBlock)
	return b.pages(s, t, number, func(page int64, p *sumPage) error {
		var failed error
		t.in(page, func(block int64) {
			i := block % sumPageBlocks
			if failed != nil || t.whole.has(block) || block*sumBlock >= size {
				p.set(i, sumUnknown, 0)
				return
			}
			switch p.state(i) {
			case sumDamaged:
			case sumUnknown:
				// An earlier try has come this far: then the block was whole.
				if p.fold <= b.folds {
					p.set(i, sumDamaged, 0)
					b.damaged(block, b.bad(block, errors.New("its last checksum is gone")))
					return
				}
				p.set(i, sumUnknown, 0)
			default:
				part := buf[:min(sumBlock, size-block*sumBlock)]
				if failed = blockdev.ReadAt(b.dev, part, block*sumBlock); failed != nil {
					return
				}
				if _, bad, err := b.checkBlock(block, part); bad {
					p.set(i, sumDamaged, 0)
					b.damaged(block, err)
				} else if failed = err; err == nil {
					p.set(i, sumUnknown, 0)
				}
			}
		})
		if failed != nil {
			return fmt.Errorf("check %s before it is folded into: %w", b.path, failed)
		}
		return nil
	})
}

func (b *base) checkBlock(block int64, p []byte) (checked, bad bool, err error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.checkBlockLocked(block, p)
}

// learn takes the checksums of what the fold has written, and makes them durable.
func (b *base) learn(s *stack, t *touched, number uint32) error {
	size := b.dev.Size()
	buf := make([]byte, sumBlock)
	var hole blockdev.Extent // that was found last
	return b.pages(s, t, number, func(page int64, p *sumPage) error {
		var failed error
		t.in(page, func(block int64) {
			i, at := block%sumPageBlocks, block*sumBlock
			if failed != nil || p.state(i) == sumDamaged {
				return
			}
			if at >= size {
				p.set(i, sumZero, 0)
				return
			}
			part := buf[:min(sumBlock, size-at)]
			var zero bool
			if zero, failed = b.zeroAt(at, int64(len(part)), size, &hole); failed != nil {
				return
			}
			if !zero {
				if failed = blockdev.ReadAt(b.dev, part, at); failed != nil {
					return
				}
				zero = zeroes(part)
			}
			if zero {
				p.set(i, sumZero, 0)
			} else {
				p.set(i, sumKnown, blockSum(part))
			}
		})
		return failed
	})
}

// zeroAt reports whether the range lies in a hole; false says nothing. It
// remembers the hole.
func (b *base) zeroAt(off, n, size int64, hole *blockdev.Extent) (bool, error) {
	if off >= hole.End() {
		*hole = blockdev.Extent{}
		err := b.dev.Extents(off, size-off, func(r blockdev.Run) bool {
			if r.Zero {
				*hole = r.Extent
			}
			return false
		})
		if err != nil {
			return false, err
		}
	}
	return hole.Off <= off && off+n <= hole.End(), nil
}

// verify checks every block of the base. It calls bad for each that is damaged,
// and goes on if that returns nil.
func (b *base) verify(ctx context.Context, bad func(block int64, err error) error, progress func(bytes int64)) error {
	b.mu.Lock()
	b.forget(b.dev.Size())
	b.mu.Unlock()
	buf := make([]byte, sumBlock)
	var hole blockdev.Extent
	for off := int64(0); ; off += sumBlock {
		size := b.dev.Size()
		if off >= size {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		part := buf[:min(sumBlock, size-off)]
		zero, err := b.zeroAt(off, int64(len(part)), size, &hole)
		if err != nil {
			return err
		}
		if zero {
			state, err := b.state(off / sumBlock)
			if err != nil {
				return err
			}
			zero = state == sumZero
		}
		if !zero {
			isBad, err := b.readBlock(part, off)
			if isBad {
				err = bad(off/sumBlock, err)
			}
			if err != nil {
				return err
			}
		}
		progress(int64(len(part)))
	}
}
