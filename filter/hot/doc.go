// Package hot is the durable map of hot extents of a disk: those that
// may differ between disk and log after a power cut. It is what makes a crash
// cost seconds and not a comparison of the whole disk.
//
//	hot.go     Map, its locks, growing and closing it
//	open.go    what the last session left
//	cell.go    an extent in memory: state and writers in one word
//	enter.go   the path of a write: Enter, Mark, Leave; marking ahead
//	wide.go    range entries, for commands over more than 64 extents
//	commit.go  the one committer, and the end of a map that cannot be written
//	cool.go    rounds: clearing marks
//	giveup.go  ending one without syncs
//	format.go  the bytes of headers and transactions
//	ring.go    reading a ring, whatever has become of it
//	file.go    the file: headers, new rings, making it
//	bits.go    the table
//	stats.go   counters
//
// # What always holds
//
//   - The mark of an extent is durable before a write into it is admitted, and as
//     long as one is counted in.
//   - It is cleared only after everything that was written there is durable on
//     the disk, and known by a record that is durable too (rule R4).
//   - What cannot be read is marked: damage costs comparing, never data.
//   - What was marked when a session ended, but for a clean end, is marked until
//     Forget, through any number of further crashes.
//
// # Use
//
//	all := m.Enter(off, n)        counted in; no system call
//	if !all { err = m.Mark(..) }  waits for a commit, on a goroutine that may
//	... append, write the disk ...
//	m.Leave(off, n)
//
// The map lies preallocated on the image's own file system, so it fails only
// when the disk does; this is the only I/O of replication that a guest's write
// waits for (RULES D4). For what to do when it fails, see Map.Broken.
//
// # The file
//
//	header 0 │ header 1 │ ring ........ │ ring of before, or of a smaller disk
//
// A header names one ring. A ring is made in one go, where the present one does
// not lie, and becomes the present one by one sector of a header: by Open, and
// when the disk has grown. The file itself is made under another name, and Open has
// made the name durable, whoever made the file, before it admits anything. Its slots then all hold a transaction, with the next
// numbers the oldest is overwritten, one 4 KiB transaction for a commit. A
// transaction has the marks set and cleared by the commit, all range entries, and
// the next slice of the table, so that the newest transactions, one for each
// slice, are the table. Nothing else is ever written, and no slot is needed when
// it is overwritten; readRing says what a crash and what damage leave there.
//
// Marks are committed in groups: one commit is under way at a time, and has
// everything that was asked for when it began. Who finds a commit under way waits
// for it and makes the next one, with all who came meanwhile.
//
// # Why a mark may be cleared
//
// Rule R4 wants four things to hold at one instant. The instant is Cleared, with
// Map.mu held, when a candidate goes from idle to clearing.
//
//  1. No write is counted in. The step is one compare-and-swap of the word that
//     holds both state and count, and expects a count of zero. Who counts in
//     before it makes it fail; who counts in after it finds the extent clearing,
//     and has it marked anew before writing.
//  2. Every leg of the disk has finished, without error, a sync that began after
//     the extent's last write ended. When Cooling looked, nobody was counted in:
//     every write had ended. It was idle, and is idle now; it cannot have been
//     anything else between, for Enter makes it hot, only the next Cooling makes
//     it idle again, and rounds do not overlap. So there was no write since, and
//     the caller promises syncs that began after Cooling returned.
//  3. Every change in it is durable as a record. The caller appends to the log, or
//     stores the gap, between Enter and Leave; what it syncs after Cooling returned
//     is therefore all of them. Of marks that Open found, Forget promises it.
//  4. None of these syncs has failed. Cleared without ok and Freeze are for good,
//     and the flag is looked at under the same lock. The caller says ok only if no
//     sync of the same files that ended until then has failed, whoever asked for
//     it: a failed one takes the kernel's error with it, and the next succeeds.
//
// For range entries Map.mu takes the place of the word.
//
// That the clear itself is lost by a crash, or is found although nobody was told
// of it, is the same: both are true.
//
// # Locks and goroutines
//
// Map.committer is held across the writes and syncs of the map's file, by Mark
// and Cleared for a commit, and by Grow and Close. Map.mu is a leaf beneath it,
// held for moments. Enter and Leave take neither, but for ranges. The package
// starts no goroutine: who waits for a mark commits.
package hot
