// Package filter is what stands between a guest and its disk: it tees every
// change into the replica log, in the order of the disk, and never lets
// anything of replication fail, tear or reorder what the guest asked for.
//
//	filter.go   Filter: the Queue that exports serve, and its life
//	group.go    the fast path: a batch of writes, logged by one append, written, answered
//	room.go     what the disk has no room for
//	slow.go     what has to wait: conflicts, FUA, flushes, trims, large and odd requests
//	locks.go    range locks, and the barrier
//	flush.go    syncs, shared by those that may share one
//	latch.go    the error latch (rule R9)
//	gaps.go     what the log lacks, and what of it has been copied
//	copy.go     copying a gap among the guest's writes
//	unreadable.go  what of a gap the disk does not give
//	track.go    what of the tracking is durable: hot extents and gaps
//	recover.go  what a log that was not closed asks for
//	stats.go    where the microseconds go
//
// # The life of a write
//
//	Submit ── lock range ── mark ── append to the log, or store a gap ── write the disk ── unlock ── Complete
//
// That order is rule R1; from it follows that whatever can be seen on the disk
// is already in the log or a gap, and lies in an extent whose mark is durable. A batch of writes that need not wait goes that
// way on the caller's goroutine: all its ranges are taken at once, without
// waiting, and counted into their extents; one append carries all its frames; then the
// disk is written, and all are completed together. Whatever would have to wait (a range
// that is locked, an extent that is cold, a
// FUA write, a flush, a trim, a request too large or not aligned) has left the
// batch before that and goes to a worker, so it holds up nobody (RULES A2, A5).
//
// # Locks
//
// A range is locked from before its frame is sequenced until log and disk have
// both been written (RULES A1). It is the one lock held across I/O. Nobody waits
// for a range while holding another: a batch tries and hands over what conflicts, a
// worker waits for one range. Waiters are served in order, and a newcomer that
// conflicts with a waiter waits behind it, so none starves.
// lockTable.mu is a leaf: nothing is called with it held.
//
// # A log that fails
//
// Append returns an error at most Options.AppendLimit of the log later; the
// write's blocks then become a gap, stored before the guest is answered, and the
// disk is written as ever. If the goroutine is itself stuck in the hung append,
// the log's watchdog calls back on another goroutine, which carries on from
// there; the buffers the stuck one may still read are marked as stolen, so that
// nobody uses them again (RULES A4).
//
// # A disk that fails
//
// A write that finds no room is done once more after the log has given up its own, which
// may be of the same file system (RULES F5); the guest sees ENOSPC only if that did
// not help.
//
// A write that fails leaves unknown bytes: its range is a gap, in memory and in the
// log, before the guest has its error (RULES L3). A sync that fails, whoever
// asked for it, is final: the latch makes every later FLUSH and FUA fail, over
// restarts, until an operator reopens the disk (rule R9). Syncs that run at once
// wait for each other's outcome, for Linux tells one of them alone. What was
// written before may vanish from the page cache although the log has it, so the whole
// disk becomes a gap, then and again when it is next opened (RULES F6).
//
// # After a crash
//
// A killed process leaves disk and log in the page cache: what it logged and did not
// write is found in the log, and read again (RULES E5). A power cut takes an arbitrary
// part of what was not synced from both, so that neither can tell what the other has
// (rule R7). Then these become gaps, durably, before anybody writes:
//
//	hot extents ∪ gaps ∪ what frames touched that no replica has acknowledged
//
// Why that is all: take a block that may differ between the disk and the replica's
// newest point p. It was written after the cut p, or was written before, and what the
// disk has of that was not durable. Each write lies in an extent that was marked before
// it began, and a mark goes only by rule R4: after a sync of the disk that began after
// the write had ended, and one of log and gaps. So either the extent is still hot; or
// the disk durably has the write, and the log's frame, or the gap, is durable as well:
// hrl.Log.Evidence finds that frame, or says that it is missing, unless the replica
// has acknowledged it. In that case p has the write, and the disk has it durably.
//
// A frame that is found may be of a write that the disk has lost, or the reverse. Neither
// matters: the block is compared, the disk is the truth, and the recovery never writes to it.
//
// # Durable steps
//
// Of the write path there is one, the mark of a cold extent (package hot); appends are
// not synced, and the disk is synced when
// the guest asks for it, by a FLUSH that begins after it arrived or by the FUA
// write itself. A gap is in the page cache before the guest is answered, which a kill
// does not lose; after a power cut the mark stands for it until it was synced. The latch is made durable before the FLUSH that found it fails. A
// crash before that loses the latch together with the answer: the guest never
// learned that its flush failed, and did not learn either that it succeeded.
package filter
