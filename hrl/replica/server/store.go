package server

import (
	"io"

	"afterimage/blockdev"
	"afterimage/hrl/replica"
	"afterimage/hrl/wire"
)

// A Store is all that the server asks of a replica's store; Of makes one. Its
// methods may be called from several goroutines.
type Store interface {
	VM(id wire.VMID) (VM, error)
	Accept(id wire.VMID, o wire.Offer, sender string, quota int64) (VM, error)
}

// A VM is all that the server asks of a VM in it.
type VM interface {
	Sender() string
	Broken() error
	State() wire.VMState
	Points() []wire.PointInfo
	StageLayer(digest string, size, off int64, body io.Reader) (wire.LayerState, error)
	Discard(keep []string) error
	List(p wire.PointInfo) (wire.PointInfo, error)
	Digests(at wire.PointID, disk string, ext []blockdev.Extent, out [][32]byte) error
}

// Of makes a Store of a replica's store.
func Of(s *replica.Store) Store { return stored{s} }

type stored struct{ s *replica.Store }

func (s stored) VM(id wire.VMID) (VM, error) {
	v, err := s.s.VM(id)
	if err != nil {
		return nil, err
	}
	return v, nil
}

func (s stored) Accept(id wire.VMID, o wire.Offer, sender string, quota int64) (VM, error) {
	v, err := s.s.Accept(id, o, sender, quota)
	if err != nil {
		return nil, err
	}
	return v, nil
}
