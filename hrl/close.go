package hrl

import "fmt"

// sayLost appends a gap frame naming what the log lacks, if it lacks anything:
// the segment that would begin with it may never come.
func (l *Log) sayLost() {
	l.mu.Lock()
	lost := l.lost
	l.lost = BlockSet{}
	l.mu.Unlock()
	if lost.Empty() {
		return
	}
	g := NewGroup()
	g.Add(Entry{Kind: KindGap, Disk: noDisk, Data: boundedSet(&lost, groupSpanMax/2)})
	// If it hangs, a goroutine of its own does, until the log's disk answers.
	outcome := make(chan error, 2)
	g.Abandoned = func(why error) { outcome <- why }
	go func() { outcome <- l.append(g) }()
	switch err := <-outcome; err {
	case nil:
		l.Finished(g)
	case ErrClosed:
		l.mu.Lock()
		l.lost.AddSet(&lost)
		l.mu.Unlock()
	}
}

// Close seals the tail, makes everything durable and records that the log was
// closed cleanly; the disks must be durable by then. If anything of that fails
// the log is left as after a crash and the error is returned. An append must
// not be under way. If the log's disk does not answer, Close returns an error
// after a while, and the log stays locked until the disk has answered.
func (l *Log) Close() error { return l.close(true) }

// Abort closes the log's files and leaves it as a killed process would.
func (l *Log) Abort() error { return l.close(false) }

func (l *Log) close(clean bool) error {
	if clean {
		l.sayLost()
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	l.closed = true
	lost := !l.lost.Empty()
	if l.tail != nil && clean {
		l.sealLocked()
	}
	l.room.Broadcast()
	l.mu.Unlock()

	err := l.keeper.stop(clean)
	l.mu.Lock()
	stuck := l.stuck
	l.mu.Unlock()
	if clean && err == nil {
		switch {
		case stuck > 0:
			err = fmt.Errorf("close log %s: %d appends have not returned", l.dir, stuck)
		case lost:
			err = fmt.Errorf("close log %s: it lacks changes and has no room to say so", l.dir)
		default:
			l.metaMu.Lock()
			l.meta.state, l.meta.ordinal, l.meta.begun = metaClean, l.ordinal, l.begun
			for _, s := range l.sealed {
				if !s.empty && s.head.ordinal > l.meta.synced {
					l.meta.synced, l.meta.syncedSeq = s.head.ordinal, s.last
				} else if s.head.ordinal == l.meta.synced {
					l.meta.syncedSeq = max(l.meta.syncedSeq, s.last)
				}
			}
			err = writeMeta(l.metaFile, &l.meta)
			l.metaMu.Unlock()
		}
	}
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	if rerr := l.release(); err == nil {
		err = rerr
	}
	return err
}

// release closes the log's files and with them gives its lock away, as soon as
// nobody can write to them any more: Close has done its part, the keeper has
// ended, and no abandoned append hangs. Were the lock gone before, another
// process could use a segment anew into which a late write still lands.
func (l *Log) release() error {
	l.mu.Lock()
	if !l.ended || !l.keeper.ended || l.stuck > 0 || l.released {
		l.mu.Unlock()
		return nil
	}
	l.released = true
	segments := append(append([]*segment(nil), l.spares...), l.sealed...)
	if l.tail != nil {
		segments = append(segments, l.tail)
	}
	l.mu.Unlock()
	for _, s := range segments {
		if s.f != nil {
			s.f.Close()
		}
	}
	return l.metaFile.Close()
}
