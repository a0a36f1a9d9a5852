package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"afterimage/bench"
)

func (a *app) benchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "bench",
		Short:   "Measure afterimage beside other NBD servers",
		Example: "  afterimage bench quick",
	}
	noun(cmd)
	cmd.AddCommand(a.benchQuickCommand(), a.benchGoNBDCommand())
	return cmd
}

// benchOptions are the flags of bench quick.
type benchOptions struct {
	dir, size, output string
	rounds            int
	cell              time.Duration
}

func (a *app) benchQuickCommand() *cobra.Command {
	var o benchOptions
	cmd := &cobra.Command{
		Use:   "quick",
		Short: "Measure in about a minute and a half",
		Long: `Measure this program, with its tee off and on, beside nbdkit, qemu-nbd and go-nbd:
4 KiB random writes and reads from one fio client, one at a time and 32 at a time.

Every server has the same image, in memory, in a process of its own; the order
changes from round to round. The best rival is measured twice: a ratio no further
from 1 than that pair's is called equal. A row with the tee on is void, and the
exit status 6, unless the log holds every write. Image and log are removed
afterwards. fio, nbdkit and qemu-utils must be installed.`,
		Example: `  afterimage bench quick
  afterimage bench quick --rounds 7 --cell 2s --output bench.json`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return interruptible(func(ctx context.Context) error { return a.benchQuick(ctx, o) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", "/dev/shm", "make image and logs in `DIR`")
	f.StringVar(&o.size, "size", "256M", "`SIZE` of the image")
	f.StringVar(&o.output, "output", "", "write the result, as JSON, to `FILE` too")
	f.IntVar(&o.rounds, "rounds", 3, "measure every server `N` times")
	f.DurationVar(&o.cell, "cell", 300*time.Millisecond, "measure each time for `DURATION`")
	return cmd
}

func (a *app) benchQuick(ctx context.Context, o benchOptions) error {
	size, err := parseSize(o.size)
	if err != nil {
		return usagef("--size %s: %v", o.size, err)
	}
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	result, err := bench.Run(ctx, bench.Config{
		Binary: binary, Directory: o.dir, ImageBytes: size, Rounds: o.rounds, Cell: o.cell, Workloads: bench.Quick(),
		Progress: func(s string) { fmt.Fprintln(a.stderr, s) },
	})
	if errors.Is(err, bench.ErrConfig) {
		return withStatus(err, statusUsage)
	}
	if err != nil {
		return err
	}
	if a.json {
		err = a.printJSON(result)
	} else {
		err = result.WriteTable(a.stdout)
	}
	if err == nil && o.output != "" {
		err = writeResult(o.output, result)
	}
	if void := result.Void(); err == nil && len(void) > 0 {
		err = withStatus(fmt.Errorf("void, the log does not hold every write: %s", strings.Join(void, "; ")), statusDamaged)
	}
	return err
}

func writeResult(path string, result *bench.Result) error {
	b, err := json.MarshalIndent(result, "", "  ")
	if err == nil {
		err = os.WriteFile(path, append(b, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	return nil
}

// benchGoNBDCommand is a rival that has no program of its own.
func (a *app) benchGoNBDCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:     "go-nbd IMAGE",
		Short:   "Serve an image with go-nbd's server, for the comparison alone",
		Example: "  afterimage bench go-nbd scratch.raw -U /tmp/scratch.sock",
		Hidden:  true,
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if socket == "" {
				return usagef("say with -U where clients connect")
			}
			return interruptible(func(ctx context.Context) error { return bench.ServeGoNBD(ctx, args[0], socket) })
		},
	}
	cmd.Flags().StringVarP(&socket, "unix", "U", "", "listen on the Unix socket `PATH`")
	return cmd
}
