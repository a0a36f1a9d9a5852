package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// readme is the README's blocks of code, each with the word behind its fence in
// the first line, with this test's directory in the place of /run.
func readme(t *testing.T, dir string) []string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	here := strings.NewReplacer("bin/afterimage", "afterimage", "/run/", dir+"/")
	var blocks []string
	for i, b := range strings.Split(string(text), "```") {
		if i%2 == 1 {
			blocks = append(blocks, here.Replace(b))
		}
	}
	return blocks
}

// block is the one block that holds what.
func block(t *testing.T, blocks []string, what string) string {
	t.Helper()
	for _, b := range blocks {
		if strings.Contains(b, what) {
			return b
		}
	}
	t.Fatalf("the README has no block with %q", what)
	panic("unreachable")
}

// playSession runs a block: what stands after "$ " is run, what follows is what
// it prints. Servers run on and are returned.
func playSession(t *testing.T, session string) (servers []*process) {
	t.Helper()
	for _, step := range strings.Split(session, "\n$ ")[1:] {
		line, want, _ := strings.Cut(step, "\n")
		p := startCommand(t, exec.Command("sh", "-c", "exec "+line))
		for want := range strings.Lines(strings.TrimSpace(want)) {
			if got := p.line(); got != strings.TrimSpace(want) {
				t.Errorf("%s prints %q, the README says %q", line, got, want)
			}
		}
		if strings.Contains(line, " serve ") {
			servers = append(servers, p)
			continue
		}
		if strings.Contains(line, " daemon ") {
			p.line() // it is ready
			servers = append(servers, p)
			continue
		}
		if status := p.wait(); status != 0 {
			t.Errorf("%s: exit status %d: %s", line, status, p.stderr.String())
		}
	}
	return servers
}

// playReadme runs the README's session; use is given the disk's URI while it is
// served. The proof at its end must hold, and must not be for nothing.
func playReadme(t *testing.T, blocks []string, dir string, use func(uri string)) {
	t.Helper()
	t.Chdir(dir)
	servers := playSession(t, block(t, blocks, " serve "))
	if len(servers) != 1 {
		t.Fatalf("the README starts %d servers", len(servers))
	}
	use(fmt.Sprintf("nbd+unix:///vm1?socket=%s/vm1.sock", dir))
	if status := servers[0].end(syscall.SIGTERM); status != 0 {
		t.Fatalf("serve: exit status %d: %s", status, servers[0].stderr.String())
	}
	if status, _, _ := runCommand(t, "disk", "compare", "began.raw", "vm1.raw"); status != statusDamaged {
		t.Fatal("nothing was written, so the session proves nothing")
	}
	playSession(t, block(t, blocks, "log replay"))
}

func TestReadme(t *testing.T) {
	dir := t.TempDir()
	playReadme(t, readme(t, dir), dir, func(uri string) {
		c := dial(t, uri)
		defer c.Close()
		for i := range int64(100) {
			if err := blockdev.WriteAt(c, []byte(fmt.Sprintf("write %d", i)), i*i*65537); err != nil {
				t.Fatal(err)
			}
		}
		if err := blockdev.Flush(c); err != nil {
			t.Fatal(err)
		}
	})
}

// TestRealReadmeQEMU opens the disk with the README's QEMU line and writes to it
// as a guest would.
func TestRealReadmeQEMU(t *testing.T) {
	testenv.Need(t, "qemu-system-x86_64")
	dir := t.TempDir()
	blocks := readme(t, dir)
	line := strings.TrimSpace(block(t, blocks, "qemu-system-x86_64"))
	playReadme(t, blocks, dir, func(string) {
		q := newQMP(t, strings.TrimSuffix(line, "..."))
		for _, c := range []string{"write -P 0x5a 1M 64k", "write -z 1M 4k", "write -f -P 0x77 10G 512", "discard 2M 1M", "flush", "read -P 0x5a 1028k 60k"} {
			out := q.monitor("qemu-io disk0 \"" + c + "\"")
			if strings.Contains(strings.ToLower(out), "fail") || strings.Contains(out, "rror") {
				t.Errorf("%s: %s", c, out)
			}
		}
		q.quit()
	})
}

// TestRealReadmeLibvirt has libvirt read the README's disk.
func TestRealReadmeLibvirt(t *testing.T) {
	virsh := testenv.Need(t, "virsh")
	dir := t.TempDir()
	_, disk, _ := strings.Cut(block(t, readme(t, "/run"), "<disk "), "\n")
	domain := "<domain type='test'><name>vm1</name><memory>8192</memory><os><type>hvm</type></os><devices>" + disk + "</devices></domain>"
	path := filepath.Join(dir, "vm1.xml")
	if err := os.WriteFile(path, []byte(domain), 0o600); err != nil {
		t.Fatal(err)
	}
	// libvirt's test driver parses as every other, and needs no daemon.
	out, err := exec.Command(virsh, "-c", "test:///default", "define --validate "+path+"; dumpxml vm1").CombinedOutput()
	if err != nil {
		t.Fatalf("virsh: %v: %s", err, out)
	}
	for _, want := range []string{"protocol='nbd' name='vm1'", "transport='unix' socket='/run/vm1.sock'"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("libvirt did not take %s from the README's disk: %s", want, out)
		}
	}
}

// qmp is a QEMU without a guest.
type qmp struct {
	t    *testing.T
	cmd  *exec.Cmd
	conn net.Conn
	dec  *json.Decoder
}

// newQMP starts the shell line, a QEMU, with its guest held.
func newQMP(t *testing.T, line string) *qmp {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "qmp")
	q := &qmp{t: t, cmd: exec.Command("sh", "-c", "exec "+line+" -S -nodefaults -display none -accel tcg -m 64 -qmp unix:"+socket+",server=on,wait=off")}
	q.cmd.Stderr = os.Stderr
	if err := q.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.cmd.Process.Kill() })
	testenv.Until(t, "QEMU listens", func() bool {
		var err error
		q.conn, err = net.Dial("unix", socket)
		return err == nil
	})
	q.conn.SetDeadline(time.Now().Add(patience))
	q.dec = json.NewDecoder(q.conn)
	var greeting any
	if err := q.dec.Decode(&greeting); err != nil {
		t.Fatal(err)
	}
	q.do(`{"execute":"qmp_capabilities"}`)
	return q
}

// do gives a command and returns what it returns.
func (q *qmp) do(command string) json.RawMessage {
	q.t.Helper()
	if _, err := q.conn.Write([]byte(command)); err != nil {
		q.t.Fatal(err)
	}
	for {
		var r struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := q.dec.Decode(&r); err != nil {
			q.t.Fatalf("%s: %v", command, err)
		}
		if r.Error != nil {
			q.t.Fatalf("%s: %s", command, r.Error)
		}
		if r.Return != nil { // else an event
			return r.Return
		}
	}
}

// monitor gives a command of QEMU's human monitor and returns what it prints.
func (q *qmp) monitor(line string) string {
	q.t.Helper()
	b, err := json.Marshal(map[string]any{"execute": "human-monitor-command", "arguments": map[string]string{"command-line": line}})
	if err != nil {
		q.t.Fatal(err)
	}
	var out string
	if err := json.Unmarshal(q.do(string(b)), &out); err != nil {
		q.t.Fatal(err)
	}
	return out
}

func (q *qmp) quit() {
	q.t.Helper()
	q.do(`{"execute":"quit"}`)
	if err := q.cmd.Wait(); err != nil {
		q.t.Errorf("QEMU: %v", err)
	}
}

// TestReadmeTwoHosts plays the session of the two hosts, block by block: the guest
// writes, the first host is killed, and the second has what was written.
func TestReadmeTwoHosts(t *testing.T) {
	dir := memDir(t)
	blocks := readme(t, dir)
	t.Chdir(dir)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	var session []string
	for _, b := range blocks {
		if strings.Contains(b, "host1") || strings.Contains(b, "host2") {
			session = append(session, strings.ReplaceAll(b, "127.0.0.1:10810", address))
		}
	}
	sock := func(host string) string { return filepath.Join(dir, host, "nbd.sock") }
	write := func(off int64, fill byte) {
		t.Helper()
		c := dial(t, uriOf(sock("host1"), "vm1/root"))
		useDisk(t, c, off, fill)
		c.Close()
	}
	var daemons []*process
	for i, b := range session {
		switch {
		case strings.Contains(b, "replica sync"):
			write(1<<20, 7)
		case strings.Contains(b, "failover start"):
			write(2<<20, 8)
			playSession(t, "\n$ afterimage replica sync vm1 --admin host1/admin.sock\n")
			daemons[0].end(syscall.SIGKILL)
		}
		daemons = append(daemons, playSession(t, b)...)
		if t.Failed() {
			t.Fatalf("block %d of the session:\n%s", i, b)
		}
	}
	if len(session) != 7 || len(daemons) != 2 {
		t.Fatalf("the session has %d blocks and starts %d daemons", len(session), len(daemons))
	}
	c := dial(t, uriOf(sock("host2"), "vm1/root"))
	for off, fill := range map[int64]byte{1 << 20: 7, 2 << 20: 8} {
		b := make([]byte, 4096)
		if err := blockdev.ReadAt(c, b, off); err != nil || b[0] != fill || b[4095] != fill {
			t.Errorf("at byte %d: %d, %v; the guest wrote %d", off, b[0], err, fill)
		}
	}
	c.Close()
	if status := daemons[1].end(syscall.SIGTERM); status != statusDone {
		t.Errorf("the second daemon ended with status %d: %s", status, daemons[1].stderr.String())
	}
}
