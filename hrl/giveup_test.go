package hrl

import (
	"errors"
	"path/filepath"
	"testing"
)

// TestGiveUp: a log gives all the room that it has, but for what a disk's write still
// needs, and names what it had; a kill then is no power cut, and the log goes on when there
// is room.
func TestGiveUp(t *testing.T) {
	for _, needed := range []bool{false, true} {
		for _, kill := range []bool{false, true} {
			room := true
			var given BlockSet
			o := Options{Quota: 100 * minSegmentBytes, Room: func(int64) bool { return room },
				Reclaimed: func(s *BlockSet) error { given.AddSet(s); return nil }}
			dir := tempDir(t)
			l, _ := openTest(t, dir, o)
			h := newHistory(t, l, 1)
			for i := range 30 {
				h.writeUntilGood(int64(i)*PayloadMax%(testDisk/2)/512*512, PayloadMax, byte(i+1))
			}
			g := NewGroup()
			if needed {
				g.Add(Entry{Kind: KindWrite, Disk: h.disk, Off: testDisk - 512, Len: 512, Data: make([]byte, 512)})
				if err := l.Append(g); err != nil {
					t.Fatal(err)
				}
			}
			l.mu.Lock()
			room = false
			l.mu.Unlock()
			if !l.GiveUp() {
				t.Fatal("no room was given")
			}
			files, _ := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
			want := 0
			if needed {
				want = 1
			}
			if st := l.Stats(); len(files) != want || st.SegmentBytes != int64(want)*minSegmentBytes || st.Spares != 0 {
				t.Fatalf("needed: %v: %d files are left: %+v", needed, len(files), st)
			}
			if l.GiveUp() {
				t.Error("room was given twice")
			}
			if err := h.write(0, 512, 1); err == nil {
				t.Error("appended without room")
			}
			model := h.model
			if needed {
				l.Finished(g)
			}
			if kill {
				if err := l.Abort(); err != nil {
					t.Fatal(err)
				}
				room = true
				var rec Recovery
				if l, rec = openTest(t, dir, o); rec != RecoverKill {
					t.Fatalf("found %v", rec)
				}
				h = newHistory(t, l, 1)
				h.model = model
			}
			l.mu.Lock()
			room = true
			l.mu.Unlock()
			h.writeUntilGood(3*testDisk/4, PayloadMax, 99)
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if f := mustOpen(t, dir).Verify(); len(f) > 0 {
				t.Fatalf("verify: %v", f)
			}
			got, err := replayed(t, dir)
			var inc *IncompleteError
			if !kill && !errors.As(err, &inc) {
				t.Errorf("the log does not say what it gave up: %v", err)
			}
			for off := range got {
				if got[off] != h.model[off] && !given.Has(h.disk, int64(off)) && off < testDisk-512 {
					t.Fatalf("byte %d differs", off)
				}
			}
		}
	}
}
