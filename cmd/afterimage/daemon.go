package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"afterimage/internal/daemon"
)

func (a *app) daemonCommand() *cobra.Command {
	var o daemon.Options
	cmd := &cobra.Command{
		Use:   "daemon --state DIR",
		Short: "Run the daemon of this host",
		Long: `Run the daemon: it serves the disks of this host's VMs over NBD, replicates them to
other hosts, and stores what other hosts replicate here. Everything it knows is kept
in DIR, or beside the images; it comes back as it was after any end, kill -9 too.

When disks can be opened and commands are answered it prints where, and runs until it
is interrupted: then it finishes what has begun, makes all disks durable and ends; a
second signal kills. A VM that cannot be opened keeps no other from being served; it
is tried again, and 'vm show' says why.

Other hosts may replicate here with --listen, over TLS alone: both hosts need
certificates of one CA ('cert init', 'cert issue'), and 'peer allow' says who may.

Both sockets are the daemon's user's alone. With --nbd-group the NBD socket is open to
a group, say libvirt-qemu. The state directory is not, so --nbd must then name a place
that the group can reach.`,
		Example: `  afterimage daemon --state /var/lib/afterimage --admin /run/afterimage/admin.sock
  afterimage daemon --state /var/lib/afterimage --listen host2.example.com:10810
  afterimage daemon --state /var/lib/afterimage --nbd /run/afterimage-nbd/nbd.sock --nbd-group kvm`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if o.State == "" {
				return withHint(usagef("say with --state where the daemon keeps what it knows"), "say --state /var/lib/afterimage")
			}
			o.Admin = a.admin
			return a.daemon(o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.State, "state", "", "keep everything in `DIR`, which is made if it is not there")
	f.StringVar(&o.NBD, "nbd", "", "serve disks on the Unix socket `PATH` (default: DIR/nbd.sock)")
	f.StringVar(&o.NBDGroup, "nbd-group", "", "let the members of `GROUP` open the disks, too")
	f.StringVar(&o.Listen, "listen", "", "let other hosts replicate here, at `HOST:PORT` (10810 is usual)")
	f.StringVar(&o.TLSDir, "tls-dir", "", "find the certificates in `DIR` (default: tls in the state directory)")
	return cmd
}

// daemon runs until a signal ends it.
func (a *app) daemon(o daemon.Options) error {
	// A log line to a pipe that nobody reads must not end the guests' disks.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	defer context.AfterFunc(ctx, stop)() // the second signal kills

	o.Product, o.Log = version, slog.New(slog.NewTextHandler(a.stderr, nil))
	d, err := daemon.Start(o)
	if err != nil {
		return err
	}
	if err := a.printDaemon(d); err != nil {
		o.Log.Warn("nobody reads where the daemon can be asked", "err", err)
	}
	<-ctx.Done()
	return d.Close()
}

func (a *app) printDaemon(d *daemon.Daemon) error {
	info := d.Info()
	if a.json {
		return a.printJSON(info)
	}
	rows := [][]string{{"admin", info.Admin}, {"nbd", info.NBD}}
	if info.Listen != "" {
		rows = append(rows, []string{"peers", fmt.Sprintf("%s, as %s", info.Listen, info.Name)})
	}
	return table(a.stdout, rows)
}
