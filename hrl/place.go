package hrl

// A place is where a cut frame lies in a segment of an open log. A reader may begin
// there instead of at the segment's header: what leads there was written by this very
// process, whose next frame it was, so that nothing has to be proven (RULES C2 is for
// whoever finds a segment). What an earlier incarnation has left has no places.
type place struct {
	at    int64   // bytes into the segment where the frame begins
	seq   uint64  // its
	prev  uint32  // bytes of the frame before it
	sizes []int64 // of the log's disks
}

// placesMax is how many places a segment knows at most. When there would be more every
// other one is forgotten: a reader then begins further ahead.
const placesMax = 128

func (s *segment) notePlace(p place) {
	if len(s.places) == placesMax {
		for i := range placesMax / 2 {
			s.places[i] = s.places[2*i]
		}
		s.places = s.places[:placesMax/2]
	}
	s.places = append(s.places, p)
}

// A stretch is a part of a segment of which an open log knows that it was written:
// the frames from a place to the end, which is one of a frame, too.
type stretch struct {
	head  segmentHeader // as it was written: with its salt it is this use of the file
	from  *place        // nil: the segment's first frame
	disks []diskState   // of the log
	end   int64
}

// stretchLocked is what the log knows of s, from the newest place on that has all that
// lies behind the mark; nil for a segment of an earlier incarnation.
func (l *Log) stretchLocked(s *segment, m Mark) *stretch {
	if s.head.incarnation != l.meta.incarnation {
		return nil
	}
	st := &stretch{head: s.head, disks: l.disks, end: s.end}
	if m.Incarnation == s.head.incarnation {
		for i := range s.places {
			if s.places[i].seq > m.Seq {
				break
			}
			p := s.places[i]
			st.from = &p
		}
	}
	return st
}

// begin makes s ready to be scanned, from where its log says. A segment that is not
// the one that the log meant is scanned like any other.
func (s *Segment) begin() {
	if s.known != nil && s.known.head != s.head {
		s.known = nil
	}
	if s.known == nil || s.known.from == nil {
		return
	}
	p := s.known.from
	s.from, s.prev, s.Last = p.at, p.prev, p.seq-1
	s.gap = s.AfterLoss // a cut comes behind the gap frame
	for id, size := range p.sizes {
		s.Disks = append(s.Disks, Disk{s.known.disks[id].name, size})
		s.regions = append(s.regions, regions{})
	}
}

// startSizes are the sizes of the segment's disks where it was begun to be read; nil
// where frames say so.
func (s *Segment) startSizes() []int64 {
	if s.known == nil || s.known.from == nil {
		return nil
	}
	return append([]int64(nil), s.known.from.sizes...)
}
