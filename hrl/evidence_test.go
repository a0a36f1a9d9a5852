package hrl

import (
	"bytes"
	"errors"
	"os"
	"testing"
)

// appendBlocks appends a write of a block each, as finished.
func appendBlocks(t *testing.T, l *Log, d DiskID, blocks ...int64) {
	t.Helper()
	for _, b := range blocks {
		g := NewGroup()
		g.Add(Entry{Kind: KindWrite, Disk: d, Off: b * BlockBytes, Len: 4096, Data: bytes.Repeat([]byte{byte(b) + 1}, 4096)})
		if err := l.Append(g); err != nil {
			t.Fatal(err)
		}
		l.Finished(g)
	}
}

// TestEvidence: what was appended is found, and what is missing of what was synced is
// known to be missing; what is missing behind that is not asked for.
func TestEvidence(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, path string, synced int64)
		want   []int64 // blocks; nil: ErrDamaged
	}{
		{"whole", func(*testing.T, string, int64) {}, []int64{1, 2, 3, 7, 8}},
		{"torn behind the sync", func(t *testing.T, path string, synced int64) {
			poke(t, path, synced+frameBytes+10, 0xff)
		}, []int64{1, 2, 3}},
		{"torn before the sync", func(t *testing.T, path string, synced int64) {
			poke(t, path, synced-100, 0xff)
		}, nil},
		{"cut off before the sync", func(t *testing.T, path string, synced int64) {
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, synced-4096); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, st.Size()); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"removed", func(t *testing.T, path string, _ int64) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := tempDir(t)
			l, _ := openTest(t, dir, Options{Life: [32]byte{1}})
			d, err := l.AddDisk("root", 64<<20)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Recovered(); err != nil {
				t.Fatal(err)
			}
			appendBlocks(t, l, d, 1, 2, 3)
			if err := l.Sync(); err != nil {
				t.Fatal(err)
			}
			l.mu.Lock()
			path, synced := l.tail.path, l.tail.end
			l.mu.Unlock()
			if n := l.Unsynced().Bytes(); n != 3*BlockBytes {
				// The tail's frames are still together.
				t.Errorf("%d bytes are not synced", n)
			}
			appendBlocks(t, l, d, 7, 8)
			if err := l.Abort(); err != nil {
				t.Fatal(err)
			}
			c.damage(t, path, synced)

			l, rec := openTest(t, dir, Options{Life: [32]byte{2}})
			if rec != RecoverPowerCut {
				t.Fatal(rec)
			}
			if d, err = l.AddDisk("root", 64<<20); err != nil {
				t.Fatal(err)
			}
			set, err := l.Evidence(Mark{})
			if c.want == nil {
				if !errors.Is(err, ErrDamaged) {
					t.Fatalf("%v", err)
				}
			} else {
				var want BlockSet
				for _, b := range c.want {
					want.Add(d, b*BlockBytes, 1)
				}
				if err != nil || set.Bytes() != want.Bytes() {
					t.Fatalf("%d bytes, not %d: %v", set.Bytes(), want.Bytes(), err)
				}
				want.Runs(func(d DiskID, off, length int64) {
					if !set.Has(d, off) {
						t.Errorf("byte %d is not evident", off)
					}
				})
			}
			if err := l.Recovered(); err != nil {
				t.Fatal(err)
			}
			// What was before is no evidence any more, nor missed.
			appendBlocks(t, l, d, 9)
			if err := l.Abort(); err != nil {
				t.Fatal(err)
			}
			l, _ = openTest(t, dir, Options{Life: [32]byte{3}})
			if _, err = l.AddDisk("root", 64<<20); err != nil {
				t.Fatal(err)
			}
			set, err = l.Evidence(Mark{l.Incarnation() - 1, 0})
			if err != nil || set.Bytes() != BlockBytes || !set.Has(d, 9*BlockBytes) {
				t.Errorf("after another power cut: %d bytes, %v", set.Bytes(), err)
			}
			if err := l.Abort(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestEvidenceMark: what lies before the mark does not count.
func TestEvidenceMark(t *testing.T) {
	dir := tempDir(t)
	l, _ := openTest(t, dir, Options{Life: [32]byte{1}})
	d, err := l.AddDisk("root", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	appendBlocks(t, l, d, 1)
	cut, err := l.Cut(CutCrash)
	if err != nil {
		t.Fatal(err)
	}
	appendBlocks(t, l, d, 5)
	set, err := l.Evidence(cut.Mark())
	if err != nil || !set.Has(d, 5*BlockBytes) || set.Has(d, 6*BlockBytes) {
		t.Errorf("while it is open: %d bytes, %v", set.Bytes(), err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, _ = openTest(t, dir, Options{Life: [32]byte{1}})
	if _, err = l.AddDisk("root", 64<<20); err != nil {
		t.Fatal(err)
	}
	set, err = l.Evidence(cut.Mark())
	if err != nil || set.Bytes() != BlockBytes || !set.Has(d, 5*BlockBytes) {
		t.Errorf("after it was closed: %d bytes, %v", set.Bytes(), err)
	}
	if err := l.Abort(); err != nil {
		t.Fatal(err)
	}
}

// TestSyncWhileAppending: a sync vouches for what had been appended, and not for an
// append that is under way.
func TestSyncWhileAppending(t *testing.T) {
	fsys := newFaultFS()
	l, _ := openTest(t, tempDir(t), Options{FS: fsys, AppendLimit: -1})
	d, err := l.AddDisk("root", 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	appendBlocks(t, l, d, 1, 2)
	hang := make(chan struct{})
	fsys.set(func() { fsys.hang = hang })
	done := make(chan struct{})
	go func() {
		defer close(done)
		appendBlocks(t, l, d, 3)
	}()
	fsys.waitHanging(t)
	if err := l.Sync(); err != nil {
		t.Error(err)
	}
	l.metaMu.Lock()
	synced := l.meta.syncedSeq
	l.metaMu.Unlock()
	if synced != 2 {
		t.Errorf("the log vouches for frame %d while 3 is being written", synced)
	}
	close(hang)
	<-done
	fsys.set(func() { fsys.hang = nil })
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}
