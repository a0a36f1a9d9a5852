package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// A finding is what doctor says of one thing, in text and under --json.
type finding struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Needed bool   `json:"needed"` // afterimage does not work right without it
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"` // what to do; empty if OK
}

func (f finding) state() string {
	switch {
	case f.OK:
		return "ok"
	case f.Needed:
		return "MISSING"
	}
	return "absent"
}

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor [DIR]",
		Short: "Check what this host lacks",
		Long: `Check this host, and the file system of DIR (default: the directory for temporary
files), for what afterimage needs and for what it can use. DIR is where images or
logs shall live. Nothing is changed; a file made in DIR for the checks is removed.
The exit status is 1 if something needed is missing.`,
		Example: "  afterimage doctor /var/lib/libvirt/images",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			dir := os.TempDir()
			if len(args) == 1 {
				dir = args[0]
			}
			st, err := os.Stat(dir)
			if err != nil {
				return err
			}
			if !st.IsDir() {
				return usagef("%s is not a directory", dir)
			}
			return a.doctor(dir)
		},
	}
}

func (a *app) doctor(dir string) error {
	found := []finding{checkKernel()}
	found = append(found, checkDir(dir)...)
	found = append(found, checkHost()...)

	var missing []string
	rows := [][]string{}
	for _, f := range found {
		if f.Needed && !f.OK {
			missing = append(missing, f.Name)
		}
		rows = append(rows, []string{f.Name, f.state(), f.Detail})
		if !f.OK && f.Remedy != "" {
			rows = append(rows, []string{"", "", "→ " + f.Remedy})
		}
	}
	var err error
	if a.json {
		err = a.printJSON(found)
	} else {
		err = table(a.stdout, rows)
	}
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("this host lacks what afterimage needs: %s", strings.Join(missing, ", "))
	}
	return err
}

func checkKernel() finding {
	// OFD locks, preadv2 and pwritev2 with their flags: all are
	// in 4.14; the oldest kernel that the tests run on is Debian 12's 6.1.
	f := finding{Name: "kernel", Needed: true, Remedy: "boot Linux 4.14 or newer (6.1 or newer is what is tested)"}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		f.Detail = err.Error()
		return f
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		f.Detail = fmt.Sprintf("release %q is not understood", release)
		return f
	}
	f.Detail = "Linux " + release
	if major > 4 || major == 4 && minor >= 14 {
		f.OK, f.Remedy = true, ""
	}
	return f
}

// checkDir tries on a real file what a disk image or a log will be asked.
func checkDir(dir string) []finding {
	file, err := os.CreateTemp(dir, ".afterimage-doctor-*")
	if err != nil {
		return []finding{{
			Name: "directory", Needed: true, Detail: err.Error(),
			Remedy: "choose a directory that this user may write to",
		}}
	}
	defer file.Close()
	defer os.Remove(file.Name())
	found := []finding{checkSpace(dir)}

	const size = 1 << 20
	if _, err := file.Write(make([]byte, size)); err != nil {
		return append(found, finding{
			Name: "write", Needed: true, Detail: err.Error(), Remedy: "free space in " + dir,
		})
	}
	fd := int(file.Fd())
	try := func(name string, needed bool, err error, ok, remedy string) {
		f := finding{Name: name, Needed: needed, OK: err == nil, Detail: ok}
		if err != nil {
			f.Detail, f.Remedy = err.Error(), remedy
		}
		found = append(found, f)
	}

	another := "use a local file system (ext4, XFS, Btrfs)"
	try("OFD locks", true, tryLock(file),
		"an image in use by QEMU is refused, and QEMU refuses ours", another)
	try("punch hole", false, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size/2),
		"trimmed space is given back", "trim will do nothing here; "+another)
	try("zero range", false, unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, size/2, size/4),
		"zeroing writes no data", "zeroes are written out here; ext4 and XFS do better")
	try("find holes", false, tryHoles(fd),
		"copies skip holes", "holes are read as zeroes here; "+another)
	try("RWF_DSYNC", true, tryWriteFlag(fd, unix.RWF_DSYNC),
		"one write can be made durable alone", another)
	try("RWF_NOWAIT", false, tryReadFlag(fd, unix.RWF_NOWAIT),
		"cached reads are answered in place", "every read goes to a worker here, which is slower")
	try("O_DIRECT", false, tryDirect(file.Name()),
		"the page cache can be left out", "the page cache is always used here")
	return found
}

func checkSpace(dir string) finding {
	const enough = 1 << 30 // a first segment and a little air
	f := finding{Name: "free space"}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		f.Detail = err.Error()
		return f
	}
	free := st.Bavail * uint64(st.Bsize)
	f.OK = free >= enough
	f.Detail = fmt.Sprintf("%s in %s", humanize.IBytes(free), dir)
	if !f.OK {
		f.Remedy = "little is left for a log: choose another directory or free some"
	}
	return f
}

// tryLock takes an exclusive lock on one open file and expects to be refused
// it on another of the same file.
func tryLock(file *os.File) error {
	other, err := os.OpenFile(file.Name(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer other.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 1}
	if err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		return err
	}
	lock = unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 1}
	err = unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &lock)
	if err == nil {
		return errors.New("two openers got the same exclusive lock")
	}
	if err != unix.EAGAIN && err != unix.EACCES {
		return err
	}
	return nil
}

// tryHoles expects the hole that was punched at the file's beginning.
func tryHoles(fd int) error {
	off, err := unix.Seek(fd, 0, unix.SEEK_DATA)
	if err != nil && err != unix.ENXIO {
		return err
	}
	if err == nil && off == 0 {
		return errors.New("a hole is reported as data")
	}
	return nil
}

func tryWriteFlag(fd, flag int) error {
	_, err := unix.Pwritev2(fd, [][]byte{make([]byte, 512)}, 0, flag)
	return err
}

func tryReadFlag(fd, flag int) error {
	_, err := unix.Preadv2(fd, [][]byte{make([]byte, 512)}, 0, flag)
	if err == unix.EAGAIN { // understood, and the page is not in the cache
		return nil
	}
	return err
}

func tryDirect(name string) error {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// checkHost looks at what lies outside of any file system.
func checkHost() []finding {
	var found []finding
	var lim unix.Rlimit
	f := finding{Name: "open files", Remedy: "raise the limit (ulimit -n, LimitNOFILE=) to 4096 or more"}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		f.Detail = err.Error()
	} else {
		f.Detail = fmt.Sprintf("up to %d", lim.Max)
		if lim.Max >= 4096 {
			f.OK, f.Remedy = true, ""
		}
	}
	found = append(found, f)

	f = finding{Name: "clock", Remedy: "run an NTP client: times in logs are labels for people"}
	var tx unix.Timex
	switch state, err := unix.Adjtimex(&tx); {
	case err != nil:
		f.Detail = err.Error()
	case state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0:
		f.Detail = "not synchronized"
	default:
		f.OK, f.Detail, f.Remedy = true, "synchronized", ""
	}
	found = append(found, f)

	for _, p := range []struct{ name, what, pkg string }{
		{"qemu-img", "converts other image formats to raw", "qemu-utils"},
		{"qemu-nbd", "serves qcow2 beneath afterimage", "qemu-utils"},
		{"nbdinfo", "shows what a server offers", "libnbd-bin"},
		{"nbdcopy", "copies disks over NBD", "libnbd-bin"},
		{"nbd-client", "attaches a disk to this host", "nbd-client"},
	} {
		f := finding{Name: p.name, Detail: p.what, OK: true}
		if _, err := exec.LookPath(p.name); err != nil {
			f.OK, f.Remedy = false, "apt-get install "+p.pkg
		}
		found = append(found, f)
	}

	for _, k := range []struct{ name, what, path, module string }{
		{"nbd module", "attaches a disk to this host as /dev/nbdN", "/sys/module/nbd", "nbd"},
		{"/dev/fuse", "serves a disk as a file (not in this version)", "/dev/fuse", "fuse"},
	} {
		f := finding{Name: k.name, Detail: k.what, OK: true}
		if _, err := os.Stat(k.path); err != nil {
			f.OK, f.Remedy = false, "modprobe "+k.module
		}
		found = append(found, f)
	}

	f = finding{Name: "Fibre Channel", Detail: "no host adapter (virtual ports are not in this version)"}
	if hosts, _ := filepath.Glob("/sys/class/fc_host/host*"); len(hosts) > 0 {
		f.OK, f.Detail = true, fmt.Sprintf("%d host adapters (virtual ports are not in this version)", len(hosts))
	}
	return append(found, f)
}
