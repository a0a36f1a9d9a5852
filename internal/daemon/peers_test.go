package daemon

import "testing"

func TestRule(t *testing.T) {
	d := &Daemon{peers: map[string]peerRecord{}}
	for _, p := range []string{"host1.example.com", "*.example.com", "*.lab.example.com", "host?", "h*"} {
		d.peers[p] = peerRecord{Pattern: p}
	}
	for identity, want := range map[string]string{
		"host1.example.com":     "host1.example.com",
		"host2.example.com":     "*.example.com",
		"host2.lab.example.com": "*.lab.example.com",
		"a.b.example.com":       "*.example.com",
		"host7":                 "host?",
		"host77":                "h*",
		"example.com":           "",
		"other":                 "",
		"":                      "",
		"*.example.com":         "*.example.com",
	} {
		got, ok := d.rule(identity)
		if got.Pattern != want || ok != (want != "") {
			t.Errorf("%q: rule %q, want %q", identity, got.Pattern, want)
		}
	}
}

func TestCheckPattern(t *testing.T) {
	for pattern, ok := range map[string]bool{
		"host1": true, "*": true, "*.example.com": true, "h?st-1_a": true, "192.0.2.1": true, "2001:db8::1": true,
		"": false, "a b": false, "a/b": false, "[a-z]": false, `a\*`: false, "ü": false, "a,b": false,
	} {
		if err := checkPattern(pattern); (err == nil) != ok {
			t.Errorf("%q: %v", pattern, err)
		}
	}
}

func TestCheckAddress(t *testing.T) {
	for address, host := range map[string]string{
		"h:1": "h", "h.example.com:10810": "h.example.com", "127.0.0.1:1": "127.0.0.1", "[::1]:5": "::1",
		"h": "", ":1": "", "h:": "", "": "", "::1:5": "", "a:b:c": "",
	} {
		got, err := checkAddress(address)
		if got != host || (err == nil) != (host != "") {
			t.Errorf("%q: %q, %v", address, got, err)
		}
	}
}
