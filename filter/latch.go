package filter

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"afterimage/hrl"
)

// A latch remembers that a sync of the disk failed (rule R9). Linux reports a
// failed write-back once and then calls the pages clean: the next sync
// succeeds without the data. So the first failure is final, whoever saw it.
type latch struct {
	fs   hrl.FS
	path string // where it is kept; empty: in memory alone

	mu     sync.Mutex
	reason error
}

// LatchedError says that a sync of the disk failed earlier.
type LatchedError struct {
	Disk string    `json:"disk"`
	When time.Time `json:"when"`
	Why  string    `json:"why"`
}

func (e *LatchedError) Error() string {
	return fmt.Sprintf("%s could not be made durable on %s: %s", e.Disk, e.When.Format(time.DateTime), e.Why)
}

// Hint says what to do.
func (e *LatchedError) Hint() string {
	return "what the guest wrote before that may be lost: check the disk beneath and the guest's file system, then reopen the disk"
}

// load reads what an earlier process stored.
func (l *latch) load() error {
	if l.path == "" {
		return nil
	}
	b, err := l.read()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read whether the disk failed before: %w", err)
	}
	e := &LatchedError{}
	if json.Unmarshal(b, e) != nil {
		// Nobody writes it but set: what is unreadable was a failure.
		e.Why = "the record of it is damaged"
	}
	l.reason = e
	return nil
}

// latchMax is longer than any record.
const latchMax = 64 << 10

func (l *latch) read() ([]byte, error) {
	f, err := l.fs.Open(l.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, latchMax)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:n], nil
}

// err is why the disk must not be called durable, or nil.
func (l *latch) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reason
}

// set latches, durably if that can be done, and returns whether nothing was
// latched before and what is latched. It comes before the request that found the
// failure is answered.
func (l *latch) set(disk string, why error) (first bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reason != nil {
		return false, l.reason
	}
	e := &LatchedError{Disk: disk, When: time.Now(), Why: why.Error()}
	l.reason = e
	if l.path != "" {
		if err := l.store(e); err != nil {
			// The file system of a disk that fails may well fail too.
			// In memory it holds in any case.
			e.Why += fmt.Sprintf(" (and this could not be recorded: %v)", err)
		}
	}
	return true, e
}

// store writes the file durably: content, then name. Half a file counts as
// latched, so it needs no rename.
func (l *latch) store(e *LatchedError) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	dir := filepath.Dir(l.path)
	if err := l.fs.MkdirAll(dir); err != nil {
		return err
	}
	f, err := l.fs.Create(l.path)
	if errors.Is(err, fs.ErrExist) {
		f, err = l.fs.Edit(l.path)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := l.fs.SyncDir(dir); err != nil {
		return err
	}
	return l.fs.SyncDir(filepath.Dir(dir))
}

// clear forgets what is latched, durably first.
func (l *latch) clear() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.path != "" {
		switch err := l.fs.Remove(l.path); {
		case err == nil:
			if err := l.fs.SyncDir(filepath.Dir(l.path)); err != nil {
				return err
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	l.reason = nil
	return nil
}
