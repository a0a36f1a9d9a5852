// Package filter is what stands between a guest and its disk: it tees every
// change into the replica log, in the order of the disk, and never lets
// anything of replication fail, tear or reorder what the guest asked for.
//
//	filter.go   Filter: the Queue that exports serve, and its life
//	group.go    the fast path: a batch of writes, logged by one append, written, answered
//	slow.go     what has to wait: conflicts, FUA, flushes, trims, large and odd requests
//	locks.go    range locks, and the barrier
//	flush.go    syncs, shared by those that may share one
//	latch.go    the error latch (rule R9)
//	gaps.go     what the log lacks, and what of it has been copied
//	copy.go     copying a gap among the guest's writes
//	recover.go  what a log that was not closed asks for
//	stats.go    where the microseconds go
//
// # The life of a write
//
//	Submit ── lock range ── append to the log, or store a gap ── write the disk ── unlock ── Complete
//
// That order is rule R1; from it follows that whatever can be seen on the disk
// is already in the log or a gap. A batch of writes that need not wait goes that
// way on the caller's goroutine: all its ranges are taken at once, without
// waiting; one append carries all its frames; then the disk is written, and all
// are completed together. Whatever would have to wait (a range that is locked, a
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
// A write that fails leaves unknown bytes: its range is a gap, in memory and in the
// log, before the guest has its error (RULES L3). A sync that fails, whoever
// asked for it, is final: the latch makes every later FLUSH and FUA fail, over
// restarts, until an operator reopens the disk (rule R9). Syncs that run at once
// wait for each other's outcome, for Linux tells one of them alone. What was
// written before may vanish from the page cache although the log has it, so the whole
// disk becomes a gap, then and again when it is next opened (RULES F6).
//
// # Durable steps
//
// None of the write path: appends are not synced, and the disk is synced when
// the guest asks for it, by a FLUSH that begins after it arrived or by the FUA
// write itself. The latch is made durable before the FLUSH that found it fails. A
// crash before that loses the latch together with the answer: the guest never
// learned that its flush failed, and did not learn either that it succeeded.
package filter
