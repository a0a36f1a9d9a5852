package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// A Machine is where a result comes from.
type Machine struct {
	CPU         string `json:"cpu"`
	Cores       int    `json:"cores"` // that may be used
	Kernel      string `json:"kernel"`
	MemoryBytes int64  `json:"memory_bytes"`
}

func machine() (Machine, error) {
	m := Machine{CPU: "unknown", Cores: runtime.NumCPU()}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = cpuModel(info)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, fmt.Errorf("uname: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return m, err
	}
	m.MemoryBytes, err = memory(info, "MemTotal")
	return m, err
}

func cpuModel(cpuinfo []byte) string {
	for line := range strings.Lines(string(cpuinfo)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH // where the kernel names no model
}

// memory is one line of /proc/meminfo, in bytes.
func memory(meminfo []byte, key string) (int64, error) {
	for line := range strings.Lines(string(meminfo)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == key+":" && f[2] == "kB" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", key)
}

// load is the load average of the last minute; -1 if it cannot be read.
func load() float64 {
	b, err := os.ReadFile("/proc/loadavg")
	if f := strings.Fields(string(b)); err == nil && len(f) > 0 {
		if l, err := strconv.ParseFloat(f[0], 64); err == nil {
			return l
		}
	}
	return -1
}

// checkSpace refuses a directory without room for what a run writes. On a tmpfs
// room is memory, of which there must be as much.
func checkSpace(dir string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	const hint = "free some, name another directory with --dir, or take a smaller --size"
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%s has %s free, %s are needed: %s: %w", dir,
			humanize.IBytes(uint64(free)), humanize.IBytes(uint64(need)), hint, unix.ENOSPC)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return nil
	}
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err
	}
	free, err := memory(info, "MemAvailable")
	if err != nil {
		return err
	}
	if free < need {
		return fmt.Errorf("%s is in memory, of which %s are free, %s are needed: %s: %w", dir,
			humanize.IBytes(uint64(free)), humanize.IBytes(uint64(need)), hint, unix.ENOMEM)
	}
	return nil
}

// usage is what a process has used so far.
type usage struct {
	cpu       time.Duration // user and system
	readWrite int64         // calls of the read and write family
}

// tick is the unit of the times in /proc/PID/stat: USER_HZ, which is 100 on
// every architecture of Linux that Go has.
const tick = time.Second / 100

func usageOf(pid int) (usage, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return usage{}, err
	}
	io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return usage{}, err
	}
	return parseUsage(stat, io)
}

func parseUsage(stat, io []byte) (usage, error) {
	var u usage
	// The second field is the program's name and may hold anything, so count
	// from its closing parenthesis: utime and stime are fields 14 and 15.
	f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(f) < 13 {
		return u, fmt.Errorf("/proc/PID/stat has %d fields after the name, want 13 or more", len(f))
	}
	for _, field := range f[11:13] {
		n, err := strconv.ParseInt(string(field), 10, 64)
		if err != nil {
			return u, fmt.Errorf("/proc/PID/stat: %w", err)
		}
		u.cpu += time.Duration(n) * tick
	}
	found := 0
	for line := range bytes.Lines(io) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		if string(key) != "syscr" && string(key) != "syscw" {
			continue
		}
		n, err := strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 64)
		if err != nil {
			return u, fmt.Errorf("/proc/PID/io: %w", err)
		}
		u.readWrite += n
		found++
	}
	if found != 2 {
		return u, errors.New("/proc/PID/io lacks syscr or syscw")
	}
	return u, nil
}

// findProgram is the path of a program, or an error that says where it is had.
func findProgram(name, pkg string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is not installed: apt-get install --no-install-recommends %s", name, pkg)
	}
	return path, nil
}

// versions asks every program for its version.
func versions(ctx context.Context, binary string) (map[string]string, error) {
	v := map[string]string{"go-nbd": "unknown"}
	for name, cmd := range map[string][]string{
		"fio":      {"fio", "--version"},
		"nbdkit":   {"nbdkit", "--version"},
		"qemu-nbd": {"qemu-nbd", "--version"},
		afterimage: {binary, "version"},
	} {
		out, err := exec.CommandContext(ctx, cmd[0], cmd[1:]...).Output()
		if err != nil {
			return nil, fmt.Errorf("%s: which version: %w", name, err)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		v[name] = strings.TrimSpace(line)
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "github.com/pojntfx/go-nbd" {
				v["go-nbd"] = d.Version
			}
		}
	}
	return v, nil
}
