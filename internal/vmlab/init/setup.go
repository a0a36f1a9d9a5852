package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"afterimage/internal/vmlab/wire"
)

const guestVariable = wire.GuestVariable

// appearLimit bounds how long a device may take to appear once its driver is
// there. Drivers look for their devices in the background.
const appearLimit = 30 * time.Second

// setUp brings the guest into the state that the lab has asked for.
func setUp() error {
	text, err := os.ReadFile(wire.ConfigPath)
	if err != nil {
		return err
	}
	var c wire.Config
	if err := json.Unmarshal(text, &c); err != nil {
		return fmt.Errorf("%s: %w", wire.ConfigPath, err)
	}
	// Until here the console was quiet, for that it is slow; from here on it
	// has what the kernel says of its drivers.
	if err := os.WriteFile("/proc/sys/kernel/printk", []byte("7"), 0); err != nil {
		return err
	}
	for _, m := range c.Modules {
		if err := load(m); err != nil && !m.Optional {
			return err
		}
	}
	if err := nameDrives(c.Drives); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return mountForModules()
}

func load(m wire.Module) error {
	f, err := os.Open(m.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), m.Params, 0)
	if errors.Is(err, syscall.EEXIST) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("load module %s %s: %w (the console may say more)", filepath.Base(m.Path), m.Params, err)
	}
	return nil
}

// nameDrives gives each drive its name below /dev/vmlab: which of vda, vdb, …
// it gets depends on who was quicker.
func nameDrives(names []string) error {
	if err := os.MkdirAll("/dev/vmlab", 0o755); err != nil {
		return err
	}
	for _, name := range names {
		err := appear(func() (bool, error) {
			serials, err := filepath.Glob("/sys/block/vd*/serial")
			if err != nil {
				return false, err
			}
			for _, s := range serials {
				text, err := os.ReadFile(s)
				if err == nil && strings.TrimSpace(string(text)) == name {
					return true, os.Symlink("/dev/"+filepath.Base(filepath.Dir(s)), "/dev/vmlab/"+name)
				}
			}
			return false, nil
		})
		if err != nil {
			return fmt.Errorf("drive %s: %w", name, err)
		}
	}
	return nil
}

// appear polls for a device.
func appear(there func() (bool, error)) error {
	for deadline := time.Now().Add(appearLimit); ; time.Sleep(time.Millisecond) {
		if ok, err := there(); ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return errors.New("it does not appear")
		}
	}
}

// openPort opens the port to the lab.
func openPort() (*os.File, error) {
	var port *os.File
	err := appear(func() (bool, error) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return false, err
		}
		for _, n := range names {
			text, err := os.ReadFile(n)
			if err != nil || strings.TrimSpace(string(text)) != wire.PortName {
				continue
			}
			port, err = os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			return err == nil, err
		}
		return false, nil
	})
	if err != nil {
		return nil, fmt.Errorf("the port to the lab: %w", err)
	}
	return port, nil
}

// loopbackUp makes 127.0.0.1 usable.
func loopbackUp() error {
	if ifi, err := net.InterfaceByName("lo"); err != nil || ifi.Flags&net.FlagUp != 0 {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// mountForModules mounts the file systems by which modules are told what to do,
// where such a module is loaded.
func mountForModules() error {
	for _, m := range []struct{ kind, at string }{
		{"configfs", "/sys/kernel/config"},
		{"debugfs", "/sys/kernel/debug"},
		{"fusectl", "/sys/fs/fuse/connections"},
	} {
		if _, err := os.Stat(m.at); err != nil {
			continue // its module has not made the directory
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return nil
}
