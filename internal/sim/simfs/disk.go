package simfs

import (
	"fmt"
	"math/rand/v2"
	"syscall"

	"afterimage/blockdev"
)

// Disk is a file as a disk.
type Disk struct {
	p    *Process
	n    *inode
	path string
	info blockdev.Info
	slow bool
}

// OpenDisk opens a file as a disk; with slow, what it does takes as long as Delay
// says. Half a batch's time passes before it is done.
func (p *Process) OpenDisk(path string, info blockdev.Info, slow bool) (blockdev.Device, error) {
	d := &Disk{p: p, path: path, info: info, slow: slow}
	d.info.Name, d.info.MemAlign, d.info.Preferred = path, 1, max(info.BlockSize, 512)
	err := p.do(OpOpen, path, func() error {
		if d.n = p.fs.names[path]; d.n == nil {
			return syscall.ENOENT
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Info implements blockdev.Device.
func (d *Disk) Info() blockdev.Info { return d.info }

// Size implements blockdev.Device.
func (d *Disk) Size() int64 {
	d.p.fs.mu.Lock()
	defer d.p.fs.mu.Unlock()
	return d.n.size
}

// Do implements blockdev.Device.
func (d *Disk) Do(reqs []*blockdev.Request) {
	size := d.Size()
	rest := func() {}
	if d.slow {
		op := OpWrite
		switch reqs[0].Op {
		case blockdev.OpRead:
			op = OpRead
		case blockdev.OpFlush:
			op = OpSync
		}
		if reqs[0].Flags&blockdev.FlagNoWait == 0 {
			start := d.tick()
			rest = d.p.wait(op, d.path)
			if op == OpSync {
				for _, r := range reqs {
					d.do(r, size, start)
				}
				rest()
				return
			}
		}
	}
	start := d.tick()
	for _, r := range reqs {
		d.do(r, size, start)
	}
	rest()
	d.p.fs.mu.Lock()
	defer d.p.fs.mu.Unlock()
	d.p.fs.clock++
	for _, r := range reqs {
		if r.Op != blockdev.OpRead && r.Op != blockdev.OpFlush && r.Len > 0 {
			d.n.ended(r.Off, r.Len, d.p.fs.clock)
			if r.Err == nil && r.Flags&blockdev.FlagFUA != 0 {
				d.n.settle(r.Off, r.Len, d.p.fs.clock)
			}
		}
	}
}

func (d *Disk) tick() uint64 {
	d.p.fs.mu.Lock()
	defer d.p.fs.mu.Unlock()
	d.p.fs.clock++
	return d.p.fs.clock
}

func (d *Disk) do(r *blockdev.Request, size int64, start uint64) {
	r.Done = blockdev.Extent{}
	if r.Err = r.Check(&d.info, size); r.Err != nil {
		return
	}
	switch r.Op {
	case blockdev.OpRead:
		r.Err = d.p.do(OpRead, d.path, func() error {
			d.n.read(r.Buf, r.Off)
			return nil
		})
	case blockdev.OpFlush:
		r.Err = d.sync(start)
	case blockdev.OpTrim:
		a := int64(pageBytes)
		lo, hi := (r.Off+a-1)&^(a-1), (r.Off+r.Len)&^(a-1)
		if !d.info.CheapTrim || lo >= hi {
			return
		}
		if r.Err = d.change(nil, lo, hi-lo); r.Err == nil {
			r.Done = blockdev.Extent{Off: lo, Len: hi - lo}
		}
	case blockdev.OpWriteZeroes:
		r.Err = d.change(nil, r.Off, r.Len)
	case blockdev.OpWrite:
		r.Err = d.change(r.Buf, r.Off, r.Len)
	}
	if r.Err != nil {
		r.Err = fmt.Errorf("%s: %s of %d bytes at %d: %w", d.path, r.Op, r.Len, r.Off, r.Err)
	}
}

// change writes; nil are zeroes. What fails is done in part: any sectors of it.
func (d *Disk) change(b []byte, off, length int64) error {
	part, err := d.p.Step(OpWrite, d.path)
	if err == ErrGone && !part {
		return err
	}
	seed := uint64(d.p.IntN(1 << 30))
	d.p.fs.mu.Lock()
	if err == nil {
		d.n.write(b, off, length, 0)
	} else {
		d.tearLocked(b, off, length, rand.New(rand.NewPCG(seed, 1)))
	}
	d.p.fs.mu.Unlock()
	if part {
		d.p.Die()
	}
	return err
}

func (d *Disk) tearLocked(b []byte, off, length int64, rng *rand.Rand) {
	end := rng.Int64N(length/sector+1) * sector
	torn := rng.IntN(2) == 0
	for at := int64(0); at < length; at += sector {
		if at < end && !torn || torn && rng.IntN(2) == 0 {
			var s []byte
			if b != nil {
				s = b[at : at+sector]
			}
			d.n.write(s, off+at, sector, 0)
		}
	}
}

func (d *Disk) sync(start uint64) error {
	part, err := d.p.Step(OpSync, d.path)
	d.p.fs.mu.Lock()
	switch {
	case err == nil:
		d.n.settle(0, 1<<60, start)
		d.n.durable = d.n.size
	case err != ErrGone:
		d.n.lose()
	}
	d.p.fs.mu.Unlock()
	if part {
		d.p.Die()
	}
	return err
}

// Extents implements blockdev.Device.
func (d *Disk) Extents(off, length int64, visit func(blockdev.Run) bool) error {
	if d.p.Gone() {
		return ErrGone
	}
	for at := off; at < off+length; {
		to := min(off+length, (at/pageBytes+1)*pageBytes)
		d.p.fs.mu.Lock()
		hole := d.n.pages[at/pageBytes] == nil
		for to < off+length && (d.n.pages[to/pageBytes] == nil) == hole {
			to = min(off+length, to+pageBytes)
		}
		d.p.fs.mu.Unlock()
		if !visit(blockdev.Run{Extent: blockdev.Extent{Off: at, Len: to - at}, Hole: hole, Zero: hole}) {
			return nil
		}
		at = to
	}
	return nil
}

// Resize implements blockdev.Device.
func (d *Disk) Resize(size int64) error {
	return d.p.do(OpWrite, d.path, func() error {
		d.n.resize(size)
		return nil
	})
}

// Close implements blockdev.Device.
func (d *Disk) Close() error { return nil }
