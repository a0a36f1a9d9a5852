// Package hrl is the replica log: every change of a VM's disks, in the one
// order in which it happened.
//
// A log is a directory. It belongs to one VM, and all disks of the VM append to
// it (rule R2), so its order is the order between disks too. It is a sequence
// of segments; a segment is a header and frames; a frame is one change of one
// disk (write, zero, copy, resize, gap), a cut, or a note for the reader. A cut
// is a frame like any other: epoch n is what stands before the nth cut.
//
//	format.go    the bytes of headers and frames
//	meta.go      the bytes of the file LOG: who this log is, which incarnation
//	fs.go        the file system as this package sees it, so that tests can break it
//	blockset.go  sets of touched 64 KiB blocks, and their bytes
//	group.go     what is appended at once
//	log.go       Open, incarnations, Close
//	append.go    the appender, and the watchdog that lets go of a hung append
//	segment.go   from spare to tail to sealed to spare again
//	sync.go      making the log durable, and noting how far it is
//	evidence.go  what a log is good for after a power cut
//	reclaim.go   what is given up at the quota, or for want of room
//	release.go   what nothing needs any more; reading what lies behind a mark
//	place.go     where cuts lie, so that such a reader need not look for them
//	giveup.go    room for a disk that has none
//	close.go     the end of a log
//	keeper.go    the goroutine that prepares, seals and writes behind
//	cut.go       ending an epoch
//	reader.go    segments and their frames, forwards and backwards
//	window.go    a piece of a segment in memory
//	coverage.go  which sectors have been seen, by windows of the address space
//	latest.go    reverse coalescing: the newest version of every sector
//	replay.go    applying a log to an image
//	verify.go    is this log whole, and if not, where
//	span.go      what lies between two cuts
//	layerformat.go  the bytes of a layer: what changed on one disk in a span
//	layerbuild.go   from a log's span to a layer, by windows of the address space
//	layerwrite.go   writing a layer, and its durable steps
//	layer.go        reading a layer by its index
//	layerverify.go  is this layer whole, and if not, where
//
// # Order of a write
//
// The caller (package filter) holds the lock on the write's range, appends,
// writes the disk, unlocks, and only then is the guest answered (rule R1).
// So whatever can be seen on the disk is already in the log or in a gap.
//
// One append is outstanding at a time: a goroutine that finds nobody appending
// becomes the leader and appends for all who came meanwhile, with one pwritev.
// Bytes of the log therefore become valid strictly in order, and a killed
// daemon leaves a valid prefix (RULES C1). Appends are not synced: a killed
// process loses nothing that way, and after a power cut the log is evidence of
// what changed, never content (rule R7), so syncing it would buy nothing.
//
// # An append that fails
//
// Nothing here may fail a guest's write. An append that fails, is short or is
// later than Options.AppendLimit ends its segment; its entries are remembered
// as a gap, and the first thing the next segment holds is a gap frame naming
// them. The goroutine stuck in a hung append is let go: the watchdog hands its
// group back through Group.Abandoned on another goroutine, the segment stays out of
// use until the append has really returned, and the sequence numbers it had are
// never used again.
//
// A log that has failed takes appends again after a while, twice as long each time it
// fails soon after that, and only once the keeper has written something itself: so a log
// that hangs or is slow does not cost a guest's write its time again and again.
//
// # Layers
//
// A layer covers (p, q], from one cut to another; both are positions of the VM,
// and a layer knows no other layer. It is made once, to a file named by the
// SHA-256 of its bytes, and is durable before anyone hears of it. Gaps in the span
// make it impossible; what was copied must be supplied, with the digest that the
// log has. Layers over a base are a disk (blockdev.NewOverlay), and a layer can
// be folded into the base (blockdev.Fold). LayerWriter has the durable steps.
//
// # Durable steps
//
// Open takes a new incarnation and makes it durable in the file LOG before the
// first append (rule R8). A crash
//
//  1. before LOG is synced leaves the old incarnation; nothing was appended
//  2. after it leaves a number that was never used; the next start takes another
//
// Close seals the tail, syncs every segment written since Open, then records
// "clean" in LOG. A crash before that record leaves the log as after a kill or a
// power cut, whichever it was: Open tells by the life it is given (boot and
// mounts, RULES E8), and says so in Recovery.
//
// Which segment is the newest is noted in LOG when it is begun, unsynced: a kill
// does not lose that, and after a power cut the log is evidence only. If it is
// missing, somebody has removed it, and Open says what it says after a power cut.
//
// Releasing: what a replica has acknowledged goes, but for the segment that holds the
// acknowledged cut; a log that does not have that one any more lacks something.
//
// Recycling: at its quota, or where its file system has no room for it (Options.Room),
// the log gives up its oldest segments, once all of their writes have ended on the disk
// (RULES C3), and their files become spares. Their frames count until the spare is used: then one system call overwrites the old
// header and writes the gap frame that names what they changed. The new header
// draws a new 128-bit salt, which seeds the checksums of all its frames, so nothing
// that lies in the file from before can be taken for a frame (RULES C2).
package hrl
