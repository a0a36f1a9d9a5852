package replica

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"afterimage/blockdev"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

// A heldLayer is a stored layer that somebody reads. All who read it share it;
// it is opened with the first and closed with the last, also when its file was
// folded and removed meanwhile.
type heldLayer struct {
	layerRef
	v    *VM
	refs int // v.mu

	mu sync.Mutex
	l  *hrl.Layer
}

// holdLayersLocked counts the caller into each layer; v.mu is held. releaseLayers
// counts it out.
func (v *VM) holdLayersLocked(refs []layerRef) []*heldLayer {
	out := make([]*heldLayer, len(refs))
	for i, r := range refs {
		h := v.held[r.digest]
		if h == nil {
			h = &heldLayer{layerRef: r, v: v}
			v.held[r.digest] = h
		}
		h.refs++
		out[i] = h
	}
	return out
}

func (v *VM) releaseLayers(held []*heldLayer) {
	v.mu.Lock()
	var last []*heldLayer
	for _, h := range held {
		if h.refs--; h.refs == 0 {
			if v.held[h.digest] == h {
				delete(v.held, h.digest)
			}
			last = append(last, h)
		}
	}
	v.mu.Unlock()
	for _, h := range last {
		h.mu.Lock()
		if h.l != nil {
			_ = h.l.Close() // it was only read
		}
		h.mu.Unlock()
	}
}

// openLayers opens what is not open yet: header and trailer are read, nothing
// else.
func openLayers(held []*heldLayer) error {
	for _, h := range held {
		if err := h.open(); err != nil {
			return h.failed(err)
		}
	}
	return nil
}

func (h *heldLayer) open() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.l != nil {
		return nil
	}
	l, err := h.v.openLayer(h.v.layerPath(h.digest))
	if err != nil {
		return err
	}
	if l.VM != h.v.id || l.Disk != h.disk {
		return errors.Join(&hrl.LayerError{Layer: l.Path, Err: errors.New("it is the layer of another disk")}, l.Close())
	}
	h.l = l
	return nil
}

// openLayer is hrl.OpenLayer where a file that is missing is damage.
func (v *VM) openLayer(path string) (*hrl.Layer, error) {
	l, err := hrl.OpenLayer(v.fs, path)
	if isMissing(err) {
		return nil, &hrl.LayerError{Layer: path, Err: errors.New("the file is missing")}
	}
	return l, err
}

func (v *VM) layerPath(digest string) string {
	return filepath.Join(v.dir, layersDir, digest+layerSuffix)
}

// failed names the point in an error of the layer, and remembers damage.
func (h *heldLayer) failed(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, hrl.ErrDamaged) {
		h.v.note(damage{layer: h.layerRef, reason: err.Error()})
	}
	return fmt.Errorf("point %v of VM %s: %w", h.point, h.v.Name(), err)
}

// Name implements blockdev.Layered.
func (h *heldLayer) Name() string { return h.l.Name() }

// DiskSize implements blockdev.Layered.
func (h *heldLayer) DiskSize() int64 { return h.l.DiskSize() }

// Lookup implements blockdev.Layered.
func (h *heldLayer) Lookup(off, n int64) (blockdev.Run, bool, error) {
	run, ok, err := h.l.Lookup(off, n)
	return run, ok, h.failed(err)
}

// ReadAt implements blockdev.Layered.
func (h *heldLayer) ReadAt(p []byte, off int64) (int, error) {
	n, err := h.l.ReadAt(p, off)
	return n, h.failed(err)
}

// A chain is what a disk of a point is made of, held open: the point stays as
// long as the chain does.
type chain struct {
	v      *VM
	id     wire.PointID
	disk   wire.Disk
	base   *base
	layers []*heldLayer
}

// chain opens what a disk of a point is made of. However many layers that are,
// none is read but for its header and trailer.
func (v *VM) chain(id wire.PointID, disk string) (*chain, error) {
	// Held until the files are open: a fold that ends meanwhile must not remove
	// them before.
	v.files.RLock()
	defer v.files.RUnlock()
	c, err := v.hold(id, disk)
	if err != nil {
		return nil, err
	}
	if err := openLayers(c.layers); err != nil {
		c.release()
		return nil, err
	}
	return c, nil
}

// hold counts the caller into the point and its layers. From then on the point
// is not retired.
func (v *VM) hold(id wire.PointID, disk string) (*chain, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.usableLocked(); err != nil {
		return nil, err
	}
	i := v.state.find(id)
	if i < 0 || v.retiring[id] {
		return nil, v.state.noPoint(id)
	}
	d := v.state.Points[i].disk(disk)
	if d == nil {
		return nil, fmt.Errorf("point %v of VM %s has no disk %s: %w", id, v.state.Name, disk, ErrNoPoint)
	}
	v.uses[id]++
	return &chain{v, id, d.Disk, v.bases[disk], v.holdLayersLocked(v.state.layers(disk, i))}, nil
}

func (c *chain) release() {
	c.v.releaseLayers(c.layers)
	c.v.mu.Lock()
	defer c.v.mu.Unlock()
	if c.v.uses[c.id]--; c.v.uses[c.id] == 0 {
		delete(c.v.uses, c.id)
		c.v.store.kick() // it may be due for retirement
	}
}

// over returns the chain as a disk, with the top over it, if any.
func (c *chain) over(top *blockdev.Top) (blockdev.Device, error) {
	layers := make([]blockdev.Layered, len(c.layers))
	for i, h := range c.layers {
		layers[i] = h
	}
	d, err := blockdev.NewOverlay(c.base, layers, top)
	if err == nil && d.Size() != c.disk.Size {
		err = errors.Join(fmt.Errorf("disk %s of point %v has %d bytes, not %d: %w", c.disk.Name, c.id, d.Size(), c.disk.Size, hrl.ErrDamaged), d.Close())
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

// A pointDevice is a disk as of a point, read-only.
type pointDevice struct {
	blockdev.Device
	chain *chain
}

// Close implements blockdev.Device, and lets the point go.
func (d *pointDevice) Close() error {
	err := d.Device.Close()
	if err == nil {
		d.chain.release()
	}
	return err
}

// OpenPoint opens a disk as it was at a point, for reading. The point is neither
// retired nor removed until the device is closed. It may be opened as often as
// one likes, also while the layers below are being folded.
func (v *VM) OpenPoint(id wire.PointID, disk string) (blockdev.Device, error) {
	c, err := v.chain(id, disk)
	if err != nil {
		return nil, err
	}
	d, err := c.over(nil)
	if err != nil {
		c.release()
		return nil, err
	}
	return &pointDevice{d, c}, nil
}
