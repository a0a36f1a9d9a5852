// Package server answers the hosts that replicate to this one: package wire's
// requests, over a replica's store.
//
//	server.go  Options, who may ask, and the way of a request through the rules
//	route.go   which request is meant, and what its body holds
//	verbs.go   what each request does to the store
//	layer.go   pieces of layers, and when one ends another
//	refuse.go  from the store's errors to refusals
//	pulse.go   signs of life while a request takes its time
//	limit.go   how much one host may ask at once, and how often that is logged
//	listen.go  Serve: connections, their limits, and the end
//	store.go   what is asked of a store
//
// # What is not taken on faith
//
// A request is looked at in this order, and the first thing wrong with it is the
// answer: the version of the protocol, the identity in the certificate, the
// path, whether a `peer allow` covers that identity, whether it asks too much at
// once, the length of the body, the body itself, and last whether the VM comes
// from this host. Nothing of a body is read before its length is known to be in
// order; what is read is read against a deadline that is renewed only as bytes
// arrive.
//
// The sender of a VM is compared on every request. Listing a point, discarding
// and a new offer of the same VM exclude each other, so an old sender whose
// request was let in can never list behind the back of a new one (RULES K7).
//
// # A piece that broke off
//
// A connection that has died is often noticed first by the host at the other end,
// which then asks where to go on, on a new connection. Such a request for a layer
// ends an older one that is still waiting for bytes of the same layer, and waits
// until the store has synced what had come: so the answer is the length at which
// the layer really goes on, and no dead connection blocks a living one.
//
// This package promises nothing durable by itself: what is answered is what the
// store returned, after it returned.
package server
