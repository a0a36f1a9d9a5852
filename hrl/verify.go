package hrl

import (
	"fmt"
)

// A Finding is something that is wrong with a log.
type Finding struct {
	Segment string `json:"segment"`
	Off     int64  `json:"offset"` // bytes into the segment
	Problem string `json:"problem"`
}

// Verify looks for what is wrong with segments that were opened: every byte was
// checked by then. It finds damage, and segments and frames that are missing
// between those there are, unless the log itself says that they were lost and
// what they changed. It cannot know of segments missing before the first or
// behind the last, nor of damage in the tail of a killed process that left no
// good frame behind it: that is how an append torn by the kill looks.
func (r *Segments) Verify() []Finding {
	var out []Finding
	var prev *Segment
	for _, s := range r.Segments {
		if s.Damage != nil {
			f := Finding{Segment: s.Path, Problem: s.Damage.Error()}
			if c, ok := s.Damage.(*CorruptError); ok {
				f.Off, f.Problem = c.Off, c.Err.Error()
			}
			out = append(out, f)
			if s.head.ordinal == 0 {
				continue // without a header it has no place in the order
			}
		}
		if prev != nil && s.Ordinal == prev.Ordinal && s.Incarnation == prev.Incarnation {
			out = append(out, Finding{s.Path, 0, fmt.Sprintf("is number %d, as %s is", s.Ordinal, prev.Path)})
		}
		if prev != nil && s.Incarnation == prev.Incarnation && !s.AfterLoss {
			switch {
			case s.Ordinal > prev.Ordinal+1:
				out = append(out, Finding{s.Path, 0, fmt.Sprintf("is number %d, the one before it is %d: %d segments are missing",
					s.Ordinal, prev.Ordinal, s.Ordinal-prev.Ordinal-1)})
			case s.First != prev.Last+1 && prev.Damage == nil:
				out = append(out, Finding{prev.Path, prev.End, fmt.Sprintf("ends with frame %d, the next segment begins with %d",
					prev.Last, s.First)})
			}
		}
		prev = s
	}
	return out
}
