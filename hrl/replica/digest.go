package replica

import (
	"crypto/sha256"
	"fmt"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
)

// A digester is a disk of a point that is kept open between calls of Digests: a
// comparison asks thousands of times for the same one.
type digester struct {
	id   wire.PointID
	disk string
	dev  blockdev.Device
	refs int // VM.mu; the holder in VM.digests counts as one
}

func (d *digester) close() { _ = d.dev.Close() }

// Digests puts the SHA-256 of each range of a disk, as it was at a point, into
// out, which has as many places as there are ranges. The part of a range beyond
// the disk's end counts as zeroes.
func (v *VM) Digests(at wire.PointID, disk string, ext []blockdev.Extent, out [][32]byte) error {
	if len(out) != len(ext) {
		return fmt.Errorf("%d ranges and room for %d digests: %w", len(ext), len(out), ErrBad)
	}
	for _, e := range ext {
		if e.Off < 0 || e.Len <= 0 || e.Len > wire.DigestLenMax || e.Off > 1<<60 {
			return fmt.Errorf("the digest of %d bytes at %d: %w", e.Len, e.Off, ErrBad)
		}
	}
	d, err := v.useDigester(at, disk)
	if err != nil {
		return err
	}
	defer v.letDigester(d)
	size := d.dev.Size()
	buf := make([]byte, wire.DigestLenMax)
	for i, e := range ext {
		p := buf[:e.Len]
		have := max(0, min(e.Len, size-e.Off))
		clear(p[have:])
		if have > 0 {
			if err := readSectors(d.dev, p[:have], e.Off); err != nil {
				return fmt.Errorf("disk %s of point %v of VM %s: %w", disk, at, v.Name(), err)
			}
		}
		out[i] = sha256.Sum256(p)
	}
	return nil
}

// readSectors reads a range that need not be of whole sectors.
func readSectors(d blockdev.Device, p []byte, off int64) error {
	const s = blockdev.SectorSize
	lo, hi := off/s*s, (off+int64(len(p))+s-1)/s*s
	if lo == off && hi == off+int64(len(p)) {
		return blockdev.ReadAt(d, p, off)
	}
	wide := make([]byte, hi-lo)
	if err := blockdev.ReadAt(d, wide, lo); err != nil {
		return err
	}
	copy(p, wide[off-lo:])
	return nil
}

func (v *VM) useDigester(at wire.PointID, disk string) (*digester, error) {
	v.mu.Lock()
	if d := v.digests; d != nil && d.id == at && d.disk == disk {
		d.refs++
		v.mu.Unlock()
		return d, nil
	}
	v.mu.Unlock()
	dev, err := v.OpenPoint(at, disk)
	if err != nil {
		return nil, err
	}
	d := &digester{at, disk, dev, 2}
	v.mu.Lock()
	old := v.digests
	if v.digests = d; v.closed {
		v.digests, d.refs = nil, 1
	}
	v.mu.Unlock()
	if old != nil {
		v.letDigester(old)
	}
	return d, nil
}

func (v *VM) letDigester(d *digester) {
	v.mu.Lock()
	d.refs--
	last := d.refs == 0
	v.mu.Unlock()
	if last {
		d.close()
	}
}

// dropDigester lets go the point that digests were asked of last, unless it is
// the one to be kept.
func (v *VM) dropDigester(keep wire.PointID) {
	v.mu.Lock()
	d := v.digests
	if d != nil && d.id == keep {
		d = nil
	}
	if d != nil {
		v.digests = nil
	}
	v.mu.Unlock()
	if d != nil {
		v.letDigester(d)
	}
}
