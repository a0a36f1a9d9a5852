package replica

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

const (
	// stageSync is after how many bytes what was received is made durable.
	stageSync = 16 << 20
	// layerMax is the most bytes of a layer's file.
	layerMax = 1 << 50
)

// A stagedLayer is a layer that no point has. Until it is complete its files are
// used by the one goroutine that has made it busy.
type stagedLayer struct {
	digest string

	// VM.mu guards the rest.
	size     int64
	len      stagedLen // what is durable
	complete bool      // whole, checked, and in layers
	busy     bool
}

func (s *stagedLayer) stateLocked() wire.LayerState {
	if s.complete {
		return wire.LayerState{Digest: s.digest, Synced: s.size, Complete: true}
	}
	return wire.LayerState{Digest: s.digest, Synced: s.len.synced}
}

func (v *VM) stagingPath(digest, suffix string) string {
	return filepath.Join(v.dir, stagingDir, digest+suffix)
}

// StageLayer receives a piece of a layer: what body has, up to the layer's end,
// from byte off on, which must be where its durable part ends. It returns how
// much is durable now, also when the body breaks off; with the last byte the
// layer is checked and Complete.
//
// A layer that turns out to be damaged, or of another VM or disk, is forgotten,
// and comes anew from its beginning.
//
// A crash after step
//
//  1. DIGEST.part and DIGEST.len made: leaves them, or nothing; they count as
//     nothing
//  2. bytes written to DIGEST.part, synced: leaves the count before
//  3. their count written to DIGEST.len, synced: leaves the count
//  4. all bytes there, staging/DIGEST.part renamed to staging/DIGEST.layer and
//     checked: leaves either name; Open gives it the first one back
//  5. renamed into layers: leaves the layer in one of the two directories
//  6. both directories synced: leaves the layer, complete
//  7. DIGEST.len removed: the same
func (v *VM) StageLayer(digest string, size, off int64, body io.Reader) (wire.LayerState, error) {
	if err := wire.CheckDigest(digest); err != nil {
		return wire.LayerState{}, fmt.Errorf("%w: %w", err, ErrBad)
	}
	if size <= 0 || size > layerMax || off < 0 || off > size {
		return wire.LayerState{}, fmt.Errorf("byte %d of a layer of %d: %w", off, size, ErrBad)
	}
	used := v.Used()
	v.mu.Lock()
	s, st, err := v.beginStageLocked(digest, size, off, used)
	v.mu.Unlock()
	if s == nil {
		return st, err
	}
	defer v.staging.Done()
	err = v.receive(s, off, body)
	v.mu.Lock()
	defer v.mu.Unlock()
	s.busy = false
	return s.stateLocked(), noRoom("layer "+digest, err)
}

// beginStageLocked makes the layer busy; nil: there is nothing to receive.
func (v *VM) beginStageLocked(digest string, size, off, used int64) (*stagedLayer, wire.LayerState, error) {
	st := wire.LayerState{Digest: digest}
	if err := v.receivingLocked(); err != nil {
		return nil, st, err
	}
	if _, listed := v.state.digests()[digest]; listed {
		return nil, wire.LayerState{Digest: digest, Synced: size, Complete: true}, nil
	}
	s := v.staged[digest]
	if s == nil {
		s = &stagedLayer{digest: digest, size: size}
		used += size
	}
	st = s.stateLocked()
	switch q := v.state.Quota; {
	case s.complete:
		return nil, st, nil
	case s.busy:
		return nil, st, fmt.Errorf("layer %s arrives through another request: %w", digest, ErrInUse)
	case s.size != size:
		return nil, st, fmt.Errorf("layer %s had %d bytes before, and %d now: %w", digest, s.size, size, ErrBad)
	case s.len.synced != off:
		return nil, st, &OffsetError{digest, off, s.len.synced}
	case q > 0 && used > q:
		v.hurry = true
		v.store.kick()
		return nil, st, &RoomError{What: fmt.Sprintf("a layer of VM %s", v.state.Name), Missing: used - q, Quota: q}
	}
	v.staged[digest] = s
	s.busy = true
	v.staging.Add(1)
	return s, st, nil
}

// receive takes the piece, and completes the layer if it was the last.
func (v *VM) receive(s *stagedLayer, off int64, body io.Reader) error {
	part, count, err := v.openStaged(s.digest, off == 0)
	if err != nil {
		return errors.Join(err, v.dropStaged(s))
	}
	off, err = v.receiveTo(s, part, count, off, body)
	if cerr := errors.Join(part.Close(), count.Close()); err == nil {
		err = cerr
	}
	if err != nil || off < s.size {
		return err
	}
	return v.complete(s)
}

// openStaged opens the two files of a layer in staging; it makes them anew at its
// beginning.
func (v *VM) openStaged(digest string, anew bool) (part, count hrl.File, err error) {
	open := v.fs.Edit
	if anew {
		open = v.fs.Create
		for _, suffix := range []string{lenSuffix, partSuffix} {
			if err := v.fs.Remove(v.stagingPath(digest, suffix)); err != nil && !isMissing(err) {
				return nil, nil, err
			}
		}
	}
	if part, err = open(v.stagingPath(digest, partSuffix)); err != nil {
		return nil, nil, err
	}
	if count, err = open(v.stagingPath(digest, lenSuffix)); err == nil && anew {
		if err = v.fs.SyncDir(filepath.Join(v.dir, stagingDir)); err != nil {
			err = errors.Join(err, count.Close())
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, part.Close())
	}
	return part, count, nil
}

// receiveTo writes what body has to part, and makes it durable from time to time
// and at the end. It returns where the durable part ends.
func (v *VM) receiveTo(s *stagedLayer, part, count hrl.File, off int64, body io.Reader) (int64, error) {
	buf := make([]byte, min(1<<20, s.size-off))
	at := off // what was written
	var broke error
	for at < s.size && broke == nil {
		n, err := io.ReadFull(body, buf[:min(int64(len(buf)), s.size-at)])
		if err == io.ErrUnexpectedEOF || err == io.EOF {
			err = io.EOF
		}
		if n > 0 {
			if _, werr := part.WriteAt(buf[:n], at); werr != nil {
				// What lies behind the durable part is written again.
				return off, werr
			}
			at += int64(n)
		}
		broke = err
		if at-off >= stageSync || at > off && (broke != nil || at == s.size) {
			if err := v.keepStaged(s, part, count, at); err != nil {
				return off, errors.Join(err, v.dropStaged(s))
			}
			off = at
		}
	}
	if broke != nil && broke != io.EOF {
		return off, fmt.Errorf("layer %s broke off at byte %d: %w", s.digest, at, broke)
	}
	if broke == nil {
		if n, _ := io.ReadFull(body, make([]byte, 1)); n > 0 {
			return 0, fmt.Errorf("layer %s has more than its %d bytes: %w", s.digest, s.size, ErrBad)
		}
	}
	return off, nil
}

// keepStaged makes durable what was received up to byte at. A sync that fails is
// final: whether its bytes are on the disk nobody will ever know.
func (v *VM) keepStaged(s *stagedLayer, part, count hrl.File, at int64) error {
	if err := part.Sync(); err != nil {
		return err
	}
	l := stagedLen{s.len.number + 1, s.size, at}
	if err := writeLen(count, l); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	s.len = l
	return nil
}

// dropStaged forgets a layer that was not completed.
func (v *VM) dropStaged(s *stagedLayer) error {
	v.mu.Lock()
	delete(v.staged, s.digest)
	s.len = stagedLen{}
	v.mu.Unlock()
	var errs []error
	// The count first: without it the rest is nothing.
	for _, suffix := range []string{lenSuffix, partSuffix, layerSuffix} {
		if err := v.fs.Remove(v.stagingPath(s.digest, suffix)); err != nil && !isMissing(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// complete checks a layer all of whose bytes are durable, and puts it in its
// place.
func (v *VM) complete(s *stagedLayer) error {
	// A layer checks its digest under the name that it will have.
	checking := v.stagingPath(s.digest, layerSuffix)
	if err := v.fs.Rename(v.stagingPath(s.digest, partSuffix), checking); err != nil {
		return errors.Join(err, v.dropStaged(s))
	}
	if err := v.checkStaged(checking); err != nil {
		// Also where the disk could not be read: it may be read elsewhere.
		return errors.Join(fmt.Errorf("a received layer: %w", err), v.dropStaged(s))
	}
	err := v.fs.Rename(checking, v.layerPath(s.digest))
	for _, dir := range []string{layersDir, stagingDir} {
		if err == nil {
			err = v.fs.SyncDir(filepath.Join(v.dir, dir))
		}
	}
	if err != nil {
		// It lies in one of the directories, whole; the next Open finds it there.
		return errors.Join(err, v.dropStaged(s))
	}
	_ = v.fs.Remove(v.stagingPath(s.digest, lenSuffix)) // the next Open does it otherwise
	v.mu.Lock()
	defer v.mu.Unlock()
	s.complete = true
	v.stored[s.digest] = s.size
	return nil
}

// checkStaged reads the whole layer.
func (v *VM) checkStaged(path string) (err error) {
	l, err := v.openLayer(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	if err := l.Verify(); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	_, known := v.bases[l.Disk]
	switch {
	case l.VM != v.id:
		return fmt.Errorf("layer %s is of VM %v: %w", l.Name(), wire.VMID(l.VM), ErrBad)
	case !known:
		return fmt.Errorf("layer %s is of disk %s, which was not offered: %w", l.Name(), l.Disk, ErrBad)
	case l.Generation < v.state.newest().Generation:
		return fmt.Errorf("layer %s is of generation %d, the newest point of %d: %w", l.Name(), l.Generation, v.state.newest().Generation, ErrBad)
	}
	return nil
}

// Discard forgets what is staged, in part or whole, and neither in a point nor
// named by keep. What is arriving just now stays.
func (v *VM) Discard(keep []string) error {
	v.change.Lock() // no point may be listed with what is being discarded
	defer v.change.Unlock()
	wanted := map[string]bool{}
	for _, k := range keep {
		wanted[k] = true
	}
	v.mu.Lock()
	if err := v.receivingLocked(); err != nil {
		v.mu.Unlock()
		return err
	}
	var drop []*stagedLayer
	for d, s := range v.staged {
		if !wanted[d] && !s.busy {
			delete(v.staged, d)
			drop = append(drop, s)
		}
	}
	v.mu.Unlock()
	var errs []error
	for _, s := range drop {
		if !s.complete {
			errs = append(errs, v.dropStaged(s))
			continue
		}
		errs = append(errs, v.removeLayer(s.digest))
	}
	return errors.Join(errs...)
}

// removeLayer removes the file of a layer that no point needs.
func (v *VM) removeLayer(digest string) error {
	if err := v.fs.Remove(v.layerPath(digest)); err != nil && !isMissing(err) {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.stored, digest)
	return nil
}
