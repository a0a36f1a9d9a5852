package replica

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"afterimage/hrl"
)

// clearRunDir removes the directory of a run that no record names: of a start
// that came to nothing, of a test or a branch that is no more. What a guest
// wrote is never removed that way, whatever has become of the record: it is an
// error there.
func (v *VM) clearRunDir(dir string) error {
	if strings.HasPrefix(filepath.Base(dir), failoverPrefix) {
		switch written, err := dirWritten(v.fs, dir); {
		case err != nil:
			return err
		case written:
			return fmt.Errorf("%s has what a guest wrote in a failover that the journal does not know: %w", dir, ErrExists)
		}
	}
	return v.store.o.Host.RemoveAll(dir)
}

// dirWritten reports whether a top in the directory has been written.
func dirWritten(fs hrl.FS, dir string) (bool, error) {
	names, err := fs.ReadDir(dir)
	if err != nil && !isMissing(err) {
		return false, err
	}
	for _, n := range names {
		if written, err := topWritten(fs, filepath.Join(dir, n)); err != nil || written {
			return written, err
		}
	}
	return false, nil
}

// topWritten reports whether the file is the presence map of a top that has any
// block: whether anything but its first page, the header, is not zero.
func topWritten(fs hrl.FS, path string) (written bool, err error) {
	if !strings.HasSuffix(path, topSuffix+".map") {
		return false, nil
	}
	f, err := fs.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Size()
	if err != nil {
		return false, err
	}
	buf := make([]byte, 1<<20)
	for off := int64(4096); off < size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), size-off)]
		if n, err := f.ReadAt(p, off); n < len(p) {
			return false, err
		}
		if !zeroes(p) {
			return true, nil
		}
	}
	return false, nil
}

// recoverRuns removes the directories of runs that no record names.
func (v *VM) recoverRuns() error {
	names, err := v.fs.ReadDir(filepath.Join(v.dir, runsDir))
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for i := range v.state.Runs {
		known[v.state.Runs[i].dir()] = true
	}
	for i := range v.state.Branches {
		known[v.state.Branches[i].Run.dir()] = true
	}
	for _, n := range names {
		if known[n] || !strings.HasPrefix(n, failoverPrefix) && !strings.HasPrefix(n, testPrefix) {
			continue
		}
		err := v.clearRunDir(filepath.Join(v.dir, runsDir, n))
		if errors.Is(err, ErrExists) {
			v.warn.Error("what a guest wrote is kept, but nothing is known of it: move it away once you have looked at it", "vm", v.state.Name, "problem", err)
		} else if err != nil {
			return err
		}
	}
	return nil
}
