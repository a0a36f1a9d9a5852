package replica

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// recoverStaging finds what is staged, and removes what a crash has left that is
// of no use.
func (v *VM) recoverStaging() error {
	if err := v.recoverParts(); err != nil {
		return err
	}
	dir := filepath.Join(v.dir, layersDir)
	names, err := v.fs.ReadDir(dir)
	if err != nil {
		return err
	}
	listed := v.state.digests()
	for _, name := range names {
		digest, ok := strings.CutSuffix(name, layerSuffix)
		if !ok || wire.CheckDigest(digest) != nil {
			continue // not ours
		}
		point, inPoint := listed[digest]
		folded := inPoint && !v.state.Base.IsZero() && !v.state.Base.Before(point)
		size, dead, err := v.look(name, inPoint)
		switch {
		case err != nil:
			return err
		case folded || dead:
			// The fold's last step, or a layer whose point will never come.
			if err := v.fs.Remove(filepath.Join(dir, name)); err != nil {
				return err
			}
			continue
		case !inPoint:
			v.staged[digest] = &stagedLayer{digest: digest, size: size, complete: true}
		}
		v.stored[digest] = size
	}
	for _, r := range v.state.allLayers() {
		if _, ok := v.stored[r.digest]; !ok {
			v.notes[damage{layer: r, reason: fmt.Sprintf("layer %s is missing", v.layerPath(r.digest))}] = true
		}
	}
	return nil
}

// look returns the size of a file in layers, and whether it is one that no point
// has and none ever will.
func (v *VM) look(name string, inPoint bool) (size int64, dead bool, err error) {
	path := filepath.Join(v.dir, layersDir, name)
	f, err := v.fs.Open(path)
	if err != nil {
		return 0, false, err
	}
	size, err = f.Size()
	if err = errors.Join(err, f.Close()); err != nil || inPoint {
		return size, false, err
	}
	l, err := v.openLayer(path)
	if errors.Is(err, hrl.ErrDamaged) || errors.Is(err, hrl.ErrVersion) {
		return size, true, nil
	}
	if err != nil {
		return size, false, err
	}
	return size, parentOf(l).Before(v.state.newest()), l.Close()
}

// parentOf is the point that a layer's header says it lies over.
func parentOf(l *hrl.Layer) wire.PointID { return pointID(l.PGeneration, l.P) }

func pointID(generation uint64, p hrl.Position) wire.PointID {
	if p == (hrl.Position{}) {
		return wire.PointID{}
	}
	return wire.PointID{Generation: generation, Incarnation: p.Incarnation, Epoch: p.Epoch}
}

func (v *VM) recoverParts() error {
	dir := filepath.Join(v.dir, stagingDir)
	names, err := v.fs.ReadDir(dir)
	if err != nil {
		return err
	}
	digests := map[string]bool{}
	for _, name := range names {
		for _, suffix := range []string{partSuffix, lenSuffix, layerSuffix} {
			if d, ok := strings.CutSuffix(name, suffix); ok && wire.CheckDigest(d) == nil {
				digests[d] = true
			}
		}
	}
	for d := range digests {
		l, ok, err := v.recoverPart(d)
		if err != nil {
			return err
		}
		s := &stagedLayer{digest: d, size: l.size, len: l}
		if !ok {
			if err := v.dropStaged(s); err != nil {
				return err
			}
			continue
		}
		v.staged[d] = s
	}
	return nil
}

// recoverPart says how much of a layer in staging is durable.
func (v *VM) recoverPart(digest string) (l stagedLen, ok bool, err error) {
	part := v.stagingPath(digest, partSuffix)
	err = v.fs.Rename(v.stagingPath(digest, layerSuffix), part)
	if err != nil && !isMissing(err) {
		return l, false, err
	}
	l, ok, err = readLen(v.fs, v.stagingPath(digest, lenSuffix))
	if err != nil || !ok {
		return l, false, err
	}
	f, err := v.fs.Open(part)
	if isMissing(err) {
		return l, false, nil
	}
	if err != nil {
		return l, false, err
	}
	have, err := f.Size()
	if err = errors.Join(err, f.Close()); err != nil || have < l.synced {
		return l, false, err
	}
	if l.synced == l.size {
		// It was being checked. The last piece is asked for again, and with it
		// the check.
		l.synced = (l.size - 1) / stageSync * stageSync
	}
	return l, true, nil
}
