package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

// version is what git describe said when the Makefile built the binary.
var version = "devel"

// versionInfo is what `version --json` prints.
type versionInfo struct {
	Version string `json:"version"`
	Go      string `json:"go"`       // the Go release it was built with
	OSArch  string `json:"platform"` // as in linux/amd64
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  afterimage version --json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := versionInfo{version, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
			if a.json {
				return a.printJSON(v)
			}
			_, err := fmt.Fprintf(a.stdout, "afterimage %s (%s, %s)\n", v.Version, v.Go, v.OSArch)
			return err
		},
	}
}
