package bench

import (
	"fmt"
	"strconv"
	"time"
)

// A Workload is what one client asks of a server.
type Workload struct {
	Write      bool
	BlockBytes int64 // of one request
	Depth      int   // requests that the client keeps in flight
}

// Quick are the workloads of the short run.
func Quick() []Workload {
	return []Workload{
		{Write: true, BlockBytes: 4096, Depth: 1},
		{Write: true, BlockBytes: 4096, Depth: 32},
		{Write: false, BlockBytes: 4096, Depth: 1},
		{Write: false, BlockBytes: 4096, Depth: 32},
	}
}

func (w Workload) direction() string {
	if w.Write {
		return "write"
	}
	return "read"
}

// Name is what scripts know the workload by: randwrite-4k-qd32.
func (w Workload) Name() string {
	return fmt.Sprintf("rand%s-%dk-qd%d", w.direction(), w.BlockBytes>>10, w.Depth)
}

// Title is the name for people.
func (w Workload) Title() string {
	return fmt.Sprintf("%d KiB random %s, QD %d", w.BlockBytes>>10, w.direction(), w.Depth)
}

// fioArgs are what fio is told. All servers take these: there is no flush, which
// one rival does not have. The same seed gives every server of a round the same
// offsets.
func (w Workload) fioArgs(size int64, runtime time.Duration, seed int) []string {
	return []string{
		"--name=" + w.Name(), "--thread", "--ioengine=nbd",
		"--rw=rand" + w.direction(),
		"--bs=" + strconv.FormatInt(w.BlockBytes, 10),
		"--iodepth=" + strconv.Itoa(w.Depth),
		"--size=" + strconv.FormatInt(size, 10),
		"--time_based", "--runtime=" + strconv.FormatInt(runtime.Milliseconds(), 10) + "ms",
		"--norandommap", "--randrepeat=0", "--randseed=" + strconv.Itoa(seed),
		"--lat_percentiles=1", "--clat_percentiles=0",
		"--clocksource=clock_gettime", // spares every run the calibration of another
	}
}
