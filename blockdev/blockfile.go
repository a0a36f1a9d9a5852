package blockdev

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// blockOpenFlags are what opening a block device takes beyond a file's flags.
// O_EXCL claims it from mounts, device-mapper, md and swap, which know nothing
// of byte locks. A reader claims it too, because what is mounted changes while
// it is read; two readers of one device need Share.
func blockOpenFlags(o FileOptions) int {
	if o.NoLock || o.Share {
		return 0
	}
	return unix.O_EXCL
}

// setUpBlock finds out what the open block device is and can do, and returns
// its size.
func (f *File) setUpBlock() (size int64, err error) {
	fd := f.handle.fd
	if size, err = unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		return 0, fmt.Errorf("ask for its size: %w", err)
	}
	logical, err := unix.IoctlGetUint32(fd, unix.BLKSSZGET)
	if err != nil {
		return 0, fmt.Errorf("ask for its logical block size: %w", err)
	}
	if logical < SectorSize || logical > 64<<10 || logical&(logical-1) != 0 {
		return 0, fmt.Errorf("its logical block size is %d: %w", logical, ErrNotSupported)
	}
	f.zeroAlign = int64(logical)
	if physical, err := unix.IoctlGetUint32(fd, unix.BLKPBSZGET); err == nil && physical&(physical-1) == 0 {
		f.info.Preferred = max(f.info.Preferred, int64(physical))
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	// Zeroing by a hole is refused without a command for it, but that shows
	// only when there is something to zero: ask beforehand.
	zero, known := queueAttribute("/sys", st.Rdev, "write_zeroes_max_bytes")
	cheap := known && zero > 0 && !f.info.ReadOnly
	f.noPunch.Store(!cheap)
	f.info.CheapZero = cheap
	f.info.CheapTrim = cheap
	return size, nil
}

// queueAttribute reads a number that the kernel tells about the request queue
// of the block device dev, or of the disk of which it is a partition.
func queueAttribute(sysfs string, dev uint64, name string) (int64, bool) {
	dir := filepath.Join(sysfs, "dev/block", fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)))
	for _, up := range []string{"", ".."} {
		// Not cleaned: dir is a symbolic link and .. is its target's parent.
		b, err := os.ReadFile(strings.Join([]string{dir, up, "queue", name}, "/"))
		if err == nil {
			n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
