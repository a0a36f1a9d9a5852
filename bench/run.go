package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// Config says how a run is done.
type Config struct {
	Binary     string // our own program, which is measured
	Directory  string // a directory for image and logs is made in it, and removed
	ImageBytes int64
	Rounds     int           // that count; one before them warms up
	Cell       time.Duration // one server under one workload in one round
	Workloads  []Workload
	// Progress is told what is being done; may be nil.
	Progress func(string)
}

// ErrConfig says that a Config asks for what cannot be.
var ErrConfig = errors.New("impossible benchmark")

const (
	minImage = 1 << 20
	minCell  = 50 * time.Millisecond // 5 ticks of the server's CPU time
	// logRate bounds what a server can log in a second.
	logRate = 1 << 30
)

func (c *Config) check() error {
	switch {
	case c.Rounds < 1:
		return fmt.Errorf("%w: %d rounds, at least 1 is needed", ErrConfig, c.Rounds)
	case c.Cell < minCell || c.Cell > time.Hour:
		return fmt.Errorf("%w: %v for a measurement, from %v to 1h are possible", ErrConfig, c.Cell, minCell)
	case c.ImageBytes < minImage || c.ImageBytes%4096 != 0:
		return fmt.Errorf("%w: an image of %d bytes, at least %s and a multiple of 4096 are needed",
			ErrConfig, c.ImageBytes, humanize.IBytes(minImage))
	}
	return nil
}

// need is the space that a run takes: the image, a copy of it as it was, and the
// log of one cell.
func (c *Config) need() int64 {
	return 2*c.ImageBytes + int64((c.Cell+time.Second).Seconds()*logRate)
}

// run is a Config at work.
type run struct {
	Config
	dir      string
	programs map[*Server]string // their paths
	seed     int                // of the next round
}

// Run measures and gives the result. When ctx is done it ends early, with ctx's
// error. Whatever it made is removed and whatever it started has ended when it
// returns.
func Run(ctx context.Context, c Config) (result *Result, err error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	r := &run{Config: c, programs: map[*Server]string{}}
	servers := Servers()
	if err := checkSpace(c.Directory, c.need()); err != nil {
		return nil, err
	}
	if err := r.find(servers); err != nil {
		return nil, err
	}
	if r.dir, err = os.MkdirTemp(c.Directory, "afterimage-bench-*"); err != nil {
		return nil, err
	}
	defer func() {
		if ctx.Err() != nil {
			result, err = nil, ctx.Err() // whatever went wrong is its consequence
		}
		err = errors.Join(err, os.RemoveAll(r.dir))
	}()

	result = &Result{
		Begun: time.Now(), LoadBefore: load(), Directory: c.Directory, FileSystem: fileSystem(c.Directory),
		ImageBytes: c.ImageBytes, Rounds: c.Rounds, CellSeconds: c.Cell.Seconds(), Absent: []Absent{},
	}
	if result.Machine, err = machine(); err != nil {
		return nil, err
	}
	if result.Versions, err = versions(ctx, c.Binary); err != nil {
		return nil, err
	}
	if err := fill(r.paths().image, c.ImageBytes); err != nil {
		return nil, fmt.Errorf("make the image: %w", err)
	}
	if err := r.measure(ctx, servers, result); err != nil {
		return nil, err
	}
	result.TookSeconds = time.Since(result.Begun).Seconds()
	return result, nil
}

// find looks for every program before anything is measured.
func (r *run) find(servers []*Server) error {
	_, err := findProgram("fio", "fio")
	errs := []error{err}
	seen := map[string]bool{}
	for _, s := range servers {
		if s.program == "" {
			r.programs[s] = r.Binary
			continue
		}
		path, err := findProgram(s.program, s.pkg)
		if err != nil && !seen[s.program] {
			errs = append(errs, err)
		}
		seen[s.program] = true
		r.programs[s] = path
	}
	return errors.Join(errs...)
}

func (r *run) paths() paths {
	return paths{
		image:  filepath.Join(r.dir, "image.raw"),
		socket: filepath.Join(r.dir, "sock"),
		log:    filepath.Join(r.dir, "log"),
	}
}

// measure does all rounds and fills the workloads of the result.
func (r *run) measure(ctx context.Context, servers []*Server, result *Result) error {
	servers, controls, absent, err := r.warmUp(ctx, servers)
	if err != nil {
		return err
	}
	result.Absent = append(result.Absent, absent...)
	all := make([][]*contestant, len(r.Workloads))
	for i := range r.Workloads {
		for _, s := range servers {
			all[i] = append(all[i], r.contestant(s, false))
		}
		all[i] = append(all[i], r.contestant(controls[i], true))
	}
	for round := 1; round <= r.Rounds; round++ {
		r.Progress(fmt.Sprintf("round %d of %d", round, r.Rounds))
		for i, w := range r.Workloads {
			r.seed++
			for _, k := range order(len(all[i]), r.seed) {
				c := all[i][k]
				s, err := r.cell(ctx, c.server, w, r.Cell)
				var void *voidError
				if errors.As(err, &void) {
					c.void, err = void.why, nil
				}
				if err != nil {
					return fmt.Errorf("%s, %s: %w", w.Title(), c.server, err)
				}
				c.samples = append(c.samples, s)
			}
		}
	}
	for i, w := range r.Workloads {
		result.Workloads = append(result.Workloads, sum(w, all[i], controls[i]))
	}
	return nil
}

// warmUp runs every server once under every workload, for a shorter time. A rival
// that does not run on this machine with some setting is left out; one that runs
// with none is an error. The best rival of each workload becomes its control.
func (r *run) warmUp(ctx context.Context, servers []*Server) (run, controls []*Server, absent []Absent, err error) {
	r.Progress("warming up")
	controls = make([]*Server, len(r.Workloads))
	fastest := make([]float64, len(r.Workloads))
	left := map[string]error{} // rivals of which no setting has run yet
	for _, s := range servers {
		left[s.Name] = nil
	}
	r.seed++
	for _, s := range servers {
		var failed error
		for i, w := range r.Workloads {
			x, err := r.cell(ctx, s, w, max(r.Cell/2, minCell))
			var void *voidError
			if err != nil && !errors.As(err, &void) {
				failed = err
				break
			}
			if s.Rival && x.fio.iops > fastest[i] {
				fastest[i], controls[i] = x.fio.iops, s
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil, nil, nil, ctx.Err()
		case failed == nil:
			run = append(run, s)
			delete(left, s.Name)
		case !s.Rival:
			return nil, nil, nil, fmt.Errorf("%s: %w", s, failed)
		default:
			absent = append(absent, Absent{s.Name, s.Settings, failed.Error()})
			if _, ok := left[s.Name]; ok {
				left[s.Name] = failed
			}
		}
	}
	for name, err := range left {
		return nil, nil, nil, fmt.Errorf("%s does not run with any settings: %w", name, err)
	}
	// A setting that ran under some workloads and failed later is no control.
	for i, c := range controls {
		for _, a := range absent {
			if c != nil && a.Server == c.Name && a.Settings == c.Settings {
				return nil, nil, nil, fmt.Errorf("%s, %s: %s", r.Workloads[i].Title(), c, a.Why)
			}
		}
	}
	return run, controls, absent, nil
}

func (r *run) contestant(s *Server, control bool) *contestant {
	program := s.program
	if program == "" {
		program = afterimage
	}
	// The names that the paths have in the result are the same in every run.
	args := s.command(paths{image: "image.raw", socket: "sock", log: "log"})
	return &contestant{server: s, control: control, command: append([]string{program}, args...)}
}

// order is the order of n servers in the round with this seed.
func order(n, seed int) []int {
	return rand.New(rand.NewPCG(uint64(seed), 0)).Perm(n)
}

// cell measures one server under one workload in a process of its own. A
// *voidError comes with a sample that does not count.
func (r *run) cell(ctx context.Context, s *Server, w Workload, runtime time.Duration) (x sample, err error) {
	p := r.paths()
	start := filepath.Join(r.dir, "start.raw")
	check := s.Tee && w.Write // no other cell logs anything
	if check {
		if err := copyFile(p.image, start); err != nil {
			return x, fmt.Errorf("copy the image: %w", err)
		}
	}
	defer func() {
		for _, path := range []string{p.log, p.socket, start} {
			err = errors.Join(err, os.RemoveAll(path))
		}
	}()

	server, err := startServer(ctx, s.String(), r.programs[s], s.command(p), p.socket)
	if err != nil {
		return x, err
	}
	if x, err = r.client(ctx, server, w, runtime, p.socket); err != nil {
		server.kill()
		return x, err
	}
	var void error
	if check {
		void = checkGaps(ctx, server)
	}
	if err := server.stop(ctx); err != nil {
		return x, err
	}
	if check && void == nil {
		void = checkLog(ctx, r.Binary, p.log, start, p.image)
	}
	return x, void
}

// client lets fio work on a running server and takes the server's share.
func (r *run) client(ctx context.Context, server *process, w Workload, runtime time.Duration, socket string) (sample, error) {
	if err := server.rest(ctx); err != nil {
		return sample{}, err
	}
	before, err := usageOf(server.pid())
	if err != nil {
		return sample{}, err
	}
	report, err := runFio(ctx, w, r.ImageBytes, runtime, r.seed, socket, filepath.Join(r.dir, "fio.json"))
	if err != nil {
		return sample{}, err
	}
	after, err := usageOf(server.pid())
	if err != nil {
		return sample{}, err
	}
	return sample{*report, after.cpu - before.cpu, after.readWrite - before.readWrite}, nil
}

// fill makes an image without holes or repetitions.
func fill(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	random := rand.NewChaCha8([32]byte{})
	buf := make([]byte, 1<<20)
	for done := int64(0); done < size && err == nil; {
		n := min(size-done, int64(len(buf)))
		_, _ = random.Read(buf[:n]) // never fails
		_, err = f.Write(buf[:n])
		done += n
	}
	return errors.Join(err, f.Close())
}

// fileSystem names what a directory lies on.
func fileSystem(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "unknown"
	}
	switch st.Type {
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	}
	return fmt.Sprintf("type %#x", st.Type)
}
