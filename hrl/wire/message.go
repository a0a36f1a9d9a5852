package wire

import (
	"fmt"
	"strings"
	"time"
)

// Limits of how long a host may be silent.
const (
	// PulseEvery is how often a host that is at work on a request says so.
	PulseEvery = 10 * time.Second
	// SilenceMax is how long the other one waits for any sign of life.
	SilenceMax = 30 * time.Second
)

// Limits of what is taken from outside.
const (
	// BodyMax is the most bytes of a request or answer in JSON.
	BodyMax = 8 << 20
	// NameMax is the most bytes of a VM's, a disk's or a host's name.
	NameMax = 128
	// DisksMax is the most disks of a VM.
	DisksMax = 64
	// LayersMax is the most layers of one disk in one point.
	LayersMax = 16384
	// PieceMax is the most bytes of a layer in one request.
	PieceMax = 8 << 20
	// UnreadableMax is the most ranges of a disk in PointDisk.Unreadable. Where there are
	// more, neighbours are joined.
	UnreadableMax = 256
	// DigestsMax is the most ranges of one DigestRequest.
	DigestsMax = 1024
	// DigestLenMax is the most bytes of such a range.
	DigestLenMax = 1 << 20
)

// Hello is the answer to who is there.
type Hello struct {
	Version int    `json:"version"`
	Product string `json:"product"` // its version, for people
	Name    string `json:"name"`    // identity of the host that answers
	You     string `json:"you"`     // identity of the host that asked
	Allowed bool   `json:"allowed"` // whether that one may replicate here
}

// An Offer is what the primary says of a VM before it sends anything of it.
type Offer struct {
	Name       string `json:"name"`
	Disks      []Disk `json:"disks"`
	Generation uint64 `json:"generation"`
	// Term says which sender of the VM is the newest: a replica refuses a lower one.
	Term uint64 `json:"term"`
	// Keep is how many points to keep; 0: as before.
	Keep int `json:"keep,omitempty"`
	// EverySeconds is how often a point is due, for the replica's own alarms.
	EverySeconds float64 `json:"every_seconds,omitempty"`
}

// A Disk is a disk of a VM.
type Disk struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
}

// Role is what a host is to a VM.
type Role string

// The roles a replica's host can have.
const (
	// RoleReplica receives.
	RoleReplica Role = "replica"
	// RoleFailedOver runs the VM from a point; it can still be cancelled, and
	// nothing is listed meanwhile.
	RoleFailedOver Role = "failed_over"
	// RolePrimary runs the VM for good.
	RolePrimary Role = "primary"
)

// VMState is what a replica says of a VM.
type VMState struct {
	Role       Role   `json:"role"`
	Generation uint64 `json:"generation"` // the highest it knows
	Term       uint64 `json:"term"`
	// Newest is the newest listed point, zero: none, and NewestTime when its primary
	// cut it: it tells the point from another that got the same name after both sides
	// had lost their memory (RULES E6).
	Newest     PointID   `json:"newest"`
	NewestTime time.Time `json:"newest_time,omitzero"`
	// Layers are those staged and not in a listed point.
	Layers []LayerState `json:"layers"`
	// FailedOverTo is the point a failover began at, while there is one.
	FailedOverTo PointID `json:"failed_over_to"`
}

// LayerState says how much of a layer the replica has.
type LayerState struct {
	Digest   string `json:"digest"`
	Synced   int64  `json:"synced"`   // bytes that are durable; go on from here
	Complete bool   `json:"complete"` // whole and checked
}

// Discard asks to forget what is staged.
type Discard struct {
	Keep []string `json:"keep"` // digests of layers that will still be needed
}

// A PointInfo is a recovery point: what is offered for listing, and what is listed.
type PointInfo struct {
	ID PointID `json:"id"`
	// Parent is the point over which the layers lie: the newest listed one.
	// ParentTime, when that was cut, tells it from another of the same name.
	Parent     PointID     `json:"parent"`
	ParentTime time.Time   `json:"parent_time,omitzero"`
	Time       time.Time   `json:"time"` // of the cut at the primary
	Kind       string      `json:"kind"` // crash or app
	Disks      []PointDisk `json:"disks"`
	// Gap is why the log did not have all that changed since the parent, so that it was
	// copied: between the times of the two no point could be made. Empty: it had. One of
	// the reasons below, and for whoever does not know it just a reason.
	Gap string `json:"gap,omitempty"`

	// Only in answers:
	Received time.Time `json:"received,omitzero"` // when it was listed
	Bytes    int64     `json:"bytes,omitempty"`   // of its layers' files
	Pinned   bool      `json:"pinned,omitempty"`
	Damaged  string    `json:"damaged,omitempty"` // why it cannot be relied on
}

// Kinds of points.
const (
	KindCrash = "crash" // as a crash of the VM would have left it
	KindApp   = "app"   // applications held still
)

// Reasons of gaps.
const (
	GapPowerCut  = "power_cut"  // what the log had was no content any more (rule R7)
	GapLogFull   = "log_full"   // its oldest part was given up
	GapLogLost   = "log_lost"   // it was removed, or damaged
	GapLogFailed = "log_failed" // appends failed, or came too late
	GapCompared  = "compared"   // nothing told what had changed: whole disks were compared
)

// gapMax is the most bytes of a reason.
const gapMax = 64

// PointDisk is one disk of a point.
type PointDisk struct {
	Disk
	// Layers are the digests, in hex, of the layers over the parent's disk,
	// the oldest first.
	Layers []string `json:"layers"`
	// Unreadable, only in answers, are ranges, offset and length in bytes, in order, that
	// the primary could not read when the point was made, or an older one and nothing was
	// written there since: the point has there what the newest point before has.
	Unreadable [][2]int64 `json:"unreadable,omitempty"`
}

// Unread says in words what of the point the primary could not read, empty if nothing.
func (p *PointInfo) Unread() string {
	var out []string
	for _, d := range p.Disks {
		var total int64
		for _, r := range d.Unreadable {
			total += r[1]
		}
		const named = 4
		for i, r := range d.Unreadable {
			if i == named {
				out = append(out, fmt.Sprintf("and %d more ranges of disk %s, %d bytes in all", len(d.Unreadable)-named, d.Name, total))
				break
			}
			out = append(out, fmt.Sprintf("disk %s [%d, +%d)", d.Name, r[0], r[1]))
		}
	}
	if len(out) == 0 {
		return ""
	}
	return strings.Join(out, ", ") + ": unreadable at the primary when the point was made, older content stands there"
}

// DigestRequest asks for the SHA-256 of ranges of a disk as of a point. The
// answer is 32 bytes for each, one behind the other.
type DigestRequest struct {
	Point  PointID    `json:"point"`
	Disk   string     `json:"disk"`
	Ranges [][2]int64 `json:"ranges"` // offset and length in bytes
}

// CheckName says what is wrong with the name of a VM or a disk, if anything:
// names become parts of paths and of export names.
func CheckName(what, name string) error {
	switch {
	case name == "":
		return fmt.Errorf("the name of a %s is empty", what)
	case len(name) > NameMax:
		return fmt.Errorf("the name of a %s has %d bytes: %d are the most", what, len(name), NameMax)
	case name[0] == '.' || name[0] == '-':
		return fmt.Errorf("the name %q of a %s begins with %q", name, what, name[:1])
	}
	if i := strings.IndexFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
	}); i >= 0 {
		return fmt.Errorf("the name %q of a %s has other characters than letters, digits, '.', '_' and '-'", name, what)
	}
	return nil
}

// CheckDigest says whether s is a digest in hex.
func CheckDigest(s string) error {
	ok := len(s) == 64
	for i := 0; ok && i < len(s); i++ {
		ok = s[i] >= '0' && s[i] <= '9' || s[i] >= 'a' && s[i] <= 'f'
	}
	if !ok {
		return fmt.Errorf("%.80q is no digest", s)
	}
	return nil
}

// Check says what is impossible about the offer.
func (o *Offer) Check() error {
	if err := CheckName("VM", o.Name); err != nil {
		return err
	}
	if o.Generation == 0 || o.Term == 0 || o.Keep < 0 || o.EverySeconds < 0 {
		return fmt.Errorf("an offer of VM %s with impossible numbers", o.Name)
	}
	return checkDisks(len(o.Disks), func(i int) Disk { return o.Disks[i] })
}

// Check says what is impossible about the point.
func (p *PointInfo) Check() error {
	if !p.ID.whole() || !p.Parent.IsZero() && !p.Parent.whole() || !p.Parent.Before(p.ID) {
		return fmt.Errorf("point %v over %v is impossible", p.ID, p.Parent)
	}
	if p.Kind != KindCrash && p.Kind != KindApp {
		return fmt.Errorf("point %v is of kind %.40q, which is unknown", p.ID, p.Kind)
	}
	if len(p.Gap) > gapMax || strings.ContainsFunc(p.Gap, func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') }) {
		return fmt.Errorf("point %v comes after a gap of the reason %.*q, which is impossible", p.ID, gapMax, p.Gap)
	}
	if p.Gap != "" && p.Parent.IsZero() {
		return fmt.Errorf("point %v comes after a gap, and is the first", p.ID)
	}
	for _, d := range p.Disks {
		if len(d.Layers) > LayersMax {
			return fmt.Errorf("disk %s of point %v has %d layers: %d are the most", d.Name, p.ID, len(d.Layers), LayersMax)
		}
		for _, l := range d.Layers {
			if err := CheckDigest(l); err != nil {
				return err
			}
		}
		if err := d.checkUnreadable(); err != nil {
			return fmt.Errorf("point %v: %w", p.ID, err)
		}
	}
	return checkDisks(len(p.Disks), func(i int) Disk { return p.Disks[i].Disk })
}

func (d *PointDisk) checkUnreadable() error {
	if len(d.Unreadable) > UnreadableMax {
		return fmt.Errorf("disk %s with %d unreadable ranges: %d are the most", d.Name, len(d.Unreadable), UnreadableMax)
	}
	last := int64(0)
	for _, r := range d.Unreadable {
		if r[0] < last || r[1] <= 0 || r[0] > d.Size || r[1] > d.Size-r[0] {
			return fmt.Errorf("disk %s of %d bytes with %d unreadable ones at %d", d.Name, d.Size, r[1], r[0])
		}
		last = r[0] + r[1]
	}
	return nil
}

// Check says what is impossible about the request.
func (d *Discard) Check() error {
	for _, k := range d.Keep {
		if err := CheckDigest(k); err != nil {
			return err
		}
	}
	return nil
}

// Check says what is impossible about the request.
func (r *DigestRequest) Check() error {
	if err := CheckName("disk", r.Disk); err != nil {
		return err
	}
	if len(r.Ranges) > DigestsMax {
		return fmt.Errorf("%d digests at once: %d are the most", len(r.Ranges), DigestsMax)
	}
	for _, e := range r.Ranges {
		if e[0] < 0 || e[1] <= 0 || e[1] > DigestLenMax || e[0] > 1<<60 {
			return fmt.Errorf("the digest of %d bytes at %d is impossible", e[1], e[0])
		}
	}
	return nil
}

func checkDisks(n int, disk func(int) Disk) error {
	if n == 0 || n > DisksMax {
		return fmt.Errorf("%d disks: 1 to %d are possible", n, DisksMax)
	}
	seen := map[string]bool{}
	for i := range n {
		d := disk(i)
		if err := CheckName("disk", d.Name); err != nil {
			return err
		}
		if d.Size < 0 || d.Size%512 != 0 || d.Size > 1<<50 {
			return fmt.Errorf("disk %s of %d bytes is impossible", d.Name, d.Size)
		}
		if seen[d.Name] {
			return fmt.Errorf("disk %s is named twice", d.Name)
		}
		seen[d.Name] = true
	}
	return nil
}
