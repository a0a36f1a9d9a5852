package admin

import (
	"time"

	"afterimage/hrl/wire"
)

// Daemon is what a daemon says of itself.
type Daemon struct {
	Version string `json:"version"`
	State   string `json:"state"`            // its state directory
	Admin   string `json:"admin"`            // path of the socket for commands
	NBD     string `json:"nbd"`              // path of the socket for disks
	Listen  string `json:"listen,omitempty"` // HOST:PORT for peers
	Name    string `json:"name,omitempty"`   // identity: the first name of its certificate
}

// AddVM asks to take a VM into care.
type AddVM struct {
	Name  string    `json:"name"`
	Disks []AddDisk `json:"disks"`
	// LogDir is the directory under which the VM's log is kept while it is
	// replicated; empty: the daemon's own.
	LogDir string `json:"log_dir,omitempty"`
	// LogQuota bounds the log, in bytes; 0: the usual bound.
	LogQuota int64 `json:"log_quota,omitempty"`
}

// AddDisk is a disk of a VM to be added.
type AddDisk struct {
	Name  string `json:"name"`
	Image string `json:"image"` // absolute path of a raw file or a block device
}

// Roles of a host for a VM.
const (
	RolePrimary    = "primary"
	RoleReplica    = "replica"
	RoleFailedOver = "failed_over" // serves from a point; can still be cancelled
)

// VM is a VM that a daemon knows.
type VM struct {
	ID   wire.VMID `json:"id"` // the same on every host
	Name string    `json:"name"`
	Role string    `json:"role"`
	// Sender is, on a replica, the identity of the host that sends.
	Sender string `json:"sender,omitempty"`
	Disks  []Disk `json:"disks"`
	// Tests are, on a replica, the tests of a failover that stand.
	Tests []string `json:"tests,omitempty"`
	// Error says why the VM is not served, though it should be.
	Error string `json:"error,omitempty"`
}

// Disk is a disk of a VM. Export and URI are empty while it is not served.
type Disk struct {
	Name   string `json:"name"`
	Image  string `json:"image"`
	Size   int64  `json:"size"`    // bytes
	Export string `json:"export"`  // VM/DISK
	URI    string `json:"uri"`     // where clients open it
	LogDir string `json:"log_dir"` // empty while the VM is not replicated
}

// ResizeDisk asks to give a disk another size.
type ResizeDisk struct {
	Size int64 `json:"size"` // bytes
	// Shrink says that what lies beyond a smaller size is not needed any more.
	Shrink bool `json:"shrink,omitempty"`
}

// Resized is a disk that has another size now.
type Resized struct {
	VM   string `json:"vm"`
	Disk string `json:"disk"`
	Size int64  `json:"size"` // bytes
	Was  int64  `json:"was"`
}

// AllowPeer lets hosts replicate to this one.
type AllowPeer struct {
	Pattern string `json:"pattern"` // of the identity; * stands for any characters, ? for one
	// Storage is the directory for what they send; empty: the daemon's own.
	Storage string `json:"storage,omitempty"`
	// Quota bounds what each of their VMs may take, in bytes; 0: nothing does.
	Quota int64 `json:"quota,omitempty"`
}

// Peer is a rule that lets hosts replicate here.
type Peer struct {
	Pattern string   `json:"pattern"`
	Storage string   `json:"storage"`
	Quota   int64    `json:"quota"` // bytes for each VM; 0: none
	VMs     []string `json:"vms"`   // stored there by hosts the rule is for
	Error   string   `json:"error,omitempty"`
}

// TestPeer asks whether another host can be replicated to.
type TestPeer struct {
	Address string `json:"address"` // HOST:PORT
}

// PeerTested is what that host said.
type PeerTested struct {
	Name    string `json:"name"`    // its identity
	You     string `json:"you"`     // ours, as it sees it
	Product string `json:"product"` // its version
	Allowed bool   `json:"allowed"` // whether we may replicate there
}

// Enable asks to replicate a VM.
type Enable struct {
	To           string  `json:"to"`              // HOST:PORT
	EverySeconds float64 `json:"every_seconds"`   // between two points; at least 1
	Keep         int     `json:"keep,omitempty"`  // how many points the replica keeps; 0: its own choice
	Limit        int64   `json:"limit,omitempty"` // bytes a second; 0: none
}

// Replication is the state of the replication of a VM, seen from this host.
// Counters are totals since replication was enabled and survive restarts.
type Replication struct {
	VM      string   `json:"vm"`
	Role    string   `json:"role"`
	Peer    string   `json:"peer"` // HOST:PORT of the replica, or the identity of the sender
	State   string   `json:"state"`
	Health  string   `json:"health"` // normal, warning or critical
	Reasons []string `json:"reasons"`

	Generation   uint64  `json:"generation"`
	EverySeconds float64 `json:"every_seconds"`
	// LastPoint is the newest point listed at the replica.
	LastPoint *LastPoint `json:"last_point"`
	// Lag is what would be lost if the primary died now. A replica cannot know:
	// there it is the age of the newest point, and a VM that writes nothing makes
	// no new ones.
	LagSeconds float64 `json:"lag_seconds"`
	LagBytes   int64   `json:"lag_bytes"`

	ReceivedEpoch   uint64 `json:"received_epoch"` // newest that is over there, listed or not
	DurableEpoch    uint64 `json:"durable_epoch"`  // newest that is listed
	LogBytes        int64  `json:"log_bytes"`      // of the log on this host's disk
	ShippedBytes    int64  `json:"shipped_bytes"`
	ShippedRawBytes int64  `json:"shipped_raw_bytes"` // before compression
	// LoggedBytes is what the log had of which layers were made, each change
	// counted, and LatestBytes what was left when only the newest version of each
	// block counted.
	LoggedBytes int64 `json:"logged_bytes"`
	LatestBytes int64 `json:"latest_bytes"`
	GapBytes    int64 `json:"gap_bytes"` // to be copied, for the log does not have them
	// HotBytes is how much of the disks would have to be compared after a power cut.
	HotBytes int64 `json:"hot_bytes"`
	// Initial is the first copy, while it is under way.
	Initial *Initial `json:"initial,omitempty"`
	// Points is how many the replica lists.
	Points int `json:"points"`
	// HistoryGaps are the gaps in the history before the points that are listed, the
	// oldest first. A primary has heard of them from the replica.
	HistoryGaps []HistoryGap `json:"history_gaps"`
}

// A HistoryGap is a span of time in which no point could be made, because the log did
// not have all that changed: it was copied from the disks, for the point at its end.
type HistoryGap struct {
	From   time.Time `json:"from"`   // the time of the point before it
	To     time.Time `json:"to"`     // of the point behind it
	Reason string    `json:"reason"` // power_cut, log_full, log_lost, log_failed or compared
	// DurationSeconds is from From to To.
	DurationSeconds float64 `json:"duration_seconds"`
}

// States of a replication.
const (
	StateInitial     = "initial" // the first copy
	StateReplicating = "replicating"
	StatePaused      = "paused"
	StateGap         = "gap" // copies what the log does not have
	StateFailedOver  = "failed_over"
)

// Healths of a replication.
const (
	HealthNormal   = "normal"
	HealthWarning  = "warning"
	HealthCritical = "critical"
)

// LastPoint is the newest point of a VM.
type LastPoint struct {
	ID    wire.PointID `json:"id"`
	Time  time.Time    `json:"time"` // of the cut
	Epoch uint64       `json:"epoch"`
}

// Initial says how far the first copy is.
type Initial struct {
	DoneBytes  int64   `json:"done_bytes"`
	TotalBytes int64   `json:"total_bytes"`
	ETASeconds float64 `json:"eta_seconds"` // 0: not known
}

// Point is a recovery point.
type Point struct {
	ID      string    `json:"id"` // the same on every host; the name of a branch
	Epoch   uint64    `json:"epoch"`
	Time    time.Time `json:"time"` // of the cut at the primary, or of the branch's end
	Kind    string    `json:"kind"` // crash, app or branch
	Disks   []string  `json:"disks"`
	Bytes   int64     `json:"bytes"` // its layers take at the replica
	Pinned  bool      `json:"pinned"`
	Damaged bool      `json:"damaged"`
	Damage  string    `json:"damage,omitempty"` // what is damaged
	// Unreadable are the ranges that the primary could not read when the point was made:
	// it has older content there. That is no damage here, and nothing is refused for it.
	Unreadable []Unreadable `json:"unreadable,omitempty"`
	// Gap is the gap in the history before the point, if there is one.
	Gap *HistoryGap `json:"gap,omitempty"`
}

// Unreadable is a range of a disk that could not be read.
type Unreadable struct {
	Disk   string `json:"disk"`
	Offset int64  `json:"offset"` // bytes
	Bytes  int64  `json:"bytes"`
}

// KindBranch is what a cancelled failover had written, from its point on. The
// other kinds are those of package wire.
const KindBranch = "branch"

// PointName names a point of a VM: an id, or latest.
type PointName struct {
	Point string `json:"point"`
}

// ServePoint asks to serve a disk as of a point, read-only, for as long as the
// request lasts.
type ServePoint struct {
	Point  string `json:"point"`
	Disk   string `json:"disk"`
	Socket string `json:"socket"` // absolute path of the Unix socket to make
}

// Served is a disk of a point that can be opened.
type Served struct {
	VM     string       `json:"vm"`
	Point  wire.PointID `json:"point"`
	Disk   string       `json:"disk"`
	Size   int64        `json:"size"` // bytes
	Export string       `json:"export"`
	URI    string       `json:"uri"`
}

// StartRun asks to start a VM from a point.
type StartRun struct {
	Point string `json:"point,omitempty"` // empty: the newest
	// As names a test; empty: VM-test. It has no meaning for a failover.
	As string `json:"as,omitempty"`
	// Unplanned says that the primary is not asked; a failover needs it.
	Unplanned bool `json:"unplanned,omitempty"`
	// NoVerify starts without a check of what the point is made of.
	NoVerify bool `json:"no_verify,omitempty"`
}

// Run is a VM that serves from a point: a failover, or a test of one.
type Run struct {
	Name  string       `json:"name"` // first part of its exports' names
	VM    string       `json:"vm"`
	Test  bool         `json:"test"`
	Point wire.PointID `json:"point"`
	Disks []Disk       `json:"disks"`
	// FirstReadSeconds is how long it took from the request, without the
	// check, until the first bytes of every disk were read; 0 in lists.
	FirstReadSeconds float64 `json:"first_read_seconds,omitempty"`
	// Unreadable are the ranges of the point that its primary could not read.
	Unreadable []Unreadable `json:"unreadable,omitempty"`
	// Error says why the run is not served.
	Error string `json:"error,omitempty"`
}

// Cancelled is what is left of a cancelled failover.
type Cancelled struct {
	Branch string `json:"branch"` // what was written since, kept under this name
}
