package hrl

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"afterimage/blockdev"
)

// LayerOptions say which layer to make of a log.
type LayerOptions struct {
	VM          [16]byte // UUID
	Generation  uint64
	PGeneration uint64 // of Span.P; see LayerInfo
	Disk        string
	Span        Span
	// Copied fills buf with the bytes of a range that was copied; they must
	// have the digest that the log has, or the layer is not made. Nil: copies
	// are missing, as gaps are.
	Copied func(e blockdev.Extent, digest [sha256.Size]byte, buf []byte) error
	// CopiesBelow leaves out whatever has a copy as its newest version: the
	// layer will lie over others that have those bytes (rule R5). Of what was
	// copied and changed afterwards it has the change, as of anything else. What
	// could not be copied, for nobody could read it, is said in either case.
	CopiesBelow bool
}

// copyMax is the most bytes of a copy frame that a layer takes.
const copyMax = PayloadMax

// refsMax is how many references are sorted at once, a variable for tests. At 48
// bytes each that is 48 MiB. One region may have more: its sectors at the most.
var refsMax = 1 << 20

// WriteLayer makes the layer of a span of the segments, in dir. What the log
// does not hold of the span (gaps; copies without Options.Copied) makes it
// impossible: an *IncompleteError names it all. Memory is a constant.
//
// After a power cut the log is evidence of what changed and never content
// (rule R7): the caller then has no business here.
func (r *Segments) WriteLayer(fs FS, dir string, o LayerOptions) (LayerFile, error) {
	pieces, p, q, err := r.pieces(o.Span)
	if err != nil {
		return LayerFile{}, err
	}
	touched, err := touchedBy(pieces, o.Disk)
	if err != nil {
		return LayerFile{}, err
	}
	info := LayerInfo{
		VM: o.VM, Generation: o.Generation, PGeneration: o.PGeneration, Disk: o.Disk,
		P: o.Span.P, Q: o.Span.Q, QTime: q.time, Kind: q.kind,
	}
	if p != nil && o.Span.From == (Position{}) {
		info.PTime = p.time
	}
	for i := range pieces {
		if id, ok := pieces[i].disk(o.Disk); ok {
			info.Size = pieces[i].sizes[id]
		}
	}
	w, err := NewLayerWriter(fs, dir, info)
	if err != nil {
		return LayerFile{}, err
	}
	b := layerBuilder{r: r, w: w, o: &o, pieces: pieces, size: info.Size, missing: missingSet{disk: o.Disk}}
	err = touched.windows(windowRegions, b.window)
	if err == nil {
		err = b.missing.err()
	}
	if err != nil {
		return LayerFile{}, errors.Join(err, w.Abort())
	}
	file, err := w.Commit()
	file.Logged = b.logged
	return file, err
}

// A ref is a version of a range, by where its bytes lie.
type ref struct {
	span
	s    *Segment // nil: zeroes
	at   int64    // of the bytes in the segment; of a copy's digest
	sum  uint32   // CRC-32C of the bytes, taken when the frame was checked
	copy int32    // its place in copies plus one; 0: a write
	lost bool     // could not be read
}

type layerBuilder struct {
	r       *Segments
	w       *LayerWriter
	o       *LayerOptions
	pieces  []piece
	size    int64 // bytes of the disk at the span's end
	c       coverage
	refs    []ref
	missing missingSet
	logged  int64    // bytes of the disk that the span's frames changed
	copies  []copied // of the present window
	buf     []byte
	got     []byte // the bytes of copies[gotCopy-1]
	gotCopy int32
}

// A copied is a copy frame.
type copied struct {
	of     span
	digest [sha256.Size]byte
}

var errManyRefs = errors.New("too many references for a window")

// window writes what lies in [lo, hi). If that is more than can be sorted at
// once it is done in halves; a region always fits.
func (b *layerBuilder) window(lo, hi int64) error {
	hi = min(hi, (b.size+regionBytes-1)/regionBytes*regionBytes)
	if lo >= hi {
		return nil // was cut off by a later shrinking
	}
	err := b.collect(lo, hi)
	if errors.Is(err, errManyRefs) {
		mid := lo + (hi-lo)/(2*regionBytes)*regionBytes
		if err := b.window(lo, mid); err != nil {
			return err
		}
		return b.window(mid, hi)
	}
	if err != nil {
		return err
	}
	slices.SortFunc(b.refs, func(x, y ref) int { return cmp.Compare(x.off, y.off) })
	for i := range b.refs {
		if err := b.emit(&b.refs[i]); err != nil {
			return err
		}
	}
	return nil
}

// collect finds the newest versions of a window.
func (b *layerBuilder) collect(lo, hi int64) error {
	b.refs, b.copies, b.gotCopy = b.refs[:0], b.copies[:0], 0
	var stats LatestStats
	err := b.r.latestWindow(b.pieces, b.o.Disk, lo, hi, &b.c, &stats, func(v *Version) error {
		n := min(v.Len, b.size-v.Off)
		if n <= 0 {
			return nil // was cut off by a later shrinking
		}
		ref := ref{span: span{v.Off, n}}
		switch v.Kind {
		case KindWrite:
			ref.s, ref.at = v.s, v.at
			ref.sum = crc32.Checksum(v.Data[:n], castagnoli)
		case KindCopy:
			if v.Unreadable() {
				ref.lost = true
				break
			}
			if b.o.CopiesBelow {
				return nil
			}
			if b.o.Copied == nil {
				b.missing.add(v.Off, n, true)
				return nil
			}
			if v.of.len > copyMax {
				return fmt.Errorf("a copy of %d bytes at %d of disk %s is too long for a layer", v.of.len, v.of.off, b.o.Disk)
			}
			c := copied{of: v.of, digest: [sha256.Size]byte(v.Data)}
			if k := len(b.copies); k == 0 || b.copies[k-1] != c {
				b.copies = append(b.copies, c)
			}
			ref.s, ref.copy = v.s, int32(len(b.copies))
		case KindGap:
			b.missing.add(v.Off, n, false)
			return nil
		}
		if b.missing.any() {
			return nil // nothing will be written any more: only look for more of it
		}
		if len(b.refs) >= refsMax && hi-lo > regionBytes {
			return errManyRefs
		}
		b.refs = append(b.refs, ref)
		return nil
	})
	if err == nil {
		b.logged += stats.LoggedBytes
		if b.missing.any() {
			b.refs = b.refs[:0]
		}
	}
	return err
}

// emit writes one version.
func (b *layerBuilder) emit(ref *ref) error {
	if ref.lost {
		return b.w.Unreadable(ref.off, ref.len)
	}
	if ref.s == nil {
		return b.w.Zero(ref.off, ref.len)
	}
	if ref.copy > 0 {
		return b.emitCopy(ref)
	}
	if int64(cap(b.buf)) < ref.len {
		b.buf = make([]byte, PayloadMax)
	}
	p := b.buf[:ref.len]
	if n, err := ref.s.f.ReadAt(p, ref.at); n < len(p) {
		return &CorruptError{ref.s.Path, ref.at, err}
	}
	// The frame was whole when it was found; these bytes were read again.
	if crc32.Checksum(p, castagnoli) != ref.sum {
		return &CorruptError{ref.s.Path, ref.at, errChecksum}
	}
	return b.w.Data(ref.off, p)
}

func (b *layerBuilder) emitCopy(ref *ref) error {
	c := &b.copies[ref.copy-1]
	if b.gotCopy != ref.copy {
		b.gotCopy = 0
		b.got = slices.Grow(b.got[:0], int(c.of.len))[:c.of.len]
		e := blockdev.Extent{Off: c.of.off, Len: c.of.len}
		if err := b.o.Copied(e, c.digest, b.got); err != nil {
			return fmt.Errorf("the copy %v of disk %s: %w", e, b.o.Disk, err)
		}
		if sha256.Sum256(b.got) != c.digest {
			return fmt.Errorf("the copy %v of disk %s: its bytes have another digest than the log: %w", e, b.o.Disk, ErrDamaged)
		}
		b.gotCopy = ref.copy
	}
	return b.w.Data(ref.off, b.got[ref.off-c.of.off:][:ref.len])
}
