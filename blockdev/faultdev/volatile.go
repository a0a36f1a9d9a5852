package faultdev

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"afterimage/blockdev"
)

const sector = blockdev.SectorSize

// Volatile is a disk with a write cache that a power cut empties in part. It
// remembers, of every sector, what may be found there after a power cut: the
// content that is known to be durable, and everything written since.
//
//   - A flush makes durable what had finished when it began. A request with
//     FUA makes itself durable.
//   - A flush that fails makes nothing durable, and as on Linux the next one
//     succeeds without the data: until a sector is written again, no flush
//     makes it durable any more.
//   - A write that fails may or may not have happened.
//   - A change of size is durable at once.
//
// Of requests that overlap and run at the same time, the one that began later
// counts as the later one.
type Volatile struct {
	blockdev.Device

	mu sync.Mutex
	// shadow is the disk as if every write that began had finished.
	shadow  *blockdev.Mem
	pending map[int64]*cached // by sector; absent: what shadow has is durable
	clock   int64             // goes on at the beginning and the end of each batch
}

// cached is a sector of which more than one version may be on the disk.
type cached struct {
	durable  []byte
	versions []*version // written since, oldest first; never empty
}

type version struct {
	data []byte
	end  int64 // the clock when its write had finished; 0: not yet
	lost bool  // its write, or a flush that should have made it durable, failed
}

// NewVolatile returns a disk over dev, all of whose content is taken to be
// durable. No rule of a Device is applied to the reading of it.
func NewVolatile(dev blockdev.Device) (*Volatile, error) {
	v := &Volatile{Device: dev, shadow: blockdev.NewMem(dev.Size()), pending: make(map[int64]*cached)}
	from := dev
	if d, ok := dev.(*Device); ok {
		from = d.Device
	}
	if err := copyDisk(v.shadow, from); err != nil {
		return nil, fmt.Errorf("read the disk under a volatile cache: %w", err)
	}
	return v, nil
}

// copyDisk copies what is not zero.
func copyDisk(to, from blockdev.Device) error {
	const chunk = 1 << 20
	var failed error
	err := from.Extents(0, from.Size(), func(run blockdev.Run) bool {
		if run.Zero {
			return true
		}
		for off := run.Off; off < run.End() && failed == nil; off += chunk {
			p := blockdev.AlignedBuf(int(min(chunk, run.End()-off)))
			if failed = blockdev.ReadAt(from, p, off); failed == nil {
				failed = blockdev.WriteAt(to, p, off)
			}
		}
		return failed == nil
	})
	if failed != nil {
		return failed
	}
	return err
}

// Do implements blockdev.Device.
func (v *Volatile) Do(reqs []*blockdev.Request) {
	info := v.Info()
	began := make([][]*version, len(reqs))
	v.mu.Lock()
	v.clock++
	start := v.clock
	for i, r := range reqs {
		valid := r.Len > 0 && r.Check(&info, v.shadow.Size()) == nil
		if valid && (r.Op == blockdev.OpWrite || r.Op == blockdev.OpWriteZeroes) {
			began[i] = v.beginLocked(r.Extent(), r.Buf)
		}
	}
	v.mu.Unlock()

	v.Device.Do(reqs)

	v.mu.Lock()
	defer v.mu.Unlock()
	v.clock++
	for i, r := range reqs {
		switch {
		case r.Op == blockdev.OpFlush && r.Err == nil:
			v.flushedLocked(start)
		case r.Op == blockdev.OpFlush:
			v.flushFailedLocked()
		case r.Op == blockdev.OpTrim && r.Len > 0 && r.Check(&info, v.shadow.Size()) == nil:
			v.trimmedLocked(r)
		case began[i] != nil:
			v.endLocked(r.Extent(), began[i], r)
		}
	}
}

// beginLocked adds a version to each sector of e: with the bytes of p, or with
// zeroes if p is nil.
func (v *Volatile) beginLocked(e blockdev.Extent, p []byte) []*version {
	first, last := e.Off/sector, (e.End()-1)/sector
	added := make([]*version, 0, last-first+1)
	for s := first; s <= last; s++ {
		c := v.pending[s]
		if c == nil {
			c = &cached{durable: v.sectorLocked(s)}
			v.pending[s] = c
		}
		data := v.sectorLocked(s)
		from, to := max(e.Off, s*sector), min(e.End(), (s+1)*sector)
		if p == nil {
			clear(data[from-s*sector : to-s*sector])
		} else {
			copy(data[from-s*sector:], p[from-e.Off:to-e.Off])
		}
		must(blockdev.WriteAt(v.shadow, data, s*sector))
		ver := &version{data: data}
		c.versions = append(c.versions, ver)
		added = append(added, ver)
	}
	return added
}

func (v *Volatile) sectorLocked(s int64) []byte {
	p := make([]byte, sector)
	must(blockdev.ReadAt(v.shadow, p, s*sector))
	return p
}

// must is for requests to the shadow, which is in memory and large enough.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// endLocked ends the versions of a request, one for each sector of e.
func (v *Volatile) endLocked(e blockdev.Extent, added []*version, r *blockdev.Request) {
	for i, ver := range added {
		ver.end = v.clock
		if r.Err != nil {
			ver.lost = true
			continue
		}
		if r.Flags&blockdev.FlagFUA != 0 {
			v.durableLocked(e.Off/sector+int64(i), ver)
		}
	}
}

// trimmedLocked adds what a trim turned out to have zeroed, or may have.
func (v *Volatile) trimmedLocked(r *blockdev.Request) {
	e := r.Done
	if r.Err != nil {
		e = r.Extent()
	}
	if e.Len > 0 {
		v.endLocked(e, v.beginLocked(e, nil), r)
	}
}

// durableLocked makes one version of a sector the durable one. What came before
// it is gone.
func (v *Volatile) durableLocked(s int64, ver *version) {
	c := v.pending[s]
	if c == nil {
		return
	}
	i := slices.Index(c.versions, ver)
	if i < 0 {
		return // something newer is durable already
	}
	c.durable = ver.data
	if c.versions = c.versions[i+1:]; len(c.versions) == 0 {
		delete(v.pending, s)
	}
}

// flushedLocked makes durable what had finished when the flush began.
func (v *Volatile) flushedLocked(start int64) {
	for s, c := range v.pending {
		for _, ver := range slices.Backward(c.versions) {
			if ver.end != 0 && ver.end <= start && !ver.lost {
				v.durableLocked(s, ver)
				break
			}
		}
	}
}

func (v *Volatile) flushFailedLocked() {
	for _, c := range v.pending {
		for _, ver := range c.versions {
			if ver.end != 0 {
				ver.lost = true
			}
		}
	}
}

// DropCache implements blockdev.CacheDropper: of sectors whose writing back has failed,
// what is durable is seen again.
func (v *Volatile) DropCache(off, length int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	for s, c := range v.pending {
		if s*sector >= off+length || (s+1)*sector <= off {
			continue
		}
		if slices.ContainsFunc(c.versions, func(ver *version) bool { return !ver.lost }) {
			continue // dirty
		}
		if err := blockdev.WriteAt(v.Device, c.durable, s*sector); err != nil {
			return err
		}
		must(blockdev.WriteAt(v.shadow, c.durable, s*sector))
		delete(v.pending, s)
	}
	return nil
}

// Unsettled is how many sectors a power cut now could leave in more than one
// state.
func (v *Volatile) Unsettled() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.pending)
}

// Resize implements blockdev.Device.
func (v *Volatile) Resize(size int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.Device.Resize(size); err != nil {
		return err
	}
	maps.DeleteFunc(v.pending, func(s int64, _ *cached) bool { return s*sector >= size })
	return v.shadow.Resize(size)
}

// Crash returns a disk as a power cut at this moment may leave it: of every
// sector that is not durable one version, the old one or any written since,
// chosen by the seed for each sector by itself. This disk goes on as it was.
func (v *Volatile) Crash(seed uint64) *blockdev.Mem {
	v.mu.Lock()
	defer v.mu.Unlock()
	left := blockdev.NewMem(v.shadow.Size())
	must(copyDisk(left, v.shadow))
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, s := range slices.Sorted(maps.Keys(v.pending)) {
		c := v.pending[s]
		data := c.durable
		if i := rng.IntN(len(c.versions) + 1); i > 0 {
			data = c.versions[i-1].data
		}
		must(blockdev.WriteAt(left, data, s*sector))
	}
	return left
}
