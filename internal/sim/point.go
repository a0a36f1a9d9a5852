package sim

import (
	"fmt"
	"time"
)

// cutSlack is how much later than its time a cut may be in the log, at the most: it
// waits for its turn, and for the log's limit.
const cutSlack = 250 * time.Millisecond

// checkPoint says whether disks can be those of a cut at that time. must is a
// moment of the model before which everything answered has to be in it; 0: none.
func (m *model) checkPoint(found [][]uint32, cut time.Time, must uint64) error {
	k := len(m.adopted) - 1
	for k > 0 && !m.adopted[k].at.Before(cut) {
		k--
	}
	from := m.adopted[k]
	until := m.clock
	if k+1 < len(m.adopted) {
		until = m.adopted[k+1].clock
	}
	var all []*write
	inside := map[*write]bool{} // it has to be in
	for _, w := range m.all {
		if w.begin <= from.clock || w.begin > until || w.end == w.begin {
			continue
		}
		all = append(all, w)
		inside[w] = w.ok && w.end != 0 && (w.ended.Before(cut) || w.end < must)
	}
	shows, hides := map[*write]string{}, map[*write]string{}
	for i := range found {
		cover := make([][]*write, len(found[i]))
		for _, w := range all {
			if w.disk == i {
				off, n := w.off, w.n
				if !inside[w] { // the log may have had more than was done
					off, n = w.asked[0], w.asked[1]
				}
				for s := off; s < off+n; s++ {
					cover[s] = append(cover[s], w)
				}
			}
		}
		for s, v := range found[i] {
			base := &write{val: from.disks[i][s], end: from.clock, ok: true, what: "base"}
			can := []*write{}
			for _, w := range append([]*write{base}, cover[s]...) {
				hidden := w.val != v || w.began.After(cut.Add(cutSlack))
				for _, o := range cover[s] {
					hidden = hidden || inside[o] && w.before(o)
				}
				if !hidden {
					can = append(can, w)
				}
			}
			where := fmt.Sprintf("disk %d, sector %d: #%d", i, s, v)
			if len(can) == 0 {
				return fmt.Errorf("%s; over #%d there were %v, the cut was at %v, %s", where, base.val, cover[s], cut.Format(clockFormat), inOrOut(cover[s], inside))
			}
			if len(can) == 1 && can[0] != base {
				shows[can[0]] = where
			}
			for _, o := range cover[s] {
				under := true
				for _, w := range can {
					under = under && (w == base || w.before(o)) && w != o
				}
				if under {
					hides[o] = where
				}
			}
		}
	}
	for w, where := range shows {
		if hides[w] != "" && !w.zero && !w.failed {
			return fmt.Errorf("%v is torn: it is at %s, not at %s", w, where, hides[w])
		}
	}
	for w, where := range hides {
		for o, there := range shows {
			if w.ok && w.before(o) && !w.zero {
				return fmt.Errorf("%v is missing at %s, but what was begun after it is there: %v at %s", w, where, o, there)
			}
		}
	}
	return nil
}

const clockFormat = "15:04:05.000000"

func inOrOut(ws []*write, inside map[*write]bool) string {
	s := ""
	for _, w := range ws {
		s += fmt.Sprintf(" #%d in=%v %s-%s", w.val, inside[w], w.began.Format(clockFormat), w.ended.Format(clockFormat))
	}
	return s
}
