package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/internal/admin"
)

func (a *app) peerCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "peer",
		Short: "Say which hosts may replicate here, and test others",
		Long: `Say which hosts may replicate to this one, and test whether this one may replicate to
another. Hosts are known by their certificates: the first name in it is the host's
identity.` + adminHelp,
		Example: "  afterimage peer allow host1.example.com --quota 500G",
	}
	noun(cmd)
	cmd.AddCommand(a.peerAllowCommand(), a.peerListCommand(), a.peerRemoveCommand(), a.peerTestCommand())
	return cmd
}

func (a *app) peerAllowCommand() *cobra.Command {
	var allow admin.AllowPeer
	var quota string
	cmd := &cobra.Command{
		Use:   "allow PATTERN",
		Short: "Let hosts replicate to this one",
		Long: `Let the hosts whose identity matches PATTERN replicate to this one; in it * stands for
any characters and ? for one. The pattern that is the very name counts before others,
of those the longest. A pattern that is allowed already gets what is given now; VMs
that are stored elsewhere stay there.`,
		Example: `  afterimage peer allow host1.example.com
  afterimage peer allow '*.branch.example.com' --storage /srv/replicas --quota 200G`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			allow.Pattern = args[0]
			var err error
			if quota != "" {
				if allow.Quota, err = parseSize(quota); err != nil {
					return usagef("--quota %s: %v", quota, err)
				}
				if allow.Quota == 0 {
					return usagef("--quota 0: nothing could be stored")
				}
			}
			if allow.Storage, err = absolute(allow.Storage); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				p, err := c.AllowPeer(ctx, allow)
				if err == nil && a.json {
					err = a.printJSON(p)
				}
				return err
			})
		},
	}
	cmd.Flags().StringVar(&allow.Storage, "storage", "", "store what they send in `DIR` (default: replicas in the state directory)")
	cmd.Flags().StringVar(&quota, "quota", "", "let each of their VMs take at most `SIZE` (default: what the disk has)")
	return cmd
}

func (a *app) peerListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List which hosts may replicate to this one",
		Long:    `List which hosts may replicate to this one, and what they have stored here.`,
		Example: "  afterimage peer list",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				peers, err := c.Peers(ctx)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(peers)
				}
				rows := [][]string{{"PATTERN", "QUOTA", "VMS", "STORAGE"}}
				for _, p := range peers {
					quota, place := "-", p.Storage
					if p.Quota > 0 {
						quota = humanize.IBytes(uint64(p.Quota))
					}
					if p.Error != "" {
						place += " (ERROR: " + oneLine(p.Error) + ")"
					}
					rows = append(rows, []string{p.Pattern, quota, orDash(strings.Join(p.VMs, ", ")), place})
				}
				return table(a.stdout, rows)
			})
		},
	}
}

func (a *app) peerRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "remove PATTERN",
		Short:   "No longer let hosts replicate to this one",
		Long:    `No longer let hosts replicate to this one. What they have stored stays.`,
		Example: "  afterimage peer remove host1.example.com",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.ask(func(ctx context.Context, c *admin.Client) error { return c.RemovePeer(ctx, args[0]) })
		},
	}
}

func (a *app) peerTestCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "test HOST:PORT",
		Short: "Test whether this host may replicate to another",
		Long: `Ask another host who it is and whether this one may replicate to it. The exit status
is 5 if it cannot be reached, or does not let this host.`,
		Example: "  afterimage peer test host2.example.com:10810",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				p, err := c.TestPeer(ctx, args[0])
				if err != nil {
					return err
				}
				if a.json {
					err = a.printJSON(p)
				} else {
					may := "may"
					if !p.Allowed {
						may = "may NOT"
					}
					_, err = fmt.Fprintf(a.stdout, "%s (afterimage %s): this host, %s, %s replicate there\n", p.Name, p.Product, p.You, may)
				}
				if err == nil && !p.Allowed {
					err = withHint(withStatus(errors.New("the peer does not let this host replicate to it"), statusUnreachable),
						fmt.Sprintf("on %s: afterimage peer allow %s", p.Name, p.You))
				}
				return err
			})
		},
	}
}
