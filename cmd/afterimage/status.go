package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
	"afterimage/hrl"
	"afterimage/internal/admin"
)

// Exit statuses, the same for every command.
const (
	statusDone        = 0
	statusFailed      = 1
	statusUsage       = 2
	statusNotFound    = 3
	statusRefused     = 4
	statusUnreachable = 5
	statusDamaged     = 6
	statusInterrupted = 130
)

// statusHelp stands under the help of every command.
const statusHelp = `0 done, 1 failed, 2 wrong usage or an impossible argument,
  3 no such thing, 4 refused in this state (in use, exists already, full),
  5 peer unreachable, 6 data damaged or different, 130 interrupted`

// statusOf says which exit status an error becomes.
func statusOf(err error) int {
	var s *statusError
	var f *blockdev.FormatError
	var refused *admin.Error
	var owned *owner.OwnedError
	switch {
	case err == nil:
		return statusDone
	case errors.As(err, &s):
		return s.status
	case errors.As(err, &refused):
		return int(refused.Status)
	case errors.Is(err, context.Canceled):
		return statusInterrupted
	case errors.Is(err, hrl.ErrDamaged), errors.Is(err, owner.ErrDamaged):
		return statusDamaged
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, hrl.ErrNoDisk):
		return statusNotFound
	case errors.Is(err, hrl.ErrLocked), errors.Is(err, hrl.ErrVersion), errors.Is(err, owner.ErrVersion):
		return statusRefused
	case errors.As(err, &owned), errors.Is(err, blockdev.ErrInUse), errors.Is(err, fs.ErrExist), errors.Is(err, blockdev.ErrReadOnly):
		return statusRefused
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return statusRefused
	case errors.As(err, &f), errors.Is(err, blockdev.ErrAlignment), errors.Is(err, blockdev.ErrFileType), errors.Is(err, unix.EISDIR):
		return statusUsage // no disk of ours, and never will be
	}
	return statusFailed
}

// A statusError is an error with the exit status that it must become.
type statusError struct {
	err    error
	status int
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func withStatus(err error, status int) error {
	if err == nil {
		return nil
	}
	return &statusError{err, status}
}

func usagef(format string, args ...any) error {
	return withStatus(fmt.Errorf(format, args...), statusUsage)
}

// A hintError is an error with a line for the operator: what to do.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// Hint is found by report, as is that of any package's own errors.
func (e *hintError) Hint() string { return e.hint }

func withHint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hintError{err, hint}
}

// report prints an error and its hint, and returns its exit status.
func report(w io.Writer, err error) int {
	fmt.Fprintf(w, "afterimage: %v\n", err)
	if hint := hintOf(err); hint != "" {
		fmt.Fprintf(w, "hint: %s\n", hint)
	}
	return statusOf(err)
}

// hintOf is the hint of an error, or empty.
func hintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}
