// Package wire is what two hosts of a replication say to each other: JSON over
// HTTPS, with certificates on both sides, and layers as they are in their files.
//
//	wire.go    names: VMs and points; the version
//	message.go requests and answers
//	error.go   refusals
//
// The primary asks, the replica answers. Paths, below the root:
//
//	GET    /v1/hello                    who is there, and may I replicate to you
//	PUT    /v1/vms/{vm}                 Offer: I have this VM            -> VMState
//	GET    /v1/vms/{vm}                                                  -> VMState
//	GET    /v1/vms/{vm}/points                                           -> []PointInfo
//	PUT    /v1/vms/{vm}/layers/{digest}?size=N&offset=N  bytes           -> LayerState
//	GET    /v1/vms/{vm}/layers/{digest}                                  -> LayerState
//	POST   /v1/vms/{vm}/discard         Discard: forget what is staged   -> VMState
//	POST   /v1/vms/{vm}/points          PointInfo: list this point       -> PointInfo
//	POST   /v1/vms/{vm}/digests         DigestRequest                    -> 32 bytes a range
//
// An answer to the listing of a point is the one acknowledgement there is: the
// layers, their directory and the record of the point are durable over there
// (RULES H6). Everything may be asked again: each request that was carried out
// once answers the second time as it did the first.
//
// Every request and every answer has VersionHeader; a host of another version
// answers with CodeVersion before it looks at anything else.
//
// A refusal is an Error with the status of its Code. While a request takes its
// time the answering host says every PulseEvery with an answer of status 102 that
// it is at work, so that an asking host which hears nothing for SilenceMax may
// take it for hung, however long a layer takes to be checked.
package wire

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Version is the version of the protocol. A host refuses any other.
const Version = 1

// VersionHeader names the HTTP header with the version, in decimal.
const VersionHeader = "Afterimage-Protocol"

// A VMID is the UUID of a VM, the same on every host.
type VMID [16]byte

// NewVMID draws one (UUID version 4).
func NewVMID() VMID {
	var id VMID
	_, _ = rand.Read(id[:]) // never fails
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}

func (id VMID) String() string {
	h := hex.EncodeToString(id[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// ParseVMID reads what String writes.
func ParseVMID(s string) (VMID, error) {
	var id VMID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, fmt.Errorf("%q is no UUID", s)
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%q is no UUID", s)
	}
	copy(id[:], b)
	if id.String() != s {
		return VMID{}, fmt.Errorf("%q is no UUID in small letters", s) // one VM has one spelling
	}
	return id, nil
}

// MarshalText implements encoding.TextMarshaler.
func (id VMID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *VMID) UnmarshalText(b []byte) error {
	v, err := ParseVMID(string(b))
	*id = v
	return err
}

// A PointID names a recovery point of a VM (rule R6). The zero value is the
// time before the first point: every disk reads as zero there.
type PointID struct {
	Generation  uint64 // one unforked history of the VM
	Incarnation uint64 // start of the primary's log
	Epoch       uint64 // that the cut ended
}

// IsZero reports whether it names no point.
func (p PointID) IsZero() bool { return p == PointID{} }

// whole reports whether none of the numbers is missing: all count from 1.
func (p PointID) whole() bool { return p.Generation > 0 && p.Incarnation > 0 && p.Epoch > 0 }

// Before reports whether the point comes before o.
func (p PointID) Before(o PointID) bool {
	switch {
	case p.Generation != o.Generation:
		return p.Generation < o.Generation
	case p.Incarnation != o.Incarnation:
		return p.Incarnation < o.Incarnation
	}
	return p.Epoch < o.Epoch
}

// String is generation.incarnation.epoch, or "none".
func (p PointID) String() string {
	if p.IsZero() {
		return "none"
	}
	return fmt.Sprintf("%d.%d.%d", p.Generation, p.Incarnation, p.Epoch)
}

// ParsePointID reads what String writes.
func ParsePointID(s string) (PointID, error) {
	if s == "none" {
		return PointID{}, nil
	}
	var n [3]uint64
	parts := strings.Split(s, ".")
	if len(parts) != len(n) {
		return PointID{}, fmt.Errorf("%q is no recovery point: one looks like 1.2.345", s)
	}
	for i, part := range parts {
		v, err := strconv.ParseUint(part, 10, 64)
		if err != nil || strconv.FormatUint(v, 10) != part {
			return PointID{}, fmt.Errorf("%q is no recovery point: one looks like 1.2.345", s)
		}
		n[i] = v
	}
	id := PointID{n[0], n[1], n[2]}
	if id.IsZero() {
		return id, fmt.Errorf("%q is no recovery point: their numbers count from 1", s)
	}
	return id, nil
}

// MarshalText implements encoding.TextMarshaler.
func (p PointID) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *PointID) UnmarshalText(b []byte) error {
	v, err := ParsePointID(string(b))
	*p = v
	return err
}
