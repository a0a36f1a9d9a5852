// Package blockdev says what a disk is, and holds the disks everything else is
// built from.
//
// A [Device] is a fixed number of bytes that can be read, written, made
// durable, zeroed and trimmed, and that knows which of its bytes are holes. It
// is asked in batches of [Request], blocks until the batch is done, and may be
// used by any number of goroutines at once. A [Queue] is the other way to be
// asked: requests go in as a batch and each is completed on its own, on any
// goroutine, so that one slow request never holds up a fast one. The exports
// (package blockdev/nbd and, later, blockdev/fuse) speak to a Queue; package
// filter is the Queue that stands in front of every disk the product serves,
// and [Pool] makes a Queue of a bare Device.
//
//	device.go    Device, Request, Extent, the errors and the helpers on them
//	queue.go     Queue, Completer and Pool
//	mem.go       a disk in memory
//	file.go      a raw image file: opening, creating, resizing; optional O_DIRECT
//	fileio.go    its reads, writes and flushes
//	filezero.go  its holes: zeroing, trimming, finding them
//	handle.go    a file descriptor that is never used after it was closed
//	buf.go       buffers that O_DIRECT takes
//	blockfile.go a block device of the host
//	qemulock.go  QEMU's byte locks, so that neither opens what the other holds
//	probe.go     image formats told apart by their magic
//	layered.go   parts of a disk that lie over a base, and folding them into it
//	overlay.go   a base, layers over it and a writable top as one Device
//	top.go       the writable top: a sparse file and its presence map
//	devtest/     the conformance suite every Device passes
//	faultdev/    a Device with every fault a disk can have, for tests
//	gonbd/       go-nbd backends as Devices, and Devices as go-nbd backends
//	nbd/         the NBD server, and the client that is a Device
//
// # What a Device promises
//
//   - A request that returned without error is visible to every later request.
//   - It is durable once a flush that began after it returned has returned
//     without error, or at once if it carried FlagFUA.
//   - Two requests that overlap and run at the same time may mix. Ordering them
//     is the business of whoever submits them (package filter's range locks).
//   - After an error of a write, trim or zeroing the content of its range is
//     unknown: old, new or a mix.
//   - After an error of a flush or of a FUA write, what was not durable before
//     is unknown for good: a later flush that succeeds proves nothing about it.
//     The Device does not remember this, the filter's latch does (rule R9).
package blockdev
