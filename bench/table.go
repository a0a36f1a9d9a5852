package bench

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
)

// WriteTable prints the result for people: of each server with several settings
// the best of this run, and all that is needed to judge the figures.
func (r *Result) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for i := range r.Workloads {
		r.Workloads[i].table(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(w, r.foot())
	return err
}

func (w *WorkloadResult) table(t io.Writer) {
	fmt.Fprintf(t, "%s\n", w.Title)
	fmt.Fprintln(t, "SERVER\tIOPS\tSPREAD\tMEAN\tP99\tCPU/REQUEST\tRATIO")
	for _, row := range w.shown() {
		name := row.name()
		if row.Control {
			name += " (control)"
		}
		if row.Void != "" {
			fmt.Fprintf(t, "%s\tVOID: %s\n", name, row.Void)
			continue
		}
		line := fmt.Sprintf("%s\t%s\t%.0f %%\t%s\t%s\t%s\t%.2f", name,
			humanize.Comma(int64(math.Round(row.IOPS.Median))), 100*row.IOPS.Spread(),
			micros(row.MeanSeconds.Median), micros(row.P99Seconds.Median), micros(row.CPUSeconds.Median),
			row.Ratio.Median)
		if remark := w.remark(row); remark != "" {
			line += "\t" + remark
		}
		fmt.Fprintln(t, line)
	}
	fmt.Fprintf(t, "equal: %.2f to %.2f (%s twice)", w.Equal.Low, w.Equal.High, w.Control)
	if w.TeeRatio != nil {
		fmt.Fprintf(t, "; tee on over tee off: %.2f", w.TeeRatio.Median)
		if w.Equal.Holds(w.TeeRatio.Median) {
			fmt.Fprint(t, ", equal")
		}
	}
	fmt.Fprint(t, "\n\n")
}

// shown are the best of each server's settings, and the control behind the rival
// that it is.
func (w *WorkloadResult) shown() []*Row {
	var rows []*Row
	for i := range w.Rows {
		if row := &w.Rows[i]; row.Best || row.Void != "" || !row.Control && row.name() == w.Control {
			rows = append(rows, row)
		}
	}
	for i := range w.Rows {
		if w.Rows[i].Control {
			at := slices.IndexFunc(rows, func(r *Row) bool { return r.name() == w.Control }) + 1
			rows = slices.Insert(rows, at, &w.Rows[i])
		}
	}
	return rows
}

func (w *WorkloadResult) remark(row *Row) string {
	switch {
	case !row.Control && row.name() == w.BestRival:
		return "best rival"
	case row.Equal:
		return "equal"
	}
	return ""
}

func micros(seconds float64) string {
	us := seconds * 1e6
	if us < 100 {
		return fmt.Sprintf("%.1f µs", us)
	}
	return humanize.Comma(int64(math.Round(us))) + " µs"
}

// foot is where, when and with what the figures were measured.
func (r *Result) foot() string {
	var b strings.Builder
	fmt.Fprintf(&b, "medians of %d rounds of %v in changing order; ratio: IOPS over the best rival's, round by round\n",
		r.Rounds, time.Duration(r.CellSeconds*float64(time.Second)))
	fmt.Fprintf(&b, "image of %s and log on %s; %s, %d cores, Linux %s, load before %.1f; %s, took %v\n",
		humanize.IBytes(uint64(r.ImageBytes)), r.FileSystem, r.Machine.CPU, r.Machine.Cores, r.Machine.Kernel, r.LoadBefore,
		r.Begun.Format(time.DateTime+" MST"), time.Duration(r.TookSeconds*float64(time.Second)).Round(time.Second))
	var names []string
	for name := range r.Versions {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		if i > 0 {
			b.WriteString(", ")
		}
		if v := r.Versions[name]; strings.HasPrefix(v, name) {
			b.WriteString(v)
		} else {
			b.WriteString(name + " " + v)
		}
	}
	b.WriteString("\n")
	for _, line := range r.commands() {
		b.WriteString(line + "\n")
	}
	for _, a := range r.Absent {
		fmt.Fprintf(&b, "left out: %s %s: %s\n", a.Server, a.Settings, a.Why)
	}
	return b.String()
}

// commands are the command lines of all servers, each once.
func (r *Result) commands() []string {
	var lines []string
	for _, w := range r.Workloads {
		for _, row := range w.Rows {
			if line := "$ " + strings.Join(row.Command, " "); !slices.Contains(lines, line) {
				lines = append(lines, line)
			}
		}
	}
	return lines
}
