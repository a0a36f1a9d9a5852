// Package replica is the other side of a replication: it keeps the disks of VMs
// that run on other hosts, as they were at each recovery point, so that any of
// them can be started here at once.
//
//	store.go          the directory with all VMs; Open and Close
//	accept.go         what a host offers: a VM comes into being
//	erase.go          and goes
//	vm.go             a VM, opened; what it tells of itself
//	state.go          what the journal says: records, and the fold over them
//	chain.go          questions to that: which layers, which points may go
//	journalformat.go  the bytes of the journal, and reading them
//	journal.go        its durable steps
//	stage.go          receiving a layer
//	stagerecover.go   what a crash has left of that
//	stagedlen.go      the bytes that say how much of a layer is durable
//	list.go           the acknowledgement; pinning, removing
//	held.go           layers and points that are open
//	stack.go          several layers as one
//	digest.go         what the primary compares with
//	base.go           the raw file below all layers, checked as it is read
//	sums.go           the bytes of the checksums beside it
//	basefold.go       folding layers into it
//	fold.go           retention, and the order in which a fold is safe
//	keeper.go         the goroutine that does both
//	damage.go         which points rely on what was found damaged
//	unreadable.go     what the primary could not read, point by point
//	verify.go         looking for it
//	run.go            failovers and tests
//	branch.go         what cancelled ones have left
//	runrecover.go     what a crash has left of them
//	errors.go         errors that callers branch on
//
// # On the disk
//
//	DIR/lock                          held by the one process that has the store
//	DIR/UUID/journal                  everything that is known of a VM
//	DIR/UUID/disks/NAME/base.raw      the disk at the oldest point, sparse
//	DIR/UUID/disks/NAME/base.raw.afterimage/identity  so that nobody serves it
//	DIR/UUID/disks/NAME/base.sums     a checksum for each 64 KiB of it
//	DIR/UUID/layers/DIGEST.layer      whole, checked layers
//	DIR/UUID/staging/DIGEST.part      a layer that is arriving, and DIGEST.len
//	DIR/UUID/runs/failover-N/DISK.top what is written in a failover
//	DIR/UUID/runs/test-NAME/DISK.top  or in a test of one
//	DIR/UUID.new, DIR/UUID.erased     a VM that is not there yet, or no more
//
// A disk at a point is base.raw with the layers of all points up to that one over
// it (blockdev.NewOverlay). A point is one record in the journal: it names its
// parent, its disks and their layers, all or none. Nothing is ever changed in
// place but base.raw, by a fold that is begun anew until it has ended; so every
// listed point can be opened at any moment, also in the middle of a fold.
//
// # What is durable, and when
//
// The steps, and what a crash after each leaves, are described where they are
// taken: Store.Accept, VM.StageLayer, VM.List, VM.fold with base.fold, VM.Start,
// VM.Cancel, VM.EndTest, VM.Erase and the type journal. What they have in common:
//
//   - A file is durable before anything names it: layers before the point's
//     record, tops before the failover's.
//   - What is to be destroyed is given up in the journal first: points before
//     the base that they need is written, layers after the base that has them
//     was, a test before its top is removed.
//   - A failed sync is final. The journal and the checksums are then written
//     anew under another name; what was staged is forgotten and sent again; a fold
//     writes everything again.
//   - What a guest wrote in a failover is never removed but by RemoveBranch.
//
// # Folding in groups
//
// The bases follow the oldest point that is kept. The first point is folded at
// once; later points are retired one by one as new ones come, and folded when
// eight have come together, or room is short: what was rewritten meanwhile is then
// written once (RULES I5). Their layers are stacked, the newest first, so that also
// the size of a base changes only once.
//
// Bases are checked block by block when they are read for the first time. A block
// that a fold has in part is checked before it is changed, since afterwards it
// gets a new checksum. What is found damaged marks the points that rely on it, in
// the journal; retention then keeps the newest point that is whole. If all are
// damaged by the same block of a base, folding goes on, with that block
// remembered as damaged until a layer covers the whole of it.
//
// # Locks and goroutines
//
// A store has one goroutine, its keeper, which ends with Close. All other work is
// done by whoever calls. Locks are taken in this order:
//
//	Store.naming    names of VMs and tests; VMs come and go
//	VM.folding      one who retires and folds
//	VM.change       one durable change at a time; held across syncs of the journal
//	VM.files        files of layers are opened (shared) or removed
//	Store.mu        the map of VMs
//	VM.mu           everything in memory; nothing slow is done under it
//	base.mu         states of blocks, against reads of the base
//	sums.mu         pages in memory
//
// A point is held by whoever has it open, from before its layers are looked up.
// Taking it and retiring it are decided under VM.mu, so a fold never takes away what
// somebody is about to read (RULES I1).
package replica
