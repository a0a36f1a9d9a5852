package server

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/wire"
)

// codes has the code of each error of a store that callers branch on, and what
// to do about it if the error does not say. HERE is this host, THEM the one that
// asked.
var codes = []struct {
	err    error
	code   wire.Code
	advice string
}{
	{replica.ErrNoVM, wire.CodeNoVM, "offer the VM first"},
	{replica.ErrNoPoint, wire.CodeNoPoint, ""},
	{replica.ErrRole, wire.CodeRole, "a failover was started on HERE: cancel or commit it there"},
	{replica.ErrSender, wire.CodeSender, "a VM is replicated by the one host where it runs"},
	{replica.ErrTerm, wire.CodeTerm, "another host has taken over the VM since: it is replicated from there"},
	{replica.ErrExists, wire.CodeExists, "give the VM another name, or remove the other one on HERE"},
	{replica.ErrOffset, wire.CodeOffset, ""},
	{replica.ErrParent, wire.CodeParent, ""},
	{replica.ErrInUse, wire.CodeInUse, ""},
	{replica.ErrNoRoom, wire.CodeNoRoom, "make room on HERE, or raise the quota there: afterimage peer allow THEM --quota SIZE"},
	{syscall.ENOSPC, wire.CodeNoRoom, "make room on HERE"},
	{syscall.EDQUOT, wire.CodeNoRoom, "make room on HERE"},
	{replica.ErrBad, wire.CodeUnfit, ""},
	{replica.ErrClosed, wire.CodeBusy, "it is tried again by itself"},
	{hrl.ErrVersion, wire.CodeVersion, "install the same version of afterimage on both hosts"},
	{hrl.ErrDamaged, wire.CodeDamaged, "see the log of the daemon on HERE"},
}

// refusal makes of an error what is answered, and logs what this host should look
// at.
func (s *Server) refusal(q *request, err error) *wire.Error {
	if e := (*wire.Error)(nil); errors.As(err, &e) {
		return e
	}
	e := &wire.Error{Code: wire.CodeFailed, Message: err.Error(), Advice: "see the log of the daemon on HERE"}
	for _, r := range codes {
		if errors.Is(err, r.err) {
			e.Code, e.Advice = r.code, r.advice
			break
		}
	}
	e.Advice = strings.NewReplacer("HERE", s.o.Name, "THEM", q.identity).Replace(e.Advice)
	if h := interface{ Hint() string }(nil); errors.As(err, &h) && h.Hint() != "" {
		e.Advice = h.Hint()
	}
	if at := (*replica.OffsetError)(nil); errors.As(err, &at) {
		e.Synced = at.Synced
	}
	if at := (*replica.ParentError)(nil); errors.As(err, &at) {
		e.Newest = at.Newest
	}
	switch {
	case errors.Is(err, context.Canceled): // nobody hears the answer
	case e.Code == wire.CodeFailed, e.Code == wire.CodeDamaged, e.Code == wire.CodeNoRoom:
		if n, say := s.failures.now(s.o.LogEvery); say {
			s.o.Warn.Warn("a request of another host failed", "peer", q.identity, "request", q.r.Method+" "+q.r.URL.Path,
				"problem", err, "times", n)
		}
	}
	return e
}

func malformed(format string, args ...any) error {
	return &wire.Error{Code: wire.CodeMalformed, Message: fmt.Sprintf(format, args...), Advice: "the two hosts do not understand each other: install the same version of afterimage on both"}
}
