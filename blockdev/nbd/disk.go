package nbd

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
)

// A disk is a Queue with the connections that use it, under whatever names it
// is exported.
//
// When a client's connection breaks, the client connects again and repeats what
// was not answered. Something of the old connection that is still waiting its
// turn must not be run after what the new one asks (rule A6): it would put old
// content over new. Therefore a connection is admitted only when of every dead
// one all that had begun has finished; what had not begun finds Gone true.
type disk struct {
	queue blockdev.Queue
	users map[*conn]struct{} // guarded by Server.mu
}

// settlePoll is how often a connection that waits for admission looks again.
const settlePoll = 2 * time.Millisecond

// ErrNoExport is wrapped by what asks for an export that is not there, in the
// server and in the client.
var ErrNoExport = errors.New("no export of that name")

var (
	errUnsettled  = errors.New("requests of a connection that has died are still under way; try again")
	errSuperseded = errors.New("the client has connected again")
	errEnding     = errors.New("the server is shutting down")
)

// admit makes c a user of the export's disk. It returns ErrNoExport if the
// export is not there any more, errFull if there is no room for it, and
// errUnsettled if it has waited for dead connections as long as it may.
func (s *Server) admit(ctx context.Context, c *conn, e *Export) error {
	deadline := time.NewTimer(s.settleTimeout())
	defer deadline.Stop()
	poll := time.NewTicker(settlePoll)
	defer poll.Stop()
	for {
		ok, err := s.tryAdmit(c, e)
		if ok || err != nil {
			return err
		}
		select {
		case <-poll.C:
		case <-deadline.C:
			return errUnsettled
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Server) tryAdmit(c *conn, e *Export) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[e.Name] != e {
		return false, ErrNoExport
	}
	d := s.disks[e.Queue]
	settled := true
	for _, u := range d.over() {
		// Its loop may still have received something. It counts what it is about
		// to submit before it looks whether the client is gone, so that nothing
		// slips by between the next two steps.
		if !u.leaving() {
			u.hangUp(errSuperseded)
		}
		if u.unfinished.Load() > 0 {
			settled = false
		}
	}
	if !settled {
		return false, nil
	}
	switch room, soon := s.roomLocked(); {
	case soon:
		return false, nil
	case !room:
		return false, errFull
	}
	s.stats.Open++
	s.stats.Served++
	c.export, c.disk, c.queue = e, d, e.Queue
	d.users[c] = struct{}{}
	return true, nil
}

// over returns the users from whom nothing more will come: their loop has ended,
// or their peer has closed. Of the latter the loop may not know yet: it may be in
// Submit, or over its bound. Server.mu is held.
func (d *disk) over() (list []*conn) {
	users := make([]*conn, 0, len(d.users))
	polls := make([]unix.PollFd, 0, len(d.users))
	for u := range d.users {
		users = append(users, u)
		polls = append(polls, unix.PollFd{Fd: u.fd, Events: unix.POLLRDHUP}) // -1 is passed over
	}
	// A descriptor that we have closed may be another's by now. What it says
	// then does not matter: before we close, gone is set or the loop has ended.
	for {
		if _, err := unix.Poll(polls, 0); err != unix.EINTR {
			break
		}
	}
	for i, u := range users {
		if polls[i].Revents != 0 || u.gone.Load() || u.leaving() {
			list = append(list, u)
		}
	}
	return list
}

// leaving reports that the loop has ended: nothing more will be submitted, and
// a client that said goodbye has its requests finished.
func (c *conn) leaving() bool {
	select {
	case <-c.loopEnded:
		return true
	default:
		return false
	}
}

// leave ends what admit began.
func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.disk != nil {
		s.stats.Open--
		delete(c.disk.users, c)
		s.dropDiskLocked(c.disk)
	}
}

// dropDiskLocked forgets a disk that nobody exports or uses.
func (s *Server) dropDiskLocked(d *disk) {
	if len(d.users) > 0 {
		return
	}
	for _, e := range s.exports {
		if e.Queue == d.queue {
			return
		}
	}
	delete(s.disks, d.queue)
}
