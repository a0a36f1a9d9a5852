package hrl

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// layerSuffix ends the names of layers, layerNew those of unfinished ones.
const (
	layerSuffix = ".layer"
	layerNew    = ".layer.new"
)

// LayerName returns the name of the file of a layer with this digest.
func LayerName(digest [sha256.Size]byte) string { return hex.EncodeToString(digest[:]) + layerSuffix }

// A LayerWriter writes one layer, in the order of the disk. Its memory is a
// constant: the index goes to a file of its own until the frames are complete.
//
// # Durable steps
//
// A crash after step
//
//  1. two files made whose names end in ".layer.new", and written: leaves them
//     in any state; RemoveUnfinished removes them
//  2. the layer's file synced: the same
//  3. renamed to the digest of its content: leaves the layer whole under that name,
//     or the unfinished name
//  4. the directory synced: leaves the layer. Only now may it be offered (H3)
type LayerWriter struct {
	fs    FS
	dir   string
	tmp   string // of both files, without what tells them apart
	info  LayerInfo
	seed  uint32
	out   appendFile
	index appendFile
	sum   hash.Hash // of out
	zip   *zstd.Encoder

	trailer layerTrailer
	page    [layerPageBytes]byte
	held    int        // entries in page
	open    layerEntry // an extent without data that may go on; len 0: none
	raw     []byte     // data that may go on, at most a frame
	rawOff  int64
	end     int64 // on the disk, of what was given
	stored  []byte
	err     error // the first one; nothing is written after it
}

// A LayerFile is a finished layer.
type LayerFile struct {
	Path   string
	Digest [sha256.Size]byte // SHA-256 of the whole file
	Bytes  int64             // of the file
	Data   int64             // bytes on the disk with data
	Zero   int64             // bytes on the disk that became zero
	Lost   int64             // bytes on the disk that could not be read
	// Logged is how many bytes of the disk the log's frames changed of which
	// the layer was made, each time counted; 0 if it was not made of a log.
	Logged int64
}

// NewLayerWriter begins a layer in dir. The caller ends it with Commit or Abort.
func NewLayerWriter(fs FS, dir string, info LayerInfo) (*LayerWriter, error) {
	if err := info.check(); err != nil {
		return nil, fmt.Errorf("write a layer: %w", err)
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	// The level costs about as much time as the disk; the encoder works in
	// the caller's goroutine alone.
	zip, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithWindowSize(LayerDataMax))
	if err != nil {
		return nil, fmt.Errorf("write a layer: %w", err)
	}
	w := &LayerWriter{
		fs: fs, dir: dir, tmp: filepath.Join(dir, hex.EncodeToString(id[:])), info: info, zip: zip, sum: sha256.New(),
		raw: make([]byte, 0, LayerDataMax),
	}
	if w.out.f, err = fs.Create(w.tmp + layerNew); err != nil {
		return nil, errors.Join(err, w.Abort())
	}
	if w.index.f, err = fs.Create(w.tmp + ".index" + layerNew); err != nil {
		return nil, errors.Join(err, w.Abort())
	}
	w.out.sum = w.sum
	var head [layerHeaderBytes]byte
	info.encode(&head)
	w.seed = binary.LittleEndian.Uint32(head[8:])
	if err := w.out.write(head[:]); err != nil {
		return nil, errors.Join(err, w.Abort())
	}
	return w, nil
}

// Data says that the disk holds p at byte off. What is given must follow what was
// given before, on the disk, and lie within it.
func (w *LayerWriter) Data(off int64, p []byte) error {
	if err := w.take(off, int64(len(p))); err != nil {
		return err
	}
	w.flushOpen()
	for len(p) > 0 {
		if n := len(w.raw); n > 0 && (w.rawOff+int64(n) != off || off%LayerDataMax == 0) {
			w.flushData()
		}
		if len(w.raw) == 0 {
			w.rawOff = off
		}
		n := min(int64(len(p)), LayerDataMax-off%LayerDataMax)
		w.raw = append(w.raw, p[:n]...)
		p, off = p[n:], off+n
	}
	return w.err
}

// Zero says that the range of the disk reads as zero.
func (w *LayerWriter) Zero(off, length int64) error {
	return w.plain(layerEntry{off: off, len: length})
}

// Unreadable says that nobody could read the range of the disk: what is below the
// layer shows there.
func (w *LayerWriter) Unreadable(off, length int64) error {
	return w.plain(layerEntry{off: off, len: length, unreadable: true})
}

// plain takes an extent without data.
func (w *LayerWriter) plain(e layerEntry) error {
	if err := w.take(e.off, e.len); err != nil {
		return err
	}
	w.flushData()
	if w.open.len > 0 && w.open.end() == e.off && w.open.unreadable == e.unreadable {
		w.open.len += e.len
		return w.err
	}
	w.flushOpen()
	w.open = e
	return w.err
}

func (w *LayerWriter) take(off, length int64) error {
	if w.err != nil {
		return w.err
	}
	if off < w.end || length <= 0 || length > w.info.Size-off || off%sectorBytes != 0 || length%sectorBytes != 0 {
		w.err = fmt.Errorf("write a layer: %d bytes at %d after byte %d of a disk of %d", length, off, w.end, w.info.Size)
		return w.err
	}
	w.end = off + length
	return nil
}

func (w *LayerWriter) flushOpen() {
	if w.open.len > 0 {
		if w.open.unreadable {
			w.trailer.lost += w.open.len
		} else {
			w.trailer.zero += w.open.len
		}
		w.entry(&w.open)
		w.open = layerEntry{}
	}
}

func (w *LayerWriter) flushData() {
	if len(w.raw) == 0 || w.err != nil {
		return
	}
	f := layerFrame{coding: codingZstd, off: w.rawOff, raw: uint32(len(w.raw))}
	w.stored = w.zip.EncodeAll(w.raw, append(w.stored[:0], make([]byte, layerFrameBytes)...))
	// What saves less than a sixteenth is not worth the time of every reader.
	if len(w.stored)-layerFrameBytes > len(w.raw)-len(w.raw)/16 {
		f.coding = codingRaw
		w.stored = append(w.stored[:layerFrameBytes], w.raw...)
	}
	f.stored = uint32(len(w.stored) - layerFrameBytes)
	f.sum = crc32.Update(w.seed, castagnoli, w.stored[layerFrameBytes:])
	f.encode(w.stored, w.seed)
	e := layerEntry{off: w.rawOff, len: int64(len(w.raw)), pos: w.out.size(), stored: f.stored}
	pad := layerSpan(f.stored) - int64(len(w.stored))
	w.err = w.out.write(append(w.stored, make([]byte, pad)...))
	w.trailer.data += e.len
	w.raw = w.raw[:0]
	w.entry(&e)
}

func (w *LayerWriter) entry(e *layerEntry) {
	if w.err != nil {
		return
	}
	putEntry(w.page[:], w.held, e)
	w.held++
	w.trailer.entries++
	if w.held == layerPageEntries {
		w.flushPage()
	}
}

func (w *LayerWriter) flushPage() {
	if w.held > 0 && w.err == nil {
		sealPage(w.page[:], (w.trailer.entries-1)/layerPageEntries, w.held, w.seed)
		w.held = 0
		w.err = w.index.write(w.page[:])
	}
}

// Commit finishes the layer and makes it durable under its name. After an error
// there is no layer, unless only the directory could not be synced: then there is
// one, whole, that a crash may take away.
func (w *LayerWriter) Commit() (LayerFile, error) {
	file, err := w.commit()
	if aerr := w.Abort(); err == nil {
		err = aerr
	}
	if err == nil {
		err = w.fs.SyncDir(w.dir)
	}
	if err != nil {
		return LayerFile{}, fmt.Errorf("write the layer (%v, %v] of disk %s: %w", w.info.P, w.info.Q, w.info.Disk, err)
	}
	return file, nil
}

func (w *LayerWriter) commit() (file LayerFile, err error) {
	w.flushData()
	w.flushOpen()
	w.flushPage()
	if w.err == nil {
		w.err = w.index.flush()
	}
	if w.err != nil {
		return file, w.err
	}
	w.trailer.index = w.out.size()
	buf := make([]byte, appendChunk)
	for off := int64(0); off < w.index.off; {
		n, err := w.index.f.ReadAt(buf[:min(appendChunk, w.index.off-off)], off)
		if n == 0 {
			return file, fmt.Errorf("read the index: %w", err)
		}
		if err := w.out.write(buf[:n]); err != nil {
			return file, err
		}
		off += int64(n)
	}
	w.trailer.size = w.out.size() + layerTrailerBytes
	var b [layerTrailerBytes]byte
	w.trailer.encode(&b, w.seed)
	if err := w.out.write(b[:]); err != nil {
		return file, err
	}
	if err := w.out.flush(); err != nil {
		return file, err
	}
	if err := w.out.f.Sync(); err != nil {
		return file, err
	}
	if err := w.out.close(); err != nil {
		return file, err
	}
	file = LayerFile{Bytes: w.trailer.size, Data: w.trailer.data, Zero: w.trailer.zero, Lost: w.trailer.lost}
	w.sum.Sum(file.Digest[:0])
	file.Path = filepath.Join(w.dir, LayerName(file.Digest))
	return file, w.fs.Rename(w.tmp+layerNew, file.Path)
}

// Abort gives the layer up and removes what there is of it. After Commit it does
// nothing.
func (w *LayerWriter) Abort() error {
	if w.zip == nil {
		return nil
	}
	// Names that are gone already, or cannot be removed, are left to
	// RemoveUnfinished.
	err := errors.Join(w.out.close(), w.index.close(), w.zip.Close())
	_ = w.fs.Remove(w.tmp + layerNew)
	_ = w.fs.Remove(w.tmp + ".index" + layerNew)
	w.zip = nil
	if w.err == nil {
		w.err = errors.New("write a layer: it was ended")
	}
	return err
}

// RemoveUnfinished removes what a crash has left of layers in dir. No
// LayerWriter may be at work there.
func RemoveUnfinished(fs FS, dir string) error {
	names, err := fs.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasSuffix(n, layerNew) {
			if err := fs.Remove(filepath.Join(dir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

const appendChunk = 1 << 20

// appendFile gathers what is written behind one another.
type appendFile struct {
	f   File
	off int64 // where buf will be
	buf []byte
	sum hash.Hash // of everything written; may be nil
}

func (a *appendFile) size() int64 { return a.off + int64(len(a.buf)) }

func (a *appendFile) write(p []byte) error {
	if a.sum != nil {
		a.sum.Write(p)
	}
	a.buf = append(a.buf, p...)
	if len(a.buf) < appendChunk {
		return nil
	}
	return a.flush()
}

func (a *appendFile) flush() error {
	n, err := a.f.WriteAt(a.buf, a.off)
	a.off += int64(n)
	a.buf = a.buf[:0]
	return err
}

func (a *appendFile) close() error {
	if a.f == nil {
		return nil
	}
	f := a.f
	a.f = nil
	return f.Close()
}
