// Package transfer compares and copies whole disks that nobody else changes.
//
//	runs.go     what a disk says of its holes, a stretch at a time
//	window.go   reading a window of a disk in requests that run at once
//	compare.go  Compare      copy.go  Copy
package transfer

// window is how much is read at once, in bytes: enough to keep a disk or a
// line busy, little enough that a command's memory does not matter.
const window = 4 << 20

// requestMax is the size of one request, in bytes; a window is several of
// them, so that a server with many hands uses them.
const requestMax = 1 << 20

// Progress is told how many more bytes of the disk are done, holes included.
// It may be called from several goroutines at once, and may be nil.
type Progress func(n int64)

func (p Progress) add(n int64) {
	if p != nil {
		p(n)
	}
}
