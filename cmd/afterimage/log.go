package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"afterimage/hrl"
)

func (a *app) logCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "log",
		Short:   "Show, verify and replay replica logs",
		Example: "  afterimage log verify /var/lib/afterimage/vm1",
	}
	noun(cmd)
	cmd.AddCommand(a.logShowCommand(), a.logVerifyCommand(), a.logReplayCommand())
	return cmd
}

// logShown is what `log show --json` prints.
type logShown struct {
	Disks    []logDisk    `json:"disks"`
	Segments []logSegment `json:"segments"` // oldest first
	Cuts     []logCut     `json:"cuts"`
}

type logDisk struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes, at the end of the log
}

type logSegment struct {
	Path        string    `json:"path"`
	Incarnation uint64    `json:"incarnation"`
	Number      uint64    `json:"number"` // within the incarnation
	First       uint64    `json:"first"`  // sequence numbers of its frames
	Last        uint64    `json:"last"`   // first-1 if it has none
	Created     time.Time `json:"created"`
	Sealed      bool      `json:"sealed"`
	Frames      int       `json:"frames"`
	Bytes       int64     `json:"bytes"`
	Damage      string    `json:"damage,omitempty"`
}

type logCut struct {
	Incarnation uint64    `json:"incarnation"`
	Epoch       uint64    `json:"epoch"` // the one it ended
	Seq         uint64    `json:"seq"`
	Time        time.Time `json:"time"`
	Kind        string    `json:"kind"` // crash or app: what the cut is consistent for
}

func (a *app) logShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show DIR|FILE...",
		Short: "Show what a replica log consists of",
		Long: `Show the disks, segments and cuts of a replica log, oldest first. DIR is the
directory of a log, FILE one of its segments. The exit status is 6 if a segment is
damaged; what is good of it is shown all the same.`,
		Example: "  afterimage log show /var/lib/afterimage/vm1",
		Args:    cobra.MinimumNArgs(1),
		RunE:    withSegments(a.logShow),
	}
}

func (a *app) logShow(segments *hrl.Segments) error {
	shown := logShown{Disks: []logDisk{}, Segments: []logSegment{}, Cuts: []logCut{}}
	for _, d := range segments.Disks() {
		shown.Disks = append(shown.Disks, logDisk(d))
	}
	var damage error
	for _, s := range segments.Segments {
		ls := logSegment{s.Path, s.Incarnation, s.Ordinal, s.First, s.Last, s.Created, s.Sealed, s.Frames, s.End, ""}
		if s.Damage != nil {
			ls.Damage = s.Damage.Error()
			damage = errors.Join(damage, s.Damage)
		}
		shown.Segments = append(shown.Segments, ls)
		err := segments.Each(s, func(f *hrl.Frame) error {
			if f.Kind != hrl.KindCut {
				return nil
			}
			epoch, at, kind, err := f.Cut()
			if err != nil {
				return err
			}
			name := "crash"
			if kind == hrl.CutApp {
				name = "app"
			}
			shown.Cuts = append(shown.Cuts, logCut{s.Incarnation, epoch, f.Seq, at, name})
			return nil
		})
		if err != nil {
			damage = errors.Join(damage, err)
		}
	}
	if err := a.printLog(&shown); err != nil {
		return err
	}
	return damage
}

func (a *app) printLog(shown *logShown) error {
	if a.json {
		return a.printJSON(shown)
	}
	rows := [][]string{{"DISK", "SIZE"}}
	for _, d := range shown.Disks {
		rows = append(rows, []string{d.Name, humanize.IBytes(uint64(d.Size))})
	}
	rows = append(rows, nil, []string{"SEGMENT", "INCARNATION", "NUMBER", "FRAMES", "SEQUENCE", "BYTES", "STATE"})
	for _, s := range shown.Segments {
		state := "open"
		switch {
		case s.Damage != "":
			state = "DAMAGED"
		case s.Sealed:
			state = "sealed"
		}
		rows = append(rows, []string{s.Path, fmt.Sprint(s.Incarnation), fmt.Sprint(s.Number), fmt.Sprint(s.Frames),
			fmt.Sprintf("%d to %d", s.First, s.Last), humanize.IBytes(uint64(s.Bytes)), state})
	}
	if len(shown.Cuts) > 0 {
		rows = append(rows, nil, []string{"CUT", "INCARNATION", "SEQUENCE", "KIND", "TIME"})
	}
	for _, c := range shown.Cuts {
		rows = append(rows, []string{fmt.Sprint(c.Epoch), fmt.Sprint(c.Incarnation), fmt.Sprint(c.Seq), c.Kind,
			c.Time.Local().Format(time.DateTime)})
	}
	return table(a.stdout, rows)
}

// logVerified is what `log verify --json` prints.
type logVerified struct {
	Whole    bool          `json:"whole"`
	Segments int           `json:"segments"`
	Frames   int64         `json:"frames"`
	Findings []hrl.Finding `json:"findings"`
}

func (a *app) logVerifyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "verify DIR|FILE...",
		Short: "Check every byte of a replica log",
		Long: `Check the checksum of every frame of a replica log, and that none is missing between
those there are. DIR is the directory of a log, FILE one of its segments. The exit
status is 6 if anything is wrong.`,
		Example: "  afterimage log verify /var/lib/afterimage/vm1",
		Args:    cobra.MinimumNArgs(1),
		RunE:    withSegments(a.logVerify),
	}
}

func (a *app) logVerify(segments *hrl.Segments) error {
	v := logVerified{Segments: len(segments.Segments), Findings: segments.Verify()}
	if v.Findings == nil {
		v.Findings = []hrl.Finding{}
	}
	v.Whole = len(v.Findings) == 0
	for _, s := range segments.Segments {
		v.Frames += int64(s.Frames)
	}
	var err error
	switch {
	case a.json:
		err = a.printJSON(v)
	case v.Whole:
		_, err = fmt.Fprintf(a.stdout, "whole: %d segments, %d frames\n", v.Segments, v.Frames)
	default:
		for _, f := range v.Findings {
			if _, err = fmt.Fprintf(a.stdout, "%s at byte %d: %s\n", f.Segment, f.Off, f.Problem); err != nil {
				break
			}
		}
	}
	if err == nil && !v.Whole {
		err = withStatus(fmt.Errorf("the log is not whole: %d findings", len(v.Findings)), statusDamaged)
	}
	return err
}

// logReplayed is what `log replay --json` prints.
type logReplayed struct {
	Disk string `json:"disk"`
	hrl.ReplayStats
	// Missing are the extents that changed without the log's holding how, in
	// bytes; they are as they were.
	Missing []logExtent `json:"missing"`
}

type logExtent struct {
	Offset int64 `json:"offset"` // bytes
	Length int64 `json:"length"`
}

func (a *app) logReplayCommand() *cobra.Command {
	var o diskOptions
	var disk, onto string
	cmd := &cobra.Command{
		Use:   "replay DIR|FILE... --onto IMAGE",
		Short: "Apply a replica log to an image",
		Long: `Apply a replica log to IMAGE, newest frame first, each block once. Applied to the
disk as it was when the log began, that gives the disk as it is at the log's end.
IMAGE gets the disk's size. A damaged log is refused before anything is written. What
changed without the log's holding it stays as it is in IMAGE, and is named; the exit
status is then 6. --disk is needed where the log has several disks.`,
		Example: "  afterimage log replay /var/lib/afterimage/vm1 --onto start.raw",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if onto == "" {
				return usagef("say with --onto which image the log is to be applied to")
			}
			return interruptible(func(ctx context.Context) error { return a.logReplay(ctx, args, disk, onto, o) })
		},
	}
	cmd.Flags().StringVar(&onto, "onto", "", "the `IMAGE` to change: a raw file, a block device or an NBD URI")
	cmd.Flags().StringVar(&disk, "disk", "", "the `NAME` of the disk in the log")
	formatFlag(cmd, &o)
	return cmd
}

func (a *app) logReplay(ctx context.Context, paths []string, disk, onto string, o diskOptions) error {
	segments, err := openSegments(paths)
	if err != nil {
		return err
	}
	defer segments.Close()
	if disk == "" {
		if disk, err = onlyDisk(segments); err != nil {
			return err
		}
	}
	dev, err := openOwn(ctx, onto, o)
	if err != nil {
		return err
	}
	defer dev.Close()
	defer closeOnDone(ctx, dev)()

	p := a.startProgress("replayed", 0)
	stats, err := segments.Replay(disk, dev, p.add)
	p.finish()
	r := logReplayed{Disk: disk, ReplayStats: stats, Missing: []logExtent{}}
	var missing *hrl.IncompleteError
	switch {
	case errors.As(err, &missing):
		for _, e := range missing.Extents {
			r.Missing = append(r.Missing, logExtent{e.Off, e.Len})
		}
	case err != nil:
		return fmt.Errorf("replay onto %s: %w", onto, err)
	}
	var printed error
	if a.json {
		printed = a.printJSON(r)
	} else {
		_, printed = fmt.Fprintf(a.stdout, "%s: %d frames, %s logged, %s applied\n", disk, r.Frames,
			humanize.IBytes(uint64(r.LoggedBytes)), humanize.IBytes(uint64(r.LatestBytes)))
	}
	return errors.Join(printed, err)
}

// onlyDisk is the name of the one disk of a log.
func onlyDisk(segments *hrl.Segments) (string, error) {
	disks := segments.Disks()
	if len(disks) == 1 {
		return disks[0].Name, nil
	}
	var names []string
	for _, d := range disks {
		names = append(names, d.Name)
	}
	if len(names) == 0 {
		return "", withStatus(errors.New("the log has no disk"), statusNotFound)
	}
	return "", usagef("the log has several disks, say which with --disk: %s", strings.Join(names, ", "))
}

// withSegments is a command whose arguments are all of a log.
func withSegments(run func(*hrl.Segments) error) func(*cobra.Command, []string) error {
	return func(_ *cobra.Command, args []string) error {
		segments, err := openSegments(args)
		if err != nil {
			return err
		}
		defer segments.Close()
		return run(segments)
	}
}

func openSegments(paths []string) (*hrl.Segments, error) {
	segments, err := hrl.OpenSegments(paths...)
	if err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	if len(segments.Segments) == 0 {
		segments.Close()
		return nil, withStatus(fmt.Errorf("there is no segment in %s", strings.Join(paths, ", ")), statusNotFound)
	}
	return segments, nil
}
