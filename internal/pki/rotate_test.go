package pki

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"afterimage/hrl"
)

// fingerprint of the certificate that is in use.
func fingerprint(t testing.TB, dir string) string {
	t.Helper()
	info, err := Inspect(dir, time.Now())
	ok(t, err)
	return info.Fingerprint
}

func TestRotate(t *testing.T) {
	a, b := hosts(t)
	oldA, oldB := snapshot(t, a), snapshot(t, b)
	ok(t, Rotate(a, "", nil, Options{}))
	ok(t, Rotate(b, a, nil, Options{Valid: 100 * 24 * time.Hour}))
	for dir, old := range map[string]map[string][]byte{a: oldA, b: oldB} {
		now := snapshot(t, dir)
		if len(now) != len(old) {
			t.Errorf("%s holds %q", dir, files(t, dir))
		}
		for name, data := range now {
			changed := name == certFile || name == keyFile
			if (string(data) != string(old[name])) != changed {
				t.Errorf("%s/%s: changed: %v", dir, name, !changed)
			}
		}
	}
	info, err := Inspect(b, time.Now())
	ok(t, err)
	if !is(info.Names, "hostb", "Alias.example.com", "127.0.0.1", "::1") || info.DaysLeft(time.Now()) != 99 {
		t.Errorf("%+v", info)
	}
	good(t, meet(t, openFiles(t, a).Server(), openFiles(t, b).Client("hosta")), "hosta", "hostb")

	// Other names.
	ok(t, Rotate(b, a, []string{"10.0.0.2", "hostb"}, Options{}))
	if got := openFiles(t, b).Names(); !is(got, "10.0.0.2", "hostb") {
		t.Errorf("the names are %q", got)
	}
	ok(t, Rotate(b, a, nil, Options{}))
	if got := openFiles(t, b).Names(); !is(got, "10.0.0.2", "hostb") {
		t.Errorf("the names have become %q", got)
	}
	if err := Rotate(b, a, []string{"*"}, Options{}); err == nil {
		t.Error("a host may be called *")
	}
}

func TestRotateRefuses(t *testing.T) {
	a, b := hosts(t)
	other := filepath.Join(t.TempDir(), "other")
	ok(t, Init(other, []string{"other"}, Options{}))
	before := snapshot(t, b)
	err := Rotate(b, "", nil, Options{})
	mentions(t, reason(t, err, Missing), "--ca")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	mentions(t, reason(t, Rotate(b, other, nil, Options{}), UnknownCA), "afterimage CA other", filepath.Join(b, caFile))
	reason(t, Rotate(b, a, nil, Options{Now: func() time.Time { return time.Now().Add(11 * year) }}), Expired)
	if err := Rotate(filepath.Join(b, "none"), a, nil, Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if unlock, err := lockDir(hrl.OS, b); err != nil {
		t.Error(err)
	} else {
		if err := Rotate(b, a, nil, Options{}); !errors.Is(err, hrl.ErrLocked) {
			t.Errorf("two at once: %v", err)
		}
		unlock()
	}
	if after := snapshot(t, b); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("what was refused has changed %q", files(t, b))
	}

	// A pair that is lost is replaced; only its names must be known.
	ok(t, os.Remove(filepath.Join(b, keyFile)))
	ok(t, Rotate(b, a, nil, Options{}))
	if name := openFiles(t, b).Name(); name != "hostb" {
		t.Errorf("it is now %s", name)
	}
	ok(t, os.WriteFile(filepath.Join(b, certFile), []byte("junk"), 0o600))
	mentions(t, reason(t, Rotate(b, a, nil, Options{}), Malformed), "--name")
	ok(t, Rotate(b, a, []string{"hostb"}, Options{}))
	openFiles(t, b)
}

// TestChangeCA: hosts go from one CA to another while they talk to each other.
func TestChangeCA(t *testing.T) {
	a, b := hosts(t)
	fa, fb := openFiles(t, a), openFiles(t, b)
	meetBoth := func() {
		t.Helper()
		good(t, meet(t, fa.Server(), fb.Client("hosta")), "hosta", "hostb")
		good(t, meet(t, fb.Server(), fa.Client("hostb")), "hostb", "hosta")
	}
	next := filepath.Join(t.TempDir(), "next")
	ok(t, Init(next, []string{"hosta"}, Options{}))
	newCA, err := os.ReadFile(filepath.Join(next, caFile))
	ok(t, err)
	for _, dir := range []string{a, b} {
		old, err := os.ReadFile(filepath.Join(dir, caFile))
		ok(t, err)
		ok(t, os.WriteFile(filepath.Join(dir, caFile), append(old, newCA...), 0o600))
		meetBoth()
	}
	// A host of the meantime believes both, whichever CA signs.
	c := filepath.Join(t.TempDir(), "c")
	ok(t, Issue(a, c, []string{"hostc"}, Options{}))
	if data := snapshot(t, c)[caFile]; strings.Count(string(data), "BEGIN CERTIFICATE") != 2 {
		t.Errorf("ca.pem of a new host: %s", data)
	}
	for _, dir := range []string{a, b} {
		ok(t, Rotate(dir, next, nil, Options{}))
		meetBoth()
	}
	for _, dir := range []string{a, b} {
		ok(t, os.WriteFile(filepath.Join(dir, caFile), newCA, 0o600))
		meetBoth()
	}
	fc := openFiles(t, c)
	reason(t, fc.Explain(meet(t, fa.Server(), fc.Client("hosta")).client), UnknownCA)
}

// TestRotateCrash ends a rotation at each of its operations. What is left is
// usable, old or new and for the same names, and the next rotation tidies up.
func TestRotateCrash(t *testing.T) {
	a, b := hosts(t)
	fa := openFiles(t, a)
	first := snapshot(t, b)
	seen := map[string]int{}
	for k, fired := 1, true; fired; k++ {
		restore(t, b, first)
		before := fingerprint(t, b)
		running := openFiles(t, b)
		fsys := &faultFS{FS: hrl.OS, failAt: k}
		err := Rotate(b, a, nil, Options{FS: fsys})
		fired = fsys.fired()
		if fired != errors.Is(err, errInjected) {
			t.Fatalf("operation %d: %v", k, err)
		}
		now := fingerprint(t, b)
		seen[fmt.Sprintf("new: %v, files: %d", now != before, len(files(t, b)))]++
		for _, f := range []*Files{running, openFiles(t, b)} {
			good(t, meet(t, f.Server(), fa.Client("hostb")), "hostb", "hosta")
			good(t, meet(t, fa.Server(), f.Client("hosta")), "hosta", "hostb")
			ok(t, f.Err())
		}
		ok(t, Rotate(b, a, nil, Options{}))
		if last := fingerprint(t, b); last == now || last == before {
			t.Errorf("operation %d: the next rotation has changed nothing", k)
		}
		if got := files(t, b); !is(got, caFile, certFile, keyFile) {
			t.Errorf("operation %d: the next rotation leaves %q", k, got)
		}
	}
	for _, want := range []string{
		"new: false, files: 3", // before anything
		"new: false, files: 5", // step 1
		"new: true, files: 4",  // step 2
		"new: true, files: 3",  // step 3
	} {
		if seen[want] == 0 {
			t.Errorf("no crash has left %q: %v", want, seen)
		}
	}
}

// TestRotateSteps: what a step rests on is durable before it. A power cut may lose
// all that was not synced, which the other tests cannot play.
func TestRotateSteps(t *testing.T) {
	a, b := hosts(t)
	cert, key := "cert.pem.new", "key.pem.new"
	steps := []string{
		"create " + cert, "write " + cert, "sync " + cert, "create " + key, "write " + key, "sync " + key, "syncdir b",
		"rename " + key, "syncdir b",
		"rename " + cert, "syncdir b",
	}
	fsys := &faultFS{FS: hrl.OS}
	ok(t, Rotate(b, a, nil, Options{FS: fsys}))
	if !is(fsys.did, steps...) {
		t.Errorf("the steps were %q", fsys.did)
	}
	// One that was cut off after step 2 is finished before anything else.
	ok(t, os.Rename(filepath.Join(b, certFile), filepath.Join(b, cert)))
	copyFile(t, filepath.Join(a, certFile), filepath.Join(b, certFile))
	fsys = &faultFS{FS: hrl.OS}
	ok(t, Rotate(b, a, nil, Options{FS: fsys}))
	if !is(fsys.did, append([]string{"rename " + cert, "syncdir b"}, steps...)...) {
		t.Errorf("the steps were %q", fsys.did)
	}
	if name := openFiles(t, b).Name(); name != "hostb" {
		t.Errorf("it is now %s", name)
	}
}

// TestRotateStates puts together what a crash leaves after each step of the
// package comment, and ends the next rotation at each of its operations too.
func TestRotateStates(t *testing.T) {
	a, b := hosts(t)
	old := snapshot(t, b)
	ok(t, Rotate(b, a, nil, Options{}))
	next := snapshot(t, b)
	torn := func(data []byte) []byte { return data[:len(data)/2] }
	for _, tt := range []struct {
		name                   string
		cert, key, cert2, key2 []byte
		want                   []byte // the certificate in use
		cutOff                 bool   // Inspect says that a rotation was
	}{
		{"certificate torn", old[certFile], old[keyFile], torn(next[certFile]), nil, old[certFile], false},
		{"key torn", old[certFile], old[keyFile], next[certFile], torn(next[keyFile]), old[certFile], false},
		{"step 1", old[certFile], old[keyFile], next[certFile], next[keyFile], old[certFile], false},
		{"step 2", old[certFile], next[keyFile], next[certFile], nil, next[certFile], true},
		{"step 3", next[certFile], next[keyFile], nil, nil, next[certFile], false},
	} {
		state := map[string][]byte{caFile: old[caFile], certFile: tt.cert, keyFile: tt.key}
		if tt.cert2 != nil {
			state[certFile+newSuffix] = tt.cert2
		}
		if tt.key2 != nil {
			state[keyFile+newSuffix] = tt.key2
		}
		for k, fired := 1, true; fired; k++ {
			restore(t, b, state)
			info, err := Inspect(b, time.Now())
			ok(t, err)
			if cutOff := len(info.Warnings) > 0; cutOff != tt.cutOff {
				t.Errorf("%s: %q", tt.name, info.Warnings)
			}
			leaf, err := readCerts(openFiles(t, b).m.path)
			ok(t, err)
			if string(encodeCerts(leaf)) != string(tt.want) {
				t.Errorf("%s: another certificate is in use", tt.name)
			}
			fsys := &faultFS{FS: hrl.OS, failAt: k}
			if err := Rotate(b, a, nil, Options{FS: fsys}); fsys.fired() != errors.Is(err, errInjected) {
				t.Fatalf("%s, operation %d: %v", tt.name, k, err)
			}
			fired = fsys.fired()
			openFiles(t, b)
		}
		if got := files(t, b); !is(got, caFile, certFile, keyFile) {
			t.Errorf("%s: the next rotation leaves %q", tt.name, got)
		}
	}
}
