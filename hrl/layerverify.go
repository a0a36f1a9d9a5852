package hrl

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Verify reads the whole layer: every byte of it is covered by a checksum or
// must be zero, index and frames must agree, and a file whose name is a digest
// must have that digest. Damage gives a *LayerError.
func (l *Layer) Verify() error {
	if err := l.verifyParts(); err != nil {
		return err
	}
	want, named := strings.CutSuffix(l.Name(), layerSuffix)
	if !named || len(want) != 2*sha256.Size {
		return nil
	}
	sum := sha256.New()
	in := io.NewSectionReader(l.f, 0, l.trailer.size)
	if _, err := io.CopyBuffer(sum, in, make([]byte, appendChunk)); err != nil {
		return fmt.Errorf("read layer %s: %w", l.Path, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return l.bad(0, fmt.Errorf("its digest is %s", got))
	}
	return nil
}

func (l *Layer) verifyParts() error {
	var head, again [layerHeaderBytes]byte
	if err := l.readAt(head[:], 0); err != nil {
		return err
	}
	if l.encode(&again); !bytes.Equal(head[:], again[:]) {
		return l.bad(0, errors.New("the header changed since it was opened"))
	}
	var t layerTrailer
	var end, endAgain [layerTrailerBytes]byte
	if err := l.readAt(end[:], l.trailer.size-layerTrailerBytes); err != nil {
		return err
	}
	if l.trailer.encode(&endAgain, l.seed); end != endAgain {
		return l.bad(l.trailer.size-layerTrailerBytes, errors.New("the trailer changed since it was opened"))
	}
	next, last := int64(layerHeaderBytes), int64(0) // where the next frame is due; the end of the last extent
	page := make([]byte, layerPageBytes)
	buf := make([]byte, layerSpan(LayerDataMax))
	for i := range l.trailer.pages() {
		// Past the cache: it is the file that is looked at.
		at := l.trailer.index + i*layerPageBytes
		if err := l.readAt(page, at); err != nil {
			return err
		}
		if err := checkPage(page, i, &l.trailer, l.Size, l.seed); err != nil {
			return l.bad(at, err)
		}
		for k := range pageEntries(page) {
			e := entryAt(page, k)
			if e.off < last {
				return l.bad(at, errors.New("index page: out of order"))
			}
			last = e.end()
			if e.pos == 0 {
				if e.unreadable {
					t.lost += e.len
				} else {
					t.zero += e.len
				}
				continue
			}
			if e.pos != next {
				return l.bad(at, fmt.Errorf("index page: a frame at byte %d where byte %d was due", e.pos, next))
			}
			t.data += e.len
			next += layerSpan(e.stored)
			b := buf[:layerSpan(e.stored)]
			if err := l.readAt(b, e.pos); err != nil {
				return err
			}
			if _, err := l.decodeFrame(&e, b); err != nil {
				return l.bad(e.pos, err)
			}
		}
	}
	if next != l.trailer.index || t.data != l.trailer.data || t.zero != l.trailer.zero || t.lost != l.trailer.lost {
		return l.bad(next, errors.New("the trailer says something else than the index"))
	}
	return nil
}
