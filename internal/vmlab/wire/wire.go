// Package wire is what a lab and the first process of its guest say to each
// other, over one virtio serial port. Both are built from the same source for
// the same test, so it has no version.
//
// A message is a header, little-endian, and a body:
//
//	byte  size  field
//	   0     1  kind
//	   1     3  reserved, zero
//	   4     4  process, a number that the lab has given it; zero where none is meant
//	   8     4  bytes of the body, at most MaxBody
//	  12        the body
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// MaxBody bounds a message's body, in bytes.
const MaxBody = 1 << 20

const headerLen = 12

// A Kind says what a message is.
type Kind uint8

// The messages. Those with a type for their body carry it as JSON.
const (
	Hello    Kind = iota + 1 // from the guest, first and once: a Greeting
	Start                    // to the guest: run a Command as this process
	Signal                   // to the guest: its body is one byte, a signal for the process and its children
	PowerOff                 // to the guest: end all processes, write everything to the disks, switch off
	Stdout                   // from the guest: what a process has printed
	Stderr                   // likewise
	Event                    // from the guest: a line that a process has written to the descriptor EventFD
	Exit                     // from the guest, the last about this process: an Outcome
	kinds                    // none: their number
)

// EventFD is the file descriptor that a process writes its events to, each a
// line. It has left the process at once, and the guest soon.
const EventFD = 3

// A Greeting says how the guest has come up.
type Greeting struct {
	Release string // of the kernel
	// Err is what went wrong. The guest then takes no orders.
	Err string `json:",omitempty"`
}

// A Command is a program to be run.
type Command struct {
	Args []string // the program first, as a path or to be looked up in $PATH
	Env  []string // "NAME=value", in addition to the guest's own
	Dir  string   // to run in; empty: /
}

// An Outcome says how a process has ended.
type Outcome struct {
	// Status is the exit status; as in a shell, 128 and the number for a signal,
	// and 127 for a program that could not be started.
	Status int
	Err    string `json:",omitempty"` // why it could not be started, or followed to its end
}

// A Config tells the guest's first process what to do at its start. It lies in
// the first file system, as ConfigPath.
type Config struct {
	Modules []Module
	Drives  []string // their names; it waits until it has seen all
}

// A Module is a kernel module in the guest, to be loaded.
type Module struct {
	Path, Params string
	Optional     bool // may refuse
}

const (
	// ConfigPath is where the Config lies.
	ConfigPath = "/vmlab/config.json"
	// PortName is the name of the virtio serial port.
	PortName = "afterimage.vmlab"
	// GuestVariable is set in the environment of every process in the guest.
	GuestVariable = "AFTERIMAGE_VMLAB_GUEST"
)

// A Message is one of either direction.
type Message struct {
	Kind    Kind
	Process uint32
	Body    []byte
}

// Write writes a message in one piece: where writers take turns, nothing
// comes in between.
func Write(w io.Writer, m Message) error {
	if len(m.Body) > MaxBody {
		return fmt.Errorf("a message with a body of %d bytes; at most %d", len(m.Body), MaxBody)
	}
	b := make([]byte, headerLen, headerLen+len(m.Body))
	b[0] = byte(m.Kind)
	binary.LittleEndian.PutUint32(b[4:], m.Process)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(m.Body)))
	_, err := w.Write(append(b, m.Body...))
	return err
}

// WriteJSON writes a message whose body has a type.
func WriteJSON(w io.Writer, kind Kind, process uint32, body any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return Write(w, Message{kind, process, b})
}

// Read reads a message. Where none begins any more the error is io.EOF, and
// within one io.ErrUnexpectedEOF: a guest whose power was cut ends like that.
func Read(r io.Reader) (Message, error) {
	var h [headerLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Message{}, err
	}
	m := Message{Kind: Kind(h[0]), Process: binary.LittleEndian.Uint32(h[4:])}
	length := binary.LittleEndian.Uint32(h[8:])
	if m.Kind == 0 || m.Kind >= kinds || h[1]|h[2]|h[3] != 0 || length > MaxBody {
		return Message{}, fmt.Errorf("this is no message: % x", h)
	}
	m.Body = make([]byte, length)
	if _, err := io.ReadFull(r, m.Body); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Message{}, err
	}
	return m, nil
}
