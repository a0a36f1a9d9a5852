package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"afterimage/hrl/wire"
	"afterimage/internal/admin"
)

// adminHelp stands under the help of nouns that are the daemon's.
const adminHelp = `

The daemon is asked on the socket that --admin or AFTERIMAGE_ADMIN names, else on
/run/afterimage/admin.sock, or $XDG_RUNTIME_DIR/afterimage/admin.sock for a user.`

// adminSocket is where the daemon is asked.
func (a *app) adminSocket() string {
	if a.admin != "" {
		return a.admin
	}
	if s := os.Getenv("AFTERIMAGE_ADMIN"); s != "" {
		return s
	}
	dir := "/run"
	if user := os.Getenv("XDG_RUNTIME_DIR"); user != "" && os.Geteuid() != 0 {
		dir = user
	}
	return filepath.Join(dir, "afterimage", "admin.sock")
}

// ask runs f with a client of the daemon, until it ends or is interrupted.
func (a *app) ask(f func(context.Context, *admin.Client) error) error {
	return interruptible(func(ctx context.Context) error {
		c := admin.NewClient(a.adminSocket())
		defer c.Close()
		return f(ctx, c)
	})
}

// vmVerb is a command that does one thing with the VM it is given, and prints
// nothing.
func (a *app) vmVerb(verb, short, long, example string, do func(context.Context, *admin.Client, string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " VM", Short: short, Long: long, Example: example, Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkVM(args[0]); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error { return do(ctx, c, args[0]) })
		},
	}
}

// checkVM refuses what no VM can be called.
func checkVM(name string) error { return withStatus(wire.CheckName("VM", name), statusUsage) }

// absolute is a path as the daemon can use it, whose working directory is another.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

// parsePoint reads VM@POINT.
func parsePoint(s string) (vm, point string, err error) {
	vm, point, ok := strings.Cut(s, "@")
	if !ok || point == "" || strings.ContainsAny(point, "@/") {
		return "", "", withHint(usagef("%q names no recovery point", s), "write VM@POINT, with an id of `afterimage point list VM`, or VM@latest")
	}
	return vm, point, checkVM(vm)
}

// parseVMDisk reads VM/DISK.
func parseVMDisk(s string) (vm, disk string, err error) {
	vm, disk, ok := strings.Cut(s, "/")
	if !ok {
		return "", "", withHint(usagef("%q names no disk of a VM", s), "write VM/DISK, as `afterimage vm show VM` has them")
	}
	if err := checkVM(vm); err != nil {
		return "", "", err
	}
	return vm, disk, withStatus(wire.CheckName("disk", disk), statusUsage)
}

// parsePointDisk reads VM@POINT/DISK.
func parsePointDisk(s string) (vm, point, disk string, err error) {
	first, disk, ok := strings.Cut(s, "/")
	if !ok {
		return "", "", "", withHint(usagef("%q names no disk of a recovery point", s), "write VM@POINT/DISK")
	}
	if vm, point, err = parsePoint(first); err != nil {
		return "", "", "", err
	}
	return vm, point, disk, withStatus(wire.CheckName("disk", disk), statusUsage)
}

// follow shows what a long request says of its progress.
type follow struct {
	a     *app
	what  string
	first int64 // bytes that were done when it began to tell
	shown *progress
}

func (f *follow) tell(p admin.Progress) {
	if f.shown == nil || f.what != p.What {
		f.end()
		f.what, f.first = p.What, p.DoneBytes
		f.shown = f.a.startProgress(p.What, max(0, p.TotalBytes-p.DoneBytes))
	}
	f.shown.done.Store(p.DoneBytes - f.first)
}

func (f *follow) end() {
	if f.shown != nil {
		f.shown.finish()
		f.shown = nil
	}
}
