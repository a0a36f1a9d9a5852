package replica

import (
	"errors"
	"fmt"

	humanize "github.com/dustin/go-humanize"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// Errors that callers branch on. Damage is hrl.ErrDamaged.
var (
	ErrNoVM    = errors.New("no such VM")
	ErrNoPoint = errors.New("no such recovery point")
	ErrNoRun   = errors.New("no such failover")
	// ErrRole says that a failover was started here: nothing is received, or
	// that none was, where one is needed.
	ErrRole   = errors.New("not in this role")
	ErrSender = errors.New("it is replicated from another host")
	ErrTerm   = errors.New("a newer sender was here")
	// ErrNoRoom says that the quota or the disk is full; a *RoomError knows by
	// how much.
	ErrNoRoom = errors.New("no room")
	ErrOffset = errors.New("the layer goes on elsewhere")           // an *OffsetError
	ErrParent = errors.New("not over the newest recovery point")    // a *ParentError
	ErrInUse  = errors.New("in use")                                // by an open device, a run, another sender's piece
	ErrExists = errors.New("exists already")                        // a name
	ErrBad    = errors.New("it does not fit what is replicated")    // a point or a layer that can never be listed
	ErrClosed = errors.New("the store, or the VM in it, is closed") // nothing was done
)

// An OffsetError says where a layer goes on.
type OffsetError struct {
	Digest      string
	Off, Synced int64 // bytes: what was asked for, what is durable
}

func (e *OffsetError) Error() string {
	return fmt.Sprintf("layer %s goes on at byte %d, not at %d", e.Digest, e.Synced, e.Off)
}

// Is makes errors.Is(err, ErrOffset) true.
func (e *OffsetError) Is(target error) bool { return target == ErrOffset }

// Hint says what to do.
func (e *OffsetError) Hint() string { return "ask where the layer goes on, and send the rest" }

// A ParentError says which point the next one must lie over.
type ParentError struct {
	Point, Parent, Newest wire.PointID
}

func (e *ParentError) Error() string {
	return fmt.Sprintf("point %v lies over %v, the newest listed one is %v", e.Point, e.Parent, e.Newest)
}

// Is makes errors.Is(err, ErrParent) true.
func (e *ParentError) Is(target error) bool { return target == ErrParent }

// Hint says what to do.
func (e *ParentError) Hint() string {
	return "the primary makes the next point over the newest listed one, by itself"
}

// A RoleError says that nothing is received, because a failover stands.
type RoleError struct {
	VM    string
	Role  wire.Role
	Point wire.PointID // the failover began at
}

func (e *RoleError) Error() string {
	if e.Role == wire.RolePrimary {
		return fmt.Sprintf("VM %s has failed over to this host, from point %v, for good", e.VM, e.Point)
	}
	return fmt.Sprintf("a failover of VM %s to this host was started, from point %v", e.VM, e.Point)
}

// Is makes errors.Is(err, ErrRole) true.
func (e *RoleError) Is(target error) bool { return target == ErrRole }

// Hint says what to do.
func (e *RoleError) Hint() string {
	if e.Role == wire.RolePrimary {
		return "the VM runs here now; the host it came from must not run it"
	}
	return fmt.Sprintf("on this host: afterimage failover commit %s, or afterimage failover cancel %s to receive again", e.VM, e.VM)
}

// A PointError says that a point cannot be relied on.
type PointError struct {
	VM     string
	Point  wire.PointID
	Reason string
}

func (e *PointError) Error() string {
	return fmt.Sprintf("point %v of VM %s is damaged: %s", e.Point, e.VM, e.Reason)
}

// Is makes errors.Is(err, hrl.ErrDamaged) true.
func (e *PointError) Is(target error) bool { return target == hrl.ErrDamaged }

// Hint says what to do.
func (e *PointError) Hint() string {
	return fmt.Sprintf("choose another point (afterimage point list %s); if it was put right, verify it: afterimage replica verify %s", e.VM, e.VM)
}

// A RoomError says how much room is missing.
type RoomError struct {
	What    string // that does not fit
	Missing int64  // bytes; 0: not known
	Quota   int64  // bytes; 0: it is the disk that is full
	Err     error  // of the system; may be nil
}

func (e *RoomError) Error() string {
	switch {
	case e.Quota > 0:
		return fmt.Sprintf("%s: the quota of %s is full, %s are missing", e.What, humanize.IBytes(uint64(e.Quota)), humanize.IBytes(uint64(e.Missing)))
	case e.Missing > 0:
		return fmt.Sprintf("%s: the disk is full, %s are missing", e.What, humanize.IBytes(uint64(e.Missing)))
	}
	return fmt.Sprintf("%s: the disk is full: %v", e.What, e.Err)
}

// Is makes errors.Is(err, ErrNoRoom) true.
func (e *RoomError) Is(target error) bool { return target == ErrNoRoom }

func (e *RoomError) Unwrap() error { return e.Err }

// A JournalError says that a VM's journal is damaged.
type JournalError struct {
	Path string
	Off  int64 // bytes into the file
	Err  error
}

func (e *JournalError) Error() string {
	return fmt.Sprintf("journal %s is damaged at byte %d: %v", e.Path, e.Off, e.Err)
}

func (e *JournalError) Unwrap() error { return e.Err }

// Is makes errors.Is(err, hrl.ErrDamaged) true.
func (e *JournalError) Is(target error) bool { return target == hrl.ErrDamaged }

// Hint says what to do.
func (e *JournalError) Hint() string {
	return "nothing of the VM was changed: keep a copy of its directory, put the journal back from a backup of this host, or remove the VM here and replicate it anew"
}

// A BaseError says that a base, or its checksums, are damaged.
type BaseError struct {
	Path string // of the file
	Off  int64  // bytes into it
	Err  error
}

func (e *BaseError) Error() string {
	return fmt.Sprintf("%s is damaged at byte %d: %v", e.Path, e.Off, e.Err)
}

func (e *BaseError) Unwrap() error { return e.Err }

// Is makes errors.Is(err, hrl.ErrDamaged) true.
func (e *BaseError) Is(target error) bool { return target == hrl.ErrDamaged }

// Hint says what to do.
func (e *BaseError) Hint() string {
	return "the points marked as damaged cannot be relied on there; check the disk of this host, and replicate the VM anew if no later point is whole"
}
