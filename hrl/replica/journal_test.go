package replica

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"afterimage/hrl"
	"afterimage/hrl/wire"
	"afterimage/internal/testenv"
)

var updateGolden = flag.Bool("update", false, "write the golden files of the present formats")

// The golden files hold the bytes of the formats as they are. If a test of them
// fails, a format was changed: raise its version, and keep what reads this one.
func golden(t testing.TB, name string, b []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", "golden", name+".hex")
	if *updateGolden {
		var out strings.Builder
		for at := 0; at < len(b); at += 32 {
			out.WriteString(hex.EncodeToString(b[at:min(at+32, len(b))]) + "\n")
		}
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(out.String()), 0o644))
	}
	text, err := os.ReadFile(path)
	must(t, err)
	want, err := hex.DecodeString(strings.ReplaceAll(string(text), "\n", ""))
	must(t, err)
	return want
}

func digestOf(first string) string { return first + strings.Repeat("0", 64-len(first)) }

// goldenRecords are records of every kind.
func goldenRecords() []record {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	id := func(epoch uint64) wire.PointID { return wire.PointID{Generation: 1, Incarnation: 2, Epoch: epoch} }
	disk := wire.Disk{Name: "root", Size: 1 << 20}
	offer := &wire.Offer{Name: "web", Disks: []wire.Disk{disk}, Generation: 1, Term: 1, Keep: 2, EverySeconds: 2}
	st := &state{VM: wire.VMID{1, 2, 3}, Keep: keepDefault, Role: wire.RoleReplica, Points: []point{}}
	if err := st.offer(&record{Offer: offer, Sender: testSender, Quota: 1 << 30}); err != nil {
		panic(err)
	}
	out := []record{{Kind: kindState, State: st}}
	for e := uint64(1); e <= 4; e++ {
		p := wire.PointInfo{ID: id(e), Time: at, Kind: wire.KindCrash, Received: at, Bytes: 100,
			Disks: []wire.PointDisk{{Disk: disk, Layers: []string{digestOf(string(rune('a' + e)))}}}}
		if e > 1 {
			p.Parent, p.ParentTime = id(e-1), at
		}
		if e == 3 {
			p.Gap = wire.GapPowerCut
			p.Disks[0].Unreadable = [][2]int64{{4096, 8192}, {64 << 10, 4096}}
		}
		out = append(out, record{Kind: kindListed, Time: at, Point: &p})
	}
	more := *offer
	more.Disks = append(more.Disks, wire.Disk{Name: "data", Size: 512})
	return append(out,
		record{Kind: kindFolded, Time: at, Points: []wire.PointID{id(1)}},
		record{Kind: kindRetired, Time: at, Points: []wire.PointID{id(1)}},
		record{Kind: kindPinned, Time: at, Points: []wire.PointID{id(2)}},
		record{Kind: kindUnpinned, Time: at, Points: []wire.PointID{id(2)}},
		record{Kind: kindPinned, Time: at, Points: []wire.PointID{id(3)}},
		record{Kind: kindDamaged, Time: at, Points: []wire.PointID{id(3), id(4)}, Reason: "rot"},
		record{Kind: kindDamaged, Time: at, Points: []wire.PointID{id(3)}},
		record{Kind: kindKeep, Time: at, Keep: 3},
		record{Kind: kindOffered, Time: at, Offer: &more, Sender: "beta"},
		record{Kind: kindStarted, Time: at, Run: &runRecord{Name: "web", Point: id(3), Generation: 2, Disks: []wire.Disk{disk}, Started: at}},
		record{Kind: kindStarted, Time: at, Run: &runRecord{Name: "try", Test: true, Point: id(2), Disks: []wire.Disk{disk}, Started: at}},
		record{Kind: kindCancelled, Time: at, Name: "branch-1"},
		record{Kind: kindStarted, Time: at, Run: &runRecord{Name: "web", Point: id(4), Generation: 3, Disks: []wire.Disk{disk}, Started: at}},
		record{Kind: kindCancelled, Time: at, Name: "branch-2"},
		record{Kind: kindBranchRemoved, Time: at, Name: "branch-1"},
		record{Kind: kindEnded, Time: at, Name: "try"},
		record{Kind: kindStarted, Time: at, Run: &runRecord{Name: "web", Point: id(4), Generation: 4, Disks: []wire.Disk{disk}, Started: at}},
		record{Kind: kindCommitted, Time: at},
	)
}

// journalOf is a journal with these records, and where each of them ends.
func journalOf(t testing.TB, records []record) (b []byte, ends []int) {
	t.Helper()
	head := journalHead{salt: [16]byte{9, 8, 7}, vm: wire.VMID{1, 2, 3}}
	b = make([]byte, journalFirst)
	head.encode(b)
	copy(b[journalMarkAt:], encodeMark(uint64(len(records)), head.seed()))
	for i := range records {
		r, err := encodeRecord(&records[i], uint64(i+1), head.seed())
		must(t, err)
		b = append(b, r...)
		ends = append(ends, len(b))
	}
	return b, ends
}

func TestGoldenJournal(t *testing.T) {
	records := goldenRecords()
	kinds := map[kind]bool{}
	for _, r := range records {
		kinds[r.Kind] = true
	}
	if len(kinds) != 14 {
		t.Errorf("the golden journal has %d kinds of records", len(kinds))
	}
	b, _ := journalOf(t, records)
	if !bytes.Equal(b, golden(t, "journal", b)) {
		t.Error("the journal's format was changed: raise journalVersion")
	}
	p, err := parseJournal("j", golden(t, "journal", b))
	must(t, err)
	s := p.state
	if s.Name != "web" || s.Sender != "beta" || s.Keep != 2 || s.Generation != 4 || s.Role != wire.RolePrimary ||
		len(s.Points) != 4 || !s.Points[0].Retired || !s.Points[2].Pinned || s.Points[3].Damaged != "rot" || s.Points[2].Damaged != "" || s.Points[2].Gap != wire.GapPowerCut || s.Points[3].Gap != "" ||
		s.Base != s.Points[0].ID || s.Folds != 1 || len(s.Runs) != 1 || len(s.Branches) != 1 || s.LastBranch != 2 || len(s.Disks) != 2 {
		t.Errorf("%+v", s)
	}
	// A checkpoint holds all of it.
	again, _ := journalOf(t, []record{{Kind: kindState, State: s}})
	if p, err = parseJournal("j", again); err != nil || !reflect.DeepEqual(p.state, s) {
		t.Errorf("%v: %+v is not %+v", err, p.state, s)
	}
}

// TestJournalDamage changes each byte of a journal, and cuts it off at each.
func TestJournalDamage(t *testing.T) {
	records := goldenRecords()
	b, ends := journalOf(t, records)
	var je *JournalError
	first, by := testenv.Every(t, 7)
	for at := first - 1; at < len(b); at += by {
		bad := bytes.Clone(b)
		bad[at] ^= 4
		_, err := parseJournal("j", bad)
		switch {
		case at == 7:
			if !errors.Is(err, hrl.ErrVersion) {
				t.Fatalf("another version: %v", err)
			}
		case at >= journalHeadBytes && at < journalFirst:
			if err != nil { // the mark, and what nobody uses
				t.Fatalf("byte %d: %v", at, err)
			}
		case !errors.As(err, &je) || !errors.Is(err, hrl.ErrDamaged) || je.Path != "j" || je.Off > int64(at) || je.Hint() == "":
			t.Fatalf("byte %d: %v", at, err)
		}
	}
	head := journalHead{}
	must(t, head.decode(b))
	for n := first - 1; n < len(b); n += by {
		if _, err := parseJournal("j", b[:n]); !errors.As(err, &je) {
			t.Fatalf("%d bytes: %v", n, err)
		}
		// Without the mark it is what a crash leaves.
		short := bytes.Clone(b[:n])
		if n < ends[0] {
			continue
		}
		clear(short[journalMarkAt:][:journalMarkBytes])
		p, err := parseJournal("j", short)
		must(t, err)
		whole := 0
		for whole < len(ends) && ends[whole] <= n {
			whole++
		}
		if p.seq != uint64(whole) || p.end != int64(ends[whole-1]) || p.torn != (ends[whole-1] != n) {
			t.Fatalf("%d bytes: %d records up to byte %d, torn %v", n, p.seq, p.end, p.torn)
		}
		// The mark knows what was there.
		copy(short[journalMarkAt:], encodeMark(uint64(whole), head.seed()))
		if _, err := parseJournal("j", short); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		copy(short[journalMarkAt:], encodeMark(uint64(whole+1), head.seed()))
		if _, err := parseJournal("j", short); !errors.As(err, &je) {
			t.Fatalf("%d bytes, a record is missing: %v", n, err)
		}
	}
	// Nothing of another file passes for a record.
	other, _ := journalOf(t, records)
	o := journalHead{salt: [16]byte{1}, vm: wire.VMID{1, 2, 3}}
	o.encode(other)
	if _, err := parseJournal("j", other); !errors.As(err, &je) {
		t.Fatalf("records of another file: %v", err)
	}
}

// TestJournalTorn: Open drops what was never acknowledged, durably, and goes on.
func TestJournalTorn(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	want := p.points(v, 2)
	must(t, s.Close())
	path := filepath.Join(s.Dir(), p.id.String(), journalName)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = f.Write([]byte("half a record"))
	must(t, errors.Join(err, f.Close()))
	for range 2 {
		s = openStore(t, s.Dir(), Options{})
		v, err = s.VM(p.id)
		must(t, err)
		if got := ids(v.Points()); !reflect.DeepEqual(got, want) {
			t.Fatalf("%v", got)
		}
		p.check(v)
		want = append(want, p.points(v, 1)...)
		must(t, s.Close())
		b, err := os.ReadFile(path)
		must(t, err)
		if bytes.Contains(b, []byte("half a record")) {
			t.Fatal("what was torn is there still")
		}
	}
}

// TestJournalSyncFails: what could not be synced is not in the journal that the
// next record goes to, which is another file.
func TestJournalSyncFails(t *testing.T) {
	p := newPrimary(t, 1, "root")
	fs := newFaultFS(0, false, syscall.EIO)
	s, v := accepted(t, p, Options{FS: fs})
	settle(t, v)
	before := v.journal.f
	fs.mu.Lock()
	fs.ops, fs.failAt = 0, 2 // the sync behind the write
	fs.mu.Unlock()
	if err := v.SetKeep(77); !errors.Is(err, syscall.EIO) || v.Keep() == 77 {
		t.Fatal(err)
	}
	path := filepath.Join(s.Dir(), p.id.String(), journalName)
	if b, err := os.ReadFile(path); err != nil || !bytes.Contains(b, []byte(`"keep":77`)) {
		t.Fatalf("it was not written at all: %v", err)
	}
	must(t, v.SetKeep(5))
	if v.journal.f == before {
		t.Fatal("it is the same file")
	}
	if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, []byte(`"keep":77`)) {
		t.Fatalf("what failed is there still: %v", err)
	}
	_, v = reopened(t, s, p.id)
	if v.Keep() != 5 {
		t.Fatalf("%d", v.Keep())
	}
}

// TestJournalGrows: it is written anew before it is too large, and says the same.
func TestJournalGrows(t *testing.T) {
	p := newPrimary(t, 1, "root")
	s, v := accepted(t, p, Options{})
	p.points(v, 2)
	path := filepath.Join(s.Dir(), p.id.String(), journalName)
	large, shrunk := int64(0), 0
	for i := range 40 {
		v.change.Lock()
		must(t, v.commitLocked(record{Kind: kindKeep, Keep: 10 + i, Reason: strings.Repeat("x", 1<<20)}))
		v.change.Unlock()
		st, err := os.Stat(path)
		must(t, err)
		if st.Size() < large {
			shrunk++
		}
		large = st.Size()
		if large > 3*journalGrown {
			t.Fatalf("%d bytes", large)
		}
	}
	if shrunk < 5 {
		t.Fatalf("written anew %d times", shrunk)
	}
	before := v.current()
	must(t, s.Close())
	s = openStore(t, s.Dir(), Options{})
	v, err := s.VM(p.id)
	must(t, err)
	a, _ := json.Marshal(before)
	b, _ := json.Marshal(v.current())
	if !bytes.Equal(a, b) {
		t.Errorf("%s is not %s", b, a)
	}
	p.check(v)
}

// TestApplyRefuses: records that cannot follow what stands before them.
func TestApplyRefuses(t *testing.T) {
	st := new(state)
	for _, r := range goldenRecords() {
		next, err := st.apply(&r)
		must(t, err)
		st = next
	}
	id := func(e uint64) []wire.PointID { return []wire.PointID{{Generation: 1, Incarnation: 2, Epoch: e}} }
	for name, r := range map[string]record{
		"no kind":               {},
		"unknown":               {Kind: "coronation"},
		"no state":              {Kind: kindState},
		"no offer":              {Kind: kindOffered},
		"no point":              {Kind: kindListed},
		"parent is not newest":  {Kind: kindListed, Point: &wire.PointInfo{ID: wire.PointID{Generation: 9, Incarnation: 1, Epoch: 1}, Parent: id(3)[0], Kind: wire.KindCrash, Disks: st.Points[3].Disks}},
		"a layer twice":         {Kind: kindListed, Point: &wire.PointInfo{ID: wire.PointID{Generation: 9, Incarnation: 1, Epoch: 1}, Parent: id(4)[0], Kind: wire.KindCrash, Disks: st.Points[3].Disks}},
		"retired before":        {Kind: kindRetired, Points: id(1)},
		"the newest":            {Kind: kindRetired, Points: id(4)},
		"folded too far":        {Kind: kindFolded, Points: id(3)},
		"folded nowhere":        {Kind: kindFolded},
		"pinned, but not there": {Kind: kindPinned, Points: id(7)},
		"none kept":             {Kind: kindKeep},
		"started twice":         {Kind: kindStarted, Run: &runRecord{Name: "x", Point: id(4)[0], Generation: 9, Disks: st.Disks}},
		"old generation":        {Kind: kindStarted, Run: &runRecord{Name: "x", Point: id(4)[0], Generation: 3, Disks: st.Disks}},
		"cancelled, committed":  {Kind: kindCancelled, Name: "branch-9"},
		"no such test":          {Kind: kindEnded, Name: "web"},
		"no such branch":        {Kind: kindBranchRemoved, Name: "branch-1"},
	} {
		if _, err := st.apply(&r); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// fixJournal makes the checksums right, so that what lies behind them is reached.
func fixJournal(b []byte) {
	if len(b) < journalFirst {
		return
	}
	le := binary.LittleEndian
	le.PutUint32(b[8:], crc32.Checksum(b[12:journalHeadBytes], castagnoli))
	seed := crc32.Checksum(b[16:32], castagnoli)
	le.PutUint32(b[journalMarkAt:], crc32.Update(seed, castagnoli, b[journalMarkAt+4:][:journalMarkBytes-4]))
	for at := journalFirst; at+recordHeadBytes <= len(b); {
		n := int(le.Uint32(b[at+4:]))
		if n <= 0 || n > len(b)-at-recordHeadBytes {
			return
		}
		le.PutUint32(b[at:], crc32.Update(seed, castagnoli, b[at+4:at+recordHeadBytes+n]))
		at += (recordHeadBytes + n + recordAlign - 1) / recordAlign * recordAlign
	}
}

// FuzzJournal reads arbitrary bytes, and records with arbitrary payloads.
func FuzzJournal(f *testing.F) {
	records := goldenRecords()
	whole, _ := journalOf(f, records)
	f.Add(whole, []byte(nil), false)
	f.Add([]byte(nil), []byte(nil), false)
	for i := range records {
		payload, err := json.Marshal(&records[i])
		must(f, err)
		f.Add([]byte(nil), payload, true)
	}
	f.Fuzz(func(t *testing.T, b, payload []byte, build bool) {
		if len(b)+len(payload) > 1<<16 {
			return
		}
		if build { // one more record behind a few good ones, or alone
			n := len(b) % len(records)
			b, _ = journalOf(t, records[:n])
			r := make([]byte, recordHeadBytes, recordHeadBytes+len(payload))
			binary.LittleEndian.PutUint32(r[4:], uint32(len(payload)))
			binary.LittleEndian.PutUint64(r[8:], uint64(n+1))
			b = append(b, append(r, payload...)...)
			b = append(b, make([]byte, -len(b)&(recordAlign-1))...)
			fixJournal(b)
		}
		p, err := parseJournal("j", b)
		if err != nil {
			return
		}
		if err := p.state.check(true); err != nil {
			t.Fatalf("a state that cannot be: %v", err)
		}
		again, _ := journalOf(t, []record{{Kind: kindState, State: p.state}})
		p.head.encode(again)
		fixJournal(again)
		if _, err := parseJournal("j", again); err != nil {
			t.Fatalf("it cannot be written anew: %v", err)
		}
	})
}
