package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FileOptions say how an image is opened. The zero value is what a disk that is
// served wants: for reading and writing, through the page cache, locked.
type FileOptions struct {
	ReadOnly bool
	// Direct opens past the page cache (O_DIRECT). Requests and their buffers
	// must then be aligned as Info says.
	Direct bool
	// NoLock takes no lock and looks at none. What is written while a VM
	// writes too is garbage: only for file systems that cannot lock.
	NoLock bool
	// Share lets a ReadOnly open read what another process is writing. The
	// reader sees a mix of moments; without it such an open is refused, since
	// nobody could tell that from a good copy.
	Share bool
	// Raw opens as a raw disk what looks like another image format.
	Raw bool
}

// File is a raw image in a file or on a block device.
type File struct {
	handle handle
	info   Info
	size   atomic.Int64
	direct bool
	block  bool // a block device of the host
	// volatile is a file that lives in the page cache alone (tmpfs): its
	// reads never wait, though the kernel has no RWF_NOWAIT for them.
	volatile bool
	// zeroAlign is the unit of fallocate: 1 for a file, the logical block of
	// a block device.
	zeroAlign int64

	// What the kernel has turned out not to support here. Set once, never
	// cleared.
	noNoWait, noDSync, noPunch, noZeroRange atomic.Bool
}

// OpenError says why an image cannot be opened or created.
type OpenError struct {
	Path string
	Err  error
	hint string
}

func (e *OpenError) Error() string { return fmt.Sprintf("open %s: %v", e.Path, e.Err) }

func (e *OpenError) Unwrap() error { return e.Err }

// Hint says what to do about it, or is empty.
func (e *OpenError) Hint() string { return e.hint }

// OpenFile opens a raw image, which is a file or a block device. Its errors are
// of type *OpenError and wrap ErrInUse where another process has it open,
// ErrAlignment where its size is no disk's, a *FormatError where it holds
// another format, ErrFileType where it is neither file nor block device, and
// otherwise what the system says (fs.ErrNotExist, fs.ErrPermission,
// syscall.EISDIR). Opening changes nothing of the image, not even its times.
func OpenFile(path string, o FileOptions) (*File, error) {
	f, err := openFile(path, o)
	if err == nil {
		return f, nil
	}
	oe := &OpenError{Path: path, Err: err}
	var h interface{ Hint() string }
	switch {
	case errors.As(err, &h):
		oe.hint = h.Hint()
	case errors.Is(err, ErrInUse) && !o.ReadOnly:
		oe.hint = fmt.Sprintf("stop what uses it (fuser -v %s may name it)", path)
	case errors.Is(err, ErrInUse):
		oe.hint = fmt.Sprintf("stop what writes to it (fuser -v %s may name it), or read it from a snapshot", path)
	case errors.Is(err, fs.ErrNotExist):
		oe.hint = "check the path; `afterimage disk create PATH SIZE` makes a new disk"
	case errors.Is(err, unix.EISDIR):
		oe.hint = "name an image file or a block device in it"
	case errors.Is(err, ErrFileType):
		oe.hint = "name an image file or a block device"
	case errors.Is(err, unix.EROFS) && !o.ReadOnly, errors.Is(err, fs.ErrPermission) && !o.ReadOnly:
		oe.hint = "check its owner and mode, or open it read-only"
	}
	return nil, oe
}

// ErrFileType is wrapped by the refusal of what cannot be a disk: a FIFO, a
// socket, a character device.
var ErrFileType = errors.New("neither a file nor a block device")

func openFile(path string, o FileOptions) (*File, error) {
	if o.Share && !o.ReadOnly {
		return nil, fmt.Errorf("sharing a disk that is opened for writing: %w", ErrNotSupported)
	}
	// Opening the wrong kind of file can do harm (a tape rewinds, a FIFO
	// waits), so its kind is looked at first, and again when it is open.
	var st unix.Stat_t
	if err := ignoringEINTR(func() error { return unix.Stat(path, &st) }); err != nil {
		return nil, err
	}
	kind := st.Mode & unix.S_IFMT
	if err := checkKind(kind); err != nil {
		return nil, err
	}
	flags := unix.O_CLOEXEC
	if o.ReadOnly {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	if kind == unix.S_IFBLK {
		flags |= blockOpenFlags(o)
	}
	var fd int
	err := ignoringEINTR(func() (err error) { fd, err = unix.Open(path, flags, 0); return })
	switch {
	case err == unix.EBUSY && kind == unix.S_IFBLK:
		return nil, fmt.Errorf("mounted, or %w", ErrInUse)
	case err == unix.EINVAL && o.Direct:
		return nil, fmt.Errorf("its file system has no O_DIRECT: %w", ErrNotSupported)
	case err != nil:
		return nil, err
	}
	f := &File{
		block: kind == unix.S_IFBLK, direct: o.Direct, zeroAlign: 1,
		info: Info{Name: path, ReadOnly: o.ReadOnly, BlockSize: 1, MemAlign: 1, Preferred: memPage, Slow: o.Direct},
	}
	f.handle.fd = fd
	if err := f.setUp(kind, o); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return f, nil
}

func checkKind(kind uint32) error {
	switch kind {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		return unix.EISDIR
	}
	return ErrFileType
}

// setUp locks the open file and finds out what it can do.
func (f *File) setUp(kind uint32, o FileOptions) error {
	fd := f.handle.fd
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != kind {
		return fmt.Errorf("became another kind of file while it was opened: %w", ErrFileType)
	}
	if !o.NoLock {
		if err := lockImage(fd, o); err != nil {
			return err
		}
	}
	size, dev := st.Size, st.Dev
	if f.block {
		var err error
		if size, err = f.setUpBlock(); err != nil {
			return err
		}
		dev = st.Rdev
	} else if p := int64(st.Blksize); p >= SectorSize && p <= 64<<10 && bits.OnesCount64(uint64(p)) == 1 {
		// Network file systems give their transfer size here, far above the
		// page that a small write really costs.
		f.info.Preferred = p
	}
	if o.Direct {
		if err := f.askAlignment(); err != nil {
			return err
		}
	}
	// Before anything is said of the size: other formats have sizes that no
	// disk has, and whoever enlarges such an image to fit spoils it.
	if !o.Raw {
		format, err := Probe(fdReader{fd, f.info.BlockSize}, size)
		if err != nil {
			return fmt.Errorf("look for another image format: %w", err)
		}
		if format != "" {
			return &FormatError{Path: f.info.Name, Format: format}
		}
	}
	if unit := max(f.info.BlockSize, SectorSize); size%unit != 0 {
		return &sizeError{size, unit}
	}
	f.size.Store(size)
	rot, _ := queueAttribute("/sys", dev, "rotational")
	f.info.Rotational = rot != 0
	if !f.block {
		f.setUpRegular()
	}
	return nil
}

// setUpRegular finds out what the file system can do.
func (f *File) setUpRegular() {
	var fsi unix.Statfs_t
	if unix.Fstatfs(f.handle.fd, &fsi) != nil {
		return
	}
	kind := uint32(fsi.Type) // signed on 32-bit machines
	switch kind {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC, unix.HUGETLBFS_MAGIC:
		f.volatile = true
	}
	cheap := !f.info.ReadOnly && punches(kind)
	f.info.CheapZero = cheap
	f.info.CheapTrim = cheap
}

// askAlignment asks the kernel what O_DIRECT needs here.
func (f *File) askAlignment() error {
	var stx unix.Statx_t
	err := ignoringEINTR(func() error {
		return unix.Statx(f.handle.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx)
	})
	if err != nil {
		return fmt.Errorf("ask for the alignment of O_DIRECT: %w", err)
	}
	if stx.Mask&unix.STATX_DIOALIGN == 0 {
		return fmt.Errorf("kernel and file system do not tell what alignment O_DIRECT needs here: open it without: %w", ErrNotSupported)
	}
	mem, off := stx.Dio_mem_align, stx.Dio_offset_align
	if mem == 0 || off == 0 {
		return fmt.Errorf("O_DIRECT is not possible here: %w", ErrNotSupported)
	}
	if mem > bufAlign || off > bufAlign || bits.OnesCount32(mem) != 1 || bits.OnesCount32(off) != 1 {
		return fmt.Errorf("O_DIRECT needs memory aligned to %d bytes and offsets to %d, more than this program can: %w", mem, off, ErrNotSupported)
	}
	f.info.MemAlign = int(mem)
	f.info.BlockSize = max(int64(off), SectorSize)
	f.info.Preferred = max(f.info.Preferred, f.info.BlockSize)
	return nil
}

// sizeError is an image of a size that no disk has.
type sizeError struct{ size, unit int64 }

func (e *sizeError) Error() string {
	return fmt.Sprintf("its size is %d bytes, no multiple of %d", e.size, e.unit)
}

func (e *sizeError) Unwrap() error { return ErrAlignment }

func (e *sizeError) Hint() string {
	if e.unit > SectorSize {
		return "open it without O_DIRECT, or enlarge it"
	}
	return fmt.Sprintf("if it is a raw disk that was cut short, enlarge it: truncate -s %%%d IMAGE", SectorSize)
}

// Info implements Device.
func (f *File) Info() Info { return f.info }

// Size implements Device.
func (f *File) Size() int64 { return f.size.Load() }

// Resize implements Device. The new size is durable when it returns.
func (f *File) Resize(size int64) error {
	if !f.handle.acquire() {
		return f.closedError()
	}
	defer f.handle.release()
	if f.block {
		return fmt.Errorf("%s: a block device has the size it has: %w", f.info.Name, ErrNotSupported)
	}
	if err := checkResize(&f.info, size); err != nil {
		return err
	}
	old := f.size.Load()
	if size < old {
		f.size.Store(size) // first, so that no request is sent beyond the end
	}
	err := ignoringEINTR(func() error { return unix.Ftruncate(f.handle.fd, size) })
	if err != nil {
		f.size.Store(old)
		return fmt.Errorf("%s: resize to %d bytes: %w", f.info.Name, size, err)
	}
	f.size.Store(size)
	if err := ignoringEINTR(func() error { return unix.Fsync(f.handle.fd) }); err != nil {
		return fmt.Errorf("%s: make the new size durable: %w", f.info.Name, err)
	}
	return nil
}

// DropCache implements CacheDropper, as far as pages are clean and nobody has mapped them.
func (f *File) DropCache(off, length int64) error {
	if !f.handle.acquire() {
		return ErrClosed
	}
	defer f.handle.release()
	return ignoringEINTR(func() error { return unix.Fadvise(f.handle.fd, off, length, unix.FADV_DONTNEED) })
}

// Close implements Device. It does not wait for requests under way: the file
// and its lock are let go when the last of them ends, at once if there is none.
func (f *File) Close() error {
	first, err := f.handle.close()
	if !first {
		return f.closedError()
	}
	if err != nil {
		return fmt.Errorf("%s: close: %w", f.info.Name, err)
	}
	return nil
}

func (f *File) closedError() error { return fmt.Errorf("%s: %w", f.info.Name, ErrClosed) }

// CreateFile makes a sparse raw image of size bytes, a positive multiple of
// SectorSize. It never overwrites: where path exists the error wraps
// fs.ErrExist. The file appears whole or not at all.
//
// A crash after step
//
//  1. nameless (or temporary) file made and enlarged: leaves nothing (or the
//     temporary file, on file systems without nameless ones)
//  2. linked to its name: leaves the image, or nothing if the directory did
//     not reach the disk
//  3. directory synced: leaves the image
func CreateFile(path string, size int64) error {
	if err := createFile(path, size, true); err != nil {
		oe := &OpenError{Path: path, Err: fmt.Errorf("create: %w", err)}
		if errors.Is(err, fs.ErrExist) {
			oe.hint = "remove it first, or choose another name"
		}
		return oe
	}
	return nil
}

// createFile tries a nameless file first if it is to, and a temporary one where
// the file system has none.
func createFile(path string, size int64, nameless bool) error {
	if size <= 0 || size%SectorSize != 0 {
		return fmt.Errorf("a disk of %d bytes: its size must be a positive multiple of %d: %w", size, SectorSize, ErrAlignment)
	}
	if _, err := os.Lstat(path); err == nil {
		return fs.ErrExist
	}
	dir := filepath.Dir(path)
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()

	var f *os.File
	temp := ""
	if nameless {
		f, err = os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	}
	if !nameless || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		if f, err = os.CreateTemp(dir, "."+filepath.Base(path)+".*"); err == nil {
			temp = f.Name()
			defer os.Remove(temp) // fails if it was renamed, as it should
		}
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if temp == "" {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	} else if err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); errors.Is(err, unix.EINVAL) {
		err = unix.Link(temp, path) // NFS: link refuses to overwrite as well
	}
	if err != nil {
		return err
	}
	return d.Sync()
}
