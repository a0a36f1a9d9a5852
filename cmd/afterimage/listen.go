package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"afterimage/blockdev/nbd"
)

// A source is where the clients of serve come from.
type source struct {
	socket string   // the Unix socket to make
	fds    int      // how many sockets systemd has passed
	conn   net.Conn // the one client of --stdio
}

// firstFD is the descriptor of the first socket that systemd passes.
const firstFD = 3

// chooseSource finds the one source that flags and environment name.
func chooseSource(o serveOptions) (*source, error) {
	if o.connections < 1 {
		return nil, usagef("--connections %d: at least one is needed", o.connections)
	}
	fds, err := listenFDs()
	if err != nil {
		return nil, err
	}
	named := 0
	for _, is := range []bool{o.socket != "", o.stdio, fds > 0} {
		if is {
			named++
		}
	}
	if named != 1 {
		err := usagef("say where clients connect: one of -U PATH, --stdio, or a socket from systemd (LISTEN_FDS)")
		return nil, withHint(err, "see 'afterimage serve -h'")
	}
	src := &source{socket: o.socket, fds: fds}
	if o.stdio {
		src.conn, err = stdioConn()
	}
	return src, err
}

// listenFDs is the number of sockets that systemd has passed to this process;
// see sd_listen_fds(3).
func listenFDs() (int, error) {
	pid, set := os.LookupEnv("LISTEN_PID")
	if !set || pid != strconv.Itoa(os.Getpid()) {
		return 0, nil
	}
	s := os.Getenv("LISTEN_FDS")
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > 1024 {
		return 0, usagef("LISTEN_FDS=%q is no number of sockets", s)
	}
	return n, nil
}

// stdioConn is the socket at standard input.
func stdioConn() (net.Conn, error) {
	conn, err := net.FileConn(os.Stdin)
	if _, ok := conn.(*net.UnixConn); ok {
		return conn, nil
	}
	if err == nil {
		conn.Close()
	}
	return nil, withHint(usagef("--stdio: standard input is no connected Unix socket"),
		"libnbd's connect_command gives it one; nbdcopy's and nbdinfo's [ ... ] want no --stdio")
}

// A listener is a Unix socket with its path.
type listener struct {
	net.Listener
	path string // absolute; begins with a zero byte in the abstract namespace
}

// uri names an export on the listener.
func (l *listener) uri(export string) string {
	return nbd.URI{Socket: l.path, Export: export}.String()
}

// open makes, or takes over, the sockets of the source.
func (s *source) open() ([]listener, error) {
	if s.socket != "" {
		path, err := filepath.Abs(s.socket)
		if err != nil {
			return nil, err
		}
		name := s.socket
		if name[0] == '@' {
			name = "./" + name // a file all the same, not Linux's abstract namespace
		}
		ln, err := nbd.ListenUnix(name)
		if err != nil {
			return nil, err
		}
		return []listener{{ln, path}}, nil
	}
	var listeners []listener
	for fd := firstFD; fd < firstFD+s.fds; fd++ {
		ln, err := passedListener(fd)
		if err != nil {
			closeAll(listeners)
			return nil, err
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

func passedListener(fd int) (listener, error) {
	file := os.NewFile(uintptr(fd), fmt.Sprintf("LISTEN_FDS descriptor %d", fd))
	defer file.Close()
	ln, err := net.FileListener(file)
	if err != nil {
		return listener{}, withStatus(fmt.Errorf("%s: %w", file.Name(), err), statusUsage)
	}
	if ln.Addr().Network() != "unix" {
		ln.Close()
		return listener{}, usagef("%s is no Unix socket: over a network a disk needs TLS, which this version does not have", file.Name())
	}
	path := ln.Addr().String()
	if strings.HasPrefix(path, "@") { // how package net writes the abstract namespace
		path = "\x00" + path[1:]
	}
	return listener{ln, path}, nil
}

func closeAll(listeners []listener) {
	for _, ln := range listeners {
		ln.Close()
	}
}
