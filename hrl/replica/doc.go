// Package replica is the other side of a replication.
package replica
