package servertest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/wire"
)

// A Fake is a store in memory, for faults: it knows nothing of layers but their
// digests, and keeps no promise over a restart. It is a server.Store.
type Fake struct {
	// Fault, if set, is asked before each operation ("accept", "stage", ...); its
	// error is the operation's.
	Fault func(op string) error
	// OnSynced, if set, is told after each piece, or part of one, was taken.
	OnSynced func(digest string, synced int64)

	mu  sync.Mutex
	vms map[wire.VMID]*FakeVM
}

// A FakeVM is a VM in a Fake.
type FakeVM struct {
	f      *Fake
	id     wire.VMID
	sender string
	broken error

	mu     sync.Mutex // guards the rest
	state  wire.VMState
	parts  map[string][]byte
	whole  map[string]bool
	busy   map[string]bool
	came   map[string]int // bytes of the piece that is being taken, or was last
	moved  *sync.Cond     // when came changed
	points []wire.PointInfo
}

func (f *Fake) fault(op string) error {
	if f.Fault == nil {
		return nil
	}
	return f.Fault(op)
}

// Get is VM without faults; nil if there is none.
func (f *Fake) Get(id wire.VMID) *FakeVM {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.vms[id]
}

// Break marks a VM as broken.
func (f *Fake) Break(id wire.VMID, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.vms[id].broken = err
}

// VM implements server.Store.
func (f *Fake) VM(id wire.VMID) (server.VM, error) {
	if err := f.fault("vm"); err != nil {
		return nil, err
	}
	if v := f.Get(id); v != nil {
		return v, nil
	}
	return nil, fmt.Errorf("VM %v: %w", id, replica.ErrNoVM)
}

// Accept implements server.Store.
func (f *Fake) Accept(id wire.VMID, o wire.Offer, sender string, quota int64) (server.VM, error) {
	if err := f.fault("accept"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.vms[id]
	switch {
	case v == nil:
		v = &FakeVM{f: f, id: id, parts: map[string][]byte{}, whole: map[string]bool{}, busy: map[string]bool{}, came: map[string]int{}}
		v.moved = sync.NewCond(&v.mu)
		v.state = wire.VMState{Role: wire.RoleReplica, Layers: []wire.LayerState{}}
		if f.vms == nil {
			f.vms = map[wire.VMID]*FakeVM{}
		}
		f.vms[id] = v
	case o.Term < v.state.Term:
		return nil, replica.ErrTerm
	case o.Term == v.state.Term && v.sender != sender:
		return nil, replica.ErrSender
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sender = sender
	v.state.Term, v.state.Generation = o.Term, o.Generation
	return v, nil
}

// Sender implements server.VM, as the methods below do.
func (v *FakeVM) Sender() string {
	v.f.mu.Lock()
	defer v.f.mu.Unlock()
	return v.sender
}

func (v *FakeVM) Broken() error {
	v.f.mu.Lock()
	defer v.f.mu.Unlock()
	return v.broken
}

func (v *FakeVM) State() wire.VMState {
	if err := v.f.fault("state"); err != nil {
		panic(err) // the only way a state can fail
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	st := v.state
	st.Layers = []wire.LayerState{}
	for d, p := range v.parts {
		st.Layers = append(st.Layers, wire.LayerState{Digest: d, Synced: int64(len(p)), Complete: v.whole[d]})
	}
	return st
}

func (v *FakeVM) Points() []wire.PointInfo {
	v.mu.Lock()
	defer v.mu.Unlock()
	return append([]wire.PointInfo(nil), v.points...)
}

func (v *FakeVM) StageLayer(digest string, size, off int64, body io.Reader) (st wire.LayerState, err error) {
	if err := v.f.fault("stage"); err != nil {
		return st, err
	}
	v.mu.Lock()
	part := v.parts[digest]
	st = wire.LayerState{Digest: digest, Synced: int64(len(part)), Complete: v.whole[digest]}
	if st.Complete || v.busy[digest] || off != st.Synced {
		defer v.mu.Unlock()
		switch {
		case st.Complete:
			return st, nil
		case v.busy[digest]:
			return st, fmt.Errorf("layer %s: %w", digest, replica.ErrInUse)
		}
		return st, &replica.OffsetError{Synced: st.Synced}
	}
	v.busy[digest] = true
	v.mu.Unlock()
	more, buf := []byte(nil), make([]byte, 64<<10)
	for err == nil {
		var n int
		n, err = body.Read(buf)
		more = append(more, buf[:n]...)
		v.mu.Lock()
		v.came[digest] = len(more)
		v.mu.Unlock()
		v.moved.Broadcast()
	}
	if err == io.EOF {
		err = nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.busy, digest)
	part = append(part, more...)
	v.parts[digest] = part
	st.Synced = int64(len(part))
	if v.f.OnSynced != nil {
		v.f.OnSynced(digest, st.Synced)
	}
	if err != nil {
		return st, fmt.Errorf("the body of layer %s: %w", digest, err)
	}
	if st.Synced == size {
		if sum := sha256.Sum256(part); hex.EncodeToString(sum[:]) != digest {
			delete(v.parts, digest)
			return st, fmt.Errorf("layer %s: %w", digest, hrl.ErrDamaged)
		}
		v.whole[digest], st.Complete = true, true
	}
	return st, nil
}

// Layer returns what has come of a layer.
func (v *FakeVM) Layer(digest string) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return bytes.Clone(v.parts[digest])
}

// WaitCame waits until n bytes of a piece have come.
func (v *FakeVM) WaitCame(digest string, n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.came[digest] < n {
		v.moved.Wait()
	}
}

// Lose forgets what has come of a layer but n bytes, as a power cut would.
func (v *FakeVM) Lose(digest string, n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.parts[digest] = v.parts[digest][:min(n, len(v.parts[digest]))]
}

func (v *FakeVM) Discard(keep []string) error {
	if err := v.f.fault("discard"); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	kept := map[string]bool{}
	for _, k := range keep {
		kept[k] = true
	}
	for d := range v.parts {
		if !kept[d] {
			delete(v.parts, d)
			delete(v.whole, d)
		}
	}
	return nil
}

func (v *FakeVM) List(p wire.PointInfo) (wire.PointInfo, error) {
	if err := v.f.fault("list"); err != nil {
		return p, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, old := range v.points {
		if old.ID == p.ID {
			return old, nil
		}
	}
	if p.Parent != v.state.Newest || !p.ParentTime.Equal(v.state.NewestTime) {
		return p, &replica.ParentError{Newest: v.state.Newest}
	}
	for _, d := range p.Disks {
		for _, l := range d.Layers {
			if !v.whole[l] {
				return p, fmt.Errorf("layer %s is not complete", l)
			}
			delete(v.parts, l)
		}
	}
	v.points = append(v.points, p)
	v.state.Newest, v.state.NewestTime = p.ID, p.Time
	return p, nil
}

func (v *FakeVM) Digests(at wire.PointID, disk string, ext []blockdev.Extent, out [][32]byte) error {
	if err := v.f.fault("digests"); err != nil {
		return err
	}
	if disk != "root" {
		return errors.New("no such disk")
	}
	for i, e := range ext {
		out[i] = sha256.Sum256(fmt.Appendf(nil, "%v %v", at, e))
	}
	return nil
}
