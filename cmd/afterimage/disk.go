package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/blockdev"
	"afterimage/internal/transfer"
)

func (a *app) diskCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "disk",
		Short:   "Create, compare, copy and resize disks",
		Example: "  afterimage disk create vm1.raw 20G",
	}
	noun(cmd)
	cmd.AddCommand(a.diskCreateCommand(), a.diskCompareCommand(), a.diskCopyCommand(), a.diskResizeCommand())
	return cmd
}

// diskCreated is what `disk create --json` prints.
type diskCreated struct {
	Path string `json:"path"`
	Size int64  `json:"size"` // bytes
}

func (a *app) diskCreateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "create PATH SIZE",
		Short: "Make a new, empty raw disk",
		Long: `Make a raw disk of SIZE bytes that reads as zeroes and takes no space until it is
written. What exists is never overwritten. SIZE is as in QEMU: K, M, G and T are
powers of 1024 (KiB too), kB and MB are decimal; it is a multiple of 512.`,
		Example: "  afterimage disk create vm1.raw 20G",
		Args:    cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			path := args[0]
			size, err := parseDiskSize(args[1])
			if err != nil {
				return err
			}
			if path == "" || uriForm.MatchString(path) {
				return usagef("%q is not the path of a file", path)
			}
			if err := blockdev.CreateFile(path, size); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(diskCreated{path, size})
			}
			_, err = fmt.Fprintf(a.stdout, "%s: %s (%d bytes)\n", path, humanize.IBytes(uint64(size)), size)
			return err
		},
	}
}

// diskCompared is what `disk compare --json` prints.
type diskCompared struct {
	Equal bool  `json:"equal"`
	SizeA int64 `json:"size_a"` // bytes
	SizeB int64 `json:"size_b"`
	// The rest is absent if the sizes differ: then nothing is read.
	FirstDifference  *int64 `json:"first_difference,omitempty"` // offset in bytes; absent if equal
	DifferingBytes   *int64 `json:"differing_bytes,omitempty"`
	DifferingExtents *int64 `json:"differing_extents,omitempty"` // runs of neighbouring sectors
}

// errDifferent is the exit status of disks that differ; the result has been
// printed.
var errDifferent = withStatus(errors.New("the disks differ"), statusDamaged)

func (a *app) diskCompareCommand() *cobra.Command {
	var o diskOptions
	cmd := &cobra.Command{
		Use:   "compare A B",
		Short: "Compare two disks byte by byte",
		Long: `Compare two disks byte by byte; each is a raw file, a block device or an NBD URI.
Where both have holes nothing is read. The exit status is 6 if they differ, in
size or in content. A disk that a VM writes is refused: it would be no comparison.`,
		Example: `  afterimage disk compare vm1.raw copy.raw
  afterimage disk compare vm1.raw 'nbd+unix:///vm1?socket=/run/vm1.sock'`,
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			o.readOnly = true
			return interruptible(func(ctx context.Context) error { return a.diskCompare(ctx, args[0], args[1], o) })
		},
	}
	formatFlag(cmd, &o)
	return cmd
}

func (a *app) diskCompare(ctx context.Context, nameA, nameB string, o diskOptions) error {
	devA, err := openDisk(ctx, nameA, o)
	if err != nil {
		return err
	}
	defer devA.Close()
	devB, err := openDisk(ctx, nameB, o)
	if err != nil {
		return err
	}
	defer devB.Close()
	defer closeOnDone(ctx, devA, devB)()

	r := diskCompared{SizeA: devA.Size(), SizeB: devB.Size()}
	var diff transfer.Difference
	if r.SizeA == r.SizeB {
		p := a.startProgress("compared", r.SizeA)
		diff, err = transfer.Compare(ctx, devA, devB, p.add)
		p.finish()
		if err != nil {
			return fmt.Errorf("compare: %w", err)
		}
		r.Equal = diff.Equal()
		r.DifferingBytes, r.DifferingExtents = &diff.Bytes, &diff.Extents
		if !r.Equal {
			r.FirstDifference = &diff.First
		}
	}
	if err := a.printCompared(r); err != nil {
		return err
	}
	if !r.Equal {
		return errDifferent
	}
	return nil
}

func (a *app) printCompared(r diskCompared) error {
	var err error
	switch {
	case a.json:
		err = a.printJSON(r)
	case r.SizeA != r.SizeB:
		_, err = fmt.Fprintf(a.stdout, "different sizes: %d and %d bytes\n", r.SizeA, r.SizeB)
	case r.Equal:
		_, err = fmt.Fprintf(a.stdout, "equal: %d bytes\n", r.SizeA)
	default:
		_, err = fmt.Fprintf(a.stdout, "different: first at byte %d; %d bytes in %d extents\n",
			*r.FirstDifference, *r.DifferingBytes, *r.DifferingExtents)
	}
	return err
}

// diskCopied is what `disk copy --json` prints.
type diskCopied struct {
	Size      int64 `json:"size"`       // bytes of the source
	DataBytes int64 `json:"data_bytes"` // written as data
	ZeroBytes int64 `json:"zero_bytes"` // zeroed, or left out of a new file
}

func (a *app) diskCopyCommand() *cobra.Command {
	var o diskOptions
	cmd := &cobra.Command{
		Use:   "copy A B",
		Short: "Copy a disk onto another, or into a new file",
		Long: `Copy disk A onto B; each is a raw file, a block device or an NBD URI. A file B that
does not exist is made. Zeroes become holes where B can have them. B must be as
large as A; what is beyond A's size stays as it was. When the command is done the
copy is durable. A disk that a VM writes is refused: it would be no copy.`,
		Example: `  afterimage disk copy vm1.raw copy.raw
  afterimage disk copy 'nbd+unix:///?socket=/run/qemu-nbd.sock' vm1.raw`,
		Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			return interruptible(func(ctx context.Context) error { return a.diskCopy(ctx, args[0], args[1], o) })
		},
	}
	formatFlag(cmd, &o)
	return cmd
}

func (a *app) diskCopy(ctx context.Context, from, to string, o diskOptions) error {
	if sameFile(from, to) {
		return usagef("%s and %s are the same file", from, to)
	}
	reading := o
	reading.readOnly = true
	src, err := openDisk(ctx, from, reading)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, created, err := openTarget(ctx, to, src.Size(), o)
	if err != nil {
		return err
	}
	defer dst.Close()
	defer closeOnDone(ctx, src, dst)()
	if dst.Size() < src.Size() {
		err := fmt.Errorf("%s has %d bytes, too few for the %d of %s: nothing was written", to, dst.Size(), src.Size(), from)
		return withHint(withStatus(err, statusRefused), "name a larger disk, or a file that does not exist")
	}

	if dst.Info().ReadOnly {
		return fmt.Errorf("%s: %w: nothing was written", to, blockdev.ErrReadOnly)
	}

	p := a.startProgress("copied", src.Size())
	done, err := transfer.Copy(ctx, dst, src, transfer.CopyOptions{TargetZero: created, Progress: p.add})
	p.finish()
	if err != nil {
		err = fmt.Errorf("copy: %w: %s is not a whole copy", err, to)
		return withHint(err, "do not use "+to+"; copy again, or remove it")
	}
	if a.json {
		return a.printJSON(diskCopied{src.Size(), done.Data, done.Zeros})
	}
	_, err = fmt.Fprintf(a.stdout, "copied %d bytes: %s data, %s zeroes\n",
		src.Size(), humanize.IBytes(uint64(done.Data)), humanize.IBytes(uint64(done.Zeros)))
	return err
}

// openTarget opens a disk for writing and, if it is a file that does not
// exist, makes it first.
func openTarget(ctx context.Context, name string, size int64, o diskOptions) (dev blockdev.Device, created bool, err error) {
	dev, err = openOwn(ctx, name, o)
	if !errors.Is(err, fs.ErrNotExist) || uriForm.MatchString(name) {
		return dev, false, err
	}
	if err := blockdev.CreateFile(name, size); err != nil {
		return nil, false, err
	}
	dev, err = openOwn(ctx, name, o)
	return dev, true, err
}

// closeOnDone closes disks when ctx is done, so that an interrupt ends what
// waits for a server that does not answer. It returns what undoes that.
func closeOnDone(ctx context.Context, devs ...blockdev.Device) (undo func() bool) {
	return context.AfterFunc(ctx, func() {
		for _, dev := range devs {
			dev.Close()
		}
	})
}

func sameFile(a, b string) bool {
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// interruptible runs f under a context that an interrupt or a request to end
// cancels; a second one kills.
func interruptible(f func(context.Context) error) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	err := f(ctx)
	if err != nil && ctx.Err() != nil {
		err = withStatus(err, statusInterrupted)
	}
	return err
}
