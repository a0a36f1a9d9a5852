package main

import (
	"bytes"
	"encoding/json"
	"io"
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

// peer runs another program, which must succeed, and returns what it prints.
func peer(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(testenv.Need(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// mustFail runs another program, which must fail with a message.
func mustFail(t *testing.T, message, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(testenv.Need(t, name), args...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), message) {
		t.Errorf("%s %q: %v, want a failure with %q\n%s", name, args, err, message, out)
	}
}

// TestRealFormats offers what qemu-img makes as images.
func TestRealFormats(t *testing.T) {
	for _, format := range []string{"qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"} {
		path := filepath.Join(t.TempDir(), "disk")
		peer(t, "qemu-img", "create", "-f", format, path, "8M")
		before, was := contentAndTime(t, path)
		p := start(t, "serve", path, "-U", path+".sock")
		if status := p.wait(); status != statusUsage {
			t.Errorf("%s: exit status %d", format, status)
		}
		for _, want := range []string{"this is a " + format + " image", "qemu-img convert -f " + format, "qemu-nbd -f " + format, "--format raw"} {
			if !strings.Contains(p.stderr.String(), want) {
				t.Errorf("%s: no %q in %s", format, want, &p.stderr)
			}
		}
		if after, is := contentAndTime(t, path); !bytes.Equal(before, after) || !was.Equal(is) {
			t.Errorf("%s: the image has changed", format)
		}
	}
}

func contentAndTime(t *testing.T, path string) ([]byte, time.Time) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return content, st.ModTime()
}

// TestRealFormatInsisted serves as raw what looks like something else.
func TestRealFormatInsisted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	peer(t, "qemu-img", "create", "-f", "qcow2", path, "8M")
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	p := start(t, "serve", path, "-U", path+".sock", "--format", "raw")
	c := dial(t, p.line())
	head := make([]byte, 4)
	if err := blockdev.ReadAt(c, head, 0); err != nil || string(head) != "QFI\xfb" {
		t.Errorf("the disk begins with %q, %v", head, err)
	}
	p.end(syscall.SIGTERM)
}

// TestRealInUse: neither opens what the other writes.
func TestRealInUse(t *testing.T) {
	disk := image(t, 8<<20)
	p := start(t, "serve", disk, "-U", disk+".sock")
	p.line()
	mustFail(t, "lock", "qemu-io", "-f", "raw", "-c", "write 0 4k", disk)
	mustFail(t, "lock", "qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, disk+".qcow2")
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}

	qemu := exec.Command(testenv.Need(t, "qemu-io"), "-f", "raw", disk)
	in, err := qemu.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); io.Copy(io.Discard, out); qemu.Wait() }()
	io.WriteString(in, "write -P 5 0 64k\n")
	answer := make([]byte, 4096)
	var said []byte
	for !bytes.Contains(said, []byte("wrote 65536")) { // then it has it open
		n, err := out.Read(answer)
		if err != nil {
			t.Fatalf("qemu-io: %v after %q", err, said)
		}
		said = append(said, answer[:n]...)
	}
	p = start(t, "serve", disk, "-U", disk+".sock")
	if status := p.wait(); status != statusRefused || !strings.Contains(p.stderr.String(), "in use by another process") {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
}

func TestRealClients(t *testing.T) {
	disk := image(t, 64<<20)
	dir := filepath.Dir(disk)
	p := start(t, "serve", disk, "-U", disk+".sock")
	uri := p.line()

	var info struct {
		Exports []struct {
			Name string `json:"export-name"`
			Size int64  `json:"export-size"`
		} `json:"exports"`
	}
	if err := json.Unmarshal([]byte(peer(t, "nbdinfo", "--list", "--json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	if len(info.Exports) != 1 || info.Exports[0].Name != "disk" || info.Exports[0].Size != 64<<20 {
		t.Errorf("nbdinfo --list says %+v", info.Exports)
	}

	peer(t, "qemu-io", "-f", "raw",
		"-c", "write -P 1 0 1M", "-c", "write -f -P 2 1M 64k", "-c", "aio_write -P 3 2M 3M", "-c", "aio_flush",
		"-c", "write -z 256k 128k", "-c", "discard 3M 1M", "-c", "flush",
		"-c", "read -P 1 0 256k", "-c", "read -P 0 256k 128k", "-c", "read -P 2 1M 64k", "-c", "read -P 3 2M 1M", uri)

	out, back := filepath.Join(dir, "out.raw"), filepath.Join(dir, "back.raw")
	peer(t, "nbdcopy", uri, out)
	peer(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, out)
	f, err := os.OpenFile(out, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte{8}, 4096), 10<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	peer(t, "nbdcopy", "--flush", out, uri)
	peer(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, back)
	peer(t, "cmp", out, back)
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
	peer(t, "cmp", out, disk)
}

// TestRealSocketActivation lets clients start the server themselves.
func TestRealSocketActivation(t *testing.T) {
	disk := image(t, 1<<20)
	peer(t, "qemu-io", "-f", "raw", "-c", "write -P 6 4k 4k", disk)
	peer(t, "nbdcopy", "--", "[", "afterimage", "serve", disk, "]", disk+".copy")
	peer(t, "cmp", disk, disk+".copy")

	server, err := exec.LookPath("afterimage")
	if err != nil {
		t.Fatal(err)
	}
	sh := exec.Command(testenv.Need(t, "nbdsh"), "-c", "h.connect_command(['"+server+"', 'serve', '"+disk+"', '--stdio'])",
		"-c", "h.pwrite(b'x' * 4096, 0)", "-c", "h.flush()", "-c", "h.shutdown()")
	sh.Env = append(os.Environ(), "PATH=/usr/bin:"+os.Getenv("PATH")) // the Python that Debian's nbdsh belongs to
	if out, err := sh.CombinedOutput(); err != nil {
		t.Fatalf("nbdsh: %v\n%s", err, out)
	}
	fileHas(t, disk, 0, 'x')
}

// TestRealQcow2Beneath takes the way out that is named for a qcow2 image.
func TestRealQcow2Beneath(t *testing.T) {
	dir := t.TempDir()
	qcow2, socket := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "qemu.sock")
	peer(t, "qemu-img", "create", "-f", "qcow2", qcow2, "16M")
	beneath := exec.Command(testenv.Need(t, "qemu-nbd"), "-f", "qcow2", "-t", "-e", "4", "-k", socket, qcow2)
	if err := beneath.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { beneath.Process.Signal(syscall.SIGTERM); beneath.Wait() }()
	testenv.Until(t, "qemu-nbd listens", func() bool {
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
		}
		return err == nil
	})
	p := start(t, "serve", uriOf(socket, ""), "-U", filepath.Join(dir, "ours.sock"), "--export", "vm")
	uri := p.line()
	peer(t, "qemu-io", "-f", "raw", "-c", "write -P 4 1M 2M", "-c", "write -z 2M 64k", "-c", "flush", uri)
	copied := filepath.Join(dir, "copy.raw")
	for _, args := range [][]string{{"disk", "copy", uri, copied}, {"disk", "compare", uri, copied}} {
		q := start(t, args...)
		io.Copy(io.Discard, q.stdout)
		if status := q.wait(); status != 0 {
			t.Errorf("%q: exit status %d: %s", args, status, &q.stderr)
		}
	}
	if status := p.end(syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
	beneath.Process.Signal(syscall.SIGTERM)
	beneath.Wait()
	peer(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, copied)
}
