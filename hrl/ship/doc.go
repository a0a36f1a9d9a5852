// Package ship is the primary's side of replication: it cuts the log of a VM,
// makes layers of what was logged, brings them to the replica, and forgets what
// the replica has acknowledged.
//
//	shipper.go   Shipper: one for each replicated VM, and its loop
//	state.go     what it must find again after a crash
//	meet.go      what the peer says when it is met, and what follows
//	cycle.go     from a cut to its acknowledgement
//	copy.go      gaps: blocks of the disk that the log does not have
//	session.go   what has been copied of them, and how that outlives a crash
//	rate.go      how fast, against how fast the guest writes
//	status.go    what it tells
//	client.go    Client: the requests; client_put.go a layer, client_send.go the transport
//	errors.go    a peer that cannot be reached
//
// # A cycle
//
//	gaps copied ─▶ cut q ─▶ layers (p, q] ─▶ offer on record ─▶ layers over there ─▶ q listed ─▶ ack on record ─▶ forgotten
//
// p is the newest point that the replica has listed. A cycle begins when one is
// due, or when somebody waits for one (Sync); there is one at a time, on the
// goroutine of the loop, which owns the session and the state. Nobody holds a lock
// while it waits for the peer, and no guest's write waits for anything here.
//
// # Gaps
//
// What the log lacks is copied from the disk, block by block, while the guest
// writes (filter.CopyGap). Each copy is an entry of the log, sequenced among
// the guest's writes (rule R5); the bytes travel in layers of their own. On the
// replica the point's layers lie in this order: the copies as they were made, then
// the layer of the log, which leaves out whatever has a copy as its newest version
// (hrl.LayerOptions.CopiesBelow). So each byte comes from the newer of the two.
//
// Copying goes in passes. In each of them several streams (Options.Streams) take
// batches of 8 MiB, each in the order of the disk: read, hash, sequence, ask for
// digests, compress; at copyLayerMax a stream's layer is finished and sent while the
// others go on. A pass copies a block once at most, and the next one begins when all of
// it is at the peer: so copies of one block lie over each other as they were made,
// whatever stream was faster. Memory is 8 MiB for each stream, and the spool has room
// for a layer of each. A layer that does not get through waits in the spool; the next
// cycle goes on with it, so a line that breaks often gets there too.
//
// The limit on the line gives way to a guest that writes faster: else the copy might
// never end. If the line itself is too slow for an hour, the status says so (RULES G4).
//
// A block that reads as zero is a zeroing in the log and costs no bytes, a hole as well as
// any other: nobody asks whether the replica has zeroes there (RULES G7).
//
// Where the replica may have a block already, its digest is asked for first, as of
// p; an equal block is sequenced but not sent, unless an older version of it was
// sent in the same session, which would hide that of p.
//
// What of a gap cannot be read stands in the log as unreadable (filter.Copied), and so
// in the layer of the log: the replica keeps what it had, and the point names it
// (RULES G5). So the log alone knows of such a block: after a restart it is copied again.
// What the newest point has as unreadable is tried again each hour, and after a start.
//
// A resize is an entry of the log as well (RULES L2), so a point has the size that its
// disk had at the cut. Layers of copies have the size from when they were begun, which
// says nothing: the layer of the log lies over them.
//
// Sometimes nothing is known of what happened since p: the log is new, or was
// damaged, or its oldest part was given up at the quota; the host has lost its
// power (rule R7); or the replica has another newest point than this host
// remembers. Then the whole disk is a gap, and the session reads the log only
// from a cut behind which every block is copied (hrl.Span.From). Nobody is asked,
// and no point is touched.
//
// # Gaps in the history
//
// Where the log did not have all that changed since p, so that it was copied, no point
// could be made of any time between p and the next one. That one says so, and why
// (wire.PointInfo.Gap): the reason is in the state from when it is found until a point
// is acknowledged that has it. The first copy comes after none.
//
// # Generations
//
// A point is named by generation, incarnation of the log and epoch (rule R6). A
// generation belongs to one log: whoever begins another one, or finds that the
// replica has a point that was never offered from here, takes a new generation,
// on record before it offers anything in it. So no name is given twice (rule R8).
//
// # Durable steps
//
// State is made durable by Options.Save before what follows from it. A crash after
//
//  1. log opened, its identity and generation saved: leaves a log without a point.
//     The next start sees that the log is the one on record and goes on
//  2. layers of q made and synced: leaves files that no record names; the next start
//     removes them
//  3. offer of q saved: leaves an offer. The next start sends the same files on
//     (RULES H3), unless the log could not vouch for the disk, which drops the files
//     and keeps the name: the replica may have listed it (RULES H2)
//  4. q listed over there: leaves an offer that the peer names as its newest point:
//     that is the acknowledgement, come late
//  5. acknowledgement saved: leaves segments and gaps that are needed no more.
//     Only after it are they forgotten (rules R3 and C3)
//
// # Copies that last
//
// What a session has copied outlives kills and power cuts of either side. Of each disk
// two more maps lie beside its gaps (filter.Tracking): Pending, of gaps whose copies the
// peer does not have, and Sent, of blocks of which older copies may lie over there.
// Damage of either reads as all of the disk, and that is the safe side: it costs copying,
// or sending without a question. Where there is no place for maps, or they fail, the session is
// kept in memory and a restart begins again. A crash after step
//
//  1. session begun: all of the disk pending, nothing sent, both synced: leaves maps that
//     no session names. What they say counts for nothing, and step 1 comes again
//  2. its gaps synced, session saved: leaves a session without copies
//  3. a layer of copies complete at the peer: leaves it staged there. No session names
//     it, so the peer drops it
//  4. its blocks sent, synced: leaves them to be sent again without a question
//  5. session saved with the layer's digest: leaves a layer that counts, with blocks that
//     are copied again: the newer copy lies over it
//  6. its blocks not pending any more, synced: leaves blocks that are not copied again.
//     Blocks found equal to those of p come here without steps 3 to 5
//  7. the offer saved, and in the session that it has all of the copies: leaves an offer
//     that can still be delivered, and heals what was copied when it is acknowledged
//  8. acknowledgement saved, without a session: see 1
//
// A block that becomes a gap again is pending in the page cache before the guest is
// answered, and durably before its extent's mark is cleared. The start believes a
// session only if the log is its own, no disk has to be compared whole, and Pending was
// there for each; and before it makes a point the peer must confirm every layer, or all
// is copied again.
//
// After a kill a block with a gap and not pending is therefore right: the log has the
// copy's entry and each change since, for whatever it does not have made the block
// pending. After a power cut the log is evidence. Such a block that is neither hot nor
// touched, behind the session's mark, by anything but copies is right too. Its disk has
// what was copied: the last change before the copy was synced to the disk before its
// extent's mark was cleared (rule R4), and was a later one lost from the log, then the
// mark stood still, or the block was pending, durably. And the peer has the same, in
// the session's layers or as of p, over which nothing of the log lies: the log is
// read from a later cut on (Span.From). What is hot or touched is pending again, zeroed
// blocks among it: zeroes are in the log alone, which is why they stay pending.
//
// The session's mark moves when all that was logged before it has become a gap, durably:
// when From is set, and after a power cut to the beginning of the new incarnation.
// Recovery looks at nothing before it, be it torn, and the log may release it.
package ship
