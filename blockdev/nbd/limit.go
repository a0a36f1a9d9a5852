package nbd

import (
	"errors"
	"fmt"
	"net"
	"time"
)

const (
	// maxKnocking is how many connections beyond MaxConnections may be in their
	// handshake, so that a client that is refused learns why. Further ones are
	// closed at once.
	maxKnocking = 16
	// refusalPause is the least time between two log lines about refusals.
	refusalPause = 10 * time.Second
)

var errFull = errors.New("the server serves as many connections as it may; close one, or try again later")

// ConnStats counts the connections of a server.
type ConnStats struct {
	Open    int // in transmission now
	Served  int // that have reached transmission since the start
	Refused int // for MaxConnections, since the start
}

func (c ConnStats) String() string {
	return fmt.Sprintf("connections: %d open, %d since the start, %d refused", c.Open, c.Served, c.Refused)
}

// ConnStats returns the present counts.
func (s *Server) ConnStats() ConnStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// refuse counts a client that finds no room and now and then says so in the
// log: a client that tries again and again must not fill it.
func (s *Server) refuse(nc net.Conn) {
	s.mu.Lock()
	s.stats.Refused++
	s.unsaid++
	n := s.unsaid
	say := time.Since(s.refusalSaid) >= refusalPause
	if say {
		s.unsaid, s.refusalSaid = 0, time.Now()
	}
	s.mu.Unlock()
	if say {
		s.log().Warn("refused a client: too many connections", "client", peerName(nc), "limit", s.MaxConnections, "refused", n)
	}
}

// roomLocked reports whether another connection may be admitted, or else whether
// there will be room when those that are dead have left.
func (s *Server) roomLocked() (room, soon bool) {
	if s.MaxConnections <= 0 || s.stats.Open < s.MaxConnections {
		return true, false
	}
	left := s.stats.Open
	for _, d := range s.disks {
		left -= len(d.over())
	}
	return false, left < s.MaxConnections
}
