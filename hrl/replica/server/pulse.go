package server

import (
	"net/http"
	"time"
)

// pulsesMax is how many signs of life a request gets. One whose disk hangs looks
// just like one that is at work; some time the other side is to hear of it.
const pulsesMax = 360

// pulse says now and then that the request is being worked on, until the function
// it returns has returned. Meanwhile nobody else may touch the answer.
func (q *request) pulse() func() {
	// Who waits for a "100 Continue" gets it from whoever reads the body, at the
	// same time.
	if !q.r.ProtoAtLeast(1, 1) || q.r.Header.Get("Expect") != "" {
		return func() {}
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		t := time.NewTicker(q.s.o.PulseEvery)
		defer t.Stop()
		for range pulsesMax {
			select {
			case <-done:
				return
			case <-t.C:
			}
			_ = q.rc.SetWriteDeadline(time.Now().Add(q.s.o.StallTimeout))
			q.w.WriteHeader(http.StatusProcessing)
		}
	}()
	return func() { close(done); <-ended }
}
