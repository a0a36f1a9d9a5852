// Package admin is what the daemon and its commands say to each other: HTTP and
// JSON over a Unix socket that only the daemon's user can open.
//
//	types.go   what is asked and answered
//	error.go   refusals, with the exit status of the command
//	stream.go  answers that take a while: progress, then the result
//	client.go  the commands' side
//
// The daemon's side is package daemon. Paths, with the bodies of question and
// answer; {vm} and {name} are names, not UUIDs:
//
//	GET    /v1/daemon                                    -> Daemon
//	GET    /v1/vms                                       -> []VM
//	POST   /v1/vms                         AddVM         -> VM
//	GET    /v1/vms/{vm}                                  -> VM
//	DELETE /v1/vms/{vm}
//	GET    /v1/peers                                     -> []Peer
//	POST   /v1/peers                       AllowPeer     -> Peer
//	DELETE /v1/peers?pattern=PATTERN
//	POST   /v1/peers/test                  TestPeer      -> PeerTested
//	GET    /v1/replication                               -> []Replication
//	GET    /v1/vms/{vm}/replication                      -> Replication
//	POST   /v1/vms/{vm}/replication        Enable        -> Replication
//	DELETE /v1/vms/{vm}/replication
//	POST   /v1/vms/{vm}/sync                             -> stream: Point
//	POST   /v1/vms/{vm}/pause, resume
//	GET    /v1/vms/{vm}/points                           -> []Point
//	POST   /v1/vms/{vm}/points/pin, unpin, remove        PointName
//	POST   /v1/vms/{vm}/points/serve       ServePoint    -> stream: Served
//	GET    /v1/runs                                      -> []Run
//	POST   /v1/vms/{vm}/test               StartRun      -> stream: Run
//	POST   /v1/vms/{vm}/failover           StartRun      -> stream: Run
//	POST   /v1/vms/{vm}/cancel                           -> Cancelled
//	POST   /v1/vms/{vm}/commit
//	DELETE /v1/tests/{name}
//
// Fields are in bytes, seconds and RFC 3339, and only ever grow. A field that a
// daemon does not know is refused, so that a newer command never believes that
// an older daemon did what it asked.
package admin
