// Package cpio writes archives that a Linux kernel unpacks as its first file
// system (Documentation/driver-api/early-userspace/buffer-format.rst). Go's
// standard library has no such format, and a program of the host that writes
// it would be one more thing to install: the whole format is below.
//
// An entry is a header of 110 bytes, all of them ASCII:
//
//	byte  size  field
//	   0     6  magic, "070701": the form without a checksum
//	   6     8  inode; each entry has one of its own, so that none is a hard link
//	  14     8  mode: type and permissions
//	  22     8  owner   30  8  group      always 0, root
//	  38     8  links, always 1
//	  46     8  time, in seconds; always 0, so that the same files give the same bytes
//	  54     8  bytes of content
//	  62     8  major   70  8  minor      of the file system it came from: 0
//	  78     8  major   86  8  minor      of the device that the entry is
//	  94     8  bytes of the name with its final zero byte
//	 102     8  checksum: 0
//
// Numbers are hexadecimal. Then comes the name, relative and with a zero byte at
// its end, then the content; each is filled up with zeroes to a multiple of four
// bytes from the archive's beginning. An entry named TRAILER!!! is the end.
package cpio

import (
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
)

// What an entry is, in the high bits of its mode.
const (
	typeDir     = 0o040000
	typeChar    = 0o020000
	typeFile    = 0o100000
	typeSymlink = 0o120000
)

const (
	magic   = "070701"
	trailer = "TRAILER!!!"
)

// A Writer writes an archive. The directories that an entry needs are made
// when it is added: the kernel makes none by itself, and drops the entry.
type Writer struct {
	out   io.Writer
	off   int64 // bytes written
	inode uint32
	has   map[string]bool // names that were added, cleaned and without the leading slash
	err   error           // the first; later calls return it
}

// NewWriter returns a Writer that writes to out. It is complete after Close.
func NewWriter(out io.Writer) *Writer {
	return &Writer{out: out, has: map[string]bool{}}
}

// Has reports whether there is an entry of this name.
func (w *Writer) Has(name string) bool { return w.has[clean(name)] }

// File adds a file with these permissions. A name that is there already is an
// error, here and below: the later one would silently win.
func (w *Writer) File(name string, perm uint32, content []byte) error {
	return w.add(name, typeFile|perm&0o7777, 0, 0, content)
}

// Dir adds a directory, unless it is there.
func (w *Writer) Dir(name string) error {
	if name = clean(name); name == "" || w.has[name] {
		return w.err
	}
	return w.add(name, typeDir|0o755, 0, 0, nil)
}

// Symlink adds a symbolic link.
func (w *Writer) Symlink(name, target string) error {
	return w.add(name, typeSymlink|0o777, 0, 0, []byte(target))
}

// CharDevice adds a character device.
func (w *Writer) CharDevice(name string, perm, major, minor uint32) error {
	return w.add(name, typeChar|perm&0o7777, major, minor, nil)
}

// Close ends the archive. It does not close what is beneath.
func (w *Writer) Close() error {
	if w.err != nil {
		return w.err
	}
	w.write(trailer, 0, 0, 0, nil)
	err := w.err
	w.err = errors.New("the archive is closed")
	return err
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (w *Writer) add(name string, mode, major, minor uint32, content []byte) error {
	if w.err != nil {
		return w.err
	}
	name = clean(name)
	switch {
	case name == "" || strings.ContainsRune(name, 0) || name == trailer:
		return fmt.Errorf("cpio: %q cannot be the name of an entry", name)
	case w.has[name]:
		return fmt.Errorf("cpio: %s is there twice", name)
	case int64(len(content)) > math.MaxUint32:
		return fmt.Errorf("cpio: %s has %d bytes, more than the format can say", name, len(content))
	}
	if err := w.Dir(path.Dir(name)); err != nil {
		return err
	}
	w.has[name] = true
	w.write(name, mode, major, minor, content)
	return w.err
}

func (w *Writer) write(name string, mode, major, minor uint32, content []byte) {
	w.inode++
	w.put(fmt.Appendf(nil, "%s%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		magic, w.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0))
	w.put(append([]byte(name), 0))
	w.pad()
	w.put(content)
	w.pad()
}

func (w *Writer) pad() { w.put(make([]byte, -w.off&3)) }

func (w *Writer) put(p []byte) {
	if w.err != nil {
		return
	}
	n, err := w.out.Write(p)
	w.off += int64(n)
	if err != nil {
		w.err = fmt.Errorf("cpio: write the archive: %w", err)
	}
}
