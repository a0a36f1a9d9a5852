package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/admin"
	"afterimage/internal/testenv"
)

// TestRealWitness has QEMU write down what it asks of the disk, in the order in which it
// was done (blklogwrites): each recovery point equals the disk after some of these writes,
// and a later point is one after more of them.
func TestRealWitness(t *testing.T) {
	testenv.Need(t, "qemu-io")
	const size, writes = 4 << 20, 1500
	a, b := twoHosts(t)
	uris := a.add("web", size, "root")
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1s", "--keep", "last=100")
	a.do("replica", "sync", "web")
	u, err := url.Parse(uris[0])
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(a.dir, "witness")
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu := exec.Command("qemu-io", "--image-opts", fmt.Sprintf(
		"driver=blklogwrites,file.driver=nbd,file.server.type=unix,file.server.path=%s,file.export=%s,log.driver=file,log.filename=%s",
		u.Query().Get("socket"), u.Path[1:], log))
	// From a file: from a pipe it reads lines that it then waits for.
	var script strings.Builder
	r := rand.New(rand.NewPCG(5, 6))
	for i := range writes {
		n := int64(1+r.IntN(16)) * 512
		off := r.Int64N((size-n)/512) * 512
		line := fmt.Sprintf("write -P %d %d %d\n", 1+i%255, off, n)
		switch r.IntN(12) {
		case 0:
			line = "flush\n"
		case 1:
			line = fmt.Sprintf("write -z %d %d\n", off, n)
		case 2:
			line = fmt.Sprintf("write -f -P %d %d %d\n", 1+i%255, off, n)
		}
		script.WriteString(line)
		if i%50 == 0 {
			script.WriteString("sleep 100\n") // so that there are points between
		}
	}
	script.WriteString("flush\nquit\n")
	commands := filepath.Join(a.dir, "commands")
	if err := os.WriteFile(commands, []byte(script.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(commands)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var out bytes.Buffer
	qemu.Stdin, qemu.Stdout, qemu.Stderr = in, &out, &out
	if err := qemu.Run(); err != nil || bytes.Contains(out.Bytes(), []byte("rror")) {
		t.Fatalf("qemu-io: %v: %s", err, out.Bytes())
	}
	a.do("replica", "sync", "web")

	after := replayWitness(t, log, size)
	var points []admin.Point
	b.decode(&points, "point", "list", "web")
	last := -1
	for _, p := range points {
		got := b.digest(fmt.Sprintf("web@%s/root", p.ID), size)
		at, ok := after[got]
		switch {
		case !ok:
			t.Errorf("point %s equals the disk at no time", p.ID)
		case at < last:
			t.Errorf("point %s is the disk after %d writes, an earlier one after %d", p.ID, at, last)
		}
		last = max(last, at)
	}
	if last != len(after)-1 && after[b.digest("web@latest/root", size)] != last {
		t.Errorf("the newest point is the disk after %d writes of %d", last, len(after)-1)
	}
	t.Logf("%d points, each the disk after some of %d changes", len(points), len(after)-1)
	if len(points) < 3 {
		t.Errorf("%d points are too few to say anything", len(points))
	}
	a.end()
	b.end()
}

// digest is the SHA-256 of a disk of a point.
func (h *hostProcess) digest(point string, size int64) [sha256.Size]byte {
	h.t.Helper()
	served := start(h.t, "point", "serve", point, "-U", filepath.Join(h.dir, "witness.sock"), "--admin", filepath.Join(h.dir, "state", "admin.sock"))
	c := dial(h.t, served.line())
	buf := make([]byte, size)
	if err := blockdev.ReadAt(c, buf, 0); err != nil {
		h.t.Fatal(err)
	}
	c.Close()
	if status := served.end(syscall.SIGINT); status != statusDone {
		h.t.Fatalf("point serve ended with status %d: %s", status, served.stderr.String())
	}
	return sha256.Sum256(buf)
}

// replayWitness returns the digest of the disk after each entry of a log in the format
// of dm-log-writes (Linux, Documentation/admin-guide/device-mapper/log-writes.rst), and
// after how many entries it was last so.
func replayWitness(t *testing.T, path string, size int64) map[[sha256.Size]byte]int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	const magic, discard = 0x6a736677736872, 4
	if len(b) < 512 || le.Uint64(b) != magic || le.Uint64(b[8:]) != 1 {
		t.Fatal("not a log of writes")
	}
	entries, sector := le.Uint64(b[16:]), int64(le.Uint32(b[24:]))
	disk := make([]byte, size)
	out := map[[sha256.Size]byte]int{sha256.Sum256(disk): 0}
	at := sector
	for i := range int(entries) {
		off, n := int64(le.Uint64(b[at:]))*512, int64(le.Uint64(b[at+8:]))*512
		flags := le.Uint64(b[at+16:])
		at += sector
		switch {
		case flags&discard != 0:
			t.Fatal("nobody has discarded anything")
		case n > 0:
			copy(disk[off:off+n], b[at:at+n])
			at += (n + sector - 1) / sector * sector
		}
		out[sha256.Sum256(disk)] = i + 1
	}
	return out
}
