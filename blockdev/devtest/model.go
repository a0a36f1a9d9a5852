package devtest

import (
	"errors"
	"fmt"
	"math/rand/v2"

	"afterimage/blockdev"
)

// model makes random batches on one range of a disk and knows what must be
// there.
type model struct {
	dev   blockdev.Device
	scope blockdev.Extent
	want  []byte // of scope
	rng   *rand.Rand
}

// newModel returns a model of a range that reads as zero.
func newModel(d blockdev.Device, scope blockdev.Extent, seed uint64) *model {
	return &model{d, scope, make([]byte, scope.Len), rand.New(rand.NewPCG(seed, 0))}
}

// step makes one batch of 1 to 64 requests that do not overlap, and checks the
// outcome of each.
func (m *model) step() error {
	block := m.dev.Info().BlockSize
	n := 1 + m.rng.IntN(64)
	if m.rng.IntN(2) == 0 {
		n = 1 + m.rng.IntN(4)
	}
	// The batch goes up the range in steps, with gaps or without.
	room := m.scope.Len / int64(n)
	if limit := int64(64 << 10); room > limit {
		room = limit
	}
	at := m.scope.Off + m.rng.Int64N(m.scope.Len-room*int64(n)+1)/block*block
	var reqs []*blockdev.Request
	for range n {
		length := m.rng.Int64N(room/block+1) * block
		if m.rng.IntN(2) == 0 {
			length = min(4096, room/block*block)
		}
		r := &blockdev.Request{Op: m.op(), Off: at, Len: length}
		switch r.Op {
		case blockdev.OpFlush:
			r.Off, r.Len, length = 0, 0, 0
		case blockdev.OpRead:
			r.Buf = blockdev.AlignedBuf(int(length))
			if m.rng.IntN(4) == 0 {
				r.Flags = blockdev.FlagNoWait
			}
		case blockdev.OpWrite:
			r.Buf = pattern(int(length), byte(m.rng.Uint32()))
		}
		if r.Op != blockdev.OpRead && r.Op != blockdev.OpFlush && m.rng.IntN(8) == 0 {
			r.Flags |= blockdev.FlagFUA
		}
		if r.Op == blockdev.OpWriteZeroes {
			r.Flags |= blockdev.Flags(m.rng.IntN(4)) * blockdev.FlagNoHole // and FlagFastZero
		}
		reqs = append(reqs, r)
		at += length
		if m.rng.IntN(2) == 0 {
			at += (room - length) / block * block
		}
	}
	if m.rng.IntN(4) == 0 {
		m.rng.Shuffle(len(reqs), func(i, j int) { reqs[i], reqs[j] = reqs[j], reqs[i] })
	}
	m.dev.Do(reqs)
	for _, r := range reqs {
		if err := m.finished(r); err != nil {
			return fmt.Errorf("%s with flags %#x of %d bytes at %d, in a batch of %d: %w", r.Op, r.Flags, r.Len, r.Off, n, err)
		}
	}
	return nil
}

func (m *model) op() blockdev.Op {
	switch m.rng.IntN(16) {
	case 0, 1, 2, 3, 4:
		return blockdev.OpRead
	case 5, 6:
		return blockdev.OpTrim
	case 7, 8:
		return blockdev.OpWriteZeroes
	case 9:
		return blockdev.OpFlush
	}
	return blockdev.OpWrite
}

// finished checks a request's outcome and applies it to the model.
func (m *model) finished(r *blockdev.Request) error {
	if r.Op == blockdev.OpFlush {
		return r.Err
	}
	want := m.want[r.Off-m.scope.Off:][:r.Len]
	switch {
	case r.Flags&blockdev.FlagNoWait != 0 && errors.Is(r.Err, blockdev.ErrWouldBlock):
		return nil
	case r.Flags&blockdev.FlagFastZero != 0 && errors.Is(r.Err, blockdev.ErrNotSupported):
		return nil
	case r.Err != nil:
		return r.Err
	}
	switch r.Op {
	case blockdev.OpRead:
		return differ(r.Buf, want)
	case blockdev.OpWrite:
		copy(want, r.Buf)
	case blockdev.OpWriteZeroes:
		clear(want)
	case blockdev.OpTrim:
		if r.Done.Len == 0 {
			return nil
		}
		if r.Done.Off < r.Off || r.Done.End() > r.Off+r.Len || r.Done.Len < 0 {
			return fmt.Errorf("it trimmed %v", r.Done)
		}
		clear(want[r.Done.Off-r.Off:][:r.Done.Len])
		return nil
	}
	if r.Done != (blockdev.Extent{}) {
		return fmt.Errorf("it says that it trimmed %v", r.Done)
	}
	return nil
}

// check compares the range with the model, and its extents with its content.
func (m *model) check() error {
	got := blockdev.AlignedBuf(int(m.scope.Len))
	if err := blockdev.ReadAt(m.dev, got, m.scope.Off); err != nil {
		return err
	}
	if err := differ(got, m.want); err != nil {
		return err
	}
	var wrong error
	at := m.scope.Off
	err := m.dev.Extents(m.scope.Off, m.scope.Len, func(r blockdev.Run) bool {
		switch {
		case r.Off != at || r.Len <= 0 || r.End() > m.scope.End():
			wrong = fmt.Errorf("run %v follows %d", r, at)
		case r.Zero && !allZero(m.want[r.Off-m.scope.Off:][:r.Len]):
			wrong = fmt.Errorf("run %v is not zero", r)
		}
		at = r.End()
		return wrong == nil
	})
	if err != nil || wrong != nil {
		return errors.Join(err, wrong)
	}
	if at != m.scope.End() {
		return fmt.Errorf("the runs end at %d, not %d", at, m.scope.End())
	}
	return nil
}
