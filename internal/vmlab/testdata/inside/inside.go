// Package inside has tests that the lab's own tests run in a guest.
package inside

// What TestWriteRaw leaves on its drive: so many sectors, that were all of the
// first version, flushed, and then all of the second, which was not.
const (
	RawSectors = 512
	RawFlushed = 1
	RawWritten = 2
)
