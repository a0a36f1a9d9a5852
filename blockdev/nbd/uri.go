package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// DefaultPort is the TCP port of NBD.
const DefaultPort = "10809"

// A URI names an export of a server:
//
//	nbd://HOST[:PORT]/EXPORT
//	nbd+unix:///EXPORT?socket=PATH
//
// Everything after the first slash is the export's name, so that one beginning
// with a slash is written with two. Characters that mean something are written
// as %XX. A socket whose name begins with %00 is in the abstract namespace.
type URI struct {
	Host   string // with its port; empty for a Unix socket
	Socket string // path of a Unix socket; its first byte is 0 in the abstract namespace
	Export string // empty: the default export
}

// ParseURI reads a URI. TLS (nbds) is not supported.
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, fmt.Errorf("%.200q is no NBD URI: %w", s, err)
	}
	return u, nil
}

func parseURI(s string) (URI, error) {
	p, err := url.Parse(s)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err // without repeating s
		}
		return URI{}, err
	}
	u := URI{Export: strings.TrimPrefix(p.Path, "/")}
	switch {
	case p.Scheme == "nbds" || p.Scheme == "nbds+unix":
		return URI{}, errors.New("TLS is not supported")
	case p.Scheme != "nbd" && p.Scheme != "nbd+unix":
		return URI{}, errors.New("want nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")
	case p.Opaque != "":
		return URI{}, errors.New("want // after the scheme")
	case p.User != nil:
		return URI{}, errors.New("a user name has no meaning without TLS")
	case p.Fragment != "" || strings.HasSuffix(s, "#"):
		return URI{}, errors.New("write # as %23")
	case len(u.Export) > maxName:
		return URI{}, fmt.Errorf("an export's name has at most %d bytes", maxName)
	}
	socket, hasSocket, err := socketParameter(p.RawQuery)
	if err != nil {
		return URI{}, err
	}
	if p.Scheme == "nbd" {
		switch {
		case hasSocket:
			return URI{}, errors.New("a socket needs the scheme nbd+unix")
		case p.Hostname() == "":
			return URI{}, errors.New("the host is missing")
		case strings.Contains(p.Hostname(), ":") && !isIPv6(p.Hostname()):
			return URI{}, fmt.Errorf("the host %.100q has colons and is no IPv6 address", p.Hostname())
		}
		port := p.Port()
		if port == "" {
			port = DefaultPort
		}
		u.Host = net.JoinHostPort(p.Hostname(), port)
		return u, nil
	}
	switch {
	case p.Host != "":
		return URI{}, errors.New("nbd+unix has no host: write nbd+unix:///EXPORT?socket=PATH")
	case socket == "":
		return URI{}, errors.New("the socket is missing: ?socket=PATH")
	case strings.IndexByte(socket[1:], 0) >= 0:
		return URI{}, errors.New("the socket's path has a zero byte")
	}
	u.Socket = socket
	return u, nil
}

func isIPv6(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.Is6()
}

// socketParameter finds socket=PATH in a query. Unlike in forms, + is itself.
// Parameters of other programs are ignored.
func socketParameter(query string) (path string, found bool, err error) {
	for query != "" {
		var one string
		one, query, _ = strings.Cut(query, "&")
		key, value, _ := strings.Cut(one, "=")
		if key != "socket" {
			continue
		}
		if found {
			return "", false, errors.New("two sockets")
		}
		found = true
		if path, err = url.PathUnescape(value); err != nil {
			return "", false, err
		}
	}
	return path, found, nil
}

// String writes the URI so that ParseURI and other programs read it.
func (u URI) String() string {
	// An escaped path may hold / and :, which are readable and safe.
	escape := func(s string) string {
		return strings.NewReplacer("%2F", "/", "+", "%2B").Replace(url.PathEscape(s))
	}
	if u.Socket != "" {
		return "nbd+unix:///" + escape(u.Export) + "?socket=" + escapeQuery(u.Socket)
	}
	host := url.URL{Scheme: "nbd", Host: strings.TrimSuffix(u.Host, ":"+DefaultPort)}
	return host.String() + "/" + escape(u.Export)
}

func escapeQuery(s string) string {
	return strings.NewReplacer("%2F", "/", "&", "%26", "=", "%3D", "+", "%2B", ";", "%3B").Replace(url.PathEscape(s))
}

// dialAddress is the URI's server as package net wants it.
func (u URI) dialAddress() (network, address string) {
	switch {
	case u.Socket == "":
		return "tcp", u.Host
	case u.Socket[0] == 0:
		return "unix", "@" + u.Socket[1:]
	case u.Socket[0] == '@':
		return "unix", "./" + u.Socket // package net would take it for abstract
	}
	return "unix", u.Socket
}
