package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"afterimage/hrl/replica"
	"afterimage/hrl/replica/server"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
	"afterimage/internal/pki"
)

// A storage is a directory with replicas, open or with the reason why not.
type storage struct {
	dir string

	mu    sync.Mutex // guards what follows; held for moments
	store *replica.Store
	err   error
}

func (s *storage) get() (*replica.Store, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.store, s.err
}

// openStorages opens what is recorded, and exports again the failovers and tests
// that stand. One that cannot be opened is tried again.
func (d *Daemon) openStorages(st *state) {
	d.peers = st.peers
	for _, dir := range st.storage {
		d.storages[dir] = &storage{dir: dir}
	}
	var tried sync.WaitGroup
	for _, dir := range st.storage {
		s := d.storages[dir] // nobody adds one before the daemon answers
		tried.Add(1)
		d.work.Go(func() { d.keepStorage(s, sync.OnceFunc(tried.Done)) })
	}
	waitSome(&tried, func() { d.log.Warn("some storage of replicas takes long to open; the rest is served meanwhile") })
}

// waitSome waits until all is tried, or the patience for it is used up.
func waitSome(tried *sync.WaitGroup, late func()) {
	all := make(chan struct{})
	go func() { tried.Wait(); close(all) }()
	select {
	case <-all:
	case <-time.After(openPatience):
		late()
	}
}

// keepStorage opens a storage, trying until it can or the daemon ends.
func (d *Daemon) keepStorage(s *storage, tried func()) {
	defer tried()
	for said := ""; ; {
		err := d.openStorage(s)
		tried()
		if err == nil {
			return
		}
		if err.Error() != said {
			said = err.Error()
			d.log.Error("the storage of replicas cannot be opened; it is tried again", "dir", s.dir, "err", err)
		}
		select {
		case <-d.ctx.Done():
			return
		case <-time.After(d.opt.Retry):
		}
	}
}

// openStorage opens a storage and serves what stands in it.
func (d *Daemon) openStorage(s *storage) error {
	store, err := replica.Open(s.dir, replica.Options{Warn: d.log})
	s.mu.Lock()
	s.store, s.err = store, err
	s.mu.Unlock()
	if err != nil {
		return err
	}
	for _, v := range store.VMs() {
		if v.Broken() != nil {
			continue // the store has said why
		}
		for _, r := range v.Runs() {
			d.resumeRun(v, r)
		}
	}
	return nil
}

func (d *Daemon) closeStorages() error {
	var errs []error
	for _, dir := range sortedKeys(d.storages) {
		if store, _ := d.storages[dir].get(); store != nil {
			errs = append(errs, store.Close())
		}
	}
	return errors.Join(errs...)
}

// stores are the open storages, by directory.
func (d *Daemon) stores() []*replica.Store {
	d.mu.Lock()
	var all []*storage
	for _, dir := range sortedKeys(d.storages) {
		all = append(all, d.storages[dir])
	}
	d.mu.Unlock()
	var stores []*replica.Store
	for _, s := range all {
		if store, err := s.get(); err == nil && store != nil {
			stores = append(stores, store)
		}
	}
	return stores
}

// replicaNamed finds a replica by the VM's name.
func (d *Daemon) replicaNamed(name string) (*replica.VM, error) {
	for _, s := range d.stores() {
		if v, err := s.Named(name); err == nil || !errors.Is(err, replica.ErrNoVM) {
			return v, err
		}
	}
	return nil, noVM(name)
}

// replicaWithID finds a replica by the VM's UUID.
func (d *Daemon) replicaWithID(id wire.VMID) (*replica.VM, error) {
	for _, s := range d.stores() {
		if v, err := s.VM(id); err == nil || !errors.Is(err, replica.ErrNoVM) {
			return v, err
		}
	}
	return nil, fmt.Errorf("VM %v: %w", id, replica.ErrNoVM)
}

// allowPeer lets hosts replicate here. A crash after step
//
//  1. directory made: leaves it, empty
//  2. rule and storage kept: leaves both
func (d *Daemon) allowPeer(a admin.AllowPeer) (admin.Peer, error) {
	if err := checkPattern(a.Pattern); err != nil {
		return admin.Peer{}, err
	}
	switch {
	case a.Quota < 0:
		return admin.Peer{}, usagef("a quota of %d bytes", a.Quota)
	case a.Storage == "":
		a.Storage = filepath.Join(d.opt.State, "replicas")
	case !filepath.IsAbs(a.Storage):
		return admin.Peer{}, usagef("storage %s: its path must be absolute", a.Storage)
	}
	a.Storage = filepath.Clean(a.Storage)
	rec := peerRecord{Pattern: a.Pattern, Storage: a.Storage, Quota: a.Quota, Allowed: time.Now().UTC().Truncate(time.Second)}
	s, err := d.addStorage(rec.Storage)
	if err != nil {
		return admin.Peer{}, err
	}
	rule, err := put(keyPeer+rec.Pattern, rec)
	if err != nil {
		return admin.Peer{}, err
	}
	place, err := put(keyStorage+rec.Storage, storageRecord{rec.Storage})
	if err != nil {
		return admin.Peer{}, err
	}
	if err := d.store.Apply(rule, place); err != nil {
		return admin.Peer{}, err
	}
	d.mu.Lock()
	d.peers[rec.Pattern] = rec
	d.storages[rec.Storage] = s
	d.mu.Unlock()
	return d.peerInfo(rec), nil
}

// addStorage opens a storage that may be new.
func (d *Daemon) addStorage(dir string) (*storage, error) {
	d.adding.Lock() // or two would open it
	defer d.adding.Unlock()
	d.mu.Lock()
	s := d.storages[dir]
	d.mu.Unlock()
	if s != nil {
		_, err := s.get()
		return s, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("storage: %w", err)
	}
	s = &storage{dir: dir}
	if err := d.openStorage(s); err != nil {
		return nil, fmt.Errorf("storage: %w", err)
	}
	return s, nil
}

// checkPattern refuses patterns that no certificate's name can match.
func checkPattern(p string) error {
	if p == "" || len(p) > wire.NameMax {
		return usagef("the pattern of a peer's name has 1 to %d bytes", wire.NameMax)
	}
	for _, r := range p {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-:*?", r) {
			return &admin.Error{Status: admin.StatusUsage, Message: fmt.Sprintf("%q is no pattern of a host's name", p),
				Advice: "write the first name of its certificate; * stands for any characters, ? for one"}
		}
	}
	return nil
}

// matches reports whether a pattern covers a host. The names have no slashes.
func matches(pattern, identity string) bool {
	ok, err := path.Match(pattern, identity)
	return err == nil && ok
}

// rule is the rule for a host: the one with its very name, else the longest
// pattern that matches.
func (d *Daemon) rule(identity string) (peerRecord, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if rec, ok := d.peers[identity]; ok {
		return rec, true
	}
	var best peerRecord
	found := false
	for _, pattern := range sortedKeys(d.peers) {
		if matches(pattern, identity) && (!found || len(pattern) > len(best.Pattern)) {
			best, found = d.peers[pattern], true
		}
	}
	return best, found
}

// removePeer no longer lets hosts replicate here. What they have stored stays.
func (d *Daemon) removePeer(pattern string) error {
	d.mu.Lock()
	_, found := d.peers[pattern]
	d.mu.Unlock()
	if !found {
		return &admin.Error{Status: admin.StatusNotFound, Message: fmt.Sprintf("no peer is allowed by the pattern %q", pattern),
			Advice: "`afterimage peer list` shows the patterns"}
	}
	if err := d.store.Apply(Change{keyPeer + pattern, nil}); err != nil {
		return err
	}
	d.mu.Lock()
	delete(d.peers, pattern)
	d.mu.Unlock()
	return nil
}

func (d *Daemon) peerList() []admin.Peer {
	d.mu.Lock()
	var recs []peerRecord
	for _, pattern := range sortedKeys(d.peers) {
		recs = append(recs, d.peers[pattern])
	}
	d.mu.Unlock()
	list := []admin.Peer{}
	for _, rec := range recs {
		list = append(list, d.peerInfo(rec))
	}
	return list
}

func (d *Daemon) peerInfo(rec peerRecord) admin.Peer {
	info := admin.Peer{Pattern: rec.Pattern, Storage: rec.Storage, Quota: rec.Quota, VMs: []string{}}
	d.mu.Lock()
	s := d.storages[rec.Storage]
	d.mu.Unlock()
	if s != nil {
		if _, err := s.get(); err != nil {
			info.Error = err.Error()
		}
	}
	for _, store := range d.stores() {
		for _, v := range store.VMs() {
			if r, ok := d.rule(v.Sender()); ok && r.Pattern == rec.Pattern {
				info.VMs = append(info.VMs, v.Name())
			}
		}
	}
	return info
}

// testPeer asks a peer whether this host may replicate to it.
func (d *Daemon) testPeer(ctx context.Context, address string) (admin.PeerTested, error) {
	if _, err := d.certs.open(); err != nil {
		return admin.PeerTested{}, err
	}
	client, err := d.dial(address)
	if err != nil {
		return admin.PeerTested{}, err
	}
	defer client.Close()
	h, err := client.Hello(ctx)
	if err != nil {
		return admin.PeerTested{}, err
	}
	return admin.PeerTested{Name: h.Name, You: h.You, Product: h.Product, Allowed: h.Allowed}, nil
}

// dial makes a client for a peer; nothing is asked yet.
func (d *Daemon) dial(address string) (*ship.Client, error) {
	host, err := checkAddress(address)
	if err != nil {
		return nil, err
	}
	client := ship.Dial(address, d.certs.client(host))
	client.ExplainBy(d.certs.explain)
	return client, nil
}

// checkAddress returns the host of HOST:PORT.
func checkAddress(address string) (host string, err error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" {
		return "", &admin.Error{Status: admin.StatusUsage, Message: fmt.Sprintf("%q is no HOST:PORT", address), Advice: "write it as host2.example.com:10810"}
	}
	return host, nil
}

// servePeers answers the hosts that replicate here.
func (d *Daemon) servePeers(ctx context.Context, ln net.Listener) error {
	files, err := d.certs.open()
	if err != nil {
		return err
	}
	s := server.New(server.Options{
		Identity: pki.Identity, Name: files.Name(), Product: d.opt.Product, Warn: d.log,
		Allow: func(identity string) (server.Grant, error) {
			rec, ok := d.rule(identity)
			if !ok {
				return server.Grant{}, server.ErrNotAllowed
			}
			return server.Grant{Store: granted{d, rec}, Quota: rec.Quota}, nil
		},
	})
	return s.Serve(ctx, ln, files.Server())
}

// granted is the storage of a rule: VMs that are stored elsewhere stay there.
type granted struct {
	d   *Daemon
	rec peerRecord
}

// VM implements server.Store.
func (g granted) VM(id wire.VMID) (server.VM, error) {
	v, err := g.d.replicaWithID(id)
	if err != nil {
		return nil, err
	}
	return v, nil
}

// Accept implements server.Store.
func (g granted) Accept(id wire.VMID, o wire.Offer, sender string, quota int64) (server.VM, error) {
	for _, s := range g.d.stores() {
		if _, err := s.VM(id); err == nil {
			return server.Of(s).Accept(id, o, sender, quota)
		}
	}
	if err := wire.CheckName("VM", o.Name); err != nil {
		return nil, &wire.Error{Code: wire.CodeMalformed, Message: err.Error()}
	}
	ctx, cancel := context.WithTimeout(g.d.ctx, claimPatience)
	defer cancel()
	release, err := g.d.claim(ctx, o.Name, "received for the first time")
	if err != nil {
		return nil, &wire.Error{Code: wire.CodeBusy, Message: err.Error()}
	}
	defer release()
	if err := g.d.nameFree(o.Name); err != nil {
		return nil, &wire.Error{Code: wire.CodeExists, Message: err.Error(), Advice: "give one of the two another name"}
	}
	if own := g.d.vmWithID(id); own != "" {
		return nil, &wire.Error{Code: wire.CodeRole, Message: fmt.Sprintf("this host is itself the primary of VM %s (%v)", own, id), Advice: "replicate it to another host"}
	}
	g.d.mu.Lock()
	s := g.d.storages[g.rec.Storage]
	g.d.mu.Unlock()
	store, err := s.get()
	if err != nil {
		return nil, err
	}
	return server.Of(store).Accept(id, o, sender, quota)
}
