// Package simfs has the files and disks of a simulated host, in memory, and what can
// befall them.
//
//	fs.go       FS: what a host stores; power cuts and kills
//	inode.go    the versions of every sector that a power cut may leave
//	process.go  Process: who uses them, until it ends at some operation; faults
//	file.go     hrl.File
//	disk.go     blockdev.Device
//
// # What is simulated
//
// Every sector of 512 bytes that was written and not synced is, after a power cut,
// what it was at the last sync or any version since, for itself: so writes are
// torn, and reordered. Every name made, renamed or removed since its directory was
// synced is there or not, for itself. A sync that fails makes nothing durable, and
// later ones succeed without what was written before it; its pages may go back to
// what is on the platter when the process that wrote them has ended. An operation
// that fails, or in whose middle the process ends, is done in part. What a process
// does after its end changes nothing.
//
// Not simulated: pages that go back while their process lives, other processes'
// use of a file, and the space that files take (a Fault says ENOSPC instead).
// Directories, and sizes set by Resize, are durable at once.
package simfs
