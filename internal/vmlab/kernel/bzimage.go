package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
)

// A bzImage is a kernel with a program before it that unpacks it. What is
// needed here of its header (Documentation/x86/boot.rst), little-endian:
//
//	 byte  size  field
//	0x1f1     1  sectors of 512 bytes, less one, before the unpacker's code; 0 means 4
//	0x202     4  magic, "HdrS"
//	0x206     2  version of this header; the payload's fields are there from 0x208 on
//	0x248     4  where the payload begins, from the beginning of the unpacker's code
//	0x24c     4  bytes of the payload; its last four say how long the kernel is
const (
	headerEnd      = 0x250
	payloadVersion = 0x208
)

var (
	xzMagic  = []byte("\xfd7zXZ\x00")
	elfMagic = []byte("\x7fELF")
	// pvhNotes are the heads of the ELF note by which a kernel says where it can be
	// entered with nothing in memory but itself: a name of 4 bytes, an address of
	// 8 or 4, and the type, which is 18.
	pvhNotes = [][]byte{
		[]byte("\x04\x00\x00\x00\x08\x00\x00\x00\x12\x00\x00\x00Xen\x00"),
		[]byte("\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00"),
	}
)

// bare returns what QEMU is to boot for a bzImage: the kernel in it, so that not
// every guest unpacks it anew, or the bzImage itself where that cannot be done
// (it is compressed otherwise, or has no entry of that kind), only slower.
func bare(ctx context.Context, bzimage []byte) ([]byte, error) {
	packed, err := payload(bzimage)
	if err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(packed, xzMagic) {
		return bzimage, nil
	}
	cmd := exec.CommandContext(ctx, "xz", "-dc")
	cmd.Stdin = bytes.NewReader(packed)
	image, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cmd, err)
	}
	if !bytes.HasPrefix(image, elfMagic) {
		return nil, errors.New("what is in it is no ELF file")
	}
	for _, note := range pvhNotes {
		if bytes.Contains(image, note) {
			return image, nil
		}
	}
	return bzimage, nil
}

// payload is the compressed kernel of a bzImage, without the length at its end.
func payload(b []byte) ([]byte, error) {
	if len(b) < headerEnd || string(b[0x202:0x206]) != "HdrS" {
		return nil, errors.New("it is no bzImage")
	}
	if v := binary.LittleEndian.Uint16(b[0x206:]); v < payloadVersion {
		return nil, fmt.Errorf("its header has version %#x, too old to say where the kernel is", v)
	}
	sectors := int64(b[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	begin := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(b[0x248:]))
	length := int64(binary.LittleEndian.Uint32(b[0x24c:]))
	if length < 4 || begin+length > int64(len(b)) {
		return nil, fmt.Errorf("its kernel, %d bytes at %d, is not within its %d bytes", length, begin, len(b))
	}
	return b[begin : begin+length-4], nil
}
