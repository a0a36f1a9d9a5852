package filter

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// A latch remembers that a sync of the disk failed (rule R9). Linux reports a
// failed write-back once and then calls the pages clean: the next sync
// succeeds without the data. So the first failure is final, whoever saw it.
type latch struct {
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
	b, err := os.ReadFile(l.path)
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
	if err := os.MkdirAll(filepath.Dir(l.path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(l.path))
}

// clear forgets what is latched, durably first.
func (l *latch) clear() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.path != "" {
		switch err := os.Remove(l.path); {
		case err == nil:
			if err := syncDir(filepath.Dir(l.path)); err != nil {
				return err
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	l.reason = nil
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
