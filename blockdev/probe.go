package blockdev

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// magic is a sign by which a format is known.
type magic struct {
	format string
	off    int64 // bytes from the beginning, or from the end if negative
	sign   []byte
}

// magics are the formats that would be destroyed, or served as rubbish, if they
// were taken for a raw disk. LUKS is not among them: a LUKS header at the
// beginning of a raw disk is the ordinary content of an encrypted guest disk,
// and its sectors are the guest's sectors, to be served as they are. The same
// is true of partition tables, file systems, LVM and ISO images.
var magics = []magic{
	{"qcow2", 0, []byte("QFI\xfb")}, // and its first version, qcow: see Probe
	{"vmdk", 0, []byte("KDMV")},
	{"vmdk", 0, []byte("COWD")},
	{"vmdk", 0, []byte("# Disk DescriptorFile")},
	{"vhdx", 0, []byte("vhdxfile")},
	{"vpc", 0, []byte("conectix")},    // VHD, dynamic or differencing
	{"vpc", -512, []byte("conectix")}, // VHD, fixed: the footer alone
	{"vdi", 64, binary.LittleEndian.AppendUint32(nil, 0xbeda107f)},
	{"qed", 0, []byte("QED\x00")},
	{"parallels", 0, []byte("WithoutFreeSpace")},
	{"parallels", 0, []byte("WithouFreSpacExt")},
}

// Probe returns the name of the image format that the first bytes of a file of
// size bytes show (for a fixed VHD, the last 512), or "" if it may be a raw
// disk. The names are those that qemu-img takes.
func Probe(r io.ReaderAt, size int64) (string, error) {
	var head, tail [512]byte
	if err := readUpTo(r, head[:min(size, 512)], 0); err != nil {
		return "", err
	}
	if size >= 512 {
		if err := readUpTo(r, tail[:], size-512); err != nil {
			return "", err
		}
	}
	for _, m := range magics {
		from := head[:]
		at := m.off
		if at < 0 {
			from, at = tail[:], at+512
		}
		if !bytes.HasPrefix(from[at:], m.sign) {
			continue
		}
		if m.format == "qcow2" && binary.BigEndian.Uint32(head[4:]) == 1 {
			return "qcow", nil
		}
		return m.format, nil
	}
	return "", nil
}

func readUpTo(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// fdReader reads a file that is not yet known to be a disk: its size may be any,
// and align is what O_DIRECT needs, or 1.
type fdReader struct {
	fd    int
	align int64 // bytes
}

// ReadAt implements io.ReaderAt.
func (r fdReader) ReadAt(p []byte, off int64) (int, error) {
	first := off / r.align * r.align
	end := (off + int64(len(p)) + r.align - 1) / r.align * r.align
	buf := AlignedBuf(int(end - first))
	have := 0
	for have < len(buf) && int64(have)%r.align == 0 { // an unaligned end is the file's
		n, err := unix.Pread(r.fd, buf[have:], first+int64(have))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		if n == 0 {
			break
		}
		have += n
	}
	n := copy(p, buf[min(int(off-first), have):have])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// FormatError is an image that its first bytes show to be of another format.
type FormatError struct {
	Path   string
	Format string
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("this is a %s image, not a raw disk", e.Format)
}

// Hint names the ways out.
func (e *FormatError) Hint() string {
	return fmt.Sprintf("convert it (qemu-img convert -f %[1]s -O raw %[2]s %[2]s.raw), "+
		"or put qemu-nbd beneath (qemu-nbd -f %[1]s -t -k SOCKET %[2]s) and name nbd+unix:///?socket=SOCKET instead; "+
		"if it really is a raw disk that begins like this, insist with --format raw", e.Format, e.Path)
}

// Unwrap makes errors.Is(err, ErrNotSupported) true.
func (e *FormatError) Unwrap() error { return ErrNotSupported }
