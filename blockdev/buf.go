package blockdev

import "unsafe"

// bufAlign is the alignment of AlignedBuf: the largest that O_DIRECT is known
// to ask for. Opening a device that wants more is refused.
const bufAlign = 4096

// AlignedBuf returns n zero bytes that every Device can read to and write
// from, whatever its Info.MemAlign.
func AlignedBuf(n int) []byte {
	b := make([]byte, n+bufAlign)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (bufAlign - 1)
	return b[skip : skip+n : skip+n]
}

// aligned reports whether the buffer begins at a multiple of align bytes.
func aligned(p []byte, align int) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(align-1) == 0
}
