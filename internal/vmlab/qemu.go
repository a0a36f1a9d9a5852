package vmlab

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"afterimage/internal/vmlab/wire"
)

// commandLine is what every guest's kernel is told.
var commandLine = []string{
	"console=ttyS0",
	"quiet",               // the serial port is slow; from setUp on the guest says everything
	"panic=-1",            // a panic is a restart, and with -no-reboot QEMU's end
	"oops=panic",          // nothing that was found after an oops means anything
	"random.trust_cpu=on", // or the first who wants random numbers waits for them
	"no_timer_check",      // QEMU's timer may be late on a busy host, which is no reason to do without it
	"cryptomgr.notests",   // half a second of testing that the kernel can encrypt
	"mitigations=off",     // against a neighbour that is not there
}

// qemuArgs is QEMU's command line; its descriptor linkFD is the lab's port.
func (l *Lab) qemuArgs(linkFD int) []string {
	args := []string{
		"-accel", "tcg,thread=multi",
		"-machine", "pc",
		// Old enough that nothing slow is emulated, and new enough for a CRC in
		// hardware, as every host of a VM has it.
		"-cpu", "Nehalem,+rdrand",
		"-smp", fmt.Sprint(l.o.CPUs), "-m", fmt.Sprint(l.o.MemoryMB),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-serial", "stdio",
		"-chardev", fmt.Sprintf("socket,id=link,fd=%d", linkFD),
		"-device", "virtio-serial-pci",
		"-device", "virtserialport,chardev=link,name=" + wire.PortName,
		"-kernel", l.kernel.Image, "-initrd", l.initrd,
		"-append", strings.Join(append(commandLine[:len(commandLine):len(commandLine)], l.o.Append), " "),
	}
	for i, d := range l.o.Drives {
		source, cache := d.Source, d.Cache
		if d.Volatile != nil {
			source = d.Volatile.uri()
		}
		if cache == "" {
			cache = "writeback"
		}
		drive := fmt.Sprintf("if=none,id=drive%d,format=raw,cache=%s,discard=unmap,file=%s",
			i, cache, strings.ReplaceAll(source, ",", ",,"))
		if d.ReadOnly {
			drive += ",readonly=on"
		}
		args = append(args, "-drive", drive,
			"-device", fmt.Sprintf("virtio-blk-pci,drive=drive%d,serial=%s", i, d.Name))
	}
	return args
}

// qemu is the process of one guest.
type qemu struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer // what QEMU itself has to say; read it once ended is closed
	ended  chan struct{}
	err    error // of the process; valid once ended is closed
}

// startQEMU starts QEMU. It ends when it is killed, when the guest switches
// itself off, and when this process ends, however that is.
func startQEMU(l *Lab, con *console) (*qemu, *os.File, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "the guest's end of the port")
	defer theirs.Close()
	// A blocked read of it must end when it is closed: the runtime has to poll it.
	if err := unix.SetNonblock(pair[0], true); err != nil {
		return nil, nil, err
	}
	ours := os.NewFile(uintptr(pair[0]), "the port to the guest")

	const firstExtra = 3
	q := &qemu{cmd: exec.Command(l.qemu, l.qemuArgs(firstExtra)...), ended: make(chan struct{})}
	q.cmd.Stdout = con
	q.cmd.Stderr = &q.stderr
	q.cmd.ExtraFiles = []*os.File{theirs}
	// Its own group: an interrupt at the terminal is for us, who then end it.
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		defer close(q.ended)
		// The signal comes when the thread ends that has started it, not only
		// with the process: the thread has to stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := q.cmd.Start()
		started <- err
		if err == nil {
			q.err = q.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		ours.Close()
		return nil, nil, fmt.Errorf("start QEMU: %w", err)
	}
	return q, ours, nil
}

// kill ends QEMU at once and returns when it has ended.
func (q *qemu) kill() {
	_ = q.cmd.Process.Kill() // it may have ended
	<-q.ended
}

// how says how it has ended.
func (q *qemu) how() string {
	s := q.cmd.ProcessState.String()
	if said := bytes.TrimSpace(q.stderr.Bytes()); len(said) > 0 {
		s += "; QEMU said:\n" + string(said)
	}
	return s
}
