package hrl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"sort"
	"sync"

	"github.com/klauspost/compress/zstd"

	"afterimage/blockdev"
)

const (
	// layerPagesHeld and layerFramesHeld are how many pages of the index and
	// how many decompressed frames an open layer keeps: 768 KiB.
	layerPagesHeld  = 64
	layerFramesHeld = 8
)

// A Layer is an open layer. Its methods may be called from several goroutines.
// It is a blockdev.Layered.
type Layer struct {
	LayerInfo
	Path string

	f       File
	seed    uint32
	trailer layerTrailer

	// mu guards the two caches, and is not held while the file is read. What
	// they hold is never changed.
	mu     sync.Mutex
	pages  recent
	frames recent
}

// OpenLayer opens a layer and checks header and trailer. The rest is checked as
// it is read, or by Verify. Damage gives a *LayerError.
func OpenLayer(fs FS, path string) (*Layer, error) {
	f, err := fs.Open(path)
	if err != nil {
		return nil, err
	}
	l := &Layer{Path: path, f: f, pages: recent{max: layerPagesHeld}, frames: recent{max: layerFramesHeld}}
	if err := l.open(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return l, nil
}

func (l *Layer) open() error {
	size, err := l.f.Size()
	if err != nil {
		return err
	}
	if size < layerHeaderBytes+layerTrailerBytes {
		return l.bad(0, fmt.Errorf("%d bytes are too short for a layer", size))
	}
	var head [layerHeaderBytes]byte
	if err := l.readAt(head[:], 0); err != nil {
		return err
	}
	if err := l.decode(&head); errors.Is(err, ErrVersion) {
		return fmt.Errorf("layer %s: %w", l.Path, err)
	} else if err != nil {
		return l.bad(0, err)
	}
	l.seed = binary.LittleEndian.Uint32(head[8:])
	var end [layerTrailerBytes]byte
	if err := l.readAt(end[:], size-layerTrailerBytes); err != nil {
		return err
	}
	if err := l.trailer.decode(&end, l.seed, size); err != nil {
		return l.bad(size-layerTrailerBytes, err)
	}
	return nil
}

// unzip returns the decoder of all layers. It has no goroutines and no end. No
// frame can claim more than LayerDataMax of memory.
var unzip = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(LayerDataMax))
})

// readAt fills p. A file that has shrunk is damage, a failed read is not.
func (l *Layer) readAt(p []byte, off int64) error {
	n, err := l.f.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return l.bad(off+int64(n), io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("read layer %s: %w", l.Path, err)
}

func (l *Layer) bad(off int64, err error) error { return &LayerError{l.Path, off, err} }

// Close releases the layer.
func (l *Layer) Close() error {
	return l.f.Close()
}

// Name returns the base name of the layer's file.
func (l *Layer) Name() string { return filepath.Base(l.Path) }

// DiskSize returns the bytes the disk had at the layer's cut Q.
func (l *Layer) DiskSize() int64 { return l.Size }

// DataBytes returns how many bytes of the disk the layer holds data of, and how
// many it says are zero.
func (l *Layer) DataBytes() (data, zero int64) { return l.trailer.data, l.trailer.zero }

// page returns a page of the index, checked.
func (l *Layer) page(i int64) ([]byte, error) {
	l.mu.Lock()
	p := l.pages.get(i)
	l.mu.Unlock()
	if p != nil {
		return p, nil
	}
	p = make([]byte, layerPageBytes)
	at := l.trailer.index + i*layerPageBytes
	if err := l.readAt(p, at); err != nil {
		return nil, err
	}
	if err := checkPage(p, i, &l.trailer, l.Size, l.seed); err != nil {
		return nil, l.bad(at, err)
	}
	l.mu.Lock()
	l.pages.put(i, p)
	l.mu.Unlock()
	return p, nil
}

// find returns the first entry that ends behind off, or false.
func (l *Layer) find(off int64) (layerEntry, bool, error) {
	pages := l.trailer.pages()
	lo, hi := int64(0), pages // the first page whose last entry ends behind off
	for lo < hi {
		mid := lo + (hi-lo)/2
		p, err := l.page(mid)
		if err != nil {
			return layerEntry{}, false, err
		}
		if e := entryAt(p, pageEntries(p)-1); e.end() <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == pages {
		return layerEntry{}, false, nil
	}
	p, err := l.page(lo)
	if err != nil {
		return layerEntry{}, false, err
	}
	n := pageEntries(p)
	i := sort.Search(n, func(i int) bool { e := entryAt(p, i); return e.end() > off })
	if i == n {
		return layerEntry{}, false, l.bad(l.trailer.index+lo*layerPageBytes, errors.New("index page: out of order"))
	}
	return entryAt(p, i), true, nil
}

// Lookup returns the first run of [off, off+n) that the layer has, Zero set if
// it is an extent of zeroes; false if it has nothing there.
func (l *Layer) Lookup(off, n int64) (blockdev.Run, bool, error) {
	for end := off + n; off < end; {
		e, ok, err := l.find(off)
		if err != nil || !ok || e.off >= end {
			return blockdev.Run{}, false, err
		}
		from, to := max(e.off, off), min(e.end(), end)
		if !e.unreadable {
			return blockdev.Run{Extent: blockdev.Extent{Off: from, Len: to - from}, Zero: e.pos == 0, Hole: e.pos == 0}, true, nil
		}
		off = to
	}
	return blockdev.Run{}, false, nil
}

// Extents calls visit for all that the layer has, in order, until it returns
// false. Extents that touch come as the index has them.
func (l *Layer) Extents(visit func(blockdev.Run) bool) error {
	return l.entries(func(e *layerEntry) bool {
		return e.unreadable || visit(blockdev.Run{Extent: blockdev.Extent{Off: e.off, Len: e.len}, Zero: e.pos == 0, Hole: e.pos == 0})
	})
}

// Unreadable calls visit for what the primary could not read at the layer's cut, in
// order, until it returns false. The layer has nothing there.
func (l *Layer) Unreadable(visit func(blockdev.Extent) bool) error {
	if l.trailer.lost == 0 {
		return nil
	}
	return l.entries(func(e *layerEntry) bool { return !e.unreadable || visit(blockdev.Extent{Off: e.off, Len: e.len}) })
}

// entries calls visit for the whole index, in order, until it returns false.
func (l *Layer) entries(visit func(*layerEntry) bool) error {
	for i := range l.trailer.pages() {
		p, err := l.page(i)
		if err != nil {
			return err
		}
		for k := range pageEntries(p) {
			e := entryAt(p, k)
			if !visit(&e) {
				return nil
			}
		}
	}
	return nil
}

// ErrAbsent says that a layer does not have all of what was asked for.
var ErrAbsent = errors.New("not in the layer")

// ReadAt implements io.ReaderAt for ranges that the layer has, as Lookup tells;
// on others it fails with ErrAbsent.
func (l *Layer) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		e, ok, err := l.find(at)
		if err != nil {
			return done, err
		}
		if !ok || e.off > at || e.unreadable {
			return done, fmt.Errorf("layer %s at byte %d of the disk: %w", l.Path, at, ErrAbsent)
		}
		n := min(int64(len(p)-done), e.end()-at)
		part := p[done : done+int(n)]
		if e.pos == 0 {
			clear(part)
		} else {
			data, err := l.frame(&e)
			if err != nil {
				return done, err
			}
			copy(part, data[at-e.off:])
		}
		done += int(n)
	}
	return done, nil
}

// frame returns the raw bytes of an entry's frame, which are not to be changed.
func (l *Layer) frame(e *layerEntry) ([]byte, error) {
	l.mu.Lock()
	data := l.frames.get(e.pos)
	l.mu.Unlock()
	if data != nil && int64(len(data)) == e.len {
		return data, nil
	}
	b := make([]byte, layerSpan(e.stored))
	if err := l.readAt(b, e.pos); err != nil {
		return nil, err
	}
	data, err := l.decodeFrame(e, b)
	if err != nil {
		return nil, l.bad(e.pos, err)
	}
	l.mu.Lock()
	l.frames.put(e.pos, data)
	l.mu.Unlock()
	return data, nil
}

// decodeFrame checks a frame against its entry and returns its raw bytes. b has
// the whole frame and its padding.
func (l *Layer) decodeFrame(e *layerEntry, b []byte) ([]byte, error) {
	var f layerFrame
	if err := f.decode(b, l.seed); err != nil {
		return nil, err
	}
	if f.off != e.off || int64(f.raw) != e.len || f.stored != e.stored {
		return nil, errors.New("frame header: not the frame that the index says")
	}
	stored, pad := b[layerFrameBytes:layerFrameBytes+f.stored], b[layerFrameBytes+f.stored:]
	if crc32.Update(l.seed, castagnoli, stored) != f.sum {
		return nil, fmt.Errorf("frame: %w", errChecksum)
	}
	if !zeroes(pad) {
		return nil, fmt.Errorf("frame: %w", errReserved)
	}
	if f.coding == codingRaw {
		return stored, nil
	}
	zip, err := unzip()
	if err != nil {
		return nil, err
	}
	raw, err := zip.DecodeAll(stored, make([]byte, 0, f.raw))
	if err != nil {
		return nil, fmt.Errorf("frame: %w", err)
	}
	if len(raw) != int(f.raw) {
		return nil, fmt.Errorf("frame: %d bytes came out, not %d", len(raw), f.raw)
	}
	return raw, nil
}

// recent holds the values that were put or got last.
type recent struct {
	max  int
	held []recentValue // the latest last
}

type recentValue struct {
	key   int64
	value []byte
}

func (r *recent) get(key int64) []byte {
	for i := len(r.held) - 1; i >= 0; i-- {
		if r.held[i].key == key {
			v := r.held[i]
			copy(r.held[i:], r.held[i+1:])
			r.held[len(r.held)-1] = v
			return v.value
		}
	}
	return nil
}

func (r *recent) put(key int64, value []byte) {
	if len(r.held) == r.max {
		copy(r.held, r.held[1:])
		r.held = r.held[:r.max-1]
	}
	r.held = append(r.held, recentValue{key, value})
}
