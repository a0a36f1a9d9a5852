package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"afterimage/internal/demo"
)

func (a *app) demoCommand() *cobra.Command {
	var o demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Lose a host, and start its VM on the other",
		Long: `Show what replication is for: two hosts as two daemons on loopback, a disk of 1 GiB
that is replicated every 2 seconds while it is written, the primary killed with
kill -9 in the middle of a write, and a failover. The disk that is then served is
compared with what was written: it must be the disk after exactly n writes, and n
at least the last write acknowledged before the newest recovery point was cut.

It needs no root and takes less than a minute. What it makes lies in /dev/shm, or in
TMPDIR, and is removed at the end.`,
		Example: `  afterimage demo
  afterimage demo --sabotage      # a byte of a stored layer is changed: exit status 6`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return a.demo(o) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.Sabotage, "sabotage", false, "change a byte of a stored layer before the failover, which must then refuse and name it")
	f.StringVar(&o.Dir, "dir", "", "work in `DIR` (default: /dev/shm if there is room, else TMPDIR)")
	return cmd
}

func (a *app) demo(o demo.Options) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	var err error
	if o.Program, err = os.Executable(); err != nil {
		return fmt.Errorf("which program this is: %w", err)
	}
	o.Say = a.stdout
	if a.json {
		o.Say = io.Discard
	}
	report, err := demo.Run(ctx, o)
	if report != nil && report.Verdict != "" {
		if a.json {
			if perr := a.printJSON(report); err == nil {
				err = perr
			}
		} else {
			fmt.Fprintln(a.stdout)
			if perr := table(a.stdout, report.Rows()); err == nil {
				err = perr
			}
		}
	}
	if errors.Is(err, demo.ErrDifferent) {
		return withStatus(err, statusDamaged)
	}
	return err
}
