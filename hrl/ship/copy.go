package ship

import (
	"context"
	"encoding/hex"
	"errors"
	"io/fs"
	"slices"
	"sync"

	"afterimage/blockdev"
	"afterimage/filter"
	"afterimage/hrl"
	"afterimage/hrl/wire"
)

const (
	// copyBatch is how much is copied before digests are asked for, in bytes. Each
	// stream has as much in memory.
	copyBatch = 8 << 20
	// copyRuns is how many runs of gaps a batch may be made of.
	copyRuns = 128
	// streamsDefault is how many batches are under way at once: while one waits for
	// the line others read and hash. As many as a Client has connections.
	streamsDefault = connectionsMax
)

// copyLayerMax is how many bytes of the disk a layer of copies gets, a variable for
// tests: what a restart copies again, for each stream, and room that the spool needs.
var copyLayerMax int64 = 256 << 20

// copyGaps copies all that is a gap, and returns when no disk has an open one.
func (s *Shipper) copyGaps(ctx context.Context) error {
	open := int64(0)
	for _, d := range s.opt.VM.Disks() {
		_, n := d.GapBytes()
		open += n
	}
	if open == 0 && len(s.waitingCopies) == 0 {
		return nil
	}
	if s.session == nil {
		cut, err := s.opt.VM.Log().Cut(hrl.CutCrash)
		if err != nil {
			return err
		}
		s.dirty = s.dirty || !cut.Touched.Empty()
		s.beginSession()
		s.newSession(&cut)
		if err := s.save(); err != nil {
			return err
		}
	}
	s.noteCopying()
	defer s.noteCopied()
	defer s.followRate(ctx)()
	if err := s.putWaiting(ctx); err != nil {
		return err
	}
	for _, d := range s.opt.VM.Disks() {
		c := &copier{s: s, d: d, parent: s.sizeOf(d.Name)}
		if err := c.run(ctx); err != nil {
			return err
		}
	}
	return nil
}

// A copier copies the gaps of one disk, in passes. In each pass every block is copied
// once at most, and all of a pass is at the peer before the next begins: so which layer
// of a pass comes first does not matter, and what is delivered is the newest copy.
type copier struct {
	s      *Shipper
	d      *filter.Disk
	parent int64 // size that the disk has in the newest point, -1: it has none

	// mu guards the rest, and what of the Shipper the streams change: its session and
	// its state. It is held while that is made durable.
	mu   sync.Mutex
	next int64 // where the pass has got to
}

// lacked reports whether the newest point has something of the extent as unreadable.
// Then it is sent in any case: a layer that has it is what ends that.
func (c *copier) lacked(e blockdev.Extent) bool {
	for _, d := range c.s.state.Acked.Disks {
		for _, r := range d.Unreadable {
			if d.Name == c.d.Name && e.Overlaps(blockdev.Extent{Off: r[0], Len: r[1]}) {
				return true
			}
		}
	}
	return false
}

func (c *copier) run(ctx context.Context) error {
	for {
		c.next = 0
		if _, ok := c.d.NextGap(0, copyBatch); !ok {
			return nil
		}
		if err := c.pass(ctx); err != nil {
			return err
		}
	}
}

// pass copies the gaps that there are, in several streams.
func (c *copier) pass(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, open := c.d.GapBytes()
	n := max(1, min(int64(c.s.opt.Streams), (open+copyBatch-1)/copyBatch))
	errs := make(chan error, n)
	for range n {
		go func() {
			st := &stream{c: c}
			err := st.run(ctx)
			if err != nil {
				cancel() // the others need not go on
				err = errors.Join(err, st.giveUp())
			}
			errs <- err
		}()
	}
	var first error
	for range n {
		if err := <-errs; err != nil && (first == nil || errors.Is(first, context.Canceled)) {
			first = err
		}
	}
	return first
}

// take gives a stream what it is to copy next: extents of copyBatch in all, in order.
func (c *copier) take() (batch []blockdev.Extent) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for left := int64(copyBatch); left >= hrl.BlockBytes && len(batch) < copyRuns; {
		e, ok := c.d.NextGap(c.next, left)
		if !ok {
			break
		}
		batch = append(batch, e)
		// The disk's last block may be shorter than its place in the buffer.
		n := (e.Len + hrl.BlockBytes - 1) &^ (hrl.BlockBytes - 1)
		left -= n
		c.next = e.Off + n
	}
	return batch
}

// A stream copies batch after batch, and brings what the peer lacks of them to it in
// layers, each in the order of the disk.
type stream struct {
	c     *copier
	buf   []byte
	batch []filter.Copied  // not in a layer yet, and not found to be there
	w     *hrl.LayerWriter // nil: none was begun
	held  hrl.BlockSet     // blocks that w has
	lost  hrl.BlockSet     // of those, that it has in part: the log alone says of the rest that it is unreadable
	raw   int64            // bytes that w has
	size  int64            // that the disk has in w
	same  hrl.BlockSet     // blocks that the newest point has
	equal int64            // bytes of them
}

// A copyLayer is a layer of copies that is finished.
type copyLayer struct {
	disk string
	file spooled
	held hrl.BlockSet // its blocks
	lost hrl.BlockSet // of those, that it has in part
}

func (t *stream) run(ctx context.Context) error {
	t.buf = blockdev.AlignedBuf(copyBatch)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		batch := t.c.take()
		if len(batch) == 0 {
			break
		}
		if err := t.copy(ctx, batch); err != nil {
			return err
		}
		if t.equal >= copyLayerMax {
			t.noteSame()
		}
	}
	if err := t.ship(ctx); err != nil {
		return err
	}
	t.noteSame()
	return nil
}

// copy copies a batch into the layer, without the blocks that the peer has.
func (t *stream) copy(ctx context.Context, batch []blockdev.Extent) error {
	buf := t.buf
	for _, e := range batch {
		var bytes int64
		err := t.c.d.CopyGap(e, buf[:e.Len], func(got *filter.Copied) {
			bytes += got.Len
			if !got.Zero {
				t.batch = append(t.batch, *got)
			}
		})
		t.c.mu.Lock()
		t.c.s.session.Totals.CopiedBytes += bytes
		t.c.mu.Unlock()
		t.c.s.noteBlock(bytes)
		if err != nil {
			return err
		}
		buf = buf[(e.Len+hrl.BlockBytes-1)&^(hrl.BlockBytes-1):]
	}
	has, err := t.has(ctx)
	if err != nil {
		return err
	}
	for i := range t.batch {
		b := &t.batch[i]
		if has[i] {
			t.same.Add(0, b.Off, b.Len)
			t.equal += b.Len
			continue
		}
		err := t.put(ctx, b)
		if err == nil && t.raw >= copyLayerMax {
			err = t.ship(ctx)
		}
		if err != nil {
			t.batch = t.batch[i:] // what came before is in a layer
			return err
		}
	}
	t.batch = t.batch[:0]
	return nil
}

// put puts a block into the layer.
func (t *stream) put(ctx context.Context, b *filter.Copied) error {
	if t.w != nil && b.End() > t.size {
		// The disk is larger now.
		if err := t.ship(ctx); err != nil {
			return err
		}
	}
	err := b.Parts(func(off int64, p []byte) error {
		if t.w == nil {
			if err := t.begin(b.End()); err != nil {
				return err
			}
		}
		t.held.Add(0, b.Off, b.Len)
		t.raw += int64(len(p))
		return t.w.Data(off, p)
	})
	if len(b.Unreadable) > 0 {
		t.lost.Add(0, b.Off, b.Len)
	}
	return err
}

// has reports of each block of the batch whether the newest point has it, so that
// it need not be sent.
func (t *stream) has(ctx context.Context) ([]bool, error) {
	c := t.c
	has := make([]bool, len(t.batch))
	var ask []blockdev.Extent
	var of []int
	for i := range t.batch {
		b := &t.batch[i]
		if b.End() > c.parent || c.d.WasSent(b.Off) {
			continue // an older copy of it may lie over the point's
		}
		if len(b.Unreadable) > 0 || c.lacked(b.Extent) {
			continue
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
		has[i] = digests[k] == t.batch[i].Digest
	}
	return has, nil
}

// begin begins a layer, of a disk that has a block up to end, even if it has become
// smaller since.
func (t *stream) begin(end int64) (err error) {
	s := t.c.s
	if err := s.opt.FS.MkdirAll(s.spool); err != nil {
		return err
	}
	p := s.state.Acked.ID
	t.size = max(t.c.d.Size(), end)
	t.w, err = hrl.NewLayerWriter(s.opt.FS, s.spool, hrl.LayerInfo{
		VM: s.opt.ID, Generation: s.state.Generation, PGeneration: p.Generation, Disk: t.c.d.Name,
		P: position(p), Q: s.session.Label, Size: t.size, Kind: hrl.CutCrash,
	})
	return err
}

// ship ends the layer and brings it to the peer.
func (t *stream) ship(ctx context.Context) error {
	if t.w == nil {
		return nil
	}
	file, err := t.w.Commit()
	if err != nil {
		return err
	}
	t.w = nil
	l := &copyLayer{disk: t.c.d.Name, file: spooled{Digest: hex.EncodeToString(file.Digest[:]), Bytes: file.Bytes, Raw: file.Data}, held: t.held, lost: t.lost}
	t.held, t.lost, t.raw = hrl.BlockSet{}, hrl.BlockSet{}, 0
	err = t.c.s.put(ctx, &l.file)
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	if err != nil {
		// The next cycle goes on with it: on a bad line more of it gets there each time.
		t.c.s.waitingCopies = append(t.c.s.waitingCopies, l)
		return err
	}
	return t.c.s.delivered(t.c.d, l)
}

// noteSame notes what was found to be at the peer.
func (t *stream) noteSame() {
	same := t.same
	t.same, t.equal = hrl.BlockSet{}, 0
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.c.s.counts(t.c.d, &same)
}

// giveUp makes gaps again of what was copied and is in no layer that is finished.
func (t *stream) giveUp() error {
	d := t.c.d
	for i := range t.batch {
		d.AddGap(t.batch[i].Off, t.batch[i].Len)
	}
	t.held.Runs(func(_ hrl.DiskID, off, length int64) { d.AddGap(off, min(length, d.Size()-off)) })
	t.noteSame()
	if t.w == nil {
		return nil
	}
	return t.w.Abort()
}

// putWaiting brings to the peer what did not get there.
func (s *Shipper) putWaiting(ctx context.Context) error {
	for len(s.waitingCopies) > 0 {
		l := s.waitingCopies[0]
		i := slices.IndexFunc(s.opt.VM.Disks(), func(d *filter.Disk) bool { return d.Name == l.disk })
		d := s.opt.VM.Disks()[i]
		if err := s.put(ctx, &l.file); err != nil {
			var refused *wire.Error
			if !errors.Is(err, fs.ErrNotExist) && !(errors.As(err, &refused) && refused.Code == wire.CodeDamaged) {
				return err
			}
			// It rotted, or went, while it waited.
			s.waitingCopies = s.waitingCopies[1:]
			s.removeFiles([]spooled{l.file})
			l.held.Runs(func(_ hrl.DiskID, off, length int64) { d.AddGap(off, min(length, d.Size()-off)) })
			return err
		}
		s.waitingCopies = s.waitingCopies[1:]
		if err := s.delivered(d, l); err != nil {
			return err
		}
	}
	return nil
}
