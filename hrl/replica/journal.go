package replica

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"afterimage/hrl"
)

const (
	journalName = "journal"
	newSuffix   = ".new"
	// journalGrown is how large a journal may become, in bytes, before it is
	// written anew as one state, if it is also twice as large as it was after
	// the last time.
	journalGrown = 4 << 20
)

// A journal is the one place where a VM's points, role and pins stand (RULES
// S9). It is used by one goroutine at a time: VM.change is held.
//
// # Durable steps
//
// A change is one record: written, synced, then acknowledged. A crash before the
// sync has ended leaves the record, or a torn one, which the next Open drops.
//
// If writing or syncing fails, what stands behind the last acknowledged record
// is unknown for good: a later sync proves nothing. The journal then takes no
// record until it has been written anew without the one that failed.
//
// Writing it anew, also when it has grown, and when a torn record is dropped: a
// crash after step
//
//  1. journal.new written and synced: leaves the old journal
//  2. renamed: leaves the old journal or the new one, which say the same
//  3. directory synced: leaves the new one
//
// If step 3 fails nothing more is acknowledged in either, until it succeeds with
// another new one.
type journal struct {
	fs   hrl.FS
	path string

	head    journalHead
	f       hrl.File
	seq     uint64 // of the last record
	end     int64  // where the next one goes
	compact int64  // how large it was when it was written anew
	failed  error  // why it must be written anew before anything is appended
}

// createJournal makes the journal of a new VM. The caller syncs nothing.
func createJournal(fs hrl.FS, path string, s *state) (*journal, error) {
	j := &journal{fs: fs, path: path}
	j.head.vm = s.VM
	if err := j.rewrite(s); err != nil {
		return nil, errors.Join(err, j.close())
	}
	return j, nil
}

// openJournal reads a journal. With a *JournalError comes what could be read of
// the state.
func openJournal(fsys hrl.FS, path string) (*journal, *state, error) {
	if err := fsys.Remove(path + newSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	f, err := fsys.Edit(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, &JournalError{path, 0, err}
	}
	if err != nil {
		return nil, nil, err
	}
	j := &journal{fs: fsys, path: path, f: f}
	p, err := j.read()
	if err != nil {
		return nil, p.state, errors.Join(err, f.Close())
	}
	j.head, j.seq, j.end, j.compact = p.head, p.seq, p.end, min(p.end, journalGrown)
	if p.torn {
		if err := j.rewrite(p.state); err != nil {
			return nil, p.state, errors.Join(err, j.close())
		}
		return j, p.state, nil
	}
	// A process that was killed may have left its last record, and the journal's name,
	// in memory alone. What is listed from now on counts as acknowledged.
	if err := errors.Join(f.Sync(), fsys.SyncDir(filepath.Dir(path))); err != nil {
		return nil, p.state, errors.Join(fmt.Errorf("journal %s: %w", path, err), j.close())
	}
	return j, p.state, nil
}

func (j *journal) read() (*parsed, error) {
	size, err := j.f.Size()
	if err != nil {
		return &parsed{}, err
	}
	if size > 4*recordMax {
		return &parsed{}, &JournalError{j.path, 0, fmt.Errorf("%d bytes are impossible", size)}
	}
	b := make([]byte, size)
	if n, err := j.f.ReadAt(b, 0); n < len(b) {
		return &parsed{}, fmt.Errorf("read journal %s: %w", j.path, err)
	}
	return parseJournal(j.path, b)
}

// append makes a record durable. now is the state before it.
func (j *journal) append(r *record, now *state) error {
	if j.failed != nil {
		if err := j.rewrite(now); err != nil {
			return fmt.Errorf("journal %s cannot be written since %w: %w", j.path, j.failed, err)
		}
	}
	b, err := encodeRecord(r, j.seq+1, j.head.seed())
	if err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	if _, err = j.f.WriteAt(b, j.end); err == nil {
		err = j.f.Sync()
	}
	if err != nil {
		j.failed = err
		return fmt.Errorf("write journal %s: %w", j.path, err)
	}
	j.seq++
	j.end += int64(len(b))
	// A mark that is missing, or old, only tells less.
	_, _ = j.f.WriteAt(encodeMark(j.seq, j.head.seed()), journalMarkAt)
	return nil
}

// grown reports whether the journal should be written anew.
func (j *journal) grown() bool { return j.failed == nil && j.end > journalGrown && j.end > 2*j.compact }

// rewrite puts a journal with one record, the state, in its place.
func (j *journal) rewrite(s *state) error {
	head := journalHead{vm: j.head.vm}
	_, _ = rand.Read(head.salt[:]) // never fails
	b, err := encodeRecord(&record{Kind: kindState, State: s}, 1, head.seed())
	if err != nil {
		return err
	}
	b = append(make([]byte, journalFirst), b...)
	head.encode(b)
	copy(b[journalMarkAt:], encodeMark(1, head.seed()))
	tmp := j.path + newSuffix
	_ = j.fs.Remove(tmp)
	f, err := j.fs.Create(tmp)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(b, 0); err == nil {
		err = f.Sync()
	}
	if err != nil {
		_ = j.fs.Remove(tmp)
		return errors.Join(err, f.Close())
	}
	if err := j.fs.Rename(tmp, j.path); err != nil {
		j.failed = err // it may have happened all the same
		return errors.Join(err, f.Close())
	}
	if j.f != nil {
		_ = j.f.Close() // nothing of it counts any more
	}
	j.f, j.head, j.seq, j.end, j.compact = f, head, 1, int64(len(b)), int64(len(b))
	j.failed = j.fs.SyncDir(filepath.Dir(j.path))
	return j.failed
}

func (j *journal) close() error {
	if j.f == nil {
		return nil
	}
	f := j.f
	j.f = nil
	return f.Close()
}
