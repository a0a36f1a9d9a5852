package nbd

import "encoding/binary"

// Everything on the wire is big-endian.
//
//	request                      simple reply
//	byte  size  field            byte  size  field
//	   0     4  requestMagic        0     4  replyMagic
//	   4     2  command flags       4     4  error, 0: none
//	   6     2  command             8     8  cookie
//	   8     8  cookie             16        data of a successful read
//	  16     8  offset
//	  24     4  length
//	  28        data of a write
//
//	option                       option reply
//	byte  size  field            byte  size  field
//	   0     8  optionMagic         0     8  optionReplyMagic
//	   8     4  option              8     4  option
//	  12     4  length             12     4  type of reply
//	  16        data               16     4  length
//	                               20        data
const (
	initMagic        = 0x4e42444d41474943 // "NBDMAGIC"
	optionMagic      = 0x49484156454f5054 // "IHAVEOPT"
	optionReplyMagic = 0x0003e889045565a9
	requestMagic     = 0x25609513
	replyMagic       = 0x67446698

	greetingSize    = 18
	optionSize      = 16
	optionReplySize = 20
	requestSize     = 28
	replySize       = 16

	// exportNamePad follows the answer to EXPORT_NAME unless both sides said
	// that it need not.
	exportNamePad = 124
)

// Handshake flags, of the server (16 bits) and of the client (32 bits).
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options.
const (
	optExportName = 1
	optAbort      = 2
	optList       = 3
	optInfo       = 6
	optGo         = 7
)

// Types of option replies. Errors have the top bit set.
const (
	repAck    = 1
	repServer = 2
	repInfo   = 3

	repErrBit           = 1 << 31
	repErrUnsup         = repErrBit | 1
	repErrPolicy        = repErrBit | 2
	repErrInvalid       = repErrBit | 3
	repErrTLSReqd       = repErrBit | 5
	repErrUnknown       = repErrBit | 6
	repErrShutdown      = repErrBit | 7
	repErrBlockSizeReqd = repErrBit | 8
	repErrTooBig        = repErrBit | 9
)

// What an information reply is about.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags: what the export offers.
const (
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagRotational      = 1 << 4
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagMultiConn       = 1 << 8
	flagSendFastZero    = 1 << 11
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
)

// Command flags.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagFastZero = 1 << 4
)

const (
	// maxName bounds the name of an export, in bytes; the protocol says 4096.
	maxName = 4096
	// maxPayload is the longest read and write that the server takes and
	// announces, in bytes. Clients exist that send 50 MB at once.
	maxPayload = 64 << 20
	// preferredBlock is the announced transfer size below which a write may
	// cost more than it should, in bytes.
	preferredBlock = 4096
	// defaultPayload is what a server takes that does not say, in bytes.
	defaultPayload = 32 << 20
)

// A request is the header of one command.
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64 // bytes
	length uint32 // bytes
}

// decode reads a request from b, at least requestSize bytes, and reports
// whether its magic is right.
func (r *request) decode(b []byte) bool {
	_ = b[requestSize-1]
	r.flags = binary.BigEndian.Uint16(b[4:])
	r.cmd = binary.BigEndian.Uint16(b[6:])
	r.cookie = binary.BigEndian.Uint64(b[8:])
	r.off = binary.BigEndian.Uint64(b[16:])
	r.length = binary.BigEndian.Uint32(b[24:])
	return binary.BigEndian.Uint32(b) == requestMagic
}

// encode writes the request to the first requestSize bytes of b.
func (r *request) encode(b []byte) {
	_ = b[requestSize-1]
	binary.BigEndian.PutUint32(b, requestMagic)
	binary.BigEndian.PutUint16(b[4:], r.flags)
	binary.BigEndian.PutUint16(b[6:], r.cmd)
	binary.BigEndian.PutUint64(b[8:], r.cookie)
	binary.BigEndian.PutUint64(b[16:], r.off)
	binary.BigEndian.PutUint32(b[24:], r.length)
}

// encodeReply writes the header of a simple reply to the first replySize bytes of b.
func encodeReply(b []byte, code uint32, cookie uint64) {
	_ = b[replySize-1]
	binary.BigEndian.PutUint32(b, replyMagic)
	binary.BigEndian.PutUint32(b[4:], code)
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// appendOptionReply appends one option reply with its data to b.
func appendOptionReply(b []byte, option, kind uint32, data ...[]byte) []byte {
	n := 0
	for _, d := range data {
		n += len(d)
	}
	b = binary.BigEndian.AppendUint64(b, optionReplyMagic)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	for _, d := range data {
		b = append(b, d...)
	}
	return b
}
