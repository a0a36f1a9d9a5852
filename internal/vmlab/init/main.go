// Command init is the first process of the VM lab's guest, and all that it has
// in place of a distribution.
//
//	main.go   process 1: mounts, collects orphans, switches off
//	setup.go  kernel modules, drives, the port to the lab
//	agent.go  runs what the lab asks for
//
// There are two processes of it. The first collects whatever has lost its
// parent; the second, the agent, can then wait for its own children by their
// number, as package os/exec does, and nobody takes them from it.
package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const asAgent = "agent"

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == asAgent && os.Getppid() == 1:
		if err := agent(); err != nil {
			say("%v", err)
			os.Exit(1)
		}
	case os.Getpid() == 1:
		if err := first(); err != nil {
			say("%v", err)
		}
		switchOff()
	default:
		say("this is the first process of a VM lab's guest, of no use elsewhere")
		os.Exit(2)
	}
}

// say writes to the console, which the lab keeps.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "vmlab: "+format+"\n", args...)
}

// first returns when the agent has ended.
func first() error {
	if err := mounts(); err != nil {
		return err
	}
	pid, err := syscall.ForkExec("/init", []string{"/init", asAgent}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   environment,
		Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return fmt.Errorf("wait for the agent: %w", err)
		case got == pid && status.ExitStatus() != 0:
			return fmt.Errorf("the agent has ended: %#x", status)
		case got == pid:
			return nil
		}
	}
}

// environment is what every process in the guest has.
var environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/", "TMPDIR=/tmp", "LANG=C.UTF-8",
	guestVariable + "=1",
}

// mounts makes what programs take for granted.
func mounts() error {
	for _, m := range []struct{ kind, at, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", "mode=0755"},
		{"devpts", "/dev/pts", "ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/run", "mode=0755"},
		{"tmpfs", "/tmp", "mode=1777"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, unix.MS_NOSUID, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
		"/etc/mtab": "/proc/self/mounts",
	} {
		if err := os.MkdirAll("/etc", 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, name); err != nil {
			return err
		}
	}
	return nil
}

// switchOff ends QEMU. What is dirty in the guest's memory is lost: the agent
// has written it to the disks before, if it was told to.
func switchOff() {
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		say("switch off: %v", err)
	}
	select {} // the kernel panics when its first process ends
}
