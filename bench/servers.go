package bench

// exportName is asked for by the client: one rival has no default export.
const exportName = "bench"

// A Server is a program with its settings.
type Server struct {
	Name     string // of the program: all settings of a rival have one name
	Settings string // what differs between servers of one name
	Rival    bool
	Tee      bool // writes a log beside the image

	// command is the command line without the program's path.
	command func(p paths) []string
	program string // looked for in PATH; empty: our own binary
	pkg     string // the Debian package that has it
}

// paths are what a command line names.
type paths struct {
	image, socket, log string
}

// String names the server and its settings.
func (s *Server) String() string {
	if s.Settings == "" {
		return s.Name
	}
	return s.Name + " " + s.Settings
}

const afterimage = "afterimage"

// Servers are all that are measured. Each rival comes with every setting that has
// been seen to be its best somewhere.
func Servers() []*Server {
	nbdkit := func(settings ...string) *Server {
		return &Server{
			Name: "nbdkit file", Settings: settings[0] + " " + settings[1], Rival: true, program: "nbdkit", pkg: "nbdkit",
			command: func(p paths) []string {
				return append([]string{"--foreground", "-U", p.socket}, append(settings, "file", p.image)...)
			},
		}
	}
	qemu := func(settings string) *Server {
		return &Server{
			Name: "qemu-nbd", Settings: settings, Rival: true, program: "qemu-nbd", pkg: "qemu-utils",
			command: func(p paths) []string {
				return []string{"--persistent", "--shared=0", "--format=raw", "--export-name=" + exportName,
					"--cache=writeback", settings, "--socket=" + p.socket, p.image}
			},
		}
	}
	serve := func(p paths) []string {
		return []string{"serve", p.image, "-U", p.socket, "--export", exportName}
	}
	return []*Server{
		nbdkit("-t", "4"),
		nbdkit("-t", "16"),
		qemu("--aio=threads"),
		qemu("--aio=io_uring"),
		{
			Name: "go-nbd", Rival: true,
			command: func(p paths) []string { return []string{"bench", "go-nbd", p.image, "-U", p.socket} },
		},
		{Name: afterimage, command: serve},
		{
			Name: afterimage, Settings: "--log", Tee: true,
			command: func(p paths) []string { return append(serve(p), "--log", p.log) },
		},
	}
}
