package server

import (
	"fmt"
	"sync"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
)

func hello(q *request) (any, error) {
	o := &q.s.o
	return wire.Hello{Version: wire.Version, Product: o.Product, Name: o.Name, You: q.identity, Allowed: q.grant.Store != nil}, nil
}

func offer(q *request) (any, error) {
	var o wire.Offer
	if err := q.decode(&o); err != nil {
		return nil, err
	}
	if err := o.Check(); err != nil {
		return nil, malformed("%v", err)
	}
	defer q.s.vms.lock(q.vm)()
	v, err := q.grant.Store.Accept(q.vm, o, q.identity, q.grant.Quota)
	if err != nil {
		return nil, fmt.Errorf("accept VM %s: %w", o.Name, err)
	}
	return v.State(), nil
}

// mine returns the VM that the request is about, if it comes from the host that
// asks.
func (q *request) mine() (VM, error) {
	v, err := q.grant.Store.VM(q.vm)
	if err != nil {
		return nil, err
	}
	if err := v.Broken(); err != nil {
		return nil, fmt.Errorf("VM %v cannot be used: %w", q.vm, err)
	}
	if v.Sender() != q.identity {
		return nil, &wire.Error{
			Code:    wire.CodeSender,
			Message: fmt.Sprintf("host %s has VM %v from %s, not from %s", q.s.o.Name, q.vm, v.Sender(), q.identity),
			Advice:  "a VM is replicated by the one host where it runs; if it was moved, offer it anew",
		}
	}
	return v, nil
}

func state(q *request) (any, error) {
	v, err := q.mine()
	if err != nil {
		return nil, err
	}
	return v.State(), nil
}

func points(q *request) (any, error) {
	v, err := q.mine()
	if err != nil {
		return nil, err
	}
	ps := v.Points()
	if ps == nil {
		ps = []wire.PointInfo{}
	}
	return ps, nil
}

func list(q *request) (any, error) {
	var p wire.PointInfo
	if err := q.decode(&p); err != nil {
		return nil, err
	}
	if err := p.Check(); err != nil {
		return nil, malformed("%v", err)
	}
	defer q.s.vms.lock(q.vm)()
	v, err := q.mine()
	if err != nil {
		return nil, err
	}
	listed, err := v.List(p)
	if err != nil {
		return nil, fmt.Errorf("list point %v: %w", p.ID, err)
	}
	return listed, nil
}

func discard(q *request) (any, error) {
	var d wire.Discard
	if err := q.decode(&d); err != nil {
		return nil, err
	}
	if err := d.Check(); err != nil {
		return nil, malformed("%v", err)
	}
	defer q.s.vms.lock(q.vm)()
	v, err := q.mine()
	if err != nil {
		return nil, err
	}
	if err := v.Discard(d.Keep); err != nil {
		return nil, fmt.Errorf("discard what is staged: %w", err)
	}
	return v.State(), nil
}

func digests(q *request) (any, error) {
	var d wire.DigestRequest
	if err := q.decode(&d); err != nil {
		return nil, err
	}
	if err := d.Check(); err != nil {
		return nil, malformed("%v", err)
	}
	v, err := q.mine()
	if err != nil {
		return nil, err
	}
	ext := make([]blockdev.Extent, len(d.Ranges))
	for i, e := range d.Ranges {
		ext[i] = blockdev.Extent{Off: e[0], Len: e[1]}
	}
	out := make([][32]byte, len(ext))
	if err := v.Digests(d.Point, d.Disk, ext, out); err != nil {
		return nil, fmt.Errorf("digests of disk %s at point %v: %w", d.Disk, d.Point, err)
	}
	b := make([]byte, 0, 32*len(out))
	for i := range out {
		b = append(b, out[i][:]...)
	}
	return b, nil
}

// vmLocks has a lock for each VM that somebody is at. It keeps an offer by a new
// sender and what an old one still lists or discards apart.
type vmLocks struct {
	mu sync.Mutex
	m  map[wire.VMID]*vmLock
}

type vmLock struct {
	sync.Mutex
	users int // guarded by vmLocks.mu
}

// lock waits for the VM's lock and returns what releases it.
func (l *vmLocks) lock(id wire.VMID) func() {
	l.mu.Lock()
	if l.m == nil {
		l.m = map[wire.VMID]*vmLock{}
	}
	v := l.m[id]
	if v == nil {
		v = &vmLock{}
		l.m[id] = v
	}
	v.users++
	l.mu.Unlock()
	v.Lock()
	return func() {
		v.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if v.users--; v.users == 0 {
			delete(l.m, id)
		}
	}
}
