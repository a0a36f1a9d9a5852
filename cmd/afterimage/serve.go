package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/blockdev/nbd"
	"afterimage/hrl"
	"afterimage/internal/shim"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	disk        diskOptions
	socket      string // -U
	stdio       bool
	export      string // meaningful if exportSet
	exportSet   bool
	pidfile     string
	log         string // directory
	logQuota    string // SIZE
	appendLimit time.Duration
	reopen      bool
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
  afterimage serve vm1.raw -U /run/vm1.sock --log /var/lib/vm1.log
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
	f.StringVar(&o.log, "log", "", "tee every change into the replica log in `DIR`")
	f.StringVar(&o.logQuota, "log-quota", "", "let the log have at most `SIZE`; beyond it the oldest is given up and becomes a gap (default: no limit, nothing is ever given up)")
	f.DurationVar(&o.appendLimit, "append-limit", 50*time.Millisecond, "how long a guest's write waits for the log before it becomes a gap")
	f.BoolVar(&o.reopen, "reopen", false, "the operator's word that a disk of which a sync failed may be used again")
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

	name := exportName(image)
	if o.exportSet {
		name = o.export
	}
	disk, err := a.openServed(ctx, image, name, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()

	srv := &nbd.Server{Log: slog.New(slog.NewTextHandler(a.stderr, nil)), MaxConnections: o.connections}
	exports := []nbd.Export{{Name: name, Queue: disk}}
	if name != "" {
		exports = append(exports, nbd.Export{Queue: disk, Unlisted: true})
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
	defer a.onUSR1(srv, disk)()
	if o.pidfile != "" {
		if err := writePidfile(o.pidfile); err != nil {
			closeAll(listeners)
			return err
		}
		defer os.Remove(o.pidfile)
	}
	if src.conn != nil {
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
			errs[i] = srv.Serve(ctx, ln)
			cancel() // a disk that cannot be reached on all its sockets must be seen
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// announce prints where the disk can be opened.
func (a *app) announce(listeners []listener, name string, disk *shim.Disk) error {
	for _, ln := range listeners {
		s := serving{ln.uri(name), name, disk.Size(), disk.Info().ReadOnly}
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

// openServed opens an image with what stands between it and its clients.
func (a *app) openServed(ctx context.Context, image, name string, o serveOptions) (*shim.Disk, error) {
	so := shim.Options{
		Name: name, LogDir: o.log, Reopen: o.reopen, AppendLimit: o.appendLimit,
		Warn: slog.New(slog.NewTextHandler(a.stderr, nil)),
	}
	if so.Name == "" {
		so.Name = "disk"
	}
	if o.logQuota != "" {
		quota, err := parseSize(o.logQuota)
		if err != nil {
			return nil, usagef("--log-quota %s: %v", o.logQuota, err)
		}
		if quota < minLogQuota {
			return nil, usagef("--log-quota %s: at least %s are needed", o.logQuota, humanize.IBytes(minLogQuota))
		}
		so.LogQuota = quota
	}
	switch {
	case o.log == "" && o.logQuota != "":
		return nil, usagef("--log-quota bounds a log: name its directory with --log")
	case o.appendLimit < time.Millisecond:
		return nil, usagef("--append-limit %v: at least 1ms is needed", o.appendLimit)
	case o.log != "" && o.disk.readOnly:
		return nil, usagef("--log and --read-only: a disk that nobody changes has nothing to log")
	}
	if !uriForm.MatchString(image) {
		so.Image = image
	}
	dev, err := openOwn(ctx, image, o.disk)
	if err != nil {
		return nil, err
	}
	p := a.startProgress("compared with the log", 0)
	defer p.finish()
	so.Progress = p.add
	disk, err := shim.Open(ctx, dev, so)
	switch {
	case errors.Is(err, shim.ErrOtherDisk):
		return nil, withHint(withStatus(err, statusRefused), "give each disk a log directory of its own, or the export the name it has in this log (--export)")
	case errors.Is(err, hrl.ErrLocked):
		return nil, withHint(fmt.Errorf("--log: %w", err), "another afterimage logs there: end it, or name another directory")
	case err != nil && o.log != "":
		return nil, fmt.Errorf("--log: %w", err)
	}
	return disk, err
}

// minLogQuota is the least that a log can do with: five segments of the
// smallest size, one in use, two ready, two not yet given up.
const minLogQuota = 40 << 20

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
func (a *app) onUSR1(srv *nbd.Server, d *shim.Disk) (stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range c {
			fmt.Fprintln(a.stderr, srv.ConnStats())
			if b, err := json.Marshal(d.Stats()); err == nil {
				fmt.Fprintf(a.stderr, "%s\n", b)
			}
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
