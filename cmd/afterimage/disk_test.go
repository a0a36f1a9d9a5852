package main

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"afterimage/internal/testenv"
)

// TestInterruptedDial interrupts a command that waits for a server that says
// nothing.
func TestInterruptedDial(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p := start(t, "disk", "compare", uriOf(socket, ""), image(t, 1<<20))
	nc, err := ln.Accept() // now it waits
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if status := p.end(os.Interrupt); status != statusInterrupted {
		t.Errorf("exit status %d: %s", status, &p.stderr)
	}
}

// TestRealInterruptedCopy interrupts a copy whose source has stopped answering.
func TestRealInterruptedCopy(t *testing.T) {
	dir := t.TempDir()
	socket, from := filepath.Join(dir, "sock"), filepath.Join(dir, "nbdkit.log")
	kit := exec.Command(testenv.Need(t, "nbdkit"), "-f", "-U", socket,
		"--filter=log", "--filter=delay", "memory", "64M", "rdelay=600", "logfile="+from)
	if err := kit.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { kit.Process.Kill(); kit.Wait() }()
	testenv.Until(t, "nbdkit listens", func() bool {
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
		}
		return err == nil
	})
	target := filepath.Join(dir, "copy.raw")
	p := start(t, "disk", "copy", uriOf(socket, ""), target)
	testenv.Until(t, "the copy reads", func() bool {
		b, _ := os.ReadFile(from)
		return strings.Contains(string(b), " Read ")
	})
	if status := p.end(syscall.SIGTERM); status != statusInterrupted {
		t.Errorf("exit status %d", status)
	}
	if !strings.Contains(p.stderr.String(), "copy.raw is not a whole copy") {
		t.Errorf("stderr: %s", &p.stderr)
	}
}

// TestRootCopyFull copies onto a file system that fills up.
func TestRootCopyFull(t *testing.T) {
	testenv.NeedRoot(t)
	disk := image(t, 8<<20)
	peer(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 8M", disk)
	small := t.TempDir()
	peer(t, "mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", small)
	defer peer(t, "umount", small)
	target := filepath.Join(small, "copy.raw")
	p := start(t, "disk", "copy", disk, target)
	io.Copy(io.Discard, p.stdout)
	if status := p.wait(); status != statusRefused {
		t.Errorf("exit status %d", status)
	}
	for _, want := range []string{"no space left on device", "copy.raw is not a whole copy", "hint: do not use"} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("no %q in %s", want, &p.stderr)
		}
	}
}

func TestProgressLine(t *testing.T) {
	p := &progress{what: "copied", total: 10 << 30}
	for _, tt := range []struct {
		done  int64
		spent time.Duration
		want  string
	}{
		{0, 2 * time.Second, "copied 0 B of 10 GiB, 0 B/s"},
		{1 << 30, 4 * time.Second, "copied 1.0 GiB of 10 GiB, 256 MiB/s, 36s left"},
		{10 << 30, 10 * time.Second, "copied 10 GiB of 10 GiB, 1.0 GiB/s"},
	} {
		if got := p.line(tt.done, tt.spent); got != tt.want {
			t.Errorf("%d bytes in %v: %q, want %q", tt.done, tt.spent, got, tt.want)
		}
	}
}

func TestExportName(t *testing.T) {
	for image, want := range map[string]string{
		"vm1.raw": "vm1", "/images/vm1.raw": "vm1", "vm1": "vm1", "vm1.tar.raw": "vm1.tar",
		"/dev/sda": "sda", "/": "", ".raw": "", "./x.img": "x",
		"nbd://host/vm1": "vm1", "nbd://host:10809/": "", "nbd://host": "",
		"nbd+unix:///a%2Fb.raw?socket=/run/x.sock": "b", "nbd+unix:///?socket=/run/x.sock": "",
	} {
		if got := exportName(image); got != want {
			t.Errorf("%s: %q, want %q", image, got, want)
		}
	}
}
