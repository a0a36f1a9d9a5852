// Package sim plays histories of a replicated VM: the product's own code, both hosts
// of it in one process, over simulated files, disks, clock and line.
//
//	simfs/       files and disks, and what a kill or a power cut leaves of them
//	line.go      the connections between the hosts
//	world.go     both hosts, and what is known of them
//	primary.go   the host where the VM runs: shim, filter, log, shipper
//	secondary.go the replica: store and server
//	guest.go     requests
//	model.go     what the disks may hold
//	point.go     what a recovery point may hold
//	driver.go    random steps; trouble.go, more.go what befalls the hosts
//	history.go   one history, from a seed; run.go many
//	small.go     all short sequences on a disk of three blocks
//	simtool/     coverage, and the mutants: mutants/*.patch
//	FOUND.md     what it found
//
// # What is simulated
//
// Everything from a guest's request to the replica's files is the product: there is
// no second implementation of anything. What is below and around it is not: files
// and disks are in memory (simfs), time is that of a testing/synctest bubble, in
// which nobody waits really, and the line carries bytes between two TLS connections.
// A step is one of: a batch of overlapping or other requests, a cut, a fault of the
// line, the log, a disk or the replica's files, a kill or a power cut of either
// host, at once or in the middle of its Nth operation, also of its recovery.
//
// # What is checked
//
//   - A read sees the last write that was answered, or one that was under way.
//   - After a kill that holds for the whole disk; after a power cut every sector is
//     what was last made durable, or something written since.
//   - Once a sync of a disk failed, all later ones fail, until an operator reopens it.
//   - Every point that the replica lists has all that was answered before its cut,
//     nothing that was begun after it, and of what was under way each write as a
//     whole or not at all, and none without what was answered before it began, on
//     any disk. A point never changes, and goes by retention alone.
//   - What the disk has after a crash is the truth: later points have it.
//   - A Sync that succeeds names a point with all that was answered before.
//   - When the faults stop, a Sync succeeds, and the point equals the disks.
//   - Nothing panics, and no goroutine is left.
//
// # Why you may believe it
//
// Each file of mutants breaks one of the rules in the product; `go run
// ./internal/sim/simtool mutants` finds each of them, or fails. `simtool cover` says
// how much of the product the histories reach.
//
// # What is not simulated
//
// The real system calls under hrl.FS and blockdev.File, the kernel's page cache, NBD,
// the daemon and its state (Save is atomic and durable here, or not done), several
// replicas, jumps of the wall clock, and full disks but as errors. The order of goroutines is the
// runtime's: a seed repeats the steps, not always the interleaving.
package sim
