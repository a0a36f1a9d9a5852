package ship

import (
	"context"
	"encoding/hex"
	"errors"
	"slices"

	"afterimage/blockdev"
	"afterimage/filter"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

const (
	// copyBatch is how many blocks are copied before their digests are asked for:
	// 8 MiB, which are in memory meanwhile.
	copyBatch = 128
	// copyLayerMax is how many bytes of the disk a layer of copies gets: what is
	// lost when the line breaks, and room that the spool needs.
	copyLayerMax = 256 << 20
)

// A session is what has been copied since the newest point, and not been
// acknowledged. It is the loop's.
type session struct {
	label hrl.Position // of a cut before all copies; layers of copies are named after it
	// from, if set, is a cut before which nothing in the log counts, and mark its
	// place in the log.
	from   hrl.Position
	mark   hrl.Mark
	copies map[string][]string      // by disk: digests of layers of copies that the peer has, the oldest first
	sent   map[string]*hrl.BlockSet // by disk: blocks in them
	totals Totals
}

func newSession(cut *hrl.CutInfo) *session {
	return &session{
		label:  hrl.Position{Incarnation: cut.Incarnation, Epoch: cut.Epoch},
		copies: map[string][]string{}, sent: map[string]*hrl.BlockSet{},
	}
}

// copyGaps copies all that is a gap, and returns when no disk has an open one.
func (s *Shipper) copyGaps(ctx context.Context) error {
	open := int64(0)
	for _, d := range s.opt.VM.Disks() {
		_, n := d.GapBytes()
		open += n
	}
	if open == 0 {
		return nil
	}
	if s.session == nil {
		cut, err := s.opt.VM.Log().Cut(hrl.CutCrash)
		if err != nil {
			return err
		}
		s.dirty = s.dirty || !cut.Touched.Empty()
		s.session = newSession(&cut)
	}
	s.noteCopying(open)
	defer s.noteCopied()
	for _, d := range s.opt.VM.Disks() {
		c := copier{s: s, d: d, parent: s.sizeOf(d.Name)}
		if err := c.run(ctx); err != nil {
			return errors.Join(err, c.giveUp())
		}
	}
	return nil
}

// A copier copies the gaps of one disk.
type copier struct {
	s      *Shipper
	d      *filter.Disk
	parent int64 // size that the disk has in the newest point, -1: it has none
	buf    []byte
	batch  []filter.Copied  // not in a layer yet
	w      *hrl.LayerWriter // nil: none was begun
	held   hrl.BlockSet     // blocks that w has
	raw    int64            // bytes that w has
}

// run copies until no gap is open, in passes over the disk: layers are written in
// the order of the disk.
func (c *copier) run(ctx context.Context) error {
	c.buf = blockdev.AlignedBuf(copyBatch * hrl.BlockBytes)
	for off := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := int64(len(c.batch)) * hrl.BlockBytes
		got, ok, err := c.d.CopyGap(off, c.buf[n:n+hrl.BlockBytes])
		if err != nil {
			return err
		}
		if ok {
			c.s.session.totals.CopiedBytes += got.Len
			c.s.noteBlock(got.Len)
			off = got.End()
			if !got.Zero {
				c.batch = append(c.batch, got)
			}
			if len(c.batch) < copyBatch {
				continue
			}
		}
		if err := c.flush(ctx); err != nil {
			return err
		}
		if c.raw >= copyLayerMax || !ok {
			if err := c.ship(ctx); err != nil {
				return err
			}
		}
		if !ok && off == 0 {
			return nil
		}
		if !ok {
			off = 0
		}
	}
}

// flush puts the batch into the layer, without the blocks that the peer has.
func (c *copier) flush(ctx context.Context) error {
	has, err := c.has(ctx)
	if err != nil {
		return err
	}
	for i := range c.batch {
		b := &c.batch[i]
		if has[i] {
			continue
		}
		if c.w == nil {
			if err := c.begin(); err != nil {
				return err
			}
		}
		if err := c.w.Data(b.Off, b.Data); err != nil {
			return err
		}
		c.held.Add(0, b.Off, b.Len)
		c.raw += b.Len
	}
	c.batch = c.batch[:0]
	return nil
}

// has reports of each block of the batch whether the newest point has it, so that
// it need not be sent.
func (c *copier) has(ctx context.Context) ([]bool, error) {
	has := make([]bool, len(c.batch))
	var ask []blockdev.Extent
	var of []int
	sent := c.s.session.sent[c.d.Name]
	for i := range c.batch {
		b := &c.batch[i]
		if b.End() > c.parent || sent != nil && sent.Has(0, b.Off) {
			continue // an older copy of it lies over the point's
		}
		ask, of = append(ask, b.Extent), append(of, i)
	}
	if len(ask) == 0 {
		return has, nil
	}
	digests, err := c.s.opt.Client.Digests(ctx, c.s.opt.ID, c.s.state.Acked.ID, c.d.Name, ask)
	var refused *wire.Error
	if errors.As(err, &refused) && refused.Code == wire.CodeDamaged {
		return has, nil // what it cannot read, it gets
	}
	if err != nil {
		return nil, err
	}
	for k, i := range of {
		has[i] = digests[k] == c.batch[i].Digest
	}
	return has, nil
}

func (c *copier) begin() (err error) {
	if err := c.s.opt.FS.MkdirAll(c.s.spool); err != nil {
		return err
	}
	p := c.s.state.Acked.ID
	c.w, err = hrl.NewLayerWriter(c.s.opt.FS, c.s.spool, hrl.LayerInfo{
		VM: c.s.opt.ID, Generation: c.s.state.Generation, PGeneration: p.Generation, Disk: c.d.Name,
		P: position(p), Q: c.s.session.label, Size: c.d.Size(), Kind: hrl.CutCrash,
	})
	return err
}

// ship ends the layer and brings it to the peer.
func (c *copier) ship(ctx context.Context) error {
	if c.w == nil {
		return nil
	}
	file, err := c.w.Commit()
	if err != nil {
		return err
	}
	c.w = nil
	f := spooled{Digest: hex.EncodeToString(file.Digest[:]), Bytes: file.Bytes, Raw: file.Data}
	err = c.s.put(ctx, &f)
	c.s.removeFiles([]spooled{f})
	if err != nil {
		return err
	}
	ses := c.s.session
	// The same blocks with the same bytes, copied twice, are one file. It covers all
	// that it covered before, so it counts where it came last.
	mine := slices.DeleteFunc(ses.copies[c.d.Name], func(d string) bool { return d == f.Digest })
	ses.copies[c.d.Name] = append(mine, f.Digest)
	if ses.sent[c.d.Name] == nil {
		ses.sent[c.d.Name] = &hrl.BlockSet{}
	}
	ses.sent[c.d.Name].AddSet(&c.held)
	ses.totals.ShippedBytes += f.Bytes
	ses.totals.ShippedRawBytes += f.Raw
	c.held, c.raw = hrl.BlockSet{}, 0
	return nil
}

// giveUp makes gaps again of what was copied and did not get to the peer.
func (c *copier) giveUp() error {
	for i := range c.batch {
		c.d.AddGap(c.batch[i].Off, c.batch[i].Len)
	}
	c.held.Runs(func(_ hrl.DiskID, off, length int64) { c.d.AddGap(off, min(length, c.d.Size()-off)) })
	if c.w == nil {
		return nil
	}
	return c.w.Abort()
}
