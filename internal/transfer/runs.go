package transfer

import (
	"fmt"

	"afterimage/blockdev"
)

// runCursor walks the runs of a disk from its beginning to its end, and asks
// for many at a time: over a network each question is a round trip.
type runCursor struct {
	dev  blockdev.Device
	size int64
	runs []blockdev.Run // ahead of the last position asked for, neighbours of one kind joined
}

const (
	runsAhead = 1024    // how many runs to ask for at most
	askAhead  = 1 << 30 // and over how many bytes
)

// zeroTo says whether the disk promises zeroes from pos on, and how far what
// it says reaches. pos must not go backwards and must be within the disk.
func (c *runCursor) zeroTo(pos int64) (zero bool, end int64, err error) {
	for len(c.runs) > 0 && c.runs[0].End() <= pos {
		c.runs = c.runs[1:]
	}
	if len(c.runs) == 0 {
		if err := c.ask(pos); err != nil {
			return false, 0, err
		}
	}
	return c.runs[0].Zero, c.runs[0].End(), nil
}

func (c *runCursor) ask(pos int64) error {
	c.runs = nil
	next := pos
	err := c.dev.Extents(pos, min(askAhead, c.size-pos), func(r blockdev.Run) bool {
		if r.Off != next || r.Len <= 0 {
			return false // caught below: a device that lies about its runs
		}
		next = r.End()
		if n := len(c.runs); n > 0 && c.runs[n-1].Zero == r.Zero {
			c.runs[n-1].Len += r.Len
		} else {
			c.runs = append(c.runs, r)
		}
		return len(c.runs) < runsAhead
	})
	name := c.dev.Info().Name
	if err != nil {
		return fmt.Errorf("find the holes of %s from byte %d: %w", name, pos, err)
	}
	if len(c.runs) == 0 {
		return fmt.Errorf("find the holes of %s: it says nothing of byte %d", name, pos)
	}
	return nil
}
