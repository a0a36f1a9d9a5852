// Package gap is the durable gap map of a disk: which 64 KiB blocks may have
// changed without the replica having them, or the log having what it takes.
//
//	gap.go     Map, its locks, asking it
//	add.go     Add and Remove, the writing of a page
//	sync.go    Sync, headers, and the end of a file that cannot be written
//	resize.go  another size of the disk; Close
//	open.go    what the last session left; making the file
//	format.go  the bytes of headers and pages
//	bits.go    a page in memory
//
// # What always holds
//
//   - A gap is in the file's page cache before Add returns (RULES G6): a kill
//     loses none.
//   - A gap is durable when a Sync returns that was called after the Add: a power cut
//     loses none. Until then the mark of the hot map covers it, which is cleared only
//     after such a Sync (RULES D3(3)).
//   - What cannot be read is a gap: damage costs comparing, never data.
//   - A removal may be lost by any crash, and costs comparing then.
//
// When a gap may be removed is rule R3, and its user's business.
//
// # The file
//
//	header 0 │ header 1 │ page 0 │ page 1 │ ...
//
// Pages lie where they are for ever, and are changed in place, whole. One page
// is 4 KiB for 2044 MiB of disk; a map of 1 TiB has 2 MiB. All of it is written when
// the file is made or grows, so that no later write needs room.
//
// # Durable steps
//
// Adding, and what a crash after each step leaves:
//
//  1. bits set in memory: the gap is lost, and nobody was told of it: Add has not
//     returned
//  2. the page written with all its bits, by one pwrite, or seen to have been
//     written by somebody who copied the bits after step 1: after a kill all of
//     it; after a power cut the page as any write of it since the last sync left
//     it, or torn
//  3. synced, by an fdatasync that began after step 2: all of it
//
// A kill. Pages are written one behind the other under their writer's lock, and
// each has the bits that memory had at a moment under that lock. The last one
// written when the process dies has therefore every bit whose Add has returned
// and that was not removed since. A kill inside a pwrite leaves a page of two
// halves, whose checksum says so: it reads as all gaps.
//
// A power cut. Every version of the page that was written after step 2 has the
// bit, unless it was removed since, and after step 3 no earlier version is left
// on the disk. A page torn between two versions reads as all gaps. That an
// fdatasync succeeded only counts if none before it has failed, for Linux
// tells of a failed write-back once: syncs run one at a time, and the first that
// fails ends the file (see fail).
//
// What Open finds after a kill is in the page cache, and perhaps not even dirty,
// should write-back have failed and the dead process have been told of it. Open
// writes it again and syncs it, so that all it found is durable.
//
// Headers change one sector at a time, in the place of the older one, and are
// synced before anything relies on them: see Open, Resize and Close. The file says
// that it is open, durably, before Open returns, so nothing of a session that
// crashed reads as clean.
//
// Removing has no step of its own: the page is written by the next Add in it,
// and by Sync and Close.
//
// # A file that fails
//
// The first write or sync that fails makes the map Broken, for good. Memory goes
// on; the file is made to read as all gaps or removed (see fail), and every
// Add returns the error, so that its user can take further measures. A removed file
// reads as all gaps, too, unless the next Open is told that nothing was tracked before.
//
// # Locks and goroutines
//
// Map.io is held across syncs, a pageWriter across the pwrite of a page,
// Map.headers across that of a header, and Map.mu for moments; they are taken in
// that order. Add takes no io, and so waits for no sync. The package starts no
// goroutine.
package gap
