package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"afterimage/hrl/wire"
)

// The keys of the state, each with what its value is, in JSON:
//
//	format               the version of all this; see formatVersion
//	vms/UUID             vmRecord: a VM of which this host is the primary
//	replication/UUID     replicationRecord: while the VM is replicated
//	ship/UUID            what package ship wants kept; absent before its first time
//	peers/PATTERN        peerRecord: who may replicate here
//	storage/DIRECTORY    storageRecord: where replicas are stored
//
// Nothing else is kept here: points, pins, failovers and tests are in the journals of
// the replicas, whose a disk is stands beside its image (RULES S9).
const (
	keyFormat      = "format"
	keyVM          = "vms/"
	keyReplication = "replication/"
	keyShip        = "ship/"
	keyPeer        = "peers/"
	keyStorage     = "storage/"
)

// formatVersion is the version of keys and records. Another one is refused.
const formatVersion = 1

// errFormat says that the state was written by another version of the daemon.
var errFormat = errors.New("the daemon's state is of another version")

// vmRecord is a VM of which this host is the primary.
type vmRecord struct {
	ID    wire.VMID    `json:"id"`
	Name  string       `json:"name"`
	Disks []diskRecord `json:"disks"`
	// LogDir is where the log is kept while the VM is replicated, and nothing else.
	LogDir   string    `json:"log_dir"`
	LogQuota int64     `json:"log_quota"` // bytes
	Added    time.Time `json:"added"`
}

type diskRecord struct {
	Name  string `json:"name"`
	Image string `json:"image"` // absolute
}

// replicationRecord is what `replica enable` was told.
type replicationRecord struct {
	To           string    `json:"to"`
	EverySeconds float64   `json:"every_seconds"`
	Keep         int       `json:"keep"`
	Limit        int64     `json:"limit"` // bytes a second; 0: none
	Paused       bool      `json:"paused"`
	Enabled      time.Time `json:"enabled"`
	// LogStale is set before the VM is served without its log: the log and
	// what package ship has kept then prove nothing any more.
	LogStale bool `json:"log_stale,omitempty"`
}

func (r *replicationRecord) every() time.Duration {
	return time.Duration(r.EverySeconds * float64(time.Second))
}

// peerRecord says who may replicate here.
type peerRecord struct {
	Pattern string    `json:"pattern"`
	Storage string    `json:"storage"` // absolute directory
	Quota   int64     `json:"quota"`   // bytes for each VM; 0: none
	Allowed time.Time `json:"allowed"`
}

// storageRecord is a directory with replicas.
type storageRecord struct {
	Dir string `json:"dir"` // absolute
}

// state is all that is kept.
type state struct {
	vms          []vmRecord // by name
	replications map[wire.VMID]*replicationRecord
	ship         map[wire.VMID]json.RawMessage
	peers        map[string]peerRecord // by pattern
	storage      []string              // sorted
}

// loadState reads what the store has. A new store gets its version.
func loadState(s Store) (*state, error) {
	entries, err := s.List("")
	if err != nil {
		return nil, err
	}
	st := &state{
		replications: map[wire.VMID]*replicationRecord{}, ship: map[wire.VMID]json.RawMessage{}, peers: map[string]peerRecord{},
	}
	if len(entries) == 0 {
		return st, s.Apply(Change{keyFormat, fmt.Append(nil, formatVersion)})
	}
	i, found := slices.BinarySearchFunc(entries, keyFormat, func(e Entry, key string) int { return strings.Compare(e.Key, key) })
	if !found || string(entries[i].Value) != fmt.Sprint(formatVersion) {
		version := "none"
		if found {
			version = string(entries[i].Value)
		}
		return nil, &formatError{version}
	}
	for _, e := range entries {
		if err := st.add(e); err != nil {
			return nil, fmt.Errorf("the daemon's state, %s: %w", e.Key, err)
		}
	}
	slices.SortFunc(st.vms, func(a, b vmRecord) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(st.storage)
	return st, nil
}

// formatError is a state of another version.
type formatError struct{ version string }

func (e *formatError) Error() string {
	return fmt.Sprintf("%v: it is %q, this daemon knows %d", errFormat, e.version, formatVersion)
}
func (e *formatError) Unwrap() error { return errFormat }
func (e *formatError) Hint() string {
	return "run the version of afterimage that wrote it, or give this one another directory (--state)"
}

// add takes one entry into the state.
func (st *state) add(e Entry) error {
	kind, name := path.Split(e.Key)
	switch {
	case e.Key == keyFormat:
		return nil
	case strings.HasPrefix(e.Key, keyPeer):
		return decodeInto(st.peers, strings.TrimPrefix(e.Key, keyPeer), e.Value)
	case strings.HasPrefix(e.Key, keyStorage):
		var r storageRecord
		if err := json.Unmarshal(e.Value, &r); err != nil {
			return err
		}
		st.storage = append(st.storage, r.Dir)
		return nil
	}
	id, err := wire.ParseVMID(name)
	if err != nil {
		return err
	}
	switch kind {
	case keyVM:
		var r vmRecord
		if err := json.Unmarshal(e.Value, &r); err != nil {
			return err
		}
		if r.ID != id {
			return fmt.Errorf("it is of VM %v", r.ID)
		}
		st.vms = append(st.vms, r)
	case keyReplication:
		r := new(replicationRecord)
		if err := json.Unmarshal(e.Value, r); err != nil {
			return err
		}
		st.replications[id] = r
	case keyShip:
		st.ship[id] = e.Value
	default:
		return errors.New("a key of an unknown kind")
	}
	return nil
}

func decodeInto[V any](m map[string]V, key string, value []byte) error {
	var v V
	if err := json.Unmarshal(value, &v); err != nil {
		return err
	}
	m[key] = v
	return nil
}

// put is the change that keeps a record.
func put(key string, record any) (Change, error) {
	b, err := json.Marshal(record)
	return Change{key, b}, err
}

// sortedKeys are the keys of a map in order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
