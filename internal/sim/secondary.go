package sim

import (
	"context"
	"crypto/tls"
	"testing"
	"time"

	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/replica/server/servertest"
	"afterimage/hrl/wire"
	"afterimage/internal/sim/simfs"
)

// keys are the certificates of both hosts. They are made once, and never end.
type keys struct{ primary, replica *tls.Config }

func newKeys(t testing.TB) *keys {
	ca, now := servertest.NewCA(t), time.Now()
	k := &keys{ca.Config("a.example"), ca.Config("b.example")}
	for _, c := range []*tls.Config{k.primary, k.replica} {
		c.Time = func() time.Time { return now }
	}
	return k
}

// A secondary is one life of the process that keeps the replica.
type secondary struct {
	proc   *simfs.Process
	store  *replica.Store
	cancel context.CancelFunc
	served chan error
	faulty bool // faults were injected
}

// Where the line is cut when a point is to be listed.
const (
	cutNowhere    = iota
	cutBeforeList // the point is not listed
	cutAfterList  // it is, and nobody hears of it
	cutForGood    // it is not, and the line stays down
)

// stored is the store as the server has it, with a line that breaks at a point.
type stored struct {
	w *world
	s *secondary
	server.Store
}

func (s stored) VM(id wire.VMID) (server.VM, error) {
	v, err := s.Store.VM(id)
	return listing{v, s.w}, err
}

func (s stored) Accept(id wire.VMID, o wire.Offer, sender string, quota int64) (server.VM, error) {
	v, err := s.Store.Accept(id, o, sender, quota)
	return listing{v, s.w}, err
}

type listing struct {
	server.VM
	w *world
}

func (l listing) List(p wire.PointInfo) (wire.PointInfo, error) {
	l.w.mu.Lock()
	where := l.w.cutAt
	l.w.cutAt = cutNowhere
	l.w.mu.Unlock()
	if where == cutBeforeList || where == cutForGood {
		if where == cutForGood {
			l.w.line.set(true, false)
		}
		l.w.line.cutNow()
		return p, errLine
	}
	out, err := l.VM.List(p)
	if where == cutAfterList {
		l.w.line.cutNow()
	}
	return out, err
}

// startReplica starts it. With die, it ends in its nth operation.
func (w *world) startReplica(die int) {
	s := &secondary{proc: w.rhost.Start(w.rng.Uint64(), w.line.cutNow), served: make(chan error, 1)}
	s.proc.DieAfter(die)
	w.sec = s
	life := [32]byte{w.rlife}
	var err error
	s.store, err = replica.Open(w.replicaDir, replica.Options{
		FS: s.proc, Host: s.proc, Warn: w.log("replica"),
		Life: func(string) ([32]byte, error) { return life, nil },
	})
	if err != nil {
		if !s.proc.Gone() {
			w.wrong("the replica does not start: %v", err)
		}
		s.proc.Die()
		s.store = nil
		w.crashReplica(w.rng.IntN(2) == 0)
		return
	}
	srv := server.New(server.Options{
		Identity: servertest.Identity, Name: "b.example", Product: "sim", Warn: w.log("server"),
		Allow:        func(string) (server.Grant, error) { return server.Grant{Store: stored{w, s, server.Of(s.store)}}, nil },
		DrainTimeout: time.Millisecond,
	})
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	ln := w.line.listen()
	go func() { s.served <- srv.Serve(ctx, ln, w.keys.replica) }()
	w.note("the replica has started")
	w.checkPoints(true)
}

// crashReplica ends it as a kill or a power cut does.
func (w *world) crashReplica(power bool) {
	s := w.sec
	s.proc.Die()
	w.endReplica()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked("the replica is gone, power cut %v", power)
	if power {
		w.stats.PowerCuts++
		w.rlife++
		w.rhost.PowerCut()
		return
	}
	w.stats.Kills++
	w.rhost.Kill()
}

// stopReplica ends it cleanly.
func (w *world) stopReplica() {
	s := w.sec
	w.endReplica()
	s.proc.Die()
	w.rhost.Kill()
	w.note("the replica has stopped")
}

func (w *world) endReplica() {
	s := w.sec
	w.line.cutNow()
	if s.cancel != nil {
		s.cancel()
		if err := <-s.served; err != nil {
			w.wrong("the server: %v", err)
		}
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil && !s.proc.Gone() && !s.faulty {
			w.wrong("closing the store: %v", err)
		}
	}
	w.sec = nil
}
