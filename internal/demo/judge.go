package demo

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
)

// judge compares the disk that is served with the model.
func (s *story) judge(ctx context.Context, uri string) error {
	dev, err := nbd.Dial(ctx, uri, nbd.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer dev.Close()
	area := make([]byte, areaBytes)
	for off := int64(0); off < areaBytes; off += 1 << 20 {
		if err := blockdev.ReadAt(dev, area[off:off+1<<20], areaOff+off); err != nil {
			return err
		}
	}
	n, why := model(area, s.writer.begun())
	s.report.Survived = n
	switch {
	case why != nil:
		s.report.Verdict = why.Error()
	case n < s.report.AckedBefore:
		s.report.Verdict = fmt.Sprintf("it ends with write %d, but write %d had been acknowledged before the point was cut", n, s.report.AckedBefore)
	default:
		s.report.Verdict, err = s.judgeRest(ctx, dev)
		if err != nil {
			return err
		}
	}
	if s.report.Verdict != "" {
		return fmt.Errorf("%w: %s", ErrDifferent, s.report.Verdict)
	}
	s.report.Equal = true
	s.report.Verdict = fmt.Sprintf("equal: the disk after exactly %d writes", n)
	return nil
}

// model finds the n for which the area is what n of at most begun writes have made
// of zeroes, and says why there is none.
func model(area []byte, begun int64) (n int64, why error) {
	// The newest number that is found is the only candidate.
	for off := 0; off < len(area); off += blockBytes {
		n = max(n, int64(binary.LittleEndian.Uint64(area[off:])))
	}
	if n > begun {
		return n, fmt.Errorf("it has write %d, and only %d were begun", n, begun)
	}
	last := make([]int64, len(area)/blockBytes)
	for i := int64(1); i <= n; i++ {
		last[placeOf(i)] = i
	}
	want := make([]byte, blockBytes)
	for b, number := range last {
		clear(want)
		if number > 0 {
			stamp(want, number)
		}
		if got := area[b*blockBytes : (b+1)*blockBytes]; !bytes.Equal(got, want) {
			return n, fmt.Errorf("it has write %d, but block %d is that of write %d, not %d", n, b, binary.LittleEndian.Uint64(got), number)
		}
	}
	return n, nil
}

// judgeRest compares what the writer never touched with the image of the host
// that died, and has the file system checked.
func (s *story) judgeRest(ctx context.Context, dev blockdev.Device) (verdict string, err error) {
	began, err := blockdev.OpenFile(s.image, blockdev.FileOptions{ReadOnly: true, Raw: true})
	if err != nil {
		return "", err
	}
	defer began.Close()
	copyPath := filepath.Join(s.dir, "served.raw")
	served, err := os.Create(copyPath)
	if err != nil {
		return "", err
	}
	defer served.Close()
	if err := served.Truncate(fsBytes); err != nil {
		return "", err
	}
	got, want := make([]byte, 1<<20), make([]byte, 1<<20)
	zero := make([]byte, 1<<20)
	for off := int64(0); off < diskBytes; off += int64(len(got)) {
		if off >= areaOff && off < areaOff+areaBytes {
			continue
		}
		if err := ctx.Err(); err != nil {
			return "", err
		}
		if err := blockdev.ReadAt(dev, got, off); err != nil {
			return "", err
		}
		if err := blockdev.ReadAt(began, want, off); err != nil {
			return "", err
		}
		if !bytes.Equal(got, want) {
			return fmt.Sprintf("it differs in the MiB at byte %d, where nothing was written", off), nil
		}
		if off < fsBytes && !bytes.Equal(got, zero) {
			if _, err := served.WriteAt(got, off); err != nil {
				return "", err
			}
		}
	}
	if !s.report.FileSystem {
		return "", nil
	}
	checked, err := fsck(ctx, copyPath)
	s.report.FsckRun = checked
	if err != nil {
		return err.Error(), nil
	}
	return "", nil
}
