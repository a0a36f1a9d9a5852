package blockdev

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// memPage is the unit in which a Mem takes memory, in bytes.
const memPage = 4096

// memShards bounds how many requests of a Mem can run at once.
const memShards = 16

// Mem is a sparse disk in memory: pages that were never written, or were
// zeroed since, take no space.
type Mem struct {
	size   atomic.Int64
	closed atomic.Bool
	info   Info
	// shards[i%memShards] has page i. A page's bytes are read and written
	// under its shard's lock, so requests that overlap mix in whole pages.
	shards [memShards]memShard
}

type memShard struct {
	mu    sync.RWMutex
	pages map[int64]*[memPage]byte // absent: a hole
}

// NewMem returns a disk of size bytes that reads as zero. Size must be a
// positive multiple of SectorSize, or zero; NewMem panics otherwise.
func NewMem(size int64) *Mem {
	if size < 0 || size%SectorSize != 0 {
		panic(fmt.Sprintf("blockdev: a disk in memory of %d bytes", size))
	}
	m := &Mem{info: Info{
		Name: "memory", BlockSize: 1, MemAlign: 1, Preferred: memPage, CheapZero: true, CheapTrim: true,
	}}
	m.size.Store(size)
	for i := range m.shards {
		m.shards[i].pages = make(map[int64]*[memPage]byte)
	}
	return m
}

// Info implements Device.
func (m *Mem) Info() Info { return m.info }

// Size implements Device.
func (m *Mem) Size() int64 { return m.size.Load() }

// Do implements Device.
func (m *Mem) Do(reqs []*Request) {
	for _, r := range reqs {
		r.Done = Extent{}
		r.Err = m.do(r)
	}
}

func (m *Mem) do(r *Request) error {
	if m.closed.Load() {
		return fmt.Errorf("%s: %w", m.info.Name, ErrClosed)
	}
	if err := r.Check(&m.info, m.size.Load()); err != nil {
		return fmt.Errorf("%s: %w", m.info.Name, err)
	}
	switch r.Op {
	case OpRead:
		m.read(r.Buf, r.Off)
	case OpWrite:
		m.write(r.Buf, r.Off)
	case OpTrim:
		m.zero(r.Extent(), false)
		if r.Len > 0 {
			r.Done = r.Extent()
		}
	case OpWriteZeroes:
		allocate := r.Flags&FlagNoHole != 0
		if allocate && r.Flags&FlagFastZero != 0 {
			return fmt.Errorf("%s: fast zeroing without a hole: %w", m.info.Name, ErrNotSupported)
		}
		m.zero(r.Extent(), allocate)
	}
	return nil
}

// memSpan splits the head off [off, off+n) that lies in one page: the page,
// its first byte wanted, and how many.
func memSpan(off, n int64) (page, at, length int64) {
	page, at = off/memPage, off%memPage
	return page, at, min(memPage-at, n)
}

func (m *Mem) read(p []byte, off int64) {
	for len(p) > 0 {
		i, at, n := memSpan(off, int64(len(p)))
		s := &m.shards[i%memShards]
		s.mu.RLock()
		if page := s.pages[i]; page != nil {
			copy(p[:n], page[at:])
		} else {
			clear(p[:n])
		}
		s.mu.RUnlock()
		p, off = p[n:], off+n
	}
}

func (m *Mem) write(p []byte, off int64) {
	for len(p) > 0 {
		i, at, n := memSpan(off, int64(len(p)))
		s := &m.shards[i%memShards]
		s.mu.Lock()
		page := s.pages[i]
		if page == nil {
			page = new([memPage]byte)
			s.pages[i] = page
		}
		copy(page[at:], p[:n])
		s.mu.Unlock()
		p, off = p[n:], off+n
	}
}

// zero makes e read as zero: whole pages become holes unless they are to be
// allocated, parts of pages are cleared.
func (m *Mem) zero(e Extent, allocate bool) {
	first, end := (e.Off+memPage-1)/memPage, e.End()/memPage // whole pages
	if allocate || first >= end {
		m.clear(e, allocate)
		return
	}
	m.clear(Extent{e.Off, first*memPage - e.Off}, false)
	m.clear(Extent{end * memPage, e.End() - end*memPage}, false)
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		if end-first > int64(len(s.pages)) {
			for page := range s.pages {
				if page >= first && page < end {
					delete(s.pages, page)
				}
			}
		} else {
			for page := first; page < end; page++ {
				if page%memShards == int64(i) {
					delete(s.pages, page)
				}
			}
		}
		s.mu.Unlock()
	}
}

// clear writes zeroes, into holes only if they are to be allocated.
func (m *Mem) clear(e Extent, allocate bool) {
	for e.Len > 0 {
		i, at, n := memSpan(e.Off, e.Len)
		s := &m.shards[i%memShards]
		s.mu.Lock()
		if page := s.pages[i]; page != nil {
			clear(page[at : at+n])
		} else if allocate {
			s.pages[i] = new([memPage]byte)
		}
		s.mu.Unlock()
		e.Off, e.Len = e.Off+n, e.Len-n
	}
}

// Extents implements Device.
func (m *Mem) Extents(off, length int64, visit func(Run) bool) error {
	if m.closed.Load() {
		return fmt.Errorf("%s: %w", m.info.Name, ErrClosed)
	}
	if err := checkRange(&m.info, off, length, m.size.Load()); err != nil {
		return err
	}
	end := off + length
	var pages []int64
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.RLock()
		for page := range s.pages {
			if page*memPage < end && (page+1)*memPage > off {
				pages = append(pages, page)
			}
		}
		s.mu.RUnlock()
	}
	slices.Sort(pages)
	for off < end {
		if len(pages) == 0 || pages[0]*memPage > off {
			to := end
			if len(pages) > 0 {
				to = pages[0] * memPage
			}
			if !visit(Run{Extent: Extent{off, to - off}, Hole: true, Zero: true}) {
				return nil
			}
			off = to
			continue
		}
		to := off
		for len(pages) > 0 && pages[0]*memPage <= to {
			to = (pages[0] + 1) * memPage
			pages = pages[1:]
		}
		to = min(to, end)
		if !visit(Run{Extent: Extent{off, to - off}}) {
			return nil
		}
		off = to
	}
	return nil
}

// Resize implements Device.
func (m *Mem) Resize(size int64) error {
	if m.closed.Load() {
		return fmt.Errorf("%s: %w", m.info.Name, ErrClosed)
	}
	if err := checkResize(&m.info, size); err != nil {
		return err
	}
	if old := m.size.Load(); size < old {
		m.size.Store(size)
		m.zero(Extent{size, old - size}, false)
		return nil
	}
	m.size.Store(size)
	return nil
}

// Close implements Device. The content is gone.
func (m *Mem) Close() error {
	if m.closed.Swap(true) {
		return fmt.Errorf("%s: %w", m.info.Name, ErrClosed)
	}
	return nil
}

// checkRange is Request.Check for the range of Extents.
func checkRange(info *Info, off, length, size int64) error {
	if off < 0 || length < 0 || off > size || length > size-off {
		return fmt.Errorf("%s: extents of %d bytes at %d of a disk of %d: %w", info.Name, length, off, size, ErrBounds)
	}
	return nil
}

// checkResize says whether a disk with this description can have that size.
func checkResize(info *Info, size int64) error {
	if info.ReadOnly {
		return fmt.Errorf("%s: resize: %w", info.Name, ErrReadOnly)
	}
	if unit := max(info.BlockSize, SectorSize); size < 0 || size%unit != 0 {
		return fmt.Errorf("%s: resize to %d bytes, no multiple of %d: %w", info.Name, size, unit, ErrAlignment)
	}
	return nil
}
