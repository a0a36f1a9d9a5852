package blockdev

// Lacks are things that kernel or file system cannot do.
type Lacks struct{ Punch, ZeroRange, DSync, NoWait bool }

// Pretend makes the file believe that it cannot do what it can.
func (f *File) Pretend(l Lacks) {
	f.noPunch.Store(l.Punch)
	f.noZeroRange.Store(l.ZeroRange)
	f.noDSync.Store(l.DSync)
	f.noNoWait.Store(l.NoWait)
	f.info.CheapZero = !l.Punch
	f.info.CheapTrim = !l.Punch
}

// CreateFileNamed is CreateFile on a file system without nameless files.
func CreateFileNamed(path string, size int64) error { return createFile(path, size, false) }

// NewTop opens a top on two devices, and FormatTop makes its map.
var (
	NewTop    = newTop
	FormatTop = formatTop
)

// TopMapBytes is the size of a presence map.
func TopMapBytes(size int64) int64 { return topMapBytes(size) }
