package shim

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// statxMntIDUnique asks statx for a mount number that is never used again (Linux 6.8).
// Older kernels know of no such number, and ignore the question: what is mounted
// anew may get the number back that it had.
const statxMntIDUnique = 0x4000

// life identifies the boot of this host, and the mounts (for block devices, the
// disk in the drive) of image and log. As long as it is the same, what a killed
// process wrote is in the page cache (RULES E8). A disk that is no image of this
// host has a page cache that we know nothing of: its life is never the same.
func life(logDir string, disks []VMDisk) ([32]byte, error) {
	h := sha256.New()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return [32]byte{}, fmt.Errorf("which boot this is: %w", err)
	}
	h.Write(boot)
	log, err := existing(logDir)
	if err != nil {
		return [32]byte{}, err
	}
	if err := addMount(h, log, false); err != nil {
		return [32]byte{}, err
	}
	for _, d := range disks {
		if d.Image == "" {
			var once [16]byte
			_, _ = rand.Read(once[:]) // never fails
			fmt.Fprintf(h, "%s %x", d.Device.Info().Name, once)
		} else if err := addMount(h, d.Image, true); err != nil {
			return [32]byte{}, err
		}
	}
	return [32]byte(h.Sum(nil)), nil
}

// existing is the path itself or the nearest directory above it that exists.
func existing(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		} else if !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return "", err
		}
		path = filepath.Dir(path)
	}
}

// addMount adds where the path lies; with file set, which file it is too: another
// one under the same name is another disk.
func addMount(h io.Writer, path string, file bool) error {
	var st unix.Statx_t
	mask := unix.STATX_BASIC_STATS | unix.STATX_MNT_ID
	err := unix.Statx(unix.AT_FDCWD, path, 0, mask|statxMntIDUnique, &st)
	if errors.Is(err, unix.EINVAL) {
		err = unix.Statx(unix.AT_FDCWD, path, 0, mask, &st)
	}
	if err != nil {
		return &os.PathError{Op: "statx", Path: path, Err: err}
	}
	fmt.Fprintf(h, " mount %d device %d:%d", st.Mnt_id, st.Dev_major, st.Dev_minor)
	if file {
		fmt.Fprintf(h, " inode %d", st.Ino)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		seq, err := diskSeq(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, " disk %d:%d %d", st.Rdev_major, st.Rdev_minor, seq)
	}
	return nil
}

// blkGetDiskSeq is BLKGETDISKSEQ (Linux 5.15): a number that grows whenever a
// drive gets another disk.
const blkGetDiskSeq = 0x80081280

func diskSeq(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var seq uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), blkGetDiskSeq, uintptr(unsafe.Pointer(&seq)))
	if errno == unix.ENOTTY || errno == unix.EINVAL {
		return 0, nil // an older kernel: boot and device number have to do
	}
	if errno != 0 {
		return 0, &os.PathError{Op: "BLKGETDISKSEQ", Path: path, Err: errno}
	}
	return seq, nil
}
