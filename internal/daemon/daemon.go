package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"afterimage/blockdev/nbd"
	"afterimage/internal/admin"
	"afterimage/internal/pki"
)

// Options say how a daemon runs. State is needed, the rest has defaults.
type Options struct {
	State    string // directory of all that the daemon keeps; made if it is not there
	Admin    string // path of the socket for commands; empty: State/admin.sock
	NBD      string // path of the socket for disks; empty: State/nbd.sock
	NBDGroup string // whose members may use it; empty: only the daemon's user
	Listen   string // HOST:PORT for peers; empty: nobody replicates to this host
	TLSDir   string // certificates; empty: State/tls
	Product  string // version of the product, for people
	Log      *slog.Logger

	// Retry is how long the daemon waits before it tries again to open what
	// could not be opened; 0: 5 seconds.
	Retry time.Duration
}

const (
	// retryEvery is the default of Options.Retry.
	retryEvery = 5 * time.Second
	// openPatience bounds how long Start waits for VMs that take their time:
	// one on a hung disk must not keep the others' commands waiting.
	openPatience = 10 * time.Second
	// claimPatience bounds how long a command waits for another one that is at
	// work on the same VM.
	claimPatience = 3 * time.Second
)

// A Daemon has VMs and replicas in its care. See the package's documentation for
// who owns what.
type Daemon struct {
	opt   Options
	log   *slog.Logger
	store Store
	certs certificates

	nbd *nbd.Server

	// ctx ends everything that runs by itself; work counts that.
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	admin, disks, peer door

	// mu guards what follows. It is held for moments, never across I/O.
	adding sync.Mutex // held while a storage is added

	mu       sync.Mutex
	claims   map[string]*claim // by name of a VM or a test
	vms      map[string]*vm    // by name: those this host is the primary of
	runs     map[string]*run   // by name of their exports
	peers    map[string]peerRecord
	storages map[string]*storage // by directory
	closed   bool
}

// Start opens everything and serves. Disks of VMs that could be opened can be
// opened by clients when it returns; what could not be is tried again. The order
// is that of the package's documentation. Errors are *admin.Error.
func Start(o Options) (*Daemon, error) {
	if err := o.setDefaults(); err != nil {
		return nil, refusal(err)
	}
	d := &Daemon{
		opt: o, log: o.Log, nbd: &nbd.Server{Log: o.Log},
		claims: map[string]*claim{}, vms: map[string]*vm{}, runs: map[string]*run{},
		peers: map[string]peerRecord{}, storages: map[string]*storage{},
	}
	d.certs.dir, d.certs.log = o.TLSDir, o.Log
	d.ctx, d.cancel = context.WithCancel(context.Background())
	if err := d.start(); err != nil {
		return nil, refusal(errors.Join(err, d.Close()))
	}
	return d, nil
}

func (o *Options) setDefaults() error {
	if o.State == "" {
		return &admin.Error{Status: admin.StatusUsage, Message: "the daemon needs a directory for its state", Advice: "name it with --state"}
	}
	var err error
	if o.State, err = filepath.Abs(o.State); err != nil {
		return err
	}
	for path, name := range map[*string]string{&o.Admin: "admin.sock", &o.NBD: "nbd.sock", &o.TLSDir: "tls"} {
		if *path == "" {
			*path = filepath.Join(o.State, name)
		} else if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Retry == 0 {
		o.Retry = retryEvery
	}
	return nil
}

func (d *Daemon) start() error {
	if err := os.MkdirAll(d.opt.State, 0o700); err != nil {
		return fmt.Errorf("the state directory: %w", err)
	}
	s, err := openBolt(d.opt.State)
	if err != nil {
		return err
	}
	d.store = s
	st, err := loadState(d.store)
	if err != nil {
		return err
	}
	// What can be refused is, before any image is touched.
	if err := d.listen(); err != nil {
		return err
	}
	d.openStorages(st)
	d.openVMs(st)
	d.serve()
	return nil
}

// Close ends the daemon: what has begun is finished, disks are made durable and
// their logs closed clean. It may be called again.
func (d *Daemon) Close() error {
	d.mu.Lock()
	closed := d.closed
	d.closed = true
	d.mu.Unlock()
	if closed {
		return nil
	}
	d.admin.close()
	d.peer.close()
	d.disks.close()
	d.cancel()
	d.work.Wait()
	errs := []error{d.closeVMs(), d.closeRuns(), d.closeStorages()}
	if d.store != nil {
		errs = append(errs, d.store.Close())
	}
	return errors.Join(errs...)
}

// Info says who this is.
func (d *Daemon) Info() admin.Daemon {
	info := admin.Daemon{Version: d.opt.Product, State: d.opt.State, Admin: d.opt.Admin, NBD: d.opt.NBD}
	if d.peer.ln != nil {
		info.Listen = d.peer.ln.Addr().String()
	}
	if files, err := d.certs.open(); err == nil {
		info.Name = files.Name()
	}
	return info
}

// claim takes a name for something that changes what stands behind it. Whoever
// comes meanwhile waits for a moment, and is then told what is under way: no
// command hangs because another waits for a disk or a peer.
func (d *Daemon) claim(ctx context.Context, name, what string) (release func(), err error) {
	late := time.NewTimer(claimPatience)
	defer late.Stop()
	for {
		d.mu.Lock()
		other := d.claims[name]
		if other == nil {
			c := &claim{what, make(chan struct{})}
			d.claims[name] = c
			d.mu.Unlock()
			return func() {
				d.mu.Lock()
				defer d.mu.Unlock()
				delete(d.claims, name)
				close(c.released)
			}, nil
		}
		d.mu.Unlock()
		select {
		case <-other.released:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-late.C:
			return nil, &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("%s is being %s", name, other.what), Advice: "try again when that is done"}
		}
	}
}

// A claim is what is under way with a name.
type claim struct {
	what     string
	released chan struct{}
}

// certificates are read when they are first needed, so that they may be made
// after the daemon was started.
type certificates struct {
	dir   string
	log   *slog.Logger
	mu    sync.Mutex // guards files
	files *pki.Files
}

func (c *certificates) open() (*pki.Files, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.files != nil {
		return c.files, nil
	}
	files, err := pki.Open(c.dir)
	if err != nil {
		return nil, err
	}
	files.Warn = c.log
	c.files = files
	return files, nil
}

// explain says what is wrong with the certificates, if that is why a peer could not
// be asked.
func (c *certificates) explain(err error) error {
	files, oerr := c.open()
	if oerr != nil {
		return err
	}
	return files.Explain(err)
}

// client is the configuration by which peers at a host are dialed. It can be made
// before there are certificates; then connecting fails, until there are.
func (c *certificates) client(host string) *tls.Config {
	return &tls.Config{
		ServerName: host, MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(i *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			files, err := c.open()
			if err != nil {
				return nil, err
			}
			return files.Client(host).GetClientCertificate(i)
		},
		// Package pki verifies, by the CAs of the moment.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			files, err := c.open()
			if err != nil {
				return err
			}
			return files.Client(host).VerifyConnection(cs)
		},
	}
}
