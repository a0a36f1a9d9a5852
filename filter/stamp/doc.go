// Package stamp tells whether a disk image was changed while we did not look:
// restored from a backup, started by another program, or edited. What the log and
// the hot extents know of such an image is worth nothing, and all of it has to be
// compared (RULES D8).
//
//	stamp.go    Stamp: opening, the heartbeat, closing
//	verdict.go  what a stamp says of an image
//	format.go   the bytes of the stamp
//
// # The life of a stamp
//
//	         Open                Begin                     Close(true)
//	on disk ──────▶ a Verdict ──────────▶ open, heartbeat ─────────────▶ clean
//	                   │                     every 5 s
//	                   │ Close                   │ Close(false), a kill, a power cut
//	                   ▼                         ▼
//	               as it was                   open
//
// Open changes nothing: what it found stays true, and is found again, until the
// caller has made durable what the verdict asks for, and calls Begin. Only then
// may the image be written.
//
// # What is compared
//
// After a clean end: the size, the time of the last change, and the SHA-256 of
// the first and last MiB. A difference in any direction is a change. The digests
// are for copies that keep the time of the original.
//
// Otherwise nobody knows when the last write was, and after a power cut the time
// of the last change is not exact: it may be older than the last write. But it
// is not later than the last heartbeat by more than the heart's period and some
// slack, unless somebody wrote after we ended: later by more than 10 s is a change.
// And the image is to be the same file, by its inode: a backup that is put back
// keeps its older time, but it is another file.
//
// What cannot be told: that an image was changed within 10 s of our last
// heartbeat; and, not ended cleanly, that its content was replaced in the same
// file and its time set back. The lock on the image keeps others out while we
// have it.
//
// Only a regular file has a time of change that means anything. A block device
// is not judged: its verdict is Unknown, but not that it must be compared, for
// then every start would compare all of it. What is known of it is taken for
// true; that another host has written to a device is for its user to declare.
//
// # Durable steps
//
//  1. Begin writes "open" to both places of the stamp and syncs it. A crash
//     before leaves what there was, or open in one of them, which the newer
//     count makes the valid one. The image has not been written yet.
//  2. A heartbeat goes to the older place, and is synced. A crash leaves the
//     heartbeat before, 5 s older.
//  3. Close(true) syncs the image with its time, reads it, and writes "clean" to
//     the older place. A crash before it is durable leaves the last heartbeat.
//
// A heartbeat that fails is tried again with the next; until then the stamp grows
// old, and a crash asks for a comparison that may not have been needed.
package stamp
