package nbd

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	// receiveSize is the size of a receive buffer, in bytes: more than a Unix
	// socket holds by default, less than a second level cache.
	receiveSize = 256 << 10

	minClass = 12 // 4 KiB
	maxClass = 26 // 64 MiB, the longest payload
	// classSlack is what a buffer has beyond its power of two, in bytes, so
	// that data of that size and its reply headers fit together.
	classSlack = 4096
)

// A buffer is pooled memory that several hold at once. It goes back to its pool
// when the last lets go of it, unless a Queue has stolen a part of it.
type buffer struct {
	b      []byte
	class  int8
	refs   atomic.Int32
	stolen atomic.Bool
}

// pools holds idle buffers of 1<<class + classSlack bytes.
var pools [maxClass + 1]sync.Pool

// newBuffer returns a buffer of at least n bytes, at most maxPayload and some
// headers, with one reference. Its content is whatever was there before.
func newBuffer(n int) *buffer {
	class := minClass
	if n > 1<<minClass+classSlack {
		class = bits.Len(uint(n - classSlack - 1))
	}
	buf, ok := pools[class].Get().(*buffer)
	if !ok {
		buf = &buffer{b: make([]byte, 1<<class+classSlack), class: int8(class)}
	}
	buf.refs.Store(1)
	return buf
}

// size is what the buffer weighs in memory, in bytes.
func (buf *buffer) size() int64 { return int64(len(buf.b)) }

// alone reports whether the caller holds the only reference and may write
// where others have read.
func (buf *buffer) alone() bool { return buf.refs.Load() == 1 && !buf.stolen.Load() }

func (buf *buffer) hold() { buf.refs.Add(1) }

// drop lets go of the buffer and reports whether that was the last reference.
func (buf *buffer) drop() bool {
	if buf.refs.Add(-1) > 0 {
		return false
	}
	if !buf.stolen.Load() {
		pools[buf.class].Put(buf)
	}
	return true
}
