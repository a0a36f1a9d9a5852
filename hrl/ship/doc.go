// Package ship is the primary's side of replication: it cuts the log of a VM,
// makes layers of what was logged, brings them to the replica, and forgets what
// the replica has acknowledged.
//
//	shipper.go   Shipper: one for each replicated VM, and its loop
//	state.go     what it must find again after a crash
//	meet.go      what the peer says when it is met, and what follows
//	cycle.go     from a cut to its acknowledgement
//	copy.go      gaps: blocks of the disk that the log does not have
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
// Where the replica may have a block already, its digest is asked for first, as of
// p; an equal block is sequenced but not sent, unless an older version of it was
// sent in the same session, which would hide that of p.
//
// Sometimes nothing is known of what happened since p: the log is new, or was
// damaged, or its oldest part was given up at the quota; the host has lost its
// power (rule R7); or the replica has another newest point than this host
// remembers. Then the whole disk is a gap, and the session reads the log only
// from a cut behind which every block is copied (hrl.Span.From). Nobody is asked,
// and no point is touched.
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
// What a session has copied is kept in memory. A restart copies the gaps that the
// log names again, and the replica drops what it had staged of them.
package ship
