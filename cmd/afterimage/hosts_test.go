package main

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/admin"
	"afterimage/internal/pki"
	"afterimage/internal/testenv"
)

// hostProcess is a daemon as a process, with what it keeps.
type hostProcess struct {
	t      *testing.T
	dir    string
	listen string
	p      *process
}

// twoHosts starts two daemons with certificates of one CA; the second lets the
// first replicate to it.
func twoHosts(t *testing.T) (a, b *hostProcess) {
	t.Helper()
	base := memDir(t)
	a, b = &hostProcess{t: t, dir: filepath.Join(base, "a")}, &hostProcess{t: t, dir: filepath.Join(base, "b")}
	if err := pki.Init(filepath.Join(a.dir, "tls"), []string{"host-a", "127.0.0.1"}, pki.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := pki.Issue(filepath.Join(a.dir, "tls"), filepath.Join(b.dir, "tls"), []string{"host-b", "127.0.0.1"}, pki.Options{}); err != nil {
		t.Fatal(err)
	}
	a.start()
	b.start()
	b.do("peer", "allow", "host-a")
	return a, b
}

// start starts the daemon and waits until it says that it is ready.
func (h *hostProcess) start() {
	h.t.Helper()
	if h.listen == "" {
		// The same address after a restart, for the peer knows it.
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			h.t.Fatal(err)
		}
		h.listen = ln.Addr().String()
		ln.Close()
	}
	h.p = start(h.t, "daemon", "--json", "--state", filepath.Join(h.dir, "state"), "--tls-dir", filepath.Join(h.dir, "tls"), "--listen", h.listen)
	var info admin.Daemon
	if err := json.NewDecoder(h.p.stdout).Decode(&info); err != nil {
		h.p.wait()
		h.t.Fatalf("the daemon did not start: %v: %s", err, h.p.stderr.String())
	}
}

// end ends the daemon, which must say that all went well.
func (h *hostProcess) end() {
	h.t.Helper()
	if status := h.p.end(syscall.SIGTERM); status != statusDone {
		h.t.Errorf("the daemon ended with status %d: %s", status, h.p.stderr.String())
	}
}

func (h *hostProcess) kill() {
	h.t.Helper()
	h.p.end(syscall.SIGKILL)
}

// run runs a command against the daemon.
func (h *hostProcess) run(args ...string) (status int, stdout, stderr string) {
	h.t.Helper()
	return runCommand(h.t, append(args, "--admin", filepath.Join(h.dir, "state", "admin.sock"))...)
}

// do runs a command that must succeed and returns what it prints, by lines.
func (h *hostProcess) do(args ...string) []string {
	h.t.Helper()
	status, stdout, stderr := h.run(args...)
	if status != statusDone {
		h.t.Fatalf("%s: %v: status %d: %s\nthe daemon says: %s", filepath.Base(h.dir), args, status, stderr, h.p.stderr.String())
	}
	if stdout = strings.TrimSuffix(stdout, "\n"); stdout == "" {
		return nil
	}
	return strings.Split(stdout, "\n")
}

// fails runs a command that must fail so, with these words, and print nothing.
func (h *hostProcess) fails(status int, words string, args ...string) {
	h.t.Helper()
	got, stdout, stderr := h.run(args...)
	if got != status || !strings.Contains(stderr, words) || stdout != "" {
		h.t.Errorf("%v: status %d, want %d and %q: %s%s", args, got, status, words, stdout, stderr)
	}
}

// decode runs a command with --json.
func (h *hostProcess) decode(v any, args ...string) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(strings.Join(h.do(append(args, "--json")...), "\n")), v); err != nil {
		h.t.Fatalf("%v: %v", args, err)
	}
}

// add adds a VM with a new image for each disk, and returns their URIs.
func (h *hostProcess) add(vm string, size int64, disks ...string) []string {
	h.t.Helper()
	return h.addQuota("256M", vm, size, disks...)
}

func (h *hostProcess) addQuota(quota, vm string, size int64, disks ...string) []string {
	h.t.Helper()
	args := []string{"vm", "add", vm, "--log-quota", quota}
	for _, disk := range disks {
		path := filepath.Join(h.dir, vm+"-"+disk+".raw")
		if err := blockdev.CreateFile(path, size); err != nil {
			h.t.Fatal(err)
		}
		args = append(args, disk+"="+path)
	}
	return h.do(args...)
}

// sameAs compares disks of the VM with those of a test of a failover.
func (h *hostProcess) sameAs(vm string, uris []string) {
	h.t.Helper()
	copies := h.do("failover", "test", vm)
	if len(copies) != len(uris) {
		h.t.Fatalf("the test has disks %q, the VM %q", copies, uris)
	}
	for i, uri := range uris {
		if status, stdout, stderr := runCommand(h.t, "disk", "compare", uri, copies[i]); status != statusDone {
			h.t.Errorf("%s and %s: status %d: %s%s", uri, copies[i], status, stdout, stderr)
		}
	}
	h.do("failover", "end-test", vm+"-test")
}

// TestDaemon is the two hosts' session, by commands alone.
func TestDaemon(t *testing.T) {
	a, b := twoHosts(t)
	uris := a.add("web", 8<<20, "root", "data")
	if want := uriOf(filepath.Join(a.dir, "state", "nbd.sock"), "web/root"); len(uris) != 2 || uris[0] != want {
		t.Fatalf("vm add printed %q, want %s first", uris, want)
	}
	useDisk(t, dial(t, uris[0]), 0, 1)
	useDisk(t, dial(t, uris[1]), 1<<20, 2)
	var tested admin.PeerTested
	a.decode(&tested, "peer", "test", b.listen)
	if !tested.Allowed || tested.Name != "host-b" || tested.You != "host-a" {
		t.Errorf("peer test: %+v", tested)
	}
	if out := a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h", "--keep", "last=3", "--limit", "800Mbit"); out != nil {
		t.Errorf("replica enable printed %q", out)
	}
	a.fails(statusRefused, "already", "replica", "enable", "web", "--to", b.listen)
	id := a.do("replica", "sync", "web")
	if len(id) != 1 || len(strings.Split(id[0], ".")) != 3 {
		t.Fatalf("replica sync printed %q", id)
	}
	b.sameAs("web", uris)
	var st admin.Replication
	a.decode(&st, "replica", "status", "web")
	if st.LastPoint == nil || st.LastPoint.ID.String() != id[0] || st.Peer != b.listen || st.Points != 1 {
		t.Errorf("replica status: %+v", st)
	}
	var all []admin.Replication
	b.decode(&all, "replica", "status")
	if len(all) != 1 || all[0].VM != "web" || all[0].Role != admin.RoleReplica {
		t.Errorf("replica status over there: %+v", all)
	}
	for _, args := range [][]string{
		{"vm", "list"}, {"vm", "show", "web"}, {"replica", "status"}, {"replica", "status", "web"}, {"point", "list", "web"}, {"peer", "list"},
	} {
		for _, h := range []*hostProcess{a, b} {
			if out := strings.Join(h.do(args...), "\n"); args[0] != "peer" && !strings.Contains(out, "web") && !strings.Contains(out, id[0]) {
				t.Errorf("%v printed %s", args, out)
			}
		}
	}

	served := start(t, "point", "serve", "web@latest/data", "-U", filepath.Join(b.dir, "p.sock"), "--admin", filepath.Join(b.dir, "state", "admin.sock"))
	if status, stdout, stderr := runCommand(t, "disk", "compare", served.line(), uris[1]); status != statusDone {
		t.Errorf("the point that is served: %s%s", stdout, stderr)
	}
	if status := served.end(syscall.SIGINT); status != statusDone {
		t.Errorf("point serve ended with status %d: %s", status, served.stderr.String())
	}
	testenv.Until(t, "its socket is gone", func() bool {
		_, err := os.Lstat(filepath.Join(b.dir, "p.sock"))
		return os.IsNotExist(err)
	})

	watch := start(t, "replica", "status", "web", "--watch", "--json", "--admin", filepath.Join(a.dir, "state", "admin.sock"))
	for range 2 {
		if err := json.Unmarshal([]byte(watch.line()), &st); err != nil || st.VM != "web" {
			t.Errorf("--watch: %+v, %v", st, err)
		}
	}
	if status := watch.end(syscall.SIGINT); status != statusDone {
		t.Errorf("--watch ended with status %d: %s", status, watch.stderr.String())
	}

	a.fails(statusRefused, "primary", "failover", "start", "web", "--unplanned")
	a.fails(statusRefused, "primary", "failover", "test", "web")
	b.fails(statusRefused, "replica", "replica", "sync", "web")
	a.fails(statusNotFound, "no VM none", "replica", "sync", "none")
	b.fails(statusNotFound, "9.9.9", "failover", "test", "web", "--point", "9.9.9")
	a.end()
	status, stdout, stderr := b.run("failover", "start", "web", "--unplanned")
	if status != statusDone || !strings.Contains(stderr, "first read after") {
		t.Fatalf("failover start: status %d: %s%s", status, stdout, stderr)
	}
	here := strings.Fields(stdout)
	if len(here) != 2 {
		t.Fatalf("failover start printed %q", stdout)
	}
	c := dial(t, here[0])
	useDisk(t, c, 4096, 9)
	b.fails(statusRefused, "in use", "failover", "cancel", "web")
	c.Close()
	branch := b.do("failover", "cancel", "web")
	if len(branch) != 1 || branch[0] == "" {
		t.Errorf("failover cancel printed %q", branch)
	}
	var points []admin.Point
	b.decode(&points, "point", "list", "web")
	if n := len(points); n != 2 || points[0].ID != id[0] || points[1].Kind != admin.KindBranch || points[1].ID != branch[0] {
		t.Errorf("point list: %+v", points)
	}
	b.do("point", "remove", "web@"+branch[0])
	b.do("failover", "start", "web", "--unplanned", "--point", id[0], "--no-verify")
	b.do("failover", "commit", "web")
	b.fails(statusRefused, "committed", "failover", "cancel", "web")
	b.end()
}

// TestServeOwned: what is a daemon's is nobody else's to write, also while the
// daemon does not run.
func TestServeOwned(t *testing.T) {
	a, b := twoHosts(t)
	a.add("web", 8<<20, "root")
	a.do("replica", "enable", "web", "--to", b.listen, "--every", "1h")
	a.do("replica", "sync", "web")
	image, other := filepath.Join(a.dir, "web-root.raw"), image(t, 8<<20)
	bases, err := filepath.Glob(filepath.Join(b.dir, "state", "replicas", "*", "disks", "root", "base.raw"))
	if err != nil || len(bases) != 1 {
		t.Fatal(bases, err)
	}
	for _, running := range []bool{true, false} {
		if !running {
			a.end()
			b.end()
		}
		for _, args := range [][]string{
			{"serve", image, "-U", image + ".sock"}, {"disk", "copy", other, image}, {"log", "replay", makeLog(t, "root"), "--onto", image},
			{"serve", bases[0], "-U", image + ".sock"}, {"serve", bases[0], "-U", image + ".sock", "--read-only"}, {"disk", "copy", other, bases[0]},
		} {
			status, _, stderr := runCommand(t, args...)
			if status != statusRefused || !strings.Contains(stderr, "VM web") || !strings.Contains(stderr, "hint: ") {
				t.Errorf("running %v: %q: status %d: %s", running, args, status, stderr)
			}
		}
	}
	p := start(t, "serve", image, "-U", image+".sock", "--read-only")
	if got, want := p.line(), uriOf(image+".sock", "web-root"); got != want {
		t.Errorf("read-only, while its daemon does not run: %s, want %s", got, want)
	}
	a.start() // which cannot have the image meanwhile
	var vm admin.VM
	a.decode(&vm, "vm", "show", "web")
	if !strings.Contains(vm.Error, "in use") {
		t.Errorf("a VM whose image is read: %+v", vm)
	}
	if status := p.end(syscall.SIGTERM); status != statusDone {
		t.Error(status, p.stderr.String())
	}
	testenv.Until(t, "the VM is served", func() bool {
		var vm admin.VM
		a.decode(&vm, "vm", "show", "web")
		return vm.Error == "" && vm.Disks[0].URI != ""
	})
	a.do("replica", "disable", "web")
	a.do("vm", "remove", "web")
	p = start(t, "serve", image, "-U", image+".sock")
	p.line()
	if status := p.end(syscall.SIGTERM); status != statusDone {
		t.Error(status, p.stderr.String())
	}
	if _, err := os.Stat(image + ".afterimage"); !os.IsNotExist(err) {
		t.Errorf("vm remove left something beside the image: %v", err)
	}
	a.end()
}
