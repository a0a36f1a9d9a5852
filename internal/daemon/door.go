package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"afterimage/internal/admin"
)

// A door is a socket and the goroutine that serves it.
type door struct {
	ln   net.Listener // nil: there is none
	end  context.CancelFunc
	done chan struct{} // closed when the goroutine has ended; nil before open
}

// open begins to serve; serve closes the listener and returns when ctx is done
// and nothing that came through the door is under way.
func (o *door) open(log *slog.Logger, what string, serve func(context.Context, net.Listener) error) {
	if o.ln == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	o.end, o.done = cancel, make(chan struct{})
	go func() {
		defer close(o.done)
		if err := serve(ctx, o.ln); err != nil && ctx.Err() == nil {
			log.Error("no more "+what+" are accepted", "socket", o.ln.Addr().String(), "err", err)
		}
	}()
}

// close ends the serving and waits for it.
func (o *door) close() {
	switch {
	case o.done != nil:
		o.end()
		<-o.done
	case o.ln != nil:
		o.ln.Close()
	}
}

// listen makes the sockets. Nobody is accepted on them yet.
func (d *Daemon) listen() error {
	var err error
	if d.opt.Listen != "" {
		if _, err := d.certs.open(); err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
		if d.peer.ln, err = net.Listen("tcp", d.opt.Listen); err != nil {
			return &admin.Error{Status: admin.StatusFailed, Message: fmt.Sprintf("--listen %s: %v", d.opt.Listen, err),
				Advice: "name an address of this host and a port that is free"}
		}
	}
	if d.disks.ln, err = listenNBD(d.opt.NBD, d.opt.NBDGroup); err != nil {
		return err
	}
	d.admin.ln, err = listenAdmin(d.opt.Admin)
	return err
}

// serve begins to answer on the sockets: disks first, so that whoever is told of
// one by a command finds it.
func (d *Daemon) serve() {
	d.disks.open(d.log, "clients of disks", d.nbd.Serve)
	d.peer.open(d.log, "peers", d.servePeers)
	d.admin.open(d.log, "commands", d.serveAdmin)
}

const (
	// endPatience bounds how long commands have to end when the daemon does.
	endPatience = 10 * time.Second
	// headerTimeout bounds how long a command takes to send its question's header.
	headerTimeout = 30 * time.Second
)

func (d *Daemon) serveAdmin(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler: d.handler(), BaseContext: func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: headerTimeout, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		limit, cancel := context.WithTimeout(context.Background(), endPatience)
		defer cancel()
		if srv.Shutdown(limit) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(ln)
	if stop() {
		srv.Close()
	} else {
		<-ended
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
