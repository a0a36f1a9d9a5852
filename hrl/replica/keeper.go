package replica

import (
	"context"
	"errors"
	"time"
)

// retryAfter is when the keeper tries again what has failed.
const retryAfter = time.Minute

// A keeper is the one goroutine of a store: it retires, folds, and records what
// was found damaged. Store.Close ends it.
type keeper struct {
	wake   chan struct{}
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
}

func (k *keeper) start(s *Store) {
	k.wake, k.done = make(chan struct{}, 1), make(chan struct{})
	k.ctx, k.cancel = context.WithCancel(context.Background())
	go k.run(s)
}

func (k *keeper) run(s *Store) {
	defer close(k.done)
	again := time.NewTimer(retryAfter)
	defer again.Stop()
	for {
		select {
		case <-k.ctx.Done():
			return
		case <-k.wake:
		case <-again.C:
		}
		again.Reset(retryAfter)
		for _, v := range s.VMs() {
			if k.ctx.Err() == nil {
				v.keep(k.ctx)
			}
		}
	}
}

func (k *keeper) stop() {
	k.cancel()
	<-k.done
}

// kick has the keeper look at all VMs.
func (s *Store) kick() {
	select {
	case s.keeper.wake <- struct{}{}:
	default:
	}
}

// keep is one round of the keeper: it records damage, retires points that are too
// many, and folds.
func (v *VM) keep(ctx context.Context) {
	v.folding.Lock()
	defer v.folding.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	v.mu.Lock()
	if v.usableLocked() != nil {
		v.mu.Unlock()
		return
	}
	v.interrupt = cancel
	waiting := v.waiting
	v.waiting = nil
	force := v.hurry || len(waiting) > 0
	v.hurry = false
	v.mu.Unlock()
	err := v.keepOnce(ctx, force)
	if err != nil && ctx.Err() == nil {
		v.warn.Warn("a replicated VM's points cannot be folded", "vm", v.Name(), "problem", err)
	}
	for _, w := range waiting {
		w <- err
	}
}

func (v *VM) keepOnce(ctx context.Context, force bool) error {
	if err := v.recordDamage(); err != nil {
		return err
	}
	was := v.stuck
	if !was {
		if err := v.retire(); err != nil {
			return err
		}
	}
	err := v.fold(ctx, force || was)
	for errors.Is(err, errMoved) {
		err = v.fold(ctx, true)
	}
	// While nothing can be folded, retiring only loses history.
	v.stuck = err != nil && ctx.Err() == nil
	// What was found in the meantime.
	if err := errors.Join(err, v.recordDamage()); err != nil || !was {
		return err
	}
	return v.keepOnce(ctx, force) // it goes on
}

// Settle waits until nothing is left to be retired and folded, and returns why
// that failed, if it did.
func (v *VM) Settle(ctx context.Context) error {
	done := make(chan error, 1)
	v.mu.Lock()
	if err := v.usableLocked(); err != nil {
		v.mu.Unlock()
		return err
	}
	v.waiting = append(v.waiting, done)
	v.mu.Unlock()
	v.store.kick()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
