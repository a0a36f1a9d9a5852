package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/internal/admin"
)

func (a *app) replicaCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "replica",
		Short: "Replicate a VM to another host",
		Long: `Replicate a VM to another host, and see how far that is. The other host's daemon must
run with --listen, and let this host: 'peer allow' there, 'peer test' here.` + adminHelp,
		Example: "  afterimage replica enable web --to host2.example.com:10810",
	}
	noun(cmd)
	cmd.AddCommand(
		a.replicaEnableCommand(), a.replicaStatusCommand(), a.replicaSyncCommand(),
		a.vmVerb("pause", "Stop shipping for a while", `Stop cutting and shipping; what is written is still logged. It stays so over restarts
until 'replica resume'.`, "  afterimage replica pause web",
			func(ctx context.Context, c *admin.Client, vm string) error { return c.Pause(ctx, vm) }),
		a.vmVerb("resume", "Ship again", `Go on after 'replica pause'.`, "  afterimage replica resume web",
			func(ctx context.Context, c *admin.Client, vm string) error { return c.Resume(ctx, vm) }),
		a.vmVerb("disable", "End the replication of a VM", `End the replication of a VM. The log goes; the replica keeps its points. If the VM is
replicated there again only what differs travels.`, "  afterimage replica disable web",
			func(ctx context.Context, c *admin.Client, vm string) error { return c.Disable(ctx, vm) }),
	)
	return cmd
}

func (a *app) replicaEnableCommand() *cobra.Command {
	var to, every, keep, limit string
	cmd := &cobra.Command{
		Use:   "enable VM --to HOST:PORT",
		Short: "Begin to replicate a VM to another host",
		Long: `Begin to replicate a VM: a recovery point is cut and shipped again and again. When the
command is done the other host has accepted the VM; the first copy goes on by itself,
and 'replica sync' waits for it. The VM may run meanwhile.`,
		Example: `  afterimage replica enable web --to host2.example.com:10810
  afterimage replica enable web --to host2.example.com:10810 --every 30s --keep last=48 --limit 20Mbit`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkVM(args[0]); err != nil {
				return err
			}
			e, err := parseEnable(to, every, keep, limit)
			if err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				r, err := c.Enable(ctx, args[0], e)
				if err == nil && a.json {
					err = a.printJSON(r)
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "replicate to the daemon at `HOST:PORT`; HOST as its certificate has it")
	f.StringVar(&every, "every", "5m", "cut a point every `DURATION`, at least 1s")
	f.StringVar(&keep, "keep", "last=24", "which points the replica keeps: last=`N`, the newest N")
	f.StringVar(&limit, "limit", "", "send at most at `RATE`: SIZE a second, or bits as in 8Mbit (default: as fast as it goes)")
	return cmd
}

func parseEnable(to, every, keep, limit string) (admin.Enable, error) {
	e := admin.Enable{To: to}
	if to == "" {
		return e, withHint(usagef("say with --to where the VM is replicated"), "write --to host2.example.com:10810")
	}
	interval, err := parseDuration(every)
	if err != nil {
		return e, withHint(usagef("--every %s: it is not a duration", every), hintOf(err))
	}
	if interval < time.Second {
		return e, usagef("--every %s: at least 1s is needed", every)
	}
	e.EverySeconds = interval.Seconds()
	if e.Keep, err = parseKeep(keep); err != nil {
		return e, err
	}
	if limit != "" {
		if e.Limit, err = parseRate(limit); err != nil {
			return e, withHint(usagef("--limit %s: %v", limit, err), hintOf(err))
		}
	}
	return e, nil
}

// parseKeep reads what a replica keeps. So far that is a number of points.
func parseKeep(s string) (int, error) {
	number, ok := strings.CutPrefix(s, "last=")
	if !ok {
		return 0, withHint(usagef("--keep %q: only the newest N points can be kept", s), "write --keep last=24")
	}
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || n > keepMax || number[0] == '+' {
		return 0, withHint(usagef("--keep %q: 1 to %d points can be kept", s, keepMax), "write --keep last=24")
	}
	return n, nil
}

// keepMax is the most points that a replica is asked to keep.
const keepMax = 10000

func (a *app) replicaStatusCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "status [VM]",
		Short: "Show how far the replication is",
		Long: `Show the replication of all VMs, or of one, from this host or to it. With --watch it is
shown every second until interrupted, with --json an object a line.`,
		Example: `  afterimage replica status
  afterimage replica status web --watch`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			vm := ""
			if len(args) > 0 {
				vm = args[0]
				if err := checkVM(vm); err != nil {
					return err
				}
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				if watch {
					return a.watchStatus(ctx, c, vm)
				}
				return a.showStatus(ctx, c, vm)
			})
		},
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "show it every second until interrupted")
	return cmd
}

func (a *app) showStatus(ctx context.Context, c *admin.Client, vm string) error {
	if vm == "" {
		rs, err := c.Replications(ctx)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(rs)
		}
		rows := [][]string{{"VM", "ROLE", "PEER", "STATE", "HEALTH", "POINT", "LAG", ""}}
		for _, r := range rs {
			rows = append(rows, append([]string{r.VM, r.Role, r.Peer}, statusCells(&r)...))
		}
		return table(a.stdout, rows)
	}
	r, err := c.Replication(ctx, vm)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(r)
	}
	return a.printStatus(&r)
}

// statusCells are state, health, newest point, lag and what is to be said of it.
func statusCells(r *admin.Replication) []string {
	point := "none"
	if r.LastPoint != nil {
		point = r.LastPoint.ID.String()
	}
	return []string{r.State, r.Health, point, seconds(r.LagSeconds), strings.Join(remarks(r), "; ")}
}

// remarks are what is not as it should be, and how far the first copy is.
func remarks(r *admin.Replication) []string {
	list := r.Reasons
	if i := r.Initial; i != nil {
		list = append(list, fmt.Sprintf("copied %s of %s", humanize.IBytes(uint64(i.DoneBytes)), humanize.IBytes(uint64(i.TotalBytes)))+left(i.ETASeconds))
	}
	return list
}

func left(eta float64) string {
	if eta <= 0 {
		return ""
	}
	return ", " + seconds(eta) + " left"
}

// seconds are shown as a duration, without more digits than anybody reads.
func seconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func (a *app) printStatus(r *admin.Replication) error {
	bytes := func(n int64) string { return humanize.IBytes(uint64(max(0, n))) }
	rows := [][]string{
		{"VM", r.VM}, {"role", r.Role}, {"peer", r.Peer}, {"state", r.State}, {"health", r.Health},
	}
	for _, why := range remarks(r) {
		rows = append(rows, []string{"", why})
	}
	if p := r.LastPoint; p != nil {
		rows = append(rows, []string{"last point", p.ID.String() + ", " + p.Time.Local().Format(time.DateTime)})
	}
	rows = append(rows, []string{"lag", seconds(r.LagSeconds) + ", " + bytes(r.LagBytes)}, []string{"generation", fmt.Sprint(r.Generation)})
	if r.Role == admin.RolePrimary {
		rows = append(rows, []string{"a point every", seconds(r.EverySeconds)}, []string{"log", bytes(r.LogBytes)},
			[]string{"to be copied", bytes(r.GapBytes)}, []string{"hot", bytes(r.HotBytes) + " to be compared after a power cut"},
			[]string{"shipped", bytes(r.ShippedBytes) + ", " + bytes(r.ShippedRawBytes) + " before compression"})
	}
	if r.Points > 0 {
		rows = append(rows, []string{"points", fmt.Sprint(r.Points)})
	}
	for _, g := range r.HistoryGaps {
		rows = append(rows, []string{"no history", fmt.Sprintf("%s to %s, %s (%s)", g.From.Local().Format(time.DateTime), g.To.Local().Format(time.DateTime),
			seconds(g.DurationSeconds), gapReason(&g))})
	}
	return table(a.stdout, rows)
}

// gapReason says in words why there is a gap in the history.
func gapReason(g *admin.HistoryGap) string { return strings.ReplaceAll(g.Reason, "_", " ") }

// watchEvery is how often --watch shows the state.
const watchEvery = time.Second

// watchStatus shows the state, a line each time, until ctx is done.
func (a *app) watchStatus(ctx context.Context, c *admin.Client, vm string) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		var rs []admin.Replication
		var err error
		if vm == "" {
			rs, err = c.Replications(ctx)
		} else {
			var r admin.Replication
			r, err = c.Replication(ctx, vm)
			rs = append(rs, r)
		}
		if err == nil {
			err = a.printWatched(rs)
		}
		if ctx.Err() != nil {
			return nil // being interrupted is how it ends
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (a *app) printWatched(rs []admin.Replication) error {
	for _, r := range rs {
		line := []byte(strings.TrimSpace(time.Now().Format(time.TimeOnly) + "  " + r.VM + "  " + strings.Join(statusCells(&r), "  ")))
		if a.json {
			var err error
			if line, err = json.Marshal(r); err != nil {
				return err
			}
		}
		if _, err := fmt.Fprintf(a.stdout, "%s\n", line); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) replicaSyncCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "sync VM",
		Short: "Cut a point now and wait until the replica has it",
		Long: `Cut a recovery point now, and return when it is listed over there: durable, and ready
to be started. Its id is printed. After 'replica enable' that waits for the first copy.`,
		Example: "  afterimage replica sync web",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkVM(args[0]); err != nil {
				return err
			}
			return a.ask(func(ctx context.Context, c *admin.Client) error {
				f := follow{a: a}
				p, err := c.Sync(ctx, args[0], f.tell)
				f.end()
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(p)
				}
				_, err = fmt.Fprintln(a.stdout, p.ID)
				return err
			})
		},
	}
}
