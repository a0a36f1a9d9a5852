package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"afterimage/hrl"
	"afterimage/hrl/wire"
)

func openStore(t *testing.T, dir string) *boltStore {
	t.Helper()
	s, err := openBolt(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, err := openBolt(dir); !errors.Is(err, hrl.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	if err := s.Apply(Change{"b/2", []byte("two")}, Change{"a/1", []byte("one")}, Change{"b/1", []byte("one")}); err != nil {
		t.Fatal(err)
	}
	if err := s.Apply(Change{"b/1", nil}, Change{"none", nil}, Change{"b/3", []byte("three")}); err != nil {
		t.Fatal(err)
	}
	// One impossible change, and none is made.
	if err := s.Apply(Change{"b/4", []byte("four")}, Change{"", []byte("no key")}); err == nil {
		t.Error("an empty key was kept")
	}
	for range 2 {
		got, err := s.List("b/")
		want := []Entry{{"b/2", []byte("two")}, {"b/3", []byte("three")}}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("got %q, %v; want %q", got, err, want)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = openStore(t, dir)
	}
	st, err := os.Stat(filepath.Join(dir, stateName))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the state's mode: %v, %v", st.Mode(), err)
	}
}

// TestStoreDamaged: whatever happens to the file, opening it fails with an error
// or gives a state. It neither panics nor ends the process.
func TestStoreDamaged(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, stateName)
	s := openStore(t, dir)
	var changes []Change
	for i := range 200 {
		changes = append(changes, Change{"vms/" + string(rune('a'+i%26)) + string(rune('a'+i/26)), bytes.Repeat([]byte{byte(i)}, 300)})
	}
	if err := s.Apply(changes...); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	var cases [][]byte
	for _, n := range []int{1, 100, 4096, 8192, 12288, 20000, len(whole) / 2, len(whole) - 1} {
		cases = append(cases, whole[:n])
	}
	// Over rotten pages bbolt's pointers go astray: the race detector's check of
	// those ends the process, where otherwise there is a panic at the worst.
	for i := 0; i < 20 && !raceEnabled; i++ {
		b := bytes.Clone(whole)
		for range 1 + r.IntN(4000) {
			b[r.IntN(len(b))] ^= byte(1 + r.IntN(255))
		}
		cases = append(cases, b)
	}
	failed := 0
	for i, b := range cases {
		dir := t.TempDir() // bbolt does not let go of a file that made it panic
		path := filepath.Join(dir, stateName)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := openBolt(dir)
		if err != nil {
			failed++
			var h interface{ Hint() string }
			if errors.Is(err, hrl.ErrDamaged) && !errors.As(err, &h) {
				t.Errorf("case %d: no hint with %v", i, err)
			}
			continue
		}
		s.Close()
	}
	if failed < len(cases)/2 {
		t.Errorf("only %d of %d damaged files were noticed", failed, len(cases))
	}
}

func TestState(t *testing.T) {
	s := openStore(t, t.TempDir())
	st, err := loadState(s)
	if err != nil || len(st.vms) != 0 {
		t.Fatal(st, err)
	}
	vms := []vmRecord{
		{ID: wire.NewVMID(), Name: "web", Disks: []diskRecord{{"root", "/i/web.raw"}}, LogDir: "/l", LogQuota: 1 << 30, Added: time.Unix(5, 0).UTC()},
		{ID: wire.NewVMID(), Name: "db", Disks: []diskRecord{{"a", "/i/a"}, {"b", "/i/b"}}},
	}
	rep := &replicationRecord{To: "h:1", EverySeconds: 2, Keep: 3, Limit: 4, Paused: true, Enabled: time.Unix(6, 0).UTC(), LogStale: true}
	peer := peerRecord{Pattern: "h*", Storage: "/r/x y", Quota: 9}
	var changes []Change
	for key, record := range map[string]any{
		keyVM + vms[0].ID.String(): vms[0], keyVM + vms[1].ID.String(): vms[1], keyReplication + vms[0].ID.String(): rep,
		keyShip + vms[0].ID.String(): json.RawMessage(`{"x":1}`), keyPeer + peer.Pattern: peer, keyStorage + peer.Storage: storageRecord{peer.Storage},
	} {
		c, err := put(key, record)
		if err != nil {
			t.Fatal(err)
		}
		changes = append(changes, c)
	}
	if err := s.Apply(changes...); err != nil {
		t.Fatal(err)
	}
	st, err = loadState(s)
	if err != nil {
		t.Fatal(err)
	}
	want := &state{
		vms:          []vmRecord{vms[1], vms[0]},
		replications: map[wire.VMID]*replicationRecord{vms[0].ID: rep},
		ship:         map[wire.VMID]json.RawMessage{vms[0].ID: json.RawMessage(`{"x":1}`)},
		peers:        map[string]peerRecord{"h*": peer},
		storage:      []string{"/r/x y"},
	}
	if !reflect.DeepEqual(st, want) {
		t.Errorf("got %+v, want %+v", st, want)
	}
}

// TestStateRefused: what is not understood is not guessed at.
func TestStateRefused(t *testing.T) {
	id := wire.NewVMID().String()
	for name, changes := range map[string][]Change{
		"another version":   {{keyFormat, []byte("2")}},
		"no version":        {{keyFormat, nil}, {keyPeer + "x", []byte("{}")}},
		"an unknown kind":   {{"ghosts/" + id, []byte("{}")}},
		"no UUID":           {{keyVM + "web", []byte("{}")}},
		"another's record":  {{keyVM + id, []byte(`{"id":"` + wire.NewVMID().String() + `"}`)}},
		"no JSON":           {{keyVM + id, []byte("{")}},
		"no JSON of a peer": {{keyPeer + "x", []byte("[]")}},
	} {
		s := openStore(t, t.TempDir())
		if _, err := loadState(s); err != nil {
			t.Fatal(err)
		}
		if err := s.Apply(changes...); err != nil {
			t.Fatal(err)
		}
		_, err := loadState(s)
		if err == nil {
			t.Errorf("%s: taken", name)
		}
		if version := name == "another version" || name == "no version"; errors.Is(err, errFormat) != version {
			t.Errorf("%s: %v", name, err)
		}
		s.Close()
	}
}
