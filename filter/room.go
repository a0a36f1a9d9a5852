package filter

import (
	"errors"
	"syscall"

	"afterimage/blockdev"
)

// lacksRoom reports whether the device had no room for what it was asked.
func lacksRoom(r *blockdev.Request) bool {
	return r.Err != nil && (errors.Is(r.Err, syscall.ENOSPC) || errors.Is(r.Err, syscall.EDQUOT))
}

// makeRoom is for requests some of which found no room on the disk: it has the log give
// up what it takes, which may be of the same file system, and does those once more (RULES
// F5). Their ranges are locked. They become gaps, for what the log had of them may
// go with the rest; so it must not wait for them any more: finished is called for that.
func (f *Filter) makeRoom(t *tee, reqs []*blockdev.Request, finished func()) {
	var again []*blockdev.Request
	for _, r := range reqs {
		f.gaps.add(r.Off, r.Len)
		if lacksRoom(r) {
			again = append(again, r)
		}
	}
	finished()
	if !t.log.GiveUp() {
		return
	}
	f.warn.Warn("the disk had no room: the log gave up its own, and what it had is copied later", "disk", f.info.Name)
	for _, r := range again {
		r.Err = nil
	}
	f.dev.Do(again)
}
