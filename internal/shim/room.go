package shim

import (
	"golang.org/x/sys/unix"
)

// reservePart is which part of a file system a log leaves to sparse images on it, at most.
const reservePart = 10

// room says whether a log in dir may take so many bytes more: on the file system of an
// image it leaves what the images there have not allocated yet, or a tenth of it, whichever is
// less (RULES F5). Where nothing can be found out the file system itself decides.
func (v *VM) room(dir string, bytes int64) bool {
	log, err := existing(dir)
	if err != nil {
		return true
	}
	var at unix.Stat_t
	var fs unix.Statfs_t
	if unix.Stat(log, &at) != nil || unix.Statfs(log, &fs) != nil {
		return true
	}
	missing := int64(0)
	for _, d := range v.opt.Disks {
		var st unix.Stat_t
		if d.Image == "" || unix.Stat(d.Image, &st) != nil || st.Dev != at.Dev || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		missing += max(0, st.Size-st.Blocks*512)
	}
	if missing == 0 {
		return true
	}
	unit := int64(fs.Bsize)
	reserve := min(missing, int64(fs.Blocks)*unit/reservePart)
	return int64(fs.Bavail)*unit-bytes >= reserve
}
