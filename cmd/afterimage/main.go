// Command afterimage is the whole product in one binary: it parses, calls the
// packages and prints.
//
//	main.go     the root command, help, running a command
//	status.go   exit statuses and what an error becomes
//	output.go   JSON, tables, terminals
//	size.go     SIZE as on the command line
//	open.go     what a DISK argument names; owner.go whose it may be
//	progress.go rate and time left of a long command
//	listen.go   where the clients of serve come from
//	admin.go    asking the daemon; VM@POINT/DISK
//	duration.go, rate.go: DURATION and RATE as on the command line
//	serve.go, disk.go, log.go, daemon.go, vm.go, peer.go, replica.go, point.go,
//	failover.go, cert.go, demo.go, bench.go, doctor.go, completion.go, version.go: a
//	noun each
package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// app is what every command is given.
type app struct {
	stdout, stderr io.Writer
	json           bool   // --json: results as JSON
	admin          string // --admin: the daemon's socket; empty: the usual places
	// begun is set when the command line was understood: an error before is
	// wrong usage, one after is the command's own.
	begun bool
}

// run runs one command line and returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	a := &app{stdout: stdout, stderr: stderr}
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteC()
	if err == nil {
		return statusDone
	}
	if !a.begun {
		err = withHint(withStatus(err, statusUsage), "see '"+cmd.CommandPath()+" -h'")
	}
	return report(stderr, err)
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "afterimage",
		Short: "Replication for the disks of virtual machines",
		Long: `Afterimage stands between a virtual machine and its disk. The machine opens the
disk over NBD; the image stays an ordinary raw file.`,
		Example: `  afterimage disk create vm1.raw 20G
  afterimage serve vm1.raw -U /run/vm1.sock`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRun:  func(*cobra.Command, []string) { a.begun = true },
	}
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print the result as JSON")
	root.PersistentFlags().StringVar(&a.admin, "admin", "", "ask the daemon on the socket `PATH`")
	root.SetHelpFunc(help)
	noun(root)
	root.AddCommand(
		a.serveCommand(),
		a.diskCommand(),
		a.logCommand(),
		a.daemonCommand(),
		a.vmCommand(),
		a.peerCommand(),
		a.replicaCommand(),
		a.pointCommand(),
		a.failoverCommand(),
		a.certCommand(),
		a.demoCommand(),
		a.benchCommand(),
		a.doctorCommand(),
		a.completionCommand(),
		a.versionCommand(),
	)
	root.SetHelpCommand(helpCommand(root))
	return root
}

// noun makes a command that only holds others answer with its help, as wrong
// usage, when no verb or an unknown one follows it.
func noun(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if len(args) > 0 {
			err = fmt.Errorf("%s has no command %q", cmd.CommandPath(), args[0])
		} else {
			err = fmt.Errorf("%s needs a command: %s", cmd.CommandPath(), strings.Join(verbs(cmd), ", "))
		}
		return withHint(withStatus(err, statusUsage), "see '"+cmd.CommandPath()+" -h'")
	}
}

func verbs(cmd *cobra.Command) []string {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return names
}

// help prints what -h prints, for every command.
func help(cmd *cobra.Command, _ []string) {
	w := cmd.OutOrStdout()
	text := cmd.Long
	if text == "" {
		text = cmd.Short
	}
	fmt.Fprintf(w, "%s\n\n%s\nExit status: %s\n", strings.TrimSpace(text), cmd.UsageString(), statusHelp)
}

func helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:     "help [COMMAND...]",
		Short:   "Show the help of a command",
		Example: "  afterimage help disk copy",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return withStatus(fmt.Errorf("there is no command %q", strings.Join(args, " ")), statusUsage)
			}
			return cmd.Help()
		},
	}
}
