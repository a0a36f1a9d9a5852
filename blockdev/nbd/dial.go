package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"time"
)

const (
	// dialTimeout bounds connecting and the handshake if the context does not.
	dialTimeout = 30 * time.Second
	// maxOptionReply is the longest option reply that is looked at, in bytes.
	maxOptionReply = 2*maxName + 64
	// maxReplies is how many answers to one option are waited for.
	maxReplies = 64
	// oldstyleMagic stands where a newstyle server has optionMagic.
	oldstyleMagic = 0x00420281861253
)

// offer is what a server says about an export.
type offer struct {
	size      int64 // bytes
	flags     uint16
	least     uint32 // smallest unit of a request in bytes, 0: not said
	preferred uint32 // bytes, 0: not said
	longest   uint32 // longest payload in bytes, 0: not said
}

// errUnsupported is a server that does not know an option.
var errUnsupported = errors.New("the server does not know the option")

// connect reaches the server and asks it for the export.
func connect(ctx context.Context, u URI) (net.Conn, offer, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var d net.Dialer
	network, address := u.dialAddress()
	nc, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, offer{}, err
	}
	undo := onDone(ctx, func() { nc.Close() })
	o, err := choose(nc, u.Export)
	if !undo() {
		err = fmt.Errorf("the server does not answer: %w", context.Cause(ctx))
	}
	if err != nil {
		nc.Close()
		return nil, offer{}, err
	}
	return nc, o, nil
}

// choose makes the handshake for an export.
func choose(nc net.Conn, export string) (offer, error) {
	var b [greetingSize]byte
	if _, err := io.ReadFull(nc, b[:]); err != nil {
		return offer{}, fmt.Errorf("read the server's greeting: %w", err)
	}
	switch magic := binary.BigEndian.Uint64(b[8:]); {
	case binary.BigEndian.Uint64(b[:]) != initMagic:
		return offer{}, errors.New("this is no NBD server")
	case magic == oldstyleMagic:
		return offer{}, errors.New("the server speaks only the oldstyle handshake, which has no exports; update it")
	case magic != optionMagic:
		return offer{}, errors.New("the server speaks an unknown handshake")
	}
	flags := binary.BigEndian.Uint16(b[16:]) & (flagFixedNewstyle | flagNoZeroes)
	if _, err := nc.Write(binary.BigEndian.AppendUint32(nil, uint32(flags))); err != nil {
		return offer{}, fmt.Errorf("answer the server's greeting: %w", err)
	}
	if flags&flagFixedNewstyle != 0 {
		o, err := goTo(nc, export)
		if !errors.Is(err, errUnsupported) {
			return o, err
		}
	}
	return exportName(nc, export, flags&flagNoZeroes != 0)
}

// goTo chooses the export by optGo.
func goTo(nc net.Conn, export string) (offer, error) {
	b := appendOption(nil, optGo, 4+len(export)+2+2)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint16(b, 1)
	b = binary.BigEndian.AppendUint16(b, infoBlockSize)
	if _, err := nc.Write(b); err != nil {
		return offer{}, fmt.Errorf("ask for the export: %w", err)
	}
	var o offer
	described := false
	for range maxReplies {
		kind, data, err := readOptionReply(nc, optGo)
		if err != nil {
			return offer{}, fmt.Errorf("ask for the export: %w", err)
		}
		switch {
		case kind == repAck && !described:
			return offer{}, errors.New("the server granted the export without describing it")
		case kind == repAck:
			return o, o.check()
		case kind == repErrUnsup:
			return offer{}, errUnsupported
		case kind&repErrBit != 0:
			return offer{}, refusal(kind, data)
		case kind != repInfo:
			return offer{}, fmt.Errorf("the server answered with an unknown reply %d", kind)
		case len(data) < 2:
			return offer{}, fmt.Errorf("the server sent %d bytes of information", len(data))
		}
		switch info, data := binary.BigEndian.Uint16(data), data[2:]; {
		case info == infoExport && len(data) == 10:
			described = true
			if err := o.describe(data); err != nil {
				return offer{}, err
			}
		case info == infoBlockSize && len(data) == 12:
			o.least = binary.BigEndian.Uint32(data)
			o.preferred = binary.BigEndian.Uint32(data[4:])
			o.longest = binary.BigEndian.Uint32(data[8:])
			if o.least == 0 {
				return offer{}, errors.New("the server's smallest block has 0 bytes")
			}
		case info == infoExport || info == infoBlockSize:
			return offer{}, fmt.Errorf("the server sent information %d of %d bytes", info, len(data))
		}
	}
	return offer{}, fmt.Errorf("the server has not come to the point in %d replies", maxReplies)
}

// exportName chooses the export in the old way.
func exportName(nc net.Conn, export string, short bool) (offer, error) {
	if _, err := nc.Write(append(appendOption(nil, optExportName, len(export)), export...)); err != nil {
		return offer{}, fmt.Errorf("ask for the export: %w", err)
	}
	b := make([]byte, 10+exportNamePad)
	if short {
		b = b[:10]
	}
	if _, err := io.ReadFull(nc, b); err != nil {
		if errors.Is(err, io.EOF) {
			return offer{}, fmt.Errorf("the server closed the connection, which is how an old one says: %w", ErrNoExport)
		}
		return offer{}, fmt.Errorf("ask for the export: %w", err)
	}
	var o offer
	if err := o.describe(b); err != nil {
		return offer{}, err
	}
	return o, o.check()
}

func appendOption(b []byte, option uint32, length int) []byte {
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint32(b, option)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

func readOptionReply(nc net.Conn, option uint32) (kind uint32, data []byte, err error) {
	var head [optionReplySize]byte
	if _, err := io.ReadFull(nc, head[:]); err != nil {
		return 0, nil, err
	}
	kind = binary.BigEndian.Uint32(head[12:])
	length := binary.BigEndian.Uint32(head[16:])
	switch {
	case binary.BigEndian.Uint64(head[:]) != optionReplyMagic:
		return 0, nil, errors.New("the server sent something that is no option reply")
	case binary.BigEndian.Uint32(head[8:]) != option:
		return 0, nil, errors.New("the server answered a question that was not asked")
	case length > maxOptionReply:
		return 0, nil, fmt.Errorf("the server announced an answer of %d bytes", length)
	}
	data = make([]byte, length)
	_, err = io.ReadFull(nc, data)
	return kind, data, err
}

// refusal is the error of an option that was refused.
func refusal(kind uint32, data []byte) error {
	var err error
	switch kind {
	case repErrUnknown:
		err = ErrNoExport
	case repErrPolicy:
		err = errors.New("the server does not allow it")
	case repErrTLSReqd:
		err = errors.New("the server insists on TLS, which is not supported")
	case repErrShutdown:
		err = errors.New("the server is shutting down")
	case repErrBlockSizeReqd:
		err = errors.New("the server insists on block sizes")
	default:
		err = fmt.Errorf("the server refuses with error %d", kind&^uint32(repErrBit))
	}
	if len(data) > 0 {
		err = fmt.Errorf("%w (the server says %.200q)", err, data)
	}
	return err
}

// describe takes size and flags.
func (o *offer) describe(b []byte) error {
	size := binary.BigEndian.Uint64(b)
	if size > math.MaxInt64 {
		return fmt.Errorf("the server says that the disk has %d bytes", size)
	}
	o.size = int64(size)
	o.flags = binary.BigEndian.Uint16(b[8:])
	return nil
}

// check brings the block sizes into the form that the rest relies on: all set,
// least 1, 512 or 4096, longest a multiple of 4096 and at most maxPayload.
func (o *offer) check() error {
	switch {
	case o.least == 0:
		// A server that says nothing should take single bytes; not all do.
		if o.least = 512; o.size%512 != 0 {
			o.least = 1
		}
	case o.least&(o.least-1) != 0 || o.least > 64<<10:
		return fmt.Errorf("the server's smallest block has %d bytes, no power of two up to 64 KiB", o.least)
	case o.least == 1:
	case o.least <= 512:
		o.least = 512
	case o.least <= 4096:
		o.least = 4096
	default:
		return fmt.Errorf("the server's smallest block has %d bytes, more than the 4096 that are supported", o.least)
	}
	if o.size%int64(o.least) != 0 {
		return fmt.Errorf("the server's disk of %d bytes is no multiple of its smallest block of %d", o.size, o.least)
	}
	if p := o.preferred; p < 512 || p&(p-1) != 0 || p > 32<<20 {
		o.preferred = preferredBlock
	}
	o.preferred = max(o.preferred, o.least)
	if o.longest == 0 {
		o.longest = defaultPayload
	}
	if o.longest = min(o.longest, maxPayload) &^ 4095; o.longest == 0 {
		return errors.New("the server takes no payload of 4096 bytes")
	}
	return nil
}
