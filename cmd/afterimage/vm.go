package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/hrl/wire"
	"afterimage/internal/admin"
)

func (a *app) vmCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vm",
		Short: "Add, list, show and remove the VMs of this host",
		Long: `Add, list, show and remove the VMs that the daemon of this host knows: those whose
disks it serves, and those it has a replica of.` + adminHelp,
		Example: "  afterimage vm add web root=/var/lib/images/web.raw",
	}
	noun(cmd)
	cmd.AddCommand(
		a.vmAddCommand(), a.vmListCommand(), a.vmShowCommand(),
		a.vmVerb("remove", "Let go of a VM", `Let go of a VM: its disks are served no longer, and its images stay as they are. A VM
that is replicated, or whose disk somebody has open, is refused.

On a replica this erases the VM's recovery points, all of them; if the VM is still
replicated here it begins anew. A VM that was failed over to this host is refused.`, "  afterimage vm remove web",
			func(ctx context.Context, c *admin.Client, vm string) error { return c.RemoveVM(ctx, vm) }),
	)
	return cmd
}

func (a *app) vmAddCommand() *cobra.Command {
	var logDir, logQuota string
	cmd := &cobra.Command{
		Use:   "add NAME DISK=IMAGE...",
		Short: "Serve the disks of a VM",
		Long: `Serve the disks of a VM over NBD, each by a name of its own. IMAGE is a raw file or a
block device, which stays as it is: only IMAGE.afterimage is made beside it, with
whose disk it is. No other daemon takes it then, nor does 'serve'.

When the disks can be opened their URIs are printed, a line each, in order.

If the VM was in this daemon's care before and its state directory was lost, it is
known again by what lies beside its images, and its replica goes on with it.`,
		Example: "  afterimage vm add web root=/var/lib/images/web.raw data=/dev/vg0/web-data",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			add, err := parseAddVM(args, logDir, logQuota)
			if err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				vm, err := c.AddVM(ctx, add)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(vm)
				}
				return a.printURIs(vm.Disks)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&logDir, "log-dir", "", "keep the log of a replication under `DIR` (default: in the daemon's state directory)")
	f.StringVar(&logQuota, "log-quota", "", "let the log have at most `SIZE`; beyond it the oldest is given up and copied from the disk later (default 16G)")
	return cmd
}

func parseAddVM(args []string, logDir, logQuota string) (admin.AddVM, error) {
	add := admin.AddVM{Name: args[0]}
	if err := checkVM(add.Name); err != nil {
		return add, err
	}
	var err error
	if add.LogDir, err = absolute(logDir); err != nil {
		return add, err
	}
	if logQuota != "" {
		if add.LogQuota, err = parseSize(logQuota); err != nil {
			return add, usagef("--log-quota %s: %v", logQuota, err)
		}
		if add.LogQuota < minLogQuota {
			return add, usagef("--log-quota %s: at least %s are needed", logQuota, humanize.IBytes(minLogQuota))
		}
	}
	for _, arg := range args[1:] {
		name, image, ok := strings.Cut(arg, "=")
		switch {
		case !ok || image == "":
			return add, withHint(usagef("%q names no disk", arg), "write DISK=IMAGE, as in root=/var/lib/images/web.raw")
		case uriForm.MatchString(image):
			return add, withHint(usagef("disk %s: the disk of a VM is a file or a block device, not %s", name, image), "'afterimage serve' serves NBD URIs")
		}
		if err := wire.CheckName("disk", name); err != nil {
			return add, withStatus(err, statusUsage)
		}
		if image, err = absolute(image); err != nil {
			return add, err
		}
		add.Disks = append(add.Disks, admin.AddDisk{Name: name, Image: image})
	}
	return add, nil
}

// printURIs prints where disks can be opened, a line each.
func (a *app) printURIs(disks []admin.Disk) error {
	for _, d := range disks {
		if _, err := fmt.Fprintln(a.stdout, d.URI); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) vmListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the VMs of this host",
		Long:    `List the VMs that the daemon of this host knows, with its role for each.`,
		Example: "  afterimage vm list --json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				vms, err := c.VMs(ctx)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(vms)
				}
				rows := [][]string{{"VM", "ROLE", "DISKS", "SIZE", "STATE"}}
				for _, vm := range vms {
					var size int64
					for _, d := range vm.Disks {
						size += d.Size
					}
					rows = append(rows, []string{vm.Name, vm.Role, fmt.Sprint(len(vm.Disks)), humanize.IBytes(uint64(size)), vmState(&vm)})
				}
				return table(a.stdout, rows)
			})
		},
	}
}

// vmState is what a person wants to know of a VM at a glance.
func vmState(vm *admin.VM) string {
	switch {
	case vm.Error != "":
		return "ERROR: " + oneLine(vm.Error)
	case len(vm.Disks) > 0 && vm.Disks[0].URI != "":
		return "served"
	}
	return "from " + vm.Sender
}

func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }

func (a *app) vmShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show VM",
		Short:   "Show a VM and where its disks can be opened",
		Long:    `Show a VM, this host's role for it, and where its disks can be opened.`,
		Example: "  afterimage vm show web",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkVM(args[0]); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				vm, err := c.VM(ctx, args[0])
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(vm)
				}
				return a.printVM(&vm)
			})
		},
	}
}

func (a *app) printVM(vm *admin.VM) error {
	rows := [][]string{{"VM", vm.Name}, {"UUID", vm.ID.String()}, {"role", vm.Role}, {"state", vmState(vm)}}
	if vm.Sender != "" {
		rows = append(rows, []string{"sender", vm.Sender})
	}
	if len(vm.Tests) > 0 {
		rows = append(rows, []string{"tests", strings.Join(vm.Tests, ", ")})
	}
	rows = append(rows, nil)
	if err := table(a.stdout, rows); err != nil {
		return err
	}
	rows = [][]string{{"DISK", "SIZE", "IMAGE", "URI"}}
	for _, d := range vm.Disks {
		rows = append(rows, []string{d.Name, humanize.IBytes(uint64(d.Size)), orDash(d.Image), orDash(d.URI)})
	}
	if err := table(a.stdout, rows); err != nil {
		return err
	}
	if len(vm.Disks) > 0 && vm.Disks[0].LogDir != "" {
		_, err := fmt.Fprintf(a.stdout, "\nlog  %s\n", vm.Disks[0].LogDir)
		return err
	}
	return nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
