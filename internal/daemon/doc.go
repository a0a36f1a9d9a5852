// Package daemon is what `afterimage daemon` runs: the VMs whose disks this host
// serves and replicates, and the replicas that other hosts keep here.
//
//	daemon.go      Start and Close, in the order that keeps data; claims
//	door.go        the three sockets, and who answers on them
//	socket.go      Unix sockets, their modes and their directories
//	store.go       Store: what is known after a restart, in bbolt
//	record.go      keys and records in the store
//	vm.go          a VM of this host: opening, trying again, closing
//	vmadd.go       vm add, vm remove
//	replication.go replica enable, sync, pause, resume, disable
//	peers.go       who may replicate here, and where it is stored
//	failover.go    tests and failovers
//	point.go       recovery points: list, serve, pin, remove
//	status.go      what is shown of VMs and replications
//	api.go         from requests of package admin to all that, and back
//	error.go       from errors to exit statuses
//
// # Who owns what
//
// A vm owns its images (opened and locked), the shim.VM over them, and, while it is
// replicated, a ship.Client and a ship.Shipper; the log is the shim.VM's. A storage
// owns a replica.Store. A run owns a replica.Run and the shim.VM over its disks. The
// one nbd.Server has the disks of all, as VM/DISK, and owns none.
//
// What is kept where (RULES S9): the store has which VMs there are, to whom they
// are replicated, and who may replicate here. All else is beside the data: whose
// an image is, in its identity file (package owner); points, failovers and tests
// in the journals of the replicas; what was written in the VM's log. So a state
// directory that is lost costs the commands to be given again, and a comparison of
// the disks, but no disk and no point: `vm add` finds the VM's UUID beside the
// images, and its replica goes on.
//
// # Goroutines
//
// Each VM has a keeper, which opens it, and tries again while something of it
// cannot be opened; each storage one that ends when it is open. So a VM on a hung
// disk, or one whose image is missing, keeps no other waiting, and Start waits for
// none of them longer than openPatience. They end with Daemon.ctx, and Close waits
// for them. Each door has a goroutine, and Shippers, servers and stores have their
// own.
//
// # Locks
//
// Whoever changes something of a VM or a test has claimed its name (Daemon.claim).
// A claim is no mutex: it is held across I/O and while a peer is asked, and who
// comes meanwhile is told so after a moment. Daemon.mu and the mu of each vm, run
// and storage guard fields, for moments, never across I/O; none is taken while
// another is held. What is shown needs no claim.
//
// # Order
//
// Start opens the store, which locks the directory, then the sockets, so that what
// can be refused is refused before an image is touched; then the storages with the
// runs in them, and the VMs; then it begins to answer: disks, peers, commands. A VM
// is opened in the order: images locked, identity files checked, log opened and
// log and disk made to agree, tee on, disks exported. If the log cannot be opened
// the guest gets its disk all the same; that the log then proves nothing is on
// record before (replicationRecord.LogStale).
//
// Close goes the other way: commands, peers, disks (requests under way finish),
// keepers, then all VMs at once: shippers, disks made durable, logs closed clean;
// then runs, storages, and the store last. After a kill nothing of that happened,
// and the next Start makes log and disk agree (package shim).
//
// The durable steps of each change stand at its function: addVM, removeVM, enable,
// disable, allowPeer.
package daemon
