package admin

import "net/http"

// A Status is the exit status that a command ends with, the same for every
// command of the product.
type Status int

// The statuses.
const (
	StatusFailed      Status = 1
	StatusUsage       Status = 2 // malformed or impossible
	StatusNotFound    Status = 3
	StatusRefused     Status = 4 // in this state
	StatusUnreachable Status = 5 // the peer, or it refuses us
	StatusDamaged     Status = 6
)

// HTTP is the HTTP status that goes with s. Clients go by the body alone.
func (s Status) HTTP() int {
	switch s {
	case StatusUsage:
		return http.StatusBadRequest
	case StatusNotFound:
		return http.StatusNotFound
	case StatusRefused:
		return http.StatusConflict
	case StatusUnreachable:
		return http.StatusBadGateway
	case StatusDamaged:
		return http.StatusUnprocessableEntity
	}
	return http.StatusInternalServerError
}

// An Error is a refusal.
type Error struct {
	Status  Status `json:"status"`
	Message string `json:"error"`
	Advice  string `json:"hint,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Hint says what to do.
func (e *Error) Hint() string { return e.Advice }
