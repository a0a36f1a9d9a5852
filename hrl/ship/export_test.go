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

// SetCopyLayerMax changes how much a layer of copies gets, until the function returned
// is called.
func SetCopyLayerMax(n int64) (restore func()) {
	was := copyLayerMax
	copyLayerMax = n
	return func() { copyLayerMax = was }
}

// SetPace changes how often the pace of copying is looked at, and for how long it may be
// too slow.
func SetPace(every, slow time.Duration) (restore func()) {
	a, b := rateEvery, slowAfter
	rateEvery, slowAfter = every, slow
	return func() { rateEvery, slowAfter = a, b }
}

// LineLimit is what goes over the line at present, in bytes a second.
func (s *Shipper) LineLimit() float64 { return float64(s.limit.Limit()) }
