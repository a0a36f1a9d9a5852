package replica

import (
	"os"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
)

// A Host is what a store needs of its host beside an hrl.FS. The simulator has one
// of its own.
type Host interface {
	// OpenBase opens a base, which its FS has made.
	OpenBase(path string) (blockdev.Device, error)
	RemoveAll(path string) error
	// Identify says beside an image whose it is.
	Identify(image string, id owner.Identity) error
}

type thisHost struct{}

func (thisHost) OpenBase(path string) (blockdev.Device, error) { return openRaw(path) }
func (thisHost) RemoveAll(path string) error                   { return os.RemoveAll(path) }
func (thisHost) Identify(image string, id owner.Identity) error {
	return owner.Write(image, id)
}
