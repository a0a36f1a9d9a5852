package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	disk        diskOptions
	socket      string // -U
	stdio       bool
	export      string // meaningful if exportSet
	exportSet   bool
	pidfile     string
	connections int
}

// serving is what `serve --json` prints once the disk can be opened.
type serving struct {
	URI      string `json:"uri"`
	Export   string `json:"export"`
	Size     int64  `json:"size"` // bytes
	ReadOnly bool   `json:"read_only"`
}

func (a *app) serveCommand() *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve IMAGE",
		Short: "Serve one disk over NBD",
		Long: `Serve one disk over NBD until interrupted. IMAGE is a raw file, a block device or
an NBD URI; an image of another format is refused, put qemu-nbd beneath for it.

Clients come over a Unix socket (-U), over standard input (--stdio, a socket that
the parent has connected), or over the Unix sockets that systemd passes
(LISTEN_FDS). When the disk can be opened its URI is printed, a line on stdout.

The image is locked as QEMU does it, so that QEMU and this command never write it
at once. SIGTERM and an interrupt finish what has begun, make the disk durable and
end; a second one kills. SIGUSR1 prints statistics to stderr.`,
		Example: `  afterimage serve vm1.raw -U /run/vm1.sock
  qemu-system-x86_64 -drive file='nbd+unix:///vm1?socket=/run/vm1.sock',format=raw,if=virtio`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.exportSet = cmd.Flags().Changed("export")
			return a.serve(args[0], o)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.socket, "unix", "U", "", "listen on the Unix socket `PATH`")
	f.BoolVar(&o.stdio, "stdio", false, "serve the one client at standard input, then end")
	f.StringVar(&o.export, "export", "", "`NAME` of the export (default: the image's base name without its extension; the empty name always works too)")
	f.BoolVar(&o.disk.readOnly, "read-only", false, "refuse every change")
	f.StringVar(&o.pidfile, "pidfile", "", "write the process id to `FILE` once the disk can be opened")
	f.IntVar(&o.connections, "connections", 64, "serve at most `N` connections at a time")
	formatFlag(cmd, &o.disk)
	return cmd
}

// serve runs until a signal ends it, or its only client leaves.
func (a *app) serve(image string, o serveOptions) (err error) {
	src, err := chooseSource(o)
	if err != nil {
		return err
	}
	// A log line to a pipe that nobody reads must not end the guest's disk.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	defer context.AfterFunc(ctx, stop)() // the second signal kills

	disk, err := openServed(ctx, image, o.disk)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.close()) }()

	srv := &nbd.Server{Log: slog.New(slog.NewTextHandler(a.stderr, nil))}
	name := exportName(image)
	if o.exportSet {
		name = o.export
	}
	exports := []nbd.Export{{Name: name, Queue: disk.queue}}
	if name != "" {
		exports = append(exports, nbd.Export{Queue: disk.queue, Unlisted: true})
	}
	for _, e := range exports {
		if err := srv.Add(e); err != nil {
			return withStatus(err, statusUsage)
		}
	}

	listeners, err := src.open()
	if err != nil {
		return err
	}
	limit := &limiter{max: o.connections, log: srv.Log}
	defer a.onUSR1(limit)()
	if o.pidfile != "" {
		if err := writePidfile(o.pidfile); err != nil {
			closeAll(listeners)
			return err
		}
		defer os.Remove(o.pidfile)
	}
	if src.conn != nil {
		limit.enter()
		return srv.ServeConn(ctx, src.conn)
	}
	if err := a.announce(listeners, name, disk); err != nil {
		closeAll(listeners)
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(listeners))
	var wg sync.WaitGroup
	for i, ln := range listeners {
		wg.Go(func() {
			errs[i] = limit.serve(ctx, srv, ln)
			cancel() // a disk that cannot be reached on all its sockets must be seen
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// announce prints where the disk can be opened.
func (a *app) announce(listeners []listener, name string, disk *served) error {
	for _, ln := range listeners {
		s := serving{ln.uri(name), name, disk.queue.Size(), disk.queue.Info().ReadOnly}
		var err error
		if a.json {
			err = a.printJSON(s)
		} else {
			_, err = fmt.Fprintln(a.stdout, s.URI)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// served is an image with what stands between it and its clients.
type served struct {
	dev   blockdev.Device
	queue blockdev.Queue
}

// workers bounds how many requests wait for the disk at once.
const workers = 32

func openServed(ctx context.Context, image string, o diskOptions) (*served, error) {
	dev, err := openDisk(ctx, image, o)
	if err != nil {
		return nil, err
	}
	return &served{dev, blockdev.NewPool(dev, workers)}, nil
}

// close finishes what was submitted, makes the disk durable and lets it go.
func (s *served) close() error {
	s.queue.Drain()
	var err error
	if !s.dev.Info().ReadOnly {
		if err = blockdev.Flush(s.dev); err != nil {
			err = fmt.Errorf("make %s durable: %w", s.dev.Info().Name, err)
		}
	}
	return errors.Join(err, s.dev.Close())
}

// exportName is the default name of the export of an image: its base name
// without the extension.
func exportName(image string) string {
	if u, err := nbd.ParseURI(image); err == nil {
		image = u.Export
	}
	base := filepath.Base(image)
	if base == "." || base == "/" {
		return ""
	}
	return strings.TrimSuffix(base, filepath.Ext(base))
}

// onUSR1 prints statistics whenever SIGUSR1 comes, until stopped.
func (a *app) onUSR1(l *limiter) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range c {
			fmt.Fprintln(a.stderr, l)
		}
	}()
	return func() {
		signal.Stop(c)
		close(c)
		<-done
	}
}

// writePidfile makes a file that is never seen half written.
func writePidfile(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".pid-*")
	if err != nil {
		return fmt.Errorf("--pidfile: %w", err)
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = fmt.Fprintln(f, os.Getpid())
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("--pidfile: %w", err)
	}
	return nil
}
