package admin

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// An Event is a line of a stream: any number with Progress, then one with
// Result or Error. A stream whose last line is neither was broken off.
type Event struct {
	Progress *Progress       `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    *Error          `json:"error,omitempty"`
}

// Progress says how far a long request is.
type Progress struct {
	What       string `json:"what"` // "copied", "verified"
	DoneBytes  int64  `json:"done_bytes"`
	TotalBytes int64  `json:"total_bytes"` // 0: not known
}

// lineMax bounds a line of a stream.
const lineMax = 1 << 20

// errBroken is a stream without an end.
var errBroken = errors.New("the daemon ended before it was done")

// A stream reads the events of an answer.
type stream struct{ lines *bufio.Scanner }

func newStream(r io.Reader) *stream {
	s := &stream{bufio.NewScanner(r)}
	s.lines.Buffer(make([]byte, 0, 4096), lineMax)
	return s
}

// result reads up to the result and decodes it into out, if that is not nil;
// progress, if not nil, is told on the way.
func (s *stream) result(out any, progress func(Progress)) error {
	for s.lines.Scan() {
		var e Event
		if err := json.Unmarshal(s.lines.Bytes(), &e); err != nil {
			return fmt.Errorf("the daemon's answer: %w", err)
		}
		switch {
		case e.Error != nil:
			return e.Error
		case e.Result != nil:
			if out == nil {
				return nil
			}
			if err := json.Unmarshal(e.Result, out); err != nil {
				return fmt.Errorf("the daemon's answer: %w", err)
			}
			return nil
		case e.Progress != nil && progress != nil:
			progress(*e.Progress)
		}
	}
	if err := s.lines.Err(); err != nil {
		return fmt.Errorf("the daemon's answer: %w", err)
	}
	return errBroken
}
