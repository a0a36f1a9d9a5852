package demo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"afterimage/blockdev"
)

const (
	diskBytes = 1 << 30
	// The file system has the first half of the disk. Behind it lies the area
	// that the writer stamps.
	fsBytes    = diskBytes / 2
	areaOff    = fsBytes
	areaBytes  = 64 << 20
	blockBytes = 4096
	areaBlocks = areaBytes / blockBytes

	// roomNeeded is what a run writes, at the most: the disk's content twice and
	// its log.
	roomNeeded = 1 << 30
)

// workDir makes the directory of a run where there is room for it.
func workDir(named string) (string, error) {
	candidates := []string{"/dev/shm", os.TempDir()}
	if named != "" {
		candidates = []string{named}
	}
	var why error
	for _, dir := range candidates {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			why = errors.Join(why, &os.PathError{Op: "statfs", Path: dir, Err: err})
			continue
		}
		if free := int64(st.Bavail) * st.Bsize; free < roomNeeded {
			why = errors.Join(why, fmt.Errorf("%s has %s free: %s are needed: %w", dir, humanize.IBytes(uint64(free)), humanize.IBytes(roomNeeded), unix.ENOSPC))
			continue
		}
		made, err := os.MkdirTemp(dir, "afterimage-demo-")
		if err == nil {
			return made, nil
		}
		why = errors.Join(why, err)
	}
	return "", fmt.Errorf("no room for the demo: %w", why)
}

// tool finds a program of the system, also where an ordinary user's PATH does not
// lead; empty: there is none.
func tool(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

// makeDisk makes the image, with a file system where mkfs.ext4 exists.
func makeDisk(ctx context.Context, path string) (fileSystem bool, err error) {
	if err := blockdev.CreateFile(path, diskBytes); err != nil {
		return false, err
	}
	mkfs := tool("mkfs.ext4")
	if mkfs == "" {
		return false, nil
	}
	files := path + ".files"
	if err := os.Mkdir(files, 0o755); err != nil {
		return false, err
	}
	defer os.RemoveAll(files)
	// Something to be found again: this program.
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(filepath.Join(files, "afterimage"), self, 0o644)
	}
	if err != nil {
		return false, err
	}
	out, err := exec.CommandContext(ctx, mkfs, "-q", "-F", "-d", files, path, fmt.Sprintf("%dk", fsBytes>>10)).CombinedOutput()
	if err != nil {
		return false, fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return true, nil
}

// fsck checks the file system of an image; no: there is no e2fsck.
func fsck(ctx context.Context, image string) (checked bool, err error) {
	e2fsck := tool("e2fsck")
	if e2fsck == "" {
		return false, nil
	}
	out, err := exec.CommandContext(ctx, e2fsck, "-f", "-n", image).CombinedOutput()
	if err != nil {
		return true, fmt.Errorf("e2fsck: %w: %s", err, out)
	}
	return true, nil
}

// newestLayer finds the layer that was stored last below a state directory.
func newestLayer(dir string) (path string, err error) {
	var newest fs.FileInfo
	err = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || filepath.Ext(p) != ".layer" {
			return ignoreGone(err)
		}
		info, err := e.Info()
		if err != nil {
			return ignoreGone(err)
		}
		if newest == nil || info.ModTime().After(newest.ModTime()) {
			newest, path = info, p
		}
		return nil
	})
	if err == nil && path == "" {
		err = errors.New("the replica has no layer to sabotage")
	}
	return path, err
}

// ignoreGone lets a walk pass over what was removed meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// flipByte changes one byte in the middle of a file.
func flipByte(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], st.Size()/2); err != nil {
		return err
	}
	b[0] ^= 0x40
	_, err = f.WriteAt(b[:], st.Size()/2)
	return err
}
