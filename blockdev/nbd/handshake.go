package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	// maxOption is the longest option data that is looked at, in bytes: a name
	// with its length, and a generous list of wishes.
	maxOption = 4 + maxName + 2 + 2*256
	// maxSkip is the longest option data that is read only to be thrown away.
	maxSkip = 1 << 20
)

// handshaking is what the server knows of a client that has not chosen its
// export. Nothing that one option brings is kept for the next.
type handshaking struct {
	s     *Server
	c     *conn
	ctx   context.Context
	fixed bool // the client knows option replies
	short bool // the client does without exportNamePad

	reply []byte // option replies of the present option; leave in one write
	done  bool   // the client has chosen or given up
}

// options is what the server understands. Each adds its replies; an error ends
// the connection.
var options = map[uint32]func(h *handshaking, option uint32, data []byte) error{
	optExportName: (*handshaking).exportName,
	optAbort:      (*handshaking).abort,
	optList:       (*handshaking).list,
	optInfo:       (*handshaking).info,
	optGo:         (*handshaking).info,
}

// handshake talks with the client until c has an export, or the client has given
// up: then c.export is nil.
func (s *Server) handshake(ctx context.Context, c *conn) error {
	h := &handshaking{s: s, c: c, ctx: ctx}
	b := binary.BigEndian.AppendUint64(nil, initMagic)
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.nc.Write(b); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.nc, flags[:]); err != nil {
		return err
	}
	f := binary.BigEndian.Uint32(flags[:])
	if f&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return &protocolError{fmt.Sprintf("unknown client flags %#x", f)}
	}
	h.fixed, h.short = f&flagFixedNewstyle != 0, f&flagNoZeroes != 0
	for !h.done {
		if err := h.option(); err != nil {
			return err
		}
	}
	return nil
}

// option reads one option and answers it.
func (h *handshaking) option() error {
	var head [optionSize]byte
	if _, err := io.ReadFull(h.c.nc, head[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(head[:]) != optionMagic {
		return &protocolError{"sent something that is no option"}
	}
	option := binary.BigEndian.Uint32(head[8:])
	length := binary.BigEndian.Uint32(head[12:])
	if !h.fixed && option != optExportName {
		return &protocolError{fmt.Sprintf("sent option %d without having said that it knows option replies", option)}
	}
	h.reply = h.reply[:0]
	handle, ok := options[option]
	if !ok || length > maxOption {
		if option == optExportName || length > maxSkip {
			return &protocolError{fmt.Sprintf("announced %d bytes of option %d", length, option)}
		}
		if _, err := io.CopyN(io.Discard, h.c.nc, int64(length)); err != nil {
			return err
		}
		if ok {
			h.say(option, repErrTooBig, []byte("more data than the server looks at"))
		} else {
			h.say(option, repErrUnsup)
		}
		return h.flush()
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(h.c.nc, data); err != nil {
		return err
	}
	if err := handle(h, option, data); err != nil {
		return err
	}
	return h.flush()
}

// say adds an option reply.
func (h *handshaking) say(option, kind uint32, data ...[]byte) {
	h.reply = appendOptionReply(h.reply, option, kind, data...)
}

// flush sends what was said.
func (h *handshaking) flush() error {
	_, err := h.c.nc.Write(h.reply)
	return err
}

// abort ends the handshake. The client need not wait for the answer.
func (h *handshaking) abort(option uint32, _ []byte) error {
	h.say(option, repAck)
	h.done = true
	return nil
}

// list names the exports.
func (h *handshaking) list(option uint32, data []byte) error {
	if len(data) > 0 {
		h.say(option, repErrInvalid, []byte("the list takes no data"))
		return nil
	}
	for _, e := range h.s.listed() {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(e.Name)))
		h.say(option, repServer, n[:], []byte(e.Name), []byte(e.Description))
	}
	h.say(option, repAck)
	return nil
}

// exportName chooses an export, in the old way: there is no answer that says no.
func (h *handshaking) exportName(_ uint32, name []byte) error {
	e := h.s.export(name)
	if len(name) > maxName || e == nil {
		return &protocolError{fmt.Sprintf("asked for the unknown export %.100q", name)}
	}
	if err := h.s.admit(h.ctx, h.c, e); err != nil {
		return err
	}
	h.reply = binary.BigEndian.AppendUint64(h.reply, uint64(e.Queue.Size()))
	h.reply = binary.BigEndian.AppendUint16(h.reply, e.flags())
	if !h.short {
		h.reply = append(h.reply, make([]byte, exportNamePad)...)
	}
	h.done = true
	return nil
}

// info describes an export, and with optGo chooses it.
//
//	byte  size  field
//	   0     4  length of the name
//	   4        name
//	         2  number of wishes
//	       2 *  wishes: which information the client would like
func (h *handshaking) info(option uint32, data []byte) error {
	invalid := func() error {
		h.say(option, repErrInvalid, []byte("name, number of wishes and wishes do not fill the option"))
		return nil
	}
	if len(data) < 6 {
		return invalid()
	}
	n := binary.BigEndian.Uint32(data)
	if uint64(n) > uint64(len(data)-6) {
		return invalid()
	}
	name, wishes := data[4:4+n], data[4+n:]
	if len(wishes) != 2+2*int(binary.BigEndian.Uint16(wishes)) {
		return invalid()
	}
	if len(name) > maxName {
		h.say(option, repErrTooBig, []byte("the name is too long"))
		return nil
	}
	e := h.s.export(name)
	if e == nil {
		h.say(option, repErrUnknown, []byte(ErrNoExport.Error()))
		return nil
	}
	if option == optGo {
		switch err := h.s.admit(h.ctx, h.c, e); {
		case errors.Is(err, ErrNoExport):
			h.say(option, repErrUnknown, []byte(err.Error()))
			return nil
		case errors.Is(err, errFull):
			h.s.refuse(h.c.nc)
			h.say(option, repErrPolicy, []byte(err.Error()))
			return nil
		case errors.Is(err, errUnsettled):
			h.s.log().Warn("a client was refused", "export", e.Name, "client", peerName(h.c.nc), "err", err)
			h.say(option, repErrPolicy, []byte(err.Error()))
			return nil
		case err != nil:
			return err
		}
		h.done = true
	}

	var b [12]byte
	binary.BigEndian.PutUint16(b[:], infoExport)
	binary.BigEndian.PutUint64(b[2:], uint64(e.Queue.Size()))
	binary.BigEndian.PutUint16(b[10:], e.flags())
	h.say(option, repInfo, b[:])
	said := make(map[uint16]bool) // a client may wish the same thing twice
	for wishes = wishes[2:]; len(wishes) > 0; wishes = wishes[2:] {
		wish := binary.BigEndian.Uint16(wishes)
		if said[wish] {
			continue
		}
		said[wish] = true
		switch wish {
		case infoName:
			h.say(option, repInfo, wishes[:2], []byte(e.Name))
		case infoDescription:
			if e.Description != "" {
				h.say(option, repInfo, wishes[:2], []byte(e.Description))
			}
		case infoBlockSize:
			var b [14]byte
			least, preferred := e.blockSizes()
			binary.BigEndian.PutUint16(b[:], infoBlockSize)
			binary.BigEndian.PutUint32(b[2:], least)
			binary.BigEndian.PutUint32(b[6:], preferred)
			binary.BigEndian.PutUint32(b[10:], maxPayload)
			h.say(option, repInfo, b[:])
		}
	}
	h.say(option, repAck)
	return nil
}

// flags is what the export offers.
func (e *Export) flags() uint16 {
	// A flush covers whatever has finished on the Queue, through whichever
	// connection it came: that is what flagMultiConn promises.
	f := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn)
	if e.Queue.Info().Rotational {
		f |= flagRotational
	}
	if e.ReadOnly {
		return f | flagReadOnly
	}
	return f | flagSendTrim | flagSendWriteZeroes | flagSendFastZero
}

// blockSizes are the smallest unit of a request and the smallest good one, in
// bytes.
func (e *Export) blockSizes() (least, preferred uint32) {
	info := e.Queue.Info()
	least = uint32(max(1, info.BlockSize))
	return least, uint32(max(preferredBlock, info.Preferred, int64(least)))
}
