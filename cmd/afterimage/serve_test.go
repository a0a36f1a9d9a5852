package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
	"afterimage/internal/testenv"
)

// patience bounds everything a test waits for.
const patience = 30 * time.Second

// process is a running afterimage.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout *bufio.Reader
	stderr syncBuffer
}

// start runs afterimage, which is killed with the test at the latest.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	return startCommand(t, exec.Command("afterimage", args...))
}

func startCommand(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout = bufio.NewReader(out)
	cmd.Stderr = &p.stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(4*patience, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		late.Stop()
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	return p
}

// line is the next line on stdout.
func (p *process) line() string {
	p.t.Helper()
	s, err := p.stdout.ReadString('\n')
	if err != nil {
		p.cmd.Wait()
		p.t.Fatalf("%s printed %q and ended: %s", p.cmd, s, &p.stderr)
	}
	return strings.TrimSuffix(s, "\n")
}

// end sends a signal and returns the exit status; -1 if a signal killed it.
func (p *process) end(sig os.Signal) int {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
	return p.wait()
}

func (p *process) wait() int {
	p.t.Helper()
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// image makes a disk of n bytes in a directory of the test's own.
func image(t *testing.T, n int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := blockdev.CreateFile(path, n); err != nil {
		t.Fatal(err)
	}
	return path
}

// dial opens an NBD URI.
func dial(t *testing.T, uri string) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), uri, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func uriOf(socket, export string) string { return nbd.URI{Socket: socket, Export: export}.String() }

// useDisk writes to a disk, makes it durable and reads it back.
func useDisk(t *testing.T, d blockdev.Device, off int64, fill byte) {
	t.Helper()
	want := bytes.Repeat([]byte{fill}, 4096)
	if err := blockdev.WriteAt(d, want, off); err != nil {
		t.Fatal(err)
	}
	if err := blockdev.Flush(d); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if err := blockdev.ReadAt(d, got, off); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("at %d: wrote %d, read %d", off, fill, got[0])
	}
}

// fileHas checks what a file holds at off.
func fileHas(t *testing.T, path string, off int64, fill byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 4096)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, bytes.Repeat([]byte{fill}, len(p))) {
		t.Errorf("%s at %d does not hold %d", path, off, fill)
	}
}

func TestServe(t *testing.T) {
	disk := image(t, 1<<20)
	dir := filepath.Dir(disk)
	socket, pidfile := filepath.Join(dir, "a b+c.sock"), filepath.Join(dir, "pid")
	p := start(t, "serve", disk, "-U", socket, "--pidfile", pidfile)
	uri := p.line()
	if want := uriOf(socket, "disk"); uri != want {
		t.Errorf("URI %s, want %s", uri, want)
	}
	if b, err := os.ReadFile(pidfile); err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(p.cmd.Process.Pid) {
		t.Errorf("pidfile: %q, %v", b, err)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	useDisk(t, dial(t, uri), 0, 1)
	useDisk(t, dial(t, uriOf(socket, "")), 4096, 2)
	if _, err := nbd.Dial(t.Context(), uriOf(socket, "other"), nbd.Options{}); !errors.Is(err, nbd.ErrNoExport) {
		t.Errorf("unknown export: %v", err)
	}
	// Its clients are still connected.
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
	for _, path := range []string{socket, pidfile} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	fileHas(t, disk, 0, 1)
	fileHas(t, disk, 4096, 2)
}

func TestServeSignals(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		disk := image(t, 1<<20)
		p := start(t, "serve", disk, "-U", disk+".sock", "--export", "x/y z")
		c := dial(t, p.line())
		useDisk(t, c, 0, 3)
		p.cmd.Process.Signal(syscall.SIGUSR1)
		testenv.Until(t, "statistics on stderr", func() bool {
			return strings.Contains(p.stderr.String(), "connections: 1 open, 1 since the start, 0 refused")
		})
		useDisk(t, c, 8192, 4)
		if status := p.end(sig); status != 0 {
			t.Errorf("%v: exit status %d: %s", sig, status, &p.stderr)
		}
	}
}

func TestServeJSON(t *testing.T) {
	disk := image(t, 1<<20)
	p := start(t, "serve", disk, "-U", disk+".sock", "--json", "--read-only", "--export", "")
	var s serving
	if err := json.NewDecoder(p.stdout).Decode(&s); err != nil {
		t.Fatal(err)
	}
	if want := (serving{uriOf(disk+".sock", ""), "", 1 << 20, true}); s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
	c := dial(t, s.URI)
	if err := blockdev.WriteAt(c, make([]byte, 512), 0); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Errorf("a write to a read-only disk: %v", err)
	}
	// Read-only, it may be served twice.
	q := start(t, "serve", disk, "-U", disk+"2.sock", "--read-only")
	dial(t, q.line())
	if status := q.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &q.stderr)
	}
}

// TestServeRefused starts servers that may not run beside one that does.
func TestServeRefused(t *testing.T) {
	disk, other := image(t, 1<<20), image(t, 1<<20)
	socket := disk + ".sock"
	p := start(t, "serve", disk, "-U", socket)
	c := dial(t, p.line())
	for _, tt := range []struct {
		message string
		args    []string
	}{
		{"in use by another process", []string{"serve", disk, "-U", disk + "2.sock"}},
		{"in use by another process", []string{"serve", disk, "-U", disk + "2.sock", "--read-only"}},
		{"another server listens", []string{"serve", other, "-U", socket}},
		{"in use by another process", []string{"disk", "compare", disk, other}},
		{"in use by another process", []string{"disk", "copy", other, disk}},
	} {
		q := start(t, tt.args...)
		out, _ := io.ReadAll(q.stdout)
		if status := q.wait(); status != statusRefused || !strings.Contains(q.stderr.String(), tt.message) || len(out) > 0 {
			t.Errorf("%q: exit status %d, %q on stdout, %s", tt.args, status, out, &q.stderr)
		}
	}
	useDisk(t, c, 0, 5)
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
}

// TestServeHostileClients sends what no client should: the server says so on
// stderr, changes nothing and serves on.
func TestServeHostileClients(t *testing.T) {
	disk := image(t, 1<<20)
	socket := disk + ".sock"
	p := start(t, "serve", disk, "-U", socket)
	uri := p.line()
	const hello = "\x00\x00\x00\x03" // the client's flags: fixed newstyle, no zeroes
	const goDefault = "IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00"
	for name, send := range map[string]string{
		"nothing":           "",
		"half of the flags": "\x00\x00",
		"garbage":           strings.Repeat("garbage!", 1000),
		"an option of 4 GiB": hello + "IHAVEOPT\x00\x00\x00\x03\xff\xff\xff\xff" +
			strings.Repeat("x", 1000),
		"garbage after the handshake": hello + goDefault + strings.Repeat("garbage!", 1000),
		"half a request":              hello + goDefault + "\x25\x60\x95\x13\x00\x00",
		"a write of 4 GiB": hello + goDefault +
			"\x25\x60\x95\x13\x00\x00\x00\x01AAAAAAAA\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff" + strings.Repeat("x", 5000),
		"a write beyond the end, cut short": hello + goDefault +
			"\x25\x60\x95\x13\x00\x00\x00\x01AAAAAAAA\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x10\x00" + "xxx",
		"a write, cut short": hello + goDefault +
			"\x25\x60\x95\x13\x00\x00\x00\x01AAAAAAAA\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00" + "xxx",
	} {
		nc, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatalf("%s: the server is gone: %v", name, err)
		}
		nc.SetDeadline(time.Now().Add(patience))
		nc.Write([]byte(send)) // it may hang up before it has read all
		nc.(*net.UnixConn).CloseWrite()
		if _, err := io.Copy(io.Discard, nc); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the server keeps the connection", name)
		}
		nc.Close()
	}
	fileHas(t, disk, 0, 0)
	useDisk(t, dial(t, uri), 0, 7)
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d", status)
	}
	for _, panicked := range []string{"panic", "goroutine "} {
		if strings.Contains(p.stderr.String(), panicked) {
			t.Errorf("stderr: %s", &p.stderr)
		}
	}
}

func TestServeConnections(t *testing.T) {
	disk := image(t, 1<<20)
	p := start(t, "serve", disk, "-U", disk+".sock", "--connections", "1")
	uri := p.line()
	first, err := nbd.Dial(t.Context(), uri, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nbd.Dial(t.Context(), uri, nbd.Options{}); err == nil || !strings.Contains(err.Error(), "as many connections as it may") {
		t.Errorf("a second connection: %v", err)
	}
	useDisk(t, first, 0, 1)
	first.Close()
	c, err := nbd.Dial(t.Context(), uri, nbd.Options{}) // whose place is free at once
	if err != nil {
		t.Fatal(err)
	}
	useDisk(t, c, 0, 2)
	c.Close()
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
}

// TestServeStdio gives a client's socket as standard input.
func TestServeStdio(t *testing.T) {
	disk := image(t, 1<<20)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	cmd := exec.Command("afterimage", "serve", disk, "--stdio")
	cmd.Stdin = theirs
	p := startCommand(t, cmd)
	theirs.Close()
	greeting := make([]byte, 16)
	if _, err := io.ReadFull(ours, greeting); err != nil || string(greeting) != "NBDMAGICIHAVEOPT" {
		t.Errorf("greeting %q, %v", greeting, err)
	}
	ours.Close()
	out, _ := io.ReadAll(p.stdout)
	if len(out) > 0 {
		t.Errorf("%q on stdout", out)
	}
	p.wait() // hanging up in the handshake is not polite, whatever its status
}

// TestServeListenFDs passes a listening socket as systemd does.
func TestServeListenFDs(t *testing.T) {
	disk := image(t, 1<<20)
	run := func(ln interface{ File() (*os.File, error) }) *process {
		f, err := ln.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		// LISTEN_PID must be the server's own id.
		cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec afterimage serve "$0"`, disk)
		cmd.ExtraFiles = []*os.File{f} // the first is descriptor 3
		return startCommand(t, cmd)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: disk + ".sock", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p := run(ln)
	uri := p.line()
	if want := uriOf(disk+".sock", "disk"); uri != want {
		t.Errorf("URI %s, want %s", uri, want)
	}
	useDisk(t, dial(t, uri), 0, 1)
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
	if _, err := os.Lstat(disk + ".sock"); err != nil {
		t.Errorf("systemd's socket: %v", err)
	}

	tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	p = run(tcp)
	if status := p.wait(); status != statusUsage || !strings.Contains(p.stderr.String(), "no Unix socket") {
		t.Errorf("a TCP socket: exit status %d: %s", status, &p.stderr)
	}
}

// TestServeOverNBD puts a server over another, and copies and compares through
// both.
func TestServeOverNBD(t *testing.T) {
	disk := image(t, 8<<20)
	lower := start(t, "serve", disk, "-U", disk+".1.sock")
	upper := start(t, "serve", lower.line(), "-U", disk+".2.sock")
	uri := upper.line()
	if want := uriOf(disk+".2.sock", "disk"); uri != want {
		t.Errorf("URI %s, want %s", uri, want)
	}
	c := dial(t, uri)
	useDisk(t, c, 1<<20, 9)
	c.Close()

	dir := t.TempDir()
	copied := filepath.Join(dir, "copy.raw")
	for _, tt := range []struct {
		status int
		args   []string
	}{
		{statusDone, []string{"disk", "copy", uri, copied}},
		{statusDone, []string{"disk", "compare", uri, copied}},
		{statusDone, []string{"disk", "copy", copied, uri}},
		{statusNotFound, []string{"disk", "compare", uriOf(disk+".2.sock", "other"), copied}},
		{statusUnreachable, []string{"disk", "compare", uriOf(disk+".none.sock", ""), copied}},
		{statusUnreachable, []string{"disk", "copy", copied, uriOf(disk+".none.sock", "")}},
		{statusUnreachable, []string{"serve", uriOf(disk+".none.sock", ""), "-U", disk + ".3.sock"}},
		{statusUsage, []string{"serve", "nbds://host/x", "-U", disk + ".3.sock"}},
		{statusUsage, []string{"disk", "compare", "nbd+unix:///x", copied}},
	} {
		p := start(t, tt.args...)
		io.Copy(io.Discard, p.stdout)
		if status := p.wait(); status != tt.status {
			t.Errorf("%q: exit status %d, want %d: %s", tt.args, status, tt.status, &p.stderr)
		}
	}
	fileHas(t, copied, 1<<20, 9)
	for _, p := range []*process{upper, lower} {
		if status := p.end(syscall.SIGTERM); status != 0 {
			t.Errorf("exit status %d: %s", status, &p.stderr)
		}
	}
	fileHas(t, disk, 1<<20, 9)
}
