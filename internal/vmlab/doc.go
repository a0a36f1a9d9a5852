// Package vmlab runs Go tests, and any other program, in a virtual machine with
// Debian's stock kernel: for what the kernel of this host lacks (/dev/nbd, Fibre
// Channel, device-mapper), must not be touched for a test, or cannot do at all,
// such as losing its power. QEMU translates the guest's code (TCG): neither KVM
// nor root is needed, and a guest is up in a few seconds.
//
//	func TestLabNBD(t *testing.T) {
//		if !vmlab.Inside(t, vmlab.Options{Modules: []string{"nbd"}}) {
//			return // it has run inside, and what came of it is reported
//		}
//		... as root, on a machine of its own ...
//	}
//
//	lab.go       Options, and a lab made of them: what its guests are to be
//	image.go     their first file system: the init program, modules, programs, files
//	programs.go  a program of this host with the libraries it needs
//	vm.go        one guest from its start to its end
//	qemu.go      the QEMU process
//	console.go   what the guest's kernel says, and whether it says that it is broken
//	process.go   a program in the guest: output, events, status
//	gotest.go    a Go test in the guest
//	report.go    its results as subtests
//	volatile.go  a disk that loses what was not flushed
//
//	init     the guest's first process     guest    what a program in the guest may use
//	wire     what the two sides say        kernel   Debian's kernel, and where it lies
//	cpio     the first file system's form  modules  which modules a module needs
//	fetch    gets the kernel: `make deps` runs it
//
// Tests that need a lab have names that begin with TestLab.
//
// # The guest
//
// The guest has no distribution, no udev and no modprobe. What it has was asked
// for: modules by [Options].Modules with all they need, loaded before the first
// program runs; programs of this host by Programs, at the paths they have here;
// other files. Everything lies in memory and is new at each boot, except the
// drives, which are files of this host: /dev/vmlab/NAME. All programs run as root,
// and have proc, sysfs, devtmpfs, /tmp, /run, the loopback interface, and configfs
// and debugfs where there is a module for it.
//
// # What a power cut loses
//
// [VM.PowerCut] kills QEMU with SIGKILL. The guest's memory is gone, and with it
// all that its kernel had not written yet: pages, the journal's transaction under
// way, a program's own buffers. That is most of what a power cut does to a program
// that relies on fsync. It is not all:
//
//   - What the guest has written to a drive, flushed or not, is in this host's page
//     cache and stays, whatever cache mode the drive has. A disk that loses it is
//     a [VolatileDisk]: of each sector that was written and not flushed it keeps
//     one version by chance, the old one or any since.
//   - A write that QEMU had begun may be done in part, but in whole sectors.
//   - Nothing here breaks a disk for good, or makes a flush fail: see
//     afterimage/blockdev/faultdev.
//
// # Time
//
// The guest's processors are many times slower than this host's, and not evenly
// so. Nothing that is measured inside says anything, and a time limit inside must
// be generous. Two guests at a time on two cores are slower than one after the
// other: tests that boot should not be parallel.
//
// # When it fails
//
// No guest outlives its test: QEMU is killed when the test ends, when it dies, and
// when [Options].Timeout is over. Whatever the test does itself, it fails if the
// guest's kernel has reported an oops, a panic or a bug of its own (the kernel is
// told to panic on an oops, so that it ends there), or if QEMU ends unasked. Then
// the test's log has the console.
package vmlab
