package hrl

import (
	"errors"
	"fmt"
	"time"
)

// ErrUnsettled says that a log cannot be made durable at present: an append hangs, or a
// segment waits for its seal. Nothing has failed.
var ErrUnsettled = errors.New("an append has not returned")

const (
	// settleTries and settlePause are how long a Sync waits for the keeper.
	settleTries = 100
	settlePause = 10 * time.Millisecond
)

// Sync makes durable what was appended before it was called, by earlier incarnations
// too, and notes in LOG how far that goes: what is found to be missing there later was
// not lost by a power cut (see Evidence). The log goes on meanwhile, but gives up no
// segment.
//
// An error other than ErrUnsettled and ErrClosed says that a sync has failed. What the
// segments hold since the last good one is then unknown (RULES C4): the caller stores
// what Unsynced names as gaps. Durable steps:
//
//  1. each segment is synced, the newest last: a crash leaves the old note
//  2. the note is written to LOG and synced: a crash leaves either
func (l *Log) Sync() error {
	list, err := l.toSync()
	if err != nil {
		return err
	}
	defer func() {
		l.mu.Lock()
		l.readers--
		l.mu.Unlock()
		l.keeper.kick()
	}()
	if len(list) == 0 {
		return nil
	}
	for _, s := range list {
		if err := l.syncSegment(s.path); err != nil {
			return fmt.Errorf("sync log %s: %w", l.dir, err)
		}
	}
	// New files had names before that were durable, or get them now.
	if err := l.fs.SyncDir(l.dir); err != nil {
		return fmt.Errorf("sync log %s: %w", l.dir, err)
	}
	newest := list[len(list)-1]
	l.metaMu.Lock()
	l.meta.synced, l.meta.syncedSeq = newest.ordinal, newest.last
	err = writeMeta(l.metaFile, &l.meta)
	l.metaMu.Unlock()
	if err != nil {
		return fmt.Errorf("sync log %s: %w", l.dir, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range list {
		if s.sealed {
			s.seg.unsynced = false
		}
	}
	return nil
}

// A syncing is a segment to be synced, as it was when that began.
type syncing struct {
	seg     *segment
	path    string
	ordinal uint64
	last    uint64
	sealed  bool
}

// toSync returns what has to be synced, the oldest first, and keeps it from being given up.
func (l *Log) toSync() ([]syncing, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for try := 0; ; try++ {
		if l.closed {
			return nil, ErrClosed
		}
		if l.settledLocked() {
			break
		}
		if try == settleTries {
			return nil, ErrUnsettled
		}
		l.keeper.kick()
		l.mu.Unlock()
		time.Sleep(settlePause)
		l.mu.Lock()
	}
	var out []syncing
	for _, s := range l.sealed {
		if s.unsynced && !s.empty {
			out = append(out, syncing{s, s.path, s.head.ordinal, s.last, true})
		}
	}
	if t := l.tail; t != nil && t.pre == nil {
		last := t.last
		if o := l.op; o != nil && o.writing && o.seg == t {
			last = o.last // what is being appended may not be in the file yet
		}
		out = append(out, syncing{t, t.path, t.head.ordinal, last, false})
	}
	l.readers++
	return out, nil
}

// settledLocked reports whether all segments but the tail are whole in their files.
func (l *Log) settledLocked() bool {
	if l.stuck > 0 || len(l.keeper.toSeal) > 0 || l.keeper.sealing {
		return false
	}
	for _, s := range l.sealed {
		if s.broken && s.f != nil {
			return false
		}
	}
	return true
}

// syncSegment syncs through a file of its own, for the keeper may close the segment's.
// Linux tells a failed write-back to whoever opens the file before it was told to anybody.
func (l *Log) syncSegment(path string) error {
	f, err := l.fs.Edit(path)
	if err != nil {
		return err
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// Unsynced is what was changed by frames that no Sync has made durable.
func (l *Log) Unsynced() *BlockSet {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := &BlockSet{}
	for _, s := range l.sealed {
		switch {
		case !s.unsynced || s.empty:
		case s.touched == nil: // of an earlier incarnation: it would have to be read
			for id, d := range l.disks {
				out.Add(DiskID(id), 0, d.size)
			}
		default:
			s.addTouched(out)
		}
	}
	if l.tail != nil {
		l.tail.addTouched(out)
	}
	return out
}

// forgetBefore notes durably that segments before the one with this number count no
// more. It comes before the first of them is overwritten or removed, so that one that
// is missing otherwise is known to be.
func (l *Log) forgetBefore(ordinal uint64) error {
	l.metaMu.Lock()
	defer l.metaMu.Unlock()
	was := l.meta.oldest
	if ordinal <= was {
		return nil
	}
	l.meta.oldest = ordinal
	err := writeMeta(l.metaFile, &l.meta)
	if err != nil {
		l.meta.oldest = was
	}
	return err
}
