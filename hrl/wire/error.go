package wire

import "net/http"

// A Code says why a request was refused, for programs.
type Code string

// The codes, each with the HTTP status it goes with.
const (
	CodeVersion    Code = "version"      // another version of the protocol
	CodeNotAllowed Code = "not_allowed"  // no `peer allow` covers the host
	CodeMalformed  Code = "malformed"    // not understood
	CodeUnknown    Code = "unknown"      // no such request
	CodeBusy       Code = "busy"         // too much at once: the same again later may pass
	CodeNoVM       Code = "no_vm"        // the VM is not known: offer it first
	CodeNoPoint    Code = "no_point"     // the point is not listed
	CodeRole       Code = "role"         // a failover was started here
	CodeSender     Code = "other_sender" // the VM comes from another host
	CodeTerm       Code = "lower_term"   // a newer sender was here
	CodeExists     Code = "exists"       // the name is taken by another VM
	CodeOffset     Code = "offset"       // not where the layer goes on; Synced says where
	CodeParent     Code = "parent"       // the parent is not the newest point; Newest is
	CodeNoRoom     Code = "no_room"      // quota or disk are full
	CodeDamaged    Code = "damaged"      // what arrived, or what lies there, is damaged
	CodeUnfit      Code = "unfit"        // it does not fit what is replicated, and never will
	CodeInUse      Code = "in_use"       // somebody has it open
	CodeFailed     Code = "failed"       // anything else
)

// Status is the HTTP status of a code.
func (c Code) Status() int {
	switch c {
	case CodeVersion:
		return http.StatusUpgradeRequired
	case CodeNotAllowed:
		return http.StatusForbidden
	case CodeMalformed:
		return http.StatusBadRequest
	case CodeNoVM, CodeNoPoint, CodeUnknown:
		return http.StatusNotFound
	case CodeBusy:
		return http.StatusServiceUnavailable
	case CodeNoRoom:
		return http.StatusInsufficientStorage
	case CodeDamaged, CodeUnfit:
		return http.StatusUnprocessableEntity
	case CodeFailed:
		return http.StatusInternalServerError
	}
	return http.StatusConflict
}

// An Error is a refusal, as it is sent.
type Error struct {
	Code    Code    `json:"code"`
	Message string  `json:"error"`
	Advice  string  `json:"hint,omitempty"`
	Synced  int64   `json:"synced,omitempty"` // with CodeOffset
	Newest  PointID `json:"newest,omitzero"`  // with CodeParent
}

func (e *Error) Error() string { return e.Message }

// Hint says what to do.
func (e *Error) Hint() string { return e.Advice }
