package wire

import (
	"encoding/json"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestVMID(t *testing.T) {
	id := NewVMID()
	if id[6]>>4 != 4 || id[8]>>6 != 2 || id == NewVMID() {
		t.Errorf("%v is no random UUID", id)
	}
	if got, err := ParseVMID(id.String()); err != nil || got != id {
		t.Errorf("%v: %v", got, err)
	}
	for _, s := range []string{
		"", "x", strings.Repeat("0", 36), "01234567-89AB-4def-8123-456789abcdef", "01234567-89ab-4def-8123-456789abcde",
		"01234567-89ab-4def-8123-456789abcdef0", "0123456789ab-4def-8123-456789abcdef--", "01234567-89ab-4def-8123-456789abcdeg",
		"01234567-89ab-4def-8123-4567-9abcdef", "../34567-89ab-4def-8123-456789abcdef",
	} {
		if id, err := ParseVMID(s); err == nil {
			t.Errorf("%q is taken for %v", s, id)
		}
	}
}

func TestPointID(t *testing.T) {
	for _, p := range []PointID{{}, {1, 2, 345}, {math.MaxUint64, math.MaxUint64, math.MaxUint64}, {0, 0, 1}} {
		if got, err := ParsePointID(p.String()); err != nil || got != p {
			t.Errorf("%v: %v, %v", p, got, err)
		}
	}
	for _, s := range []string{"", "1", "1.2", "1.2.3.4", "01.2.3", "1.2.+3", "1.2.-3", "1.2.3 ", "a.b.c", "0.0.0", "1.2.18446744073709551616", "None"} {
		if p, err := ParsePointID(s); err == nil {
			t.Errorf("%q is taken for %v", s, p)
		}
	}
	rising := []PointID{{}, {1, 1, 1}, {1, 1, 2}, {1, 2, 1}, {2, 1, 1}}
	for i, a := range rising {
		for k, b := range rising {
			if a.Before(b) != (i < k) {
				t.Errorf("%v before %v: %v", a, b, a.Before(b))
			}
		}
	}
	var back struct {
		P PointID
		V VMID
	}
	back.P, back.V = PointID{1, 2, 3}, NewVMID()
	want := back
	b, err := json.Marshal(back)
	if err != nil {
		t.Fatal(err)
	}
	back.P, back.V = PointID{}, VMID{}
	if err := json.Unmarshal(b, &back); err != nil || back != want {
		t.Errorf("%s: %v, %v", b, back, err)
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"a", "web-1.example_X", strings.Repeat("n", NameMax)} {
		if err := CheckName("VM", name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", ".hidden", "-flag", "a/b", "a b", "a\x00", "a\n", "ä", strings.Repeat("n", NameMax+1), "a\xff"} {
		if CheckName("VM", name) == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
	if CheckDigest(strings.Repeat("0af", 32)[:64]) != nil {
		t.Error("a digest is none")
	}
	for _, d := range []string{"", strings.Repeat("A", 64), strings.Repeat("0", 63), strings.Repeat("0", 65), strings.Repeat("/", 64)} {
		if CheckDigest(d) == nil {
			t.Errorf("%q is taken for a digest", d)
		}
	}
}

func TestChecks(t *testing.T) {
	digest := strings.Repeat("0", 64)
	disk := func(name string, size int64) Disk { return Disk{name, size} }
	offer := func(change func(*Offer)) *Offer {
		o := &Offer{Name: "web", Disks: []Disk{disk("root", 512), disk("data", 0)}, Generation: 1, Term: 1}
		change(o)
		return o
	}
	point := func(change func(*PointInfo)) *PointInfo {
		p := &PointInfo{ID: PointID{1, 1, 2}, Parent: PointID{1, 1, 1}, Time: time.Unix(1, 0), Kind: KindCrash,
			Disks: []PointDisk{{Disk: disk("root", 512), Layers: []string{digest}}}}
		change(p)
		return p
	}
	ask := func(change func(*DigestRequest)) *DigestRequest {
		r := &DigestRequest{Disk: "root", Ranges: [][2]int64{{0, 1}, {1 << 60, DigestLenMax}}}
		change(r)
		return r
	}
	many := make([]Disk, DisksMax+1)
	for i := range many {
		many[i] = disk("d"+string(rune('A'+i%26))+string(rune('a'+i/26)), 512)
	}
	for i, c := range []struct {
		what interface{ Check() error }
		good bool
	}{
		{offer(func(o *Offer) {}), true},
		{offer(func(o *Offer) { o.Disks = many[1:] }), true},
		{offer(func(o *Offer) { o.Disks = many }), false},
		{offer(func(o *Offer) { o.Disks = nil }), false},
		{offer(func(o *Offer) { o.Name = "" }), false},
		{offer(func(o *Offer) { o.Generation = 0 }), false},
		{offer(func(o *Offer) { o.Term = 0 }), false},
		{offer(func(o *Offer) { o.Keep = -1 }), false},
		{offer(func(o *Offer) { o.EverySeconds = -1 }), false},
		{offer(func(o *Offer) { o.Disks[1].Name = "root" }), false},
		{offer(func(o *Offer) { o.Disks[1].Name = "../x" }), false},
		{offer(func(o *Offer) { o.Disks[1].Size = -512 }), false},
		{offer(func(o *Offer) { o.Disks[1].Size = 513 }), false},
		{offer(func(o *Offer) { o.Disks[1].Size = 1 << 60 }), false},

		{point(func(p *PointInfo) {}), true},
		{point(func(p *PointInfo) { p.Parent = PointID{} }), true},
		{point(func(p *PointInfo) { p.Kind = KindApp }), true},
		{point(func(p *PointInfo) { p.Disks[0].Layers = nil }), true},
		{point(func(p *PointInfo) { p.Disks[0].Unreadable = [][2]int64{{0, 512}} }), true},
		{point(func(p *PointInfo) { p.Disks[0].Unreadable = [][2]int64{{0, 1024}} }), false},
		{point(func(p *PointInfo) { p.Disks[0].Unreadable = [][2]int64{{-512, 512}} }), false},
		{point(func(p *PointInfo) { p.Disks[0].Unreadable = [][2]int64{{256, 256}, {0, 128}} }), false},
		{point(func(p *PointInfo) { p.Disks[0].Unreadable = make([][2]int64, UnreadableMax+1) }), false},
		{point(func(p *PointInfo) { p.Gap = GapPowerCut }), true},
		{point(func(p *PointInfo) { p.Gap = "one_of_a_newer_host" }), true},
		{point(func(p *PointInfo) { p.Gap, p.Parent = GapPowerCut, PointID{} }), false},
		{point(func(p *PointInfo) { p.Gap = "Power cut" }), false},
		{point(func(p *PointInfo) { p.Gap = strings.Repeat("a", gapMax+1) }), false},
		{point(func(p *PointInfo) { p.Parent = p.ID }), false},
		{point(func(p *PointInfo) { p.Parent = PointID{1, 1, 3} }), false},
		{point(func(p *PointInfo) { p.Parent = PointID{0, 1, 1} }), false},
		{point(func(p *PointInfo) { p.ID = PointID{2, 0, 1} }), false},
		{point(func(p *PointInfo) { p.ID = PointID{} }), false},
		{point(func(p *PointInfo) { p.Kind = "" }), false},
		{point(func(p *PointInfo) { p.Disks = nil }), false},
		{point(func(p *PointInfo) { p.Disks[0].Layers = []string{"x"} }), false},
		{point(func(p *PointInfo) { p.Disks[0].Layers = make([]string, LayersMax+1) }), false},
		{point(func(p *PointInfo) { p.Disks[0].Name = "-" }), false},

		{ask(func(r *DigestRequest) {}), true},
		{ask(func(r *DigestRequest) { r.Ranges = nil }), true},
		{ask(func(r *DigestRequest) { r.Disk = "" }), false},
		{ask(func(r *DigestRequest) { r.Ranges = make([][2]int64, DigestsMax+1) }), false},
		{ask(func(r *DigestRequest) { r.Ranges[0][0] = -1 }), false},
		{ask(func(r *DigestRequest) { r.Ranges[0][1] = 0 }), false},
		{ask(func(r *DigestRequest) { r.Ranges[0][1] = DigestLenMax + 1 }), false},
		{ask(func(r *DigestRequest) { r.Ranges[0][0] = math.MaxInt64 }), false},

		{&Discard{}, true},
		{&Discard{Keep: []string{digest}}, true},
		{&Discard{Keep: []string{digest, ".."}}, false},
	} {
		if err := c.what.Check(); (err == nil) != c.good {
			t.Errorf("case %d: %v", i, err)
		}
	}
}

// TestError: a refusal arrives as it was sent, and programs that only know HTTP
// are told the kind of it.
func TestError(t *testing.T) {
	for _, e := range []Error{
		{Code: CodeOffset, Message: "elsewhere", Synced: 7},
		{Code: CodeParent, Message: "other parent", Newest: PointID{1, 2, 3}},
		{Code: CodeNoRoom, Message: "full", Advice: "make room"},
	} {
		b, err := json.Marshal(&e)
		if err != nil {
			t.Fatal(err)
		}
		var back Error
		if err := json.Unmarshal(b, &back); err != nil || back != e || back.Error() != e.Message || back.Hint() != e.Advice {
			t.Errorf("%s: %+v, %v", b, back, err)
		}
		if strings.Contains(string(b), "newest") != (e.Code == CodeParent) {
			t.Errorf("%s", b)
		}
	}
	for c, status := range map[Code]int{
		CodeVersion: 426, CodeNotAllowed: 403, CodeMalformed: 400, CodeUnknown: 404, CodeBusy: 503, CodeNoVM: 404, CodeNoPoint: 404,
		CodeRole: 409, CodeSender: 409, CodeTerm: 409, CodeExists: 409, CodeOffset: 409, CodeParent: 409, CodeInUse: 409,
		CodeNoRoom: 507, CodeDamaged: 422, CodeUnfit: 422, CodeFailed: 500, "one of a newer host": http.StatusConflict,
	} {
		if c.Status() != status {
			t.Errorf("%s: status %d", c, c.Status())
		}
	}
}

// FuzzNames: each name has one spelling.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"none", "1.2.345", "0.0.0", "01234567-89ab-4def-8123-456789abcdef"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := ParsePointID(s); err == nil && p.String() != s {
			t.Errorf("%q is point %v", s, p)
		}
		if id, err := ParseVMID(s); err == nil && id.String() != s {
			t.Errorf("%q is VM %v", s, id)
		}
	})
}

// FuzzMessages: what is taken from outside, and passes its check, goes out and
// comes in again as it was.
func FuzzMessages(f *testing.F) {
	f.Add([]byte(`{"name":"web","disks":[{"name":"root","size":1024}],"generation":1,"term":1,"every_seconds":1.5}`))
	f.Add([]byte(`{"id":"1.1.1","parent":"none","time":"2026-01-02T03:04:05Z","kind":"crash","disks":[{"name":"root","size":1024,"layers":[]}]}`))
	f.Add([]byte(`{"point":"1.1.1","disk":"root","ranges":[[0,512]]}`))
	f.Add([]byte(`{"keep":[]}`))
	f.Add([]byte(`{"code":"parent","error":"x","newest":"1.2.3"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		again(t, b, &Offer{}, &Offer{})
		again(t, b, &PointInfo{}, &PointInfo{})
		again(t, b, &DigestRequest{}, &DigestRequest{})
		again(t, b, &Discard{}, &Discard{})
		var e Error
		if json.Unmarshal(b, &e) == nil {
			if _, err := json.Marshal(&e); err != nil {
				t.Error(err)
			}
		}
	})
}

func again(t *testing.T, b []byte, one, two interface{ Check() error }) {
	t.Helper()
	if json.Unmarshal(b, one) != nil || one.Check() != nil {
		return
	}
	first, err := json.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(first, two); err != nil {
		t.Fatalf("%s: %v", first, err)
	}
	if err := two.Check(); err != nil {
		t.Fatalf("%s: %v", first, err)
	}
	if second, err := json.Marshal(two); err != nil || string(second) != string(first) {
		t.Errorf("%s became %s: %v", first, second, err)
	}
}
