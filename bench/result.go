package bench

import (
	"strings"
	"time"
)

// A Result is one run, and its JSON.
type Result struct {
	Begun       time.Time         `json:"begun"`
	TookSeconds float64           `json:"took_seconds"`
	Machine     Machine           `json:"machine"`
	LoadBefore  float64           `json:"load_before"` // load average of the minute before; -1: unknown
	Versions    map[string]string `json:"versions"`
	Directory   string            `json:"directory"` // where image and log lay
	FileSystem  string            `json:"file_system"`
	ImageBytes  int64             `json:"image_bytes"`
	Rounds      int               `json:"rounds"`
	CellSeconds float64           `json:"cell_seconds"` // one server under one workload in one round
	Absent      []Absent          `json:"absent"`
	Workloads   []WorkloadResult  `json:"workloads"`
}

// Absent is a server that does not run on this machine.
type Absent struct {
	Server   string `json:"server"`
	Settings string `json:"settings"`
	Why      string `json:"why"`
}

// A WorkloadResult is what the servers did under one workload.
type WorkloadResult struct {
	Name       string `json:"name"`
	Title      string `json:"title"`
	BlockBytes int64  `json:"block_bytes"`
	Depth      int    `json:"depth"`

	BestRival string `json:"best_rival"` // with its settings
	// Control is the rival that was measured twice; ratios within Equal may be
	// chance.
	Control string `json:"control"`
	Equal   Band   `json:"equal"`
	// TeeRatio is IOPS with the tee on over IOPS with it off, round by round;
	// nil if either is missing or void.
	TeeRatio *Figure `json:"tee_ratio"`

	Rows []Row `json:"rows"`
}

// A Row is one server under one workload.
type Row struct {
	Server   string   `json:"server"`
	Settings string   `json:"settings"`
	Command  []string `json:"command"`
	Rival    bool     `json:"rival"`
	Control  bool     `json:"control"` // the second name of the rival in Control
	Tee      bool     `json:"tee"`
	Best     bool     `json:"best"` // of the settings of this server

	IOPS        Figure `json:"iops"`
	MeanSeconds Figure `json:"mean_seconds"` // latency
	P99Seconds  Figure `json:"p99_seconds"`
	CPUSeconds  Figure `json:"cpu_seconds_per_request"` // of the server, user and system
	// ReadWriteCalls are the server's system calls of the read and write family.
	// A server that uses send and recv has more than these.
	ReadWriteCalls Figure `json:"read_write_calls_per_request"`

	// Ratio is IOPS over those of the best rival, round by round. Equal says
	// that its median lies within the control's band.
	Ratio Figure `json:"ratio"`
	Equal bool   `json:"equal"`
	// Void says why the row does not count; it is then compared with nothing.
	Void string `json:"void,omitempty"`
}

// name is the server with its settings.
func (r *Row) name() string { return strings.TrimSpace(r.Server + " " + r.Settings) }

// Void lists the rows that do not count, as "workload: server: why".
func (r *Result) Void() []string {
	var void []string
	for _, w := range r.Workloads {
		for _, row := range w.Rows {
			if row.Void != "" {
				void = append(void, w.Title+": "+row.name()+": "+row.Void)
			}
		}
	}
	return void
}

// sample is one server under one workload in one round.
type sample struct {
	fio            fioReport
	cpu            time.Duration
	readWriteCalls int64
}

// contestant is a server with what the rounds gave for one workload.
type contestant struct {
	server  *Server
	control bool
	command []string
	samples []sample // a round each
	void    string
}

// sum makes the result of one workload. control is the rival measured twice.
func sum(w Workload, cs []*contestant, control *Server) WorkloadResult {
	r := WorkloadResult{
		Name: w.Name(), Title: w.Title(), BlockBytes: w.BlockBytes, Depth: w.Depth,
		Control: control.String(), Equal: Band{1, 1},
	}
	for _, c := range cs {
		r.Rows = append(r.Rows, c.row())
	}
	best := -1
	bestOf := map[string]int{}
	var twin, second *Row
	for i := range r.Rows {
		row := &r.Rows[i]
		switch {
		case row.Control:
			second = row
			continue
		case row.Void != "":
			continue
		case row.Rival && row.name() == r.Control:
			twin = row
		}
		if row.Rival && (best < 0 || row.IOPS.Median > r.Rows[best].IOPS.Median) {
			best = i
		}
		key := row.Server
		if row.Tee {
			key += " with its tee"
		}
		if b, ok := bestOf[key]; !ok || row.IOPS.Median > r.Rows[b].IOPS.Median {
			bestOf[key] = i
		}
	}
	for _, i := range bestOf {
		r.Rows[i].Best = true
	}
	if twin != nil && second != nil {
		r.Equal = band(ratios(second.IOPS.Rounds, twin.IOPS.Rounds))
	}
	if best >= 0 {
		r.BestRival = r.Rows[best].name()
		for i := range r.Rows {
			if row := &r.Rows[i]; row.Void == "" {
				row.Ratio = figure(ratios(row.IOPS.Rounds, r.Rows[best].IOPS.Rounds))
				row.Equal = r.Equal.Holds(row.Ratio.Median)
			}
		}
	}
	r.TeeRatio = teeRatio(r.Rows)
	return r
}

func teeRatio(rows []Row) *Figure {
	var on, off *Row
	for i := range rows {
		row := &rows[i]
		switch {
		case row.Rival || row.Void != "":
		case row.Tee:
			on = row
		default:
			off = row
		}
	}
	if on == nil || off == nil {
		return nil
	}
	f := figure(ratios(on.IOPS.Rounds, off.IOPS.Rounds))
	return &f
}

func (c *contestant) row() Row {
	s := c.server
	each := func(of func(sample) float64) Figure {
		xs := make([]float64, 0, len(c.samples))
		for _, x := range c.samples {
			xs = append(xs, of(x))
		}
		return figure(xs)
	}
	perRequest := func(x sample, n float64) float64 { return n / float64(x.fio.requests) }
	return Row{
		Server: s.Name, Settings: s.Settings, Command: c.command, Rival: s.Rival, Control: c.control, Tee: s.Tee, Void: c.void,

		IOPS:           each(func(x sample) float64 { return x.fio.iops }),
		MeanSeconds:    each(func(x sample) float64 { return x.fio.mean.Seconds() }),
		P99Seconds:     each(func(x sample) float64 { return x.fio.p99.Seconds() }),
		CPUSeconds:     each(func(x sample) float64 { return perRequest(x, x.cpu.Seconds()) }),
		ReadWriteCalls: each(func(x sample) float64 { return perRequest(x, float64(x.readWriteCalls)) }),
		Ratio:          figure(nil),
	}
}
