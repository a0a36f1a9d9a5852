package pki

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"slices"
	"strings"
	"testing"
)

func TestParseNames(t *testing.T) {
	long := strings.Repeat("a", 60)
	for _, tt := range []struct {
		in   string
		want []string // nil: refused
	}{
		{"hosta", []string{"hosta"}},
		{"Host-A.example.com,10.0.0.1, ::1", []string{"Host-A.example.com", "10.0.0.1", "::1"}},
		{"10.0.0.1,hosta", []string{"10.0.0.1", "hosta"}},
		{"hosta,hosta,b,hosta", []string{"hosta", "b"}},
		{"2001:DB8::0001", []string{"2001:db8::1"}},
		{"::ffff:10.0.0.1", []string{"10.0.0.1"}},
		{"host_1", []string{"host_1"}},
		{"7", []string{"7"}},
		{"h," + long + "." + long + "." + long, []string{"h", long + "." + long + "." + long}},
		{"", nil},
		{"a,", nil},
		{",a", nil},
		{"*.example.com", nil},
		{"a,*", nil},
		{"a b", nil},
		{"a..b", nil},
		{".a", nil},
		{"a.", nil},
		{"-a", nil},
		{"a-", nil},
		{"a\n", []string{"a"}},
		{"a\nb", nil},
		{"häst", nil},
		{"10.0.0.300", nil},
		{"10.0.0", nil},
		{"[::1]", nil},
		{"fe80::1%eth0", nil},
		{"hosta:10810", nil},
		{"a/b", nil},
		{"a@b", nil},
		{long + "." + long, nil}, // a first name is short
		{strings.Repeat("a", 64), nil},
		{"h," + strings.Repeat("abc.", 64), nil},
	} {
		got, err := ParseNames(tt.in)
		if (err == nil) != (tt.want != nil) || !slices.Equal(got, tt.want) {
			t.Errorf("ParseNames(%q) = %q, %v; want %q", tt.in, got, err, tt.want)
		}
	}
}

// TestNamesOf: certificates of other tools have a common name that means nothing,
// or none.
func TestNamesOf(t *testing.T) {
	ip := net.ParseIP("10.0.0.1")
	for _, tt := range []struct {
		cn   string
		dns  []string
		ips  []net.IP
		want string // names, the identity first; empty: it has none
		ok   bool
	}{
		{"hosta", []string{"hosta", "b"}, nil, "hosta b", true},
		{"b", []string{"hosta", "b"}, []net.IP{ip}, "b hosta 10.0.0.1", true},
		{"10.0.0.1", []string{"hosta"}, []net.IP{ip}, "10.0.0.1 hosta", true},
		{"other", []string{"hosta"}, nil, "hosta", true},
		{"", []string{"hosta"}, nil, "hosta", true},
		{"", nil, []net.IP{ip}, "10.0.0.1", true},
		{"hosta", nil, nil, "", false},
		{"", nil, nil, "", false},
		{"", []string{"*.example.com"}, nil, "*.example.com", false},
		{"*", []string{"hosta", "*"}, nil, "* hosta", false},
		{"", []string{"a\nb"}, nil, "a\nb", false},
	} {
		cert := &x509.Certificate{Subject: pkix.Name{CommonName: tt.cn}, DNSNames: tt.dns, IPAddresses: tt.ips}
		got := namesOf(cert)
		if strings.Join(got, " ") != tt.want {
			t.Errorf("names of %q %q %v: %q, want %q", tt.cn, tt.dns, tt.ips, got, tt.want)
		}
		id, err := Identity(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}})
		if (err == nil) != tt.ok || tt.ok && id != got[0] {
			t.Errorf("identity of %q %q %v: %q, %v", tt.cn, tt.dns, tt.ips, id, err)
		}
	}
	for _, cs := range []*tls.ConnectionState{nil, {}} {
		if id, err := Identity(cs); err == nil {
			t.Errorf("a connection without certificate has the identity %q", id)
		}
	}
}
