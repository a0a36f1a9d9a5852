package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/internal/admin"
)

func (a *app) pointCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "point",
		Short: "List, serve, pin and remove recovery points",
		Long: `List, serve, pin and remove the recovery points of a VM. A point is named VM@ID, or
VM@latest; it has the same id on every host.` + adminHelp,
		Example: "  afterimage point list web",
	}
	noun(cmd)
	cmd.AddCommand(a.pointListCommand(), a.pointServeCommand(),
		a.pointVerb("pin", "Keep a point for good", `Keep a point from being retired, however old it is, until 'point unpin'.`,
			func(ctx context.Context, c *admin.Client, vm, point string) error { return c.Pin(ctx, vm, point, true) }),
		a.pointVerb("unpin", "No longer keep a point for good", `Undo 'point pin'.`,
			func(ctx context.Context, c *admin.Client, vm, point string) error {
				return c.Pin(ctx, vm, point, false)
			}),
		a.pointVerb("remove", "Remove a point, or a branch", `Remove a point, or the branch that a cancelled failover has left. The newest point, a
pinned one and one that is in use are refused.`,
			func(ctx context.Context, c *admin.Client, vm, point string) error {
				return c.RemovePoint(ctx, vm, point)
			}),
	)
	return cmd
}

// pointVerb is a command that does one thing with the point it is given.
func (a *app) pointVerb(verb, short, long string, do func(context.Context, *admin.Client, string, string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " VM@POINT", Short: short, Long: long + "\nPoints are kept on the replica: run it there.",
		Example: "  afterimage point " + verb + " web@1.2.345", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			vm, point, err := parsePoint(args[0])
			if err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error { return do(ctx, c, vm, point) })
		},
	}
}

func (a *app) pointListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list VM",
		Short: "List the recovery points of a VM",
		Long: `List the recovery points of a VM, oldest first, and behind them the branches that
cancelled failovers have left. On the primary the replica is asked. "No history" says for
how long before a point there could be none, because the log did not have all that changed.`,
		Example: "  afterimage point list web --json",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkVM(args[0]); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				points, err := c.Points(ctx, args[0])
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(points)
				}
				rows := [][]string{{"POINT", "TIME", "KIND", "DISKS", "SIZE", ""}}
				for _, p := range points {
					var remarks []string
					if p.Pinned {
						remarks = append(remarks, "pinned")
					}
					if p.Gap != nil {
						remarks = append(remarks, fmt.Sprintf("no history for %s before it (%s)", seconds(p.Gap.DurationSeconds), gapReason(p.Gap)))
					}
					if p.Damaged {
						remarks = append(remarks, "DAMAGED: "+oneLine(p.Damage))
					}
					if len(p.Unreadable) > 0 {
						remarks = append(remarks, unreadableWords(p.Unreadable))
					}
					rows = append(rows, []string{p.ID, p.Time.Local().Format(time.DateTime), p.Kind, strings.Join(p.Disks, ","),
						humanize.IBytes(uint64(p.Bytes)), strings.Join(remarks, ", ")})
				}
				return table(a.stdout, rows)
			})
		},
	}
}

// unreadableWords says what of a point its primary could not read.
func unreadableWords(ranges []admin.Unreadable) string {
	var bytes int64
	var disks []string
	for _, r := range ranges {
		bytes += r.Bytes
		if !slices.Contains(disks, r.Disk) {
			disks = append(disks, r.Disk)
		}
	}
	return fmt.Sprintf("UNREADABLE at the primary: %s of %s, the first at byte %d of %s, where it has older content",
		humanize.IBytes(uint64(bytes)), strings.Join(disks, ", "), ranges[0].Offset, ranges[0].Disk)
}

func (a *app) pointServeCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "serve VM@POINT/DISK -U PATH",
		Short: "Serve a disk as it was at a point",
		Long: `Serve a disk as it was at a recovery point, or as a cancelled failover has left it,
over NBD and read-only, until interrupted. When it can be opened its URI is printed.`,
		Example: `  afterimage point serve web@latest/root -U /run/web-root.sock
  afterimage point serve web@1.2.345/root -U /run/web-root.sock`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			vm, point, disk, err := parsePointDisk(args[0])
			if err != nil {
				return err
			}
			if socket == "" {
				return usagef("say with -U where clients connect: -U PATH")
			}
			s := admin.ServePoint{Point: point, Disk: disk}
			if s.Socket, err = absolute(socket); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				return c.ServePoint(ctx, vm, s, func(info admin.Served) error {
					if a.json {
						return a.printJSON(info)
					}
					_, err := fmt.Fprintln(a.stdout, info.URI)
					return err
				})
			})
		},
	}
	cmd.Flags().StringVarP(&socket, "unix", "U", "", "listen on the Unix socket `PATH`")
	return cmd
}
