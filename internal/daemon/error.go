package daemon

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/blockdev/owner"
	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
	"afterimage/internal/pki"
)

// refusal is what an error becomes for a command.
func refusal(err error) *admin.Error {
	var a *admin.Error
	if errors.As(err, &a) && a.Message == err.Error() {
		return a
	}
	r := &admin.Error{Status: statusOf(err), Message: err.Error()}
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		r.Advice = h.Hint()
	}
	return r
}

// statusOf says with which exit status a command ends.
func statusOf(err error) admin.Status {
	var (
		a           *admin.Error
		refused     *wire.Error
		unreachable *ship.UnreachableError
		owned       *owner.OwnedError
		format      *blockdev.FormatError
		cert        *pki.Error
		role        *ship.RoleError
	)
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	switch {
	case errors.As(err, &a):
		return a.Status
	case errors.As(err, &refused):
		return peerStatus(refused.Code)
	case errors.As(err, &unreachable):
		return admin.StatusUnreachable
	case errors.As(err, &cert) && cert.Reason == pki.Missing:
		return admin.StatusNotFound
	case errors.As(err, &cert):
		return admin.StatusRefused
	case is(hrl.ErrDamaged, owner.ErrDamaged):
		return admin.StatusDamaged
	case is(fs.ErrNotExist, replica.ErrNoVM, replica.ErrNoPoint, replica.ErrNoRun, nbd.ErrNoExport):
		return admin.StatusNotFound
	case errors.As(err, &owned), errors.As(err, &role), is(hrl.ErrLocked, hrl.ErrVersion, owner.ErrVersion, errFormat, ship.ErrPaused, blockdev.ErrInUse, fs.ErrExist, blockdev.ErrReadOnly,
		replica.ErrRole, replica.ErrSender, replica.ErrTerm, replica.ErrNoRoom, replica.ErrInUse, replica.ErrExists, unix.ENOSPC, unix.EDQUOT):
		return admin.StatusRefused
	case errors.As(err, &format), is(blockdev.ErrAlignment, blockdev.ErrFileType, unix.EISDIR):
		return admin.StatusUsage
	}
	return admin.StatusFailed
}

// peerStatus says what the refusal of a peer becomes: what is in the way over
// there is in the way here; otherwise the peer does not want us.
func peerStatus(c wire.Code) admin.Status {
	switch c {
	case wire.CodeRole, wire.CodeExists, wire.CodeNoRoom, wire.CodeInUse, wire.CodeBusy:
		return admin.StatusRefused
	case wire.CodeDamaged:
		return admin.StatusDamaged
	}
	return admin.StatusUnreachable
}

func usagef(format string, args ...any) error {
	return &admin.Error{Status: admin.StatusUsage, Message: fmt.Sprintf(format, args...)}
}

func refusef(hint, format string, args ...any) error {
	return &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf(format, args...), Advice: hint}
}

// withStatus is an error of a package that knows no status.
func withStatus(err error, s admin.Status) error {
	return &admin.Error{Status: s, Message: err.Error()}
}

func noVM(name string) error {
	return &admin.Error{Status: admin.StatusNotFound, Message: fmt.Sprintf("there is no VM %s on this host", name),
		Advice: "`afterimage vm list` shows those there are"}
}
