package gap

import (
	"errors"
	"math/rand/v2"
	"testing"
)

// TestFailEach fails the first operation, then the second, until none is left
// to fail: alone, and with all behind it.
func TestFailEach(t *testing.T) {
	for _, sticky := range []bool{false, true} {
		fired := true
		for k := 1; fired; k++ {
			fired = failAt(t, k, sticky)
			if t.Failed() {
				t.Fatalf("operation %d, sticky %v", k, sticky)
			}
		}
	}
}

// failAt lets operation k of the life of a map fail, then kills and cuts the
// power.
func failAt(t *testing.T, k int, sticky bool) bool {
	const size = 3*gib + 5000
	fs := newVolatileFS()
	m, _ := open(t, fs, size)
	if err := m.Add(7*block, 1); err != nil {
		t.Fatal(err)
	}
	m.Close()

	fs.ops, fs.failAt, fs.sticky = 0, k, sticky
	kept, cut := []int64{7}, []int64{7}
	broken := life(t, fs, size, &kept, &cut)
	fired := fs.fired
	rng := rand.New(rand.NewPCG(1, uint64(k)))
	for _, c := range []struct {
		left *volatileFS
		must []int64
	}{{fs.killed(), kept}, {fs.crash(rng), cut}, {fs.crash(rng), cut}} {
		m, found := open(t, c.left, gib)
		if found.Kind == New {
			if !broken {
				t.Error("the map is gone")
			}
			continue
		}
		for _, b := range c.must {
			if !m.Has(b*block, 1) {
				t.Errorf("block %d is lost: %+v", b, found)
			}
		}
		m.Close()
	}
	return fired
}

// life does one of everything. It puts down what a kill must leave, and what a
// power cut must; and reports whether the file was given up.
func life(t *testing.T, fs *volatileFS, size int64, kept, cut *[]int64) (broken bool) {
	m, found, err := Open(fs, "d/gaps", size, true)
	if err != nil {
		return true
	}
	if found.Kind == New {
		t.Error("new")
	}
	step := func(what string, err error) bool {
		if err != nil && !errors.Is(err, errInjected) {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil && m.Broken() == nil && what != "resize" && what != "close" {
			t.Errorf("%s: %v, and not broken", what, err)
		}
		if err == nil && m.Broken() != nil {
			t.Errorf("%s succeeds though broken: %v", what, m.Broken())
		}
		return err == nil
	}
	add := func(b int64) {
		if step("add", m.Add(b*block, 1)) {
			*kept = append(*kept, b)
		}
		if !m.Has(b*block, 1) {
			t.Errorf("memory lacks block %d", b)
		}
	}
	sync := func() {
		if step("sync", m.Sync()) {
			*cut = append([]int64(nil), *kept...)
		}
	}
	add(5)
	sync()
	add(6)
	step("remove", m.Remove(9*block, block))
	step("remove", m.Remove(5*block, 0))
	step("resize", m.Resize(5*gib))
	add(100)
	sync()
	step("resize", m.Resize(gib+100))
	add(101)
	if step("close", m.Close()) {
		*cut = *kept
	}
	return m.Broken() != nil
}

// TestBrokenReadsAsAll: after a failure the next Open believes nothing.
func TestBrokenReadsAsAll(t *testing.T) {
	for _, op := range []string{"write", "sync"} {
		fs := newVolatileFS()
		m, _ := open(t, fs, gib)
		if err := m.Add(0, 1); err != nil {
			t.Fatal(err)
		}
		fs.failAt = fs.ops + 1
		var err error
		if op == "write" {
			err = m.Add(block, 1)
		} else {
			err = m.Sync()
		}
		if !errors.Is(err, errInjected) || !errors.Is(m.Broken(), errInjected) || !m.Dirty() {
			t.Errorf("%s: %v", op, err)
		}
		for range 2 {
			if err := m.Add(2*block, 1); !errors.Is(err, errInjected) {
				t.Errorf("add to a broken map: %v", err)
			}
		}
		if err := m.Sync(); !errors.Is(err, errInjected) {
			t.Errorf("sync of a broken map: %v", err)
		}
		if err := m.Resize(2 * gib); !errors.Is(err, errInjected) {
			t.Errorf("resize of a broken map: %v", err)
		}
		if err := m.Add(2*gib-1, 1); !errors.Is(err, errInjected) || !m.Has(2*gib-1, 1) || !m.Has(2*block, 1) {
			t.Error("memory does not go on")
		}
		if err := m.Close(); !errors.Is(err, errInjected) {
			t.Errorf("close of a broken map: %v", err)
		}
		left := fs.crash(rand.New(rand.NewPCG(2, 3)))
		if m, found := open(t, left, 2*gib); found.Kind != Unclean || !found.All || found.Why == nil || m.Bytes() != 2*gib {
			t.Errorf("%s: found %+v", op, found)
		}
	}
}

// TestSyncOfOpenFails: what the page cache shows after a failed sync is not believed.
func TestSyncOfOpenFails(t *testing.T) {
	fs := newVolatileFS()
	m, _ := open(t, fs, gib)
	if err := m.Add(0, 1); err != nil {
		t.Fatal(err)
	}
	fs.kill()
	failed := false
	fs.before = func(op string, _ *volatileFile, _ []byte, _ int64) {
		if op == "size" && !failed { // then follow allocate, write, sync
			failed = true
			fs.mu.Lock()
			fs.failAt = fs.ops + 3
			fs.mu.Unlock()
		}
	}
	m, found := open(t, fs, gib)
	if !fs.fired || !found.All || found.Why == nil || m.Bytes() != gib {
		t.Errorf("found %+v", found)
	}
	if err := m.Add(0, 1); err != nil {
		t.Error(err)
	}
}

// TestWriteBackFailedUnseen: write-back failed, and only the dead process could
// have known. What Open finds in the page cache has to become durable.
func TestWriteBackFailedUnseen(t *testing.T) {
	fs := newVolatileFS()
	m, _ := open(t, fs, gib)
	if err := m.Add(9*block, 1); err != nil {
		t.Fatal(err)
	}
	for _, n := range fs.now() {
		for _, v := range n.pending {
			v.lost = true
		}
	}
	fs.kill()
	if m, _ := open(t, fs, gib); !m.Has(9*block, 1) || m.Dirty() {
		t.Error("a kill loses a gap")
	}
	for seed := range uint64(8) {
		if m, _ := open(t, fs.crash(rand.New(rand.NewPCG(seed, 1))), gib); !m.Has(9*block, 1) {
			t.Error("a power cut loses a gap that Open found")
		}
	}
}
