package bench

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"
)

// ServeGoNBD serves an image with go-nbd's server until ctx is done: the loop that
// its documentation shows, with its own backend for files. It is for the
// comparison alone: that server has no flush and checks no bounds.
func ServeGoNBD(ctx context.Context, image, socket string) error {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("go-nbd: %w", err)
	}
	defer context.AfterFunc(ctx, func() { ln.Close() })()

	exports := []*server.Export{{Name: exportName, Backend: backend.NewFileBackend(f)}}
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("go-nbd: %w", err)
		}
		wg.Go(func() {
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			defer conn.Close()
			// How a client left is its own affair.
			_ = server.Handle(conn, exports, &server.Options{SupportsMultiConn: true})
		})
	}
}
