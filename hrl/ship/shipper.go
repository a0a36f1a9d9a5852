package ship

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"afterimage/filter"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// A Source is the VM that is replicated.
type Source interface {
	// Disks are the VM's disks; they stay the same.
	Disks() []*filter.Disk
	// Log is the log while there is one.
	Log() *hrl.Log
	// OpenLog opens the log in dir, makes log and disks agree and turns the tee on
	// for all disks. Gaps and copies before acked are healed; with evidence set what
	// the log has behind that is no content; with session given what was delivered
	// of the gaps counts (filter.CopiesDelivered), and all before it, if it is not zero,
	// is a gap. Once they agree, and before anything
	// new is logged, opened is called with what was found of each disk; its error
	// ends it all.
	OpenLog(ctx context.Context, dir string, quota int64, acked hrl.Mark, evidence bool, session *hrl.Mark, opened func(*hrl.Log, []filter.Recovered) error) error
	// StopLog turns the tee off and closes the log.
	StopLog() error
}

// Options say what is replicated, and how.
type Options struct {
	VM     Source
	ID     wire.VMID
	Name   string
	Client *Client // the peer; the caller closes it

	FS       hrl.FS // where LogDir lies; nil: hrl.OS
	LogDir   string // gets the log and the layers that wait to be sent
	LogQuota int64  // bytes of log; 0: no limit

	Every time.Duration // between two points
	Keep  int           // how many points the replica keeps; 0: as it likes
	Limit int64         // bytes a second on the line; 0: none; see SetLimit
	// Streams is how many batches of 8 MiB are copied at once where gaps are; 0: 4.
	Streams int

	State  json.RawMessage             // what Save was given last; nil: nothing yet
	Save   func(json.RawMessage) error // makes it durable before it returns
	Paused bool
	Warn   *slog.Logger // nil: slog.Default()
}

// ErrPaused is the answer to a Sync while the replication is paused.
var ErrPaused = errors.New("the replication is paused")

const (
	// retryMin and retryMax bound how long the loop waits after a cycle that failed.
	retryMin = time.Second
	retryMax = 30 * time.Second
	// limitBurst is what may leave at once under a limit, in bytes.
	limitBurst = 64 << 10
)

// A Shipper replicates one VM. Its methods may be called from several goroutines.
type Shipper struct {
	opt   Options
	spool string
	limit *rate.Limiter
	warn  *slog.Logger

	// These are the loop's, and Start's before it.
	state   state
	met     bool      // the peer has said what it has, and nothing has failed since
	heard   time.Time // when the peer last answered
	session *session  // what has been copied and not acknowledged; may be nil
	keep    bool      // the session is kept on record
	// waitingCopies are finished and did not get to the peer: the line broke.
	waitingCopies []*copyLayer
	needWhole     bool // the whole disk has to become a gap before the next cut
	// needCollapse: what the log has touched has to become a gap before the next cut,
	// and its content does not count any more.
	needCollapse bool
	dirty        bool         // something changed since the newest offer, or may have
	sealed       wire.PointID // the offer to which sealed gaps belong
	failures     int64        // of the log, as counted at the newest cut

	retried time.Time // when unreadable blocks were last tried again

	wakeup chan struct{} // capacity 1
	cancel context.CancelFunc
	done   chan struct{}

	// mu guards the rest. It is never held across I/O.
	mu      sync.Mutex
	paused  bool
	stop    context.CancelFunc // of the cycle under way; nil: none
	waiting []*waiter          // for the next cycle that begins
	seen    seen
	bound   int64   // on the line, in bytes a second; 0: none
	floor   float64 // what the bound may not be below for now
}

// A waiter waits for a point with all that had been written when it came.
type waiter struct {
	done  chan struct{}
	point wire.PointID
	err   error
}

// Enable asks the peer whether it takes the VM, before anything is stored here.
func Enable(ctx context.Context, o Options) error {
	st, err := loadState(o.State)
	if err != nil {
		return err
	}
	_, err = o.Client.Offer(ctx, o.ID, offerOf(&o, &st))
	return err
}

func offerOf(o *Options, st *state) wire.Offer {
	out := wire.Offer{
		Name: o.Name, Generation: max(st.Generation, 1), Term: st.Term, Keep: o.Keep, EverySeconds: o.Every.Seconds(),
	}
	for _, d := range o.VM.Disks() {
		out.Disks = append(out.Disks, wire.Disk{Name: d.Name, Size: d.Size()})
	}
	return out
}

// Start opens the log, turns the tee on, and begins to ship. It does not need
// the peer. The log stays when the Shipper is closed: it is the VM's.
func Start(ctx context.Context, o Options) (*Shipper, error) {
	st, err := loadState(o.State)
	if err != nil {
		return nil, err
	}
	if o.Warn == nil {
		o.Warn = slog.Default()
	}
	if o.FS == nil {
		o.FS = hrl.OS
	}
	if o.Streams <= 0 {
		o.Streams = streamsDefault
	}
	s := &Shipper{
		opt: o, spool: filepath.Join(o.LogDir, "spool"), limit: rate.NewLimiter(rate.Inf, limitBurst), warn: o.Warn,
		state: st, paused: o.Paused, wakeup: make(chan struct{}, 1), done: make(chan struct{}),
	}
	s.loadSession()
	s.seen.state = s.state
	s.SetLimit(o.Limit)
	if err := s.openLog(ctx); err != nil {
		return nil, err
	}
	if err := s.sweepSpool(); err != nil {
		return nil, errors.Join(err, o.VM.StopLog())
	}
	ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go s.run(ctx)
	return s, nil
}

func (s *Shipper) logDir() string { return filepath.Join(s.opt.LogDir, "log") }

// openLog opens the log and finds out what it knows. Whether it is the one that
// the generation belongs to is on record before anything is logged in it.
func (s *Shipper) openLog(ctx context.Context) error {
	evidence, mark := s.state.Evidence && !s.state.Whole, (*hrl.Mark)(nil)
	if ses := s.session; ses != nil {
		m := ses.Mark
		evidence, mark = s.state.Evidence && ses.From == hrl.Position{}, &m
	}
	err := s.opt.VM.OpenLog(ctx, s.logDir(), s.opt.LogQuota, s.state.AckedMark, evidence, mark, func(log *hrl.Log, found []filter.Recovered) error {
		id := log.ID()
		name := hex.EncodeToString(id[:])
		if name != s.state.Log {
			// Marks of another log mean nothing in this one.
			s.state.Log, s.state.AckedMark = name, hrl.Mark{}
			for i := range s.state.Offers {
				s.state.Offers[i].Mark = hrl.Mark{}
			}
			s.state.Generation++
			s.state.Whole = true
			s.session = nil
			s.noteGap(wire.GapLogLost)
		}
		for i := range found {
			s.state.Whole = s.state.Whole || found[i].Whole != nil
			s.state.Evidence = s.state.Evidence || found[i].Evidence
			s.resumeSession(log, i, &found[i])
			switch f := &found[i]; {
			case f.Found == hrl.RecoverPowerCut:
				s.noteGap(wire.GapPowerCut)
			case f.Whole != nil:
				s.noteGap(wire.GapCompared)
			case f.Found == hrl.RecoverKill:
				if _, open := s.opt.VM.Disks()[i].GapBytes(); open > 0 {
					s.noteGap(wire.GapLogFailed)
				}
			}
		}
		if s.need(); s.needWhole || s.needCollapse {
			s.dropOffers()
		}
		return s.save()
	})
	if err != nil {
		return err
	}
	s.sealed, s.dirty = wire.PointID{}, true
	s.dropWaiting()
	s.resealSession()
	s.failures = 0
	return nil
}

// dropOffers gives up what was offered. Its names are kept: the replica may have
// listed it all the same (RULES H2).
func (s *Shipper) dropOffers() {
	for i := range s.state.Offers {
		o := &s.state.Offers[i]
		o.Dropped, o.Files = true, nil
	}
	s.dirty = true
}

// sweepSpool removes what no offer names.
func (s *Shipper) sweepSpool() error {
	if err := s.opt.FS.MkdirAll(s.spool); err != nil {
		return err
	}
	wanted := map[string]bool{}
	for _, o := range s.state.Offers {
		for _, f := range o.Files {
			wanted[filepath.Base(s.spoolPath(f.Digest))] = true
		}
	}
	names, err := s.opt.FS.ReadDir(s.spool)
	if err != nil {
		return err
	}
	for _, n := range names {
		if !wanted[n] {
			if err := s.opt.FS.Remove(filepath.Join(s.spool, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// Sync makes a point of now and returns when the replica has listed it. Without a
// change since the newest point that is the one.
func (s *Shipper) Sync(ctx context.Context) (wire.PointID, error) {
	w := &waiter{done: make(chan struct{})}
	s.mu.Lock()
	if s.paused {
		s.mu.Unlock()
		return wire.PointID{}, ErrPaused
	}
	s.waiting = append(s.waiting, w)
	s.mu.Unlock()
	s.wake()
	select {
	case <-w.done:
		return w.point, w.err
	case <-ctx.Done():
		return wire.PointID{}, ctx.Err()
	case <-s.done:
		return wire.PointID{}, ErrClosed
	}
}

// Pause stops shipping; the log goes on.
func (s *Shipper) Pause() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = true
	if s.stop != nil {
		s.stop()
	}
}

// Resume goes on.
func (s *Shipper) Resume() {
	s.mu.Lock()
	s.paused = false
	s.mu.Unlock()
	s.wake()
}

// Close ends what is under way and waits for it. It may be called twice.
func (s *Shipper) Close() error {
	s.cancel()
	<-s.done
	return nil
}

func (s *Shipper) wake() {
	select {
	case s.wakeup <- struct{}{}:
	default:
	}
}

// run is the loop.
func (s *Shipper) run(ctx context.Context) {
	defer close(s.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	pause := retryMin
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wakeup:
		case <-timer.C:
		}
		waiting, ok := s.begin(ctx)
		if !ok {
			continue // paused: Resume wakes the loop
		}
		began := time.Now()
		err := s.cycle(waiting.ctx, len(waiting.list) > 0)
		s.finish(waiting, err)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			pause = retryMin
			timer.Reset(max(0, s.opt.Every-time.Since(began)))
		default:
			s.met = false
			timer.Reset(min(pause, max(s.opt.Every, retryMin)))
			pause = min(2*pause, retryMax)
		}
	}
}

// A round is one cycle and those who wait for it.
type round struct {
	ctx  context.Context
	list []*waiter
}

func (s *Shipper) begin(ctx context.Context) (round, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := round{list: s.waiting}
	s.waiting = nil
	if s.paused {
		for _, w := range r.list {
			w.err = ErrPaused
			close(w.done)
		}
		return round{}, false
	}
	r.ctx, s.stop = context.WithCancel(ctx)
	return r, true
}

func (s *Shipper) finish(r round, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
	s.stop = nil
	if s.paused && errors.Is(err, context.Canceled) {
		err = ErrPaused
	}
	was := s.seen.err
	s.seen.err = err
	if errors.Is(err, ErrPaused) || errors.Is(err, context.Canceled) {
		s.seen.err = was
	}
	switch now := s.seen.err; {
	case now != nil && (was == nil || was.Error() != now.Error()):
		s.seen.since = time.Now()
		s.warn.Warn("replication does not get on", "why", now)
	case now == nil && was != nil:
		s.warn.Info("replication gets on again", "after", time.Since(s.seen.since).Round(time.Second))
	}
	for _, w := range r.list {
		w.point, w.err = s.state.Acked.ID, err
		close(w.done)
	}
}
