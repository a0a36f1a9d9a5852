package ship

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path/filepath"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// stateVersion is the version of state. Another one is refused.
const stateVersion = 2

// state is what a Shipper must find again. It is JSON, made durable as a whole.
type state struct {
	Version    int    `json:"version"`
	Generation uint64 `json:"generation"` // of the points to come; 0: none yet
	Term       uint64 `json:"term"`
	// Log is the UUID, in hex, of the log that the generation belongs to.
	Log string `json:"log"`
	// Acked is the newest point the replica has listed, as far as is known.
	Acked wire.PointInfo `json:"acked"`
	// AckedMark is where its cut lies in the log; zero: not in this log.
	AckedMark hrl.Mark `json:"acked_mark"`
	// Whole says that the log does not have all that changed since Acked: whatever
	// the log says, every block has to be compared.
	Whole bool `json:"whole"`
	// Evidence says that what the log had when this was set is no content: what it
	// touched is a gap, and the next point's layers are made of what was logged
	// behind a cut that comes after that.
	Evidence bool `json:"evidence"`
	// Gap is why the next point comes after a gap in the history, empty: it does not
	// (wire.PointInfo.Gap). The first reason since Acked counts.
	Gap string `json:"gap,omitempty"`
	// Session is what of the session under way is on record; nil: nothing. It is
	// Shipper.session while the Shipper runs.
	Session *session `json:"session,omitempty"`
	// Offers are the points offered since Acked, the newest last. Only that one can
	// still have its files.
	Offers []offer `json:"offers,omitempty"`
	Totals Totals  `json:"totals"`
}

// An offer is a point that the replica may have listed.
type offer struct {
	Point wire.PointInfo `json:"point"`
	Mark  hrl.Mark       `json:"mark"` // where its cut lies in the log
	// Files are those of its layers that lie in the spool.
	Files []spooled `json:"files,omitempty"`
	// Dropped says that it will not be sent any more.
	Dropped bool   `json:"dropped,omitempty"`
	Totals  Totals `json:"totals"` // what its acknowledgement adds
}

// A spooled layer waits to be sent.
type spooled struct {
	Digest string `json:"digest"`
	Bytes  int64  `json:"bytes"`
	Raw    int64  `json:"raw"` // bytes of the disk of which it has data
}

// Totals count since replication was enabled.
type Totals struct {
	Points int64 `json:"points"` // acknowledged
	// LoggedBytes is what the frames changed of which layers were made, each
	// change counted; LatestBytes what was left of it when only the newest version
	// of each block counted.
	LoggedBytes int64 `json:"logged_bytes"`
	LatestBytes int64 `json:"latest_bytes"`
	CopiedBytes int64 `json:"copied_bytes"` // of the disk, read to heal gaps
	// ShippedRawBytes is how much of the disk the layers hold that were sent, and
	// ShippedBytes how long those layers are.
	ShippedRawBytes int64 `json:"shipped_raw_bytes"`
	ShippedBytes    int64 `json:"shipped_bytes"`
}

func (t *Totals) add(o Totals) {
	t.Points += o.Points
	t.LoggedBytes += o.LoggedBytes
	t.LatestBytes += o.LatestBytes
	t.CopiedBytes += o.CopiedBytes
	t.ShippedRawBytes += o.ShippedRawBytes
	t.ShippedBytes += o.ShippedBytes
}

func loadState(raw json.RawMessage) (state, error) {
	st := state{Version: stateVersion, Term: 1}
	if len(raw) == 0 {
		return st, nil
	}
	if err := json.Unmarshal(raw, &st); err != nil {
		return st, fmt.Errorf("the state of the replication: %w", err)
	}
	if st.Version != stateVersion {
		return st, fmt.Errorf("the state of the replication: %w: version %d, this is %d", hrl.ErrVersion, st.Version, stateVersion)
	}
	return st, nil
}

// save makes the state durable. What it says must not be acted upon before.
func (s *Shipper) save() error {
	st := s.state
	st.Session = s.keptSession()
	raw, err := json.Marshal(&st)
	if err == nil {
		err = s.opt.Save(raw)
	}
	if err != nil {
		return fmt.Errorf("record the state of the replication: %w", err)
	}
	s.mu.Lock()
	s.seen.state = s.state
	s.seen.state.Offers = append([]offer(nil), s.state.Offers...)
	s.mu.Unlock()
	return nil
}

// noteGap notes why nothing tells what happened between the newest point and the next.
// Before the first one there is no history.
func (s *Shipper) noteGap(reason string) {
	if s.state.Gap == "" && !s.state.Acked.ID.IsZero() {
		s.state.Gap = reason
	}
}

// spoolPath is where a layer lies that waits to be sent.
func (s *Shipper) spoolPath(digest string) string {
	var d [32]byte
	_, _ = hex.Decode(d[:], []byte(digest)) // made by ourselves, or read back
	return filepath.Join(s.spool, hrl.LayerName(d))
}

// position is the point's place as layers name it.
func position(p wire.PointID) hrl.Position {
	return hrl.Position{Incarnation: p.Incarnation, Epoch: p.Epoch}
}
