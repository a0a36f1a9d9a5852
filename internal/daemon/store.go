package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterr "go.etcd.io/bbolt/errors"

	"afterimage/hrl"
)

// A Store keeps what a daemon must know after a restart, as small values under
// keys that look like paths, so that a cluster could keep them in etcd.
type Store interface {
	// List returns the values of all keys with the prefix, by key.
	List(prefix string) ([]Entry, error)
	// Apply makes all changes or none; they are durable when it returns.
	Apply(changes ...Change) error
	Close() error
}

// An Entry is a value with its key.
type Entry struct {
	Key   string
	Value []byte
}

// A Change sets a key, or deletes it where Value is nil.
type Change Entry

const (
	// stateName is the file of the state in the daemon's directory.
	stateName = "state.db"
	// lockTimeout bounds how long openBolt waits for a daemon that is ending.
	lockTimeout = 2 * time.Second
)

var bucketName = []byte("afterimage")

// boltStore is the Store of one host.
type boltStore struct{ db *bolt.DB }

// openBolt opens, or makes, the state in a directory. The error wraps
// hrl.ErrLocked if another daemon has it, and hrl.ErrDamaged if it cannot be read.
func openBolt(dir string) (s *boltStore, err error) {
	path := filepath.Join(dir, stateName)
	made, err := absent(path)
	if err != nil {
		return nil, err
	}
	// A file that was cut short is mapped beyond its end, and a page that
	// rotted stops bbolt with a panic: both become an error here.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	var db *bolt.DB
	defer func() {
		if p := recover(); p != nil {
			s, err = nil, damagedState(path, fmt.Errorf("%v", p))
		}
		if err != nil && db != nil {
			_ = db.Close()
		}
	}()
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockTimeout})
	switch {
	case errors.Is(err, bolterr.ErrTimeout):
		return nil, &stateError{path, hrl.ErrLocked, "another daemon runs on this directory: end it, or give this one a directory of its own (--state)"}
	case errors.Is(err, bolterr.ErrInvalid), errors.Is(err, bolterr.ErrChecksum), errors.Is(err, bolterr.ErrVersionMismatch):
		return nil, damagedState(path, err)
	case err != nil:
		return nil, fmt.Errorf("open the daemon's state: %w", err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucketName)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open the daemon's state: %w", err)
	}
	s = &boltStore{db}
	if _, err := s.List(""); err != nil { // reads all of it
		return nil, damagedState(path, err)
	}
	if made {
		if err := hrl.OS.SyncDir(dir); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func absent(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return true, nil
	}
	return false, err
}

// stateError is a state that cannot be opened.
type stateError struct {
	path string
	err  error
	hint string
}

func (e *stateError) Error() string {
	return fmt.Sprintf("open the daemon's state %s: %v", e.path, e.err)
}
func (e *stateError) Unwrap() error { return e.err }
func (e *stateError) Hint() string  { return e.hint }

func damagedState(path string, why error) error {
	return &stateError{path, fmt.Errorf("%w: %v", hrl.ErrDamaged, why),
		"move it away and add the VMs again (`vm add`): they are known by what lies beside their images, no disk and no point is lost"}
}

// List implements Store.
func (s *boltStore) List(prefix string) ([]Entry, error) {
	var entries []Entry
	err := s.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketName).Cursor()
		for k, v := c.Seek([]byte(prefix)); k != nil && strings.HasPrefix(string(k), prefix); k, v = c.Next() {
			entries = append(entries, Entry{string(k), append([]byte(nil), v...)})
		}
		return nil
	})
	return entries, err
}

// Apply implements Store. It is bbolt's transaction: new pages are written and
// synced, then the one page that makes them valid. A crash leaves the state before
// or after it.
func (s *boltStore) Apply(changes ...Change) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketName)
		for _, c := range changes {
			var err error
			if c.Value == nil {
				err = b.Delete([]byte(c.Key))
			} else {
				err = b.Put([]byte(c.Key), c.Value)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("keep the daemon's state: %w", err)
	}
	return nil
}

// Close implements Store.
func (s *boltStore) Close() error { return s.db.Close() }
