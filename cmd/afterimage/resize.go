package main

import (
	"context"
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/internal/admin"
)

func (a *app) diskResizeCommand() *cobra.Command {
	var r admin.ResizeDisk
	cmd := &cobra.Command{
		Use:   "resize VM/DISK SIZE",
		Short: "Make the disk of a VM larger or smaller",
		Long: `Make the disk of a VM larger or smaller, while it is served and replicated or not. What
comes anew reads as zeroes. A smaller size is refused without --shrink, for what lies
beyond it is lost; older recovery points keep it. SIZE is the new size, a multiple of
4096; K, M, G and T are powers of 1024. The next recovery point has the new size.

A client that has the disk open sees the new size when it opens it again: connect
anew, or restart the VM. Until then it uses what it knew; beyond a smaller end its
requests fail. A block device has the size it has, and is refused.` + adminHelp,
		Example: `  afterimage disk resize web/root 40G
  afterimage disk resize web/data 10G --shrink`,
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			vm, disk, err := parseVMDisk(args[0])
			if err != nil {
				return err
			}
			if r.Size, err = parseDiskSize(args[1]); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				done, err := c.Resize(ctx, vm, disk, r)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(done)
				}
				_, err = fmt.Fprintf(a.stdout, "%s/%s: %s (%d bytes), was %s (%d bytes)\n", done.VM, done.Disk,
					humanize.IBytes(uint64(done.Size)), done.Size, humanize.IBytes(uint64(done.Was)), done.Was)
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&r.Shrink, "shrink", false, "cut off what lies beyond a smaller size")
	return cmd
}
