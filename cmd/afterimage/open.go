package main

import (
	"context"
	"errors"
	"regexp"

	"github.com/spf13/cobra"

	"afterimage/blockdev"
	"afterimage/blockdev/nbd"
)

// diskOptions say how the disk that an argument names is opened.
type diskOptions struct {
	readOnly bool
	format   string // --format: "" guesses and refuses what is not raw, "raw" insists
}

// formatFlag adds --format to a command that opens disks.
func formatFlag(cmd *cobra.Command, o *diskOptions) {
	cmd.Flags().StringVar(&o.format, "format", "", "raw: take the image as raw, whatever its first bytes look like")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"raw"}, cobra.ShellCompDirectiveNoFileComp))
}

func (o diskOptions) check() error {
	if o.format != "" && o.format != "raw" {
		err := usagef("--format %s: raw is the only format", o.format)
		return withHint(err, "qemu-nbd serves other formats; name the NBD URI it prints as the image")
	}
	return nil
}

// uriForm is a URI; a path that looks like one can be written with ./ before.
var uriForm = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*://`)

// openDisk opens a raw file, a block device or an NBD URI.
func openDisk(ctx context.Context, name string, o diskOptions) (blockdev.Device, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if name == "" {
		return nil, usagef("the name of a disk is empty")
	}
	if uriForm.MatchString(name) {
		return openURI(ctx, name, o)
	}
	dev, err := blockdev.OpenFile(name, blockdev.FileOptions{ReadOnly: o.readOnly, Raw: o.format == "raw"})
	if err != nil {
		return nil, err // not dev: a nil *File is no nil Device
	}
	return dev, nil
}

func openURI(ctx context.Context, uri string, o diskOptions) (blockdev.Device, error) {
	if _, err := nbd.ParseURI(uri); err != nil {
		return nil, withStatus(err, statusUsage)
	}
	dev, err := nbd.Dial(ctx, uri, nbd.Options{ReadOnly: o.readOnly})
	switch {
	case errors.Is(err, nbd.ErrNoExport):
		return nil, withHint(withStatus(err, statusNotFound), "nbdinfo --list shows what the server has")
	case err != nil:
		return nil, withHint(withStatus(err, statusUnreachable), "see that the server runs, and may be reached from here")
	}
	return dev, nil
}
