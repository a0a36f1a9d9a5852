package ship

import (
	"net/http"
	"time"
)

// UseHTTP2 makes the client speak HTTP/2, for the comparison.
func (c *Client) UseHTTP2() {
	c.transport.TLSClientConfig.NextProtos = []string{"h2"}
	c.transport.Protocols = new(http.Protocols)
	c.transport.Protocols.SetHTTP2(true)
}

// SetSilence changes how long the peer may be silent, in a handshake too.
func (c *Client) SetSilence(d time.Duration) { c.silence, c.transport.TLSHandshakeTimeout = d, d }

// PieceBytes and the error of a peer that is silent, for their tests.
var (
	PieceBytes = pieceBytes
	ErrSilent  = errSilent
)
