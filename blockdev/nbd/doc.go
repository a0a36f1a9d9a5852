// Package nbd serves disks over the NBD protocol, and uses a disk that another
// server exports as a [blockdev.Device].
//
// Both sides speak the fixed newstyle handshake and simple replies. The server
// puts [blockdev.Queue]s on the wire: whatever has arrived on a connection is
// one batch, payloads are never copied, and replies of requests that finish
// together leave together.
//
//	proto.go      the bytes both sides agree on
//	errno.go      errors on the wire
//	uri.go        nbd:// and nbd+unix://
//	server.go     Server: exports, accepting, ending cleanly
//	disk.go       who uses a disk, and when a new connection may (rule A6)
//	limit.go      how many connections, and what those over it hear
//	handshake.go  options until the client has chosen an export
//	conn.go       one client in transmission, from admission to its last reply
//	receive.go    requests in: parsed in place, given to the Queue in batches
//	batch.go      up to 16 requests and where their replies lie
//	send.go       replies out, never blocking who has finished the request
//	monitor.go    loops taken from a Submit that hangs
//	buffer.go     pooled memory with counted references
//	listen.go     a Unix socket that does not steal a living server's
//	client.go     Client: a Device over a connection
//	dial.go       the client's handshake
//	transfer.go   the client's requests and replies on the wire
//
// # The life of a request
//
// A connection has one loop. It receives into a buffer, parses what is complete
// and submits it in batches of at most [blockdev.BatchMax]; the payload of a
// write is the part of the receive buffer where it landed. The Queue completes
// requests on whatever goroutine finished them. That goroutine writes the
// replies itself as far as the socket takes them without waiting; what remains
// is left to a goroutine of the connection, so that a client that does not read
// stops nobody but itself. What a connection holds in memory is bounded: over
// the bound it stops receiving, never sending.
//
// The protocol has no word for a disk that gets another size: a client is told the size
// when it connects. Requests are checked against the present one, so beyond a smaller
// end they fail (EINVAL, for writes ENOSPC), and a larger disk takes them.
//
// Submit may hang (a log on a dead disk). Then the monitor gives the loop to a
// fresh goroutine and the connection's other requests go on.
package nbd
