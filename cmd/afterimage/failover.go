package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"afterimage/internal/admin"
)

func (a *app) failoverCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "failover",
		Short: "Start a VM from a recovery point, in earnest or as a test",
		Long: `Start a VM on the host that has its replica: from the newest recovery point or from
any other, in earnest or as a test.` + adminHelp,
		Example: "  afterimage failover test web",
	}
	noun(cmd)
	cmd.AddCommand(a.failoverTestCommand(), a.failoverEndTestCommand(), a.failoverStartCommand(),
		a.failoverCancelCommand(),
		a.vmVerb("commit", "Make a failover final", `Make a failover final: there is no way back to what the replica received. The VM goes
on as it is.`, "  afterimage failover commit web",
			func(ctx context.Context, c *admin.Client, vm string) error { return c.Commit(ctx, vm) }))
	return cmd
}

// runFlags are the flags of what starts a VM from a point.
func runFlags(cmd *cobra.Command, s *admin.StartRun) {
	cmd.Flags().StringVar(&s.Point, "point", "", "start from the point with this `ID` (default: the newest)")
	cmd.Flags().BoolVar(&s.NoVerify, "no-verify", false, "start without checking what the point is made of")
}

func (a *app) failoverTestCommand() *cobra.Command {
	var s admin.StartRun
	cmd := &cobra.Command{
		Use:   "test VM",
		Short: "Start a throw-away copy of a VM from a point",
		Long: `Start a throw-away copy of a VM from a recovery point, on the host that has its
replica; the replication goes on, and any number of tests may stand at once. What the
point is made of is checked first. The URIs of the disks are printed, a line each.`,
		Example: `  afterimage failover test web
  afterimage failover test web --point 1.2.345 --as web-lab`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.startRun(args[0], func(ctx context.Context, c *admin.Client, f func(admin.Progress)) (admin.Run, error) {
				return c.Test(ctx, args[0], s, f)
			})
		},
	}
	runFlags(cmd, &s)
	cmd.Flags().StringVar(&s.As, "as", "", "call the copy `NAME`: its disks are exported as NAME/DISK (default: VM-test)")
	return cmd
}

func (a *app) failoverEndTestCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "end-test NAME",
		Short:   "End a test; nothing of it is left",
		Long:    `End a test of a failover, and remove what was written in it.`,
		Example: "  afterimage failover end-test web-test",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkVM(args[0]); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error { return c.EndTest(ctx, args[0]) })
		},
	}
}

func (a *app) failoverStartCommand() *cobra.Command {
	var s admin.StartRun
	cmd := &cobra.Command{
		Use:   "start VM --unplanned",
		Short: "Start a VM on this host, whose primary is lost",
		Long: `Start a VM from a recovery point on the host that has its replica, because its primary
is lost. What the point is made of is checked first. From then on nothing is received
from the primary, until 'failover cancel' or 'failover commit'. The URIs of the disks
are printed, a line each.`,
		Example: `  afterimage failover start web --unplanned
  afterimage failover start web --unplanned --point 1.2.345`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if !s.Unplanned {
				return withHint(usagef("say that the primary is lost: --unplanned"), "make sure that the VM does not run there any more")
			}
			return a.startRun(args[0], func(ctx context.Context, c *admin.Client, f func(admin.Progress)) (admin.Run, error) {
				return c.Failover(ctx, args[0], s, f)
			})
		},
	}
	runFlags(cmd, &s)
	cmd.Flags().BoolVar(&s.Unplanned, "unplanned", false, "do not ask the primary: it is lost")
	return cmd
}

// startRun starts a VM from a point and says where its disks are.
func (a *app) startRun(vm string, start func(context.Context, *admin.Client, func(admin.Progress)) (admin.Run, error)) error {
	if err := checkVM(vm); err != nil {
		return err
	}
	return a.ask(func(ctx context.Context, c *admin.Client) error {
		f := follow{a: a}
		r, err := start(ctx, c, f.tell)
		f.end()
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(r)
		}
		first := time.Duration(r.FirstReadSeconds * float64(time.Second))
		fmt.Fprintf(a.stderr, "%s runs from point %v; first read after %v\n", r.Name, r.Point, first.Round(100*time.Microsecond))
		if len(r.Unreadable) > 0 {
			fmt.Fprintf(a.stderr, "warning: %s\n", unreadableWords(r.Unreadable))
		}
		return a.printURIs(r.Disks)
	})
}

func (a *app) failoverCancelCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cancel VM",
		Short: "Take a failover back",
		Long: `Take a failover back: this host receives again. What was written since is kept as a
branch, whose name is printed: 'point serve' opens it, 'point remove' removes it. A
VM whose disk somebody has open is refused.`,
		Example: "  afterimage failover cancel web",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkVM(args[0]); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				r, err := c.Cancel(ctx, args[0])
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(r)
				}
				_, err = fmt.Fprintln(a.stdout, r.Branch)
				return err
			})
		},
	}
}
