// Package owner keeps the identity file beside an image: whose disk it is, and
// what it is to its owner, so that no opener writes to a disk that is replicated
// by another process, is a replica itself, or was handed to somebody else
// (RULES J4). QEMU's byte locks only tell who has an image open at the moment;
// this tells whose it is while nobody has.
//
// The file is IMAGE.afterimage/identity, where IMAGE is the image's real path,
// whatever symbolic links lead to it. It is one line: the CRC-32C of the rest in
// hexadecimal, a space, and an object in JSON with its own version.
//
// Only a file can have one. What lies beside a block device in /dev does not
// survive a boot, so a device is left without: Write and Remove do nothing, Read
// finds nothing, and the byte locks have to do.
//
// # Durable steps
//
// Write makes the file whole or not at all. A crash after step
//
//  1. directory made, its parent synced: leaves no identity, or the one before
//  2. identity.new written and synced: the same
//  3. renamed to identity, directory synced: leaves the new one
package owner

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Version is the version of the file. Any other is refused.
const Version = 1

const (
	besideSuffix = ".afterimage"
	fileName     = "identity"
	newSuffix    = ".new"
	// fileMax is the most bytes of the file that are read.
	fileMax = 64 << 10
)

// Role is what an image is to its owner.
type Role string

// The roles.
const (
	RolePrimary Role = "primary" // the disk of a VM that runs, or ran, here
	RoleReplica Role = "replica" // a base: only folding writes it
	RoleRun     Role = "run"     // the top of a failover
)

// Identity says whose image it is.
type Identity struct {
	VM    [16]byte // UUID
	Name  string   // of the VM
	Disk  string   // its name in the VM
	Role  Role
	Owner string // absolute path of the owner's state directory
	// Generation is the one that writes to it; 0 where none does.
	Generation uint64
}

// ErrDamaged says that there is an identity file that cannot be read. It is no
// leave to open the image.
var ErrDamaged = errors.New("the identity file is damaged")

// ErrVersion says that the file was written by another version.
var ErrVersion = errors.New("the identity file is of another version of afterimage")

// Path returns the path of the identity file of an image, which must exist, or
// "" if it can have none.
func Path(image string) (string, error) {
	path, err := filepath.EvalSymlinks(image)
	if err != nil {
		return "", err
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	st, err := os.Stat(path)
	if err != nil || !st.Mode().IsRegular() {
		return "", err
	}
	return filepath.Join(path+besideSuffix, fileName), nil
}

// Read returns the identity of an image, or nil if it has none.
func Read(image string) (*Identity, error) {
	path, err := Path(image)
	if err != nil {
		return nil, fmt.Errorf("whose image is %s: %w", image, err)
	}
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("whose image is %s: %w", image, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, fileMax+1))
	if err != nil {
		return nil, fmt.Errorf("whose image is %s: %w", image, err)
	}
	id, err := decode(b)
	if err != nil {
		return nil, &fileError{path, err}
	}
	return id, nil
}

// fileError is an identity file that says nothing.
type fileError struct {
	path string
	err  error
}

func (e *fileError) Error() string { return fmt.Sprintf("%s: %v", e.path, e.err) }
func (e *fileError) Unwrap() error { return e.err }
func (e *fileError) Hint() string {
	return "find out whose disk it is before you use it; if it is nobody's, remove the file"
}

// line is what stands in the file, in JSON.
type line struct {
	Version    int    `json:"version"`
	VM         string `json:"vm"`
	Name       string `json:"name"`
	Disk       string `json:"disk"`
	Role       Role   `json:"role"`
	Owner      string `json:"owner"`
	Generation uint64 `json:"generation,omitempty"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encode(id *Identity) ([]byte, error) {
	b, err := json.Marshal(line{
		Version: Version, VM: hex.EncodeToString(id.VM[:]), Name: id.Name, Disk: id.Disk,
		Role: id.Role, Owner: id.Owner, Generation: id.Generation,
	})
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(b, castagnoli), b), nil
}

func decode(b []byte) (*Identity, error) {
	s, ok := strings.CutSuffix(string(b), "\n")
	sum, text, two := strings.Cut(s, " ")
	if !ok || !two || len(b) > fileMax || sum != fmt.Sprintf("%08x", crc32.Checksum([]byte(text), castagnoli)) {
		return nil, ErrDamaged
	}
	var l line
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if l.Version != Version {
		return nil, fmt.Errorf("%w: version %d, this is %d", ErrVersion, l.Version, Version)
	}
	vm, err := hex.DecodeString(l.VM)
	if err != nil || len(vm) != 16 || check(l.Role, l.Owner) != nil {
		return nil, ErrDamaged
	}
	return &Identity{VM: [16]byte(vm), Name: l.Name, Disk: l.Disk, Role: l.Role, Owner: l.Owner, Generation: l.Generation}, nil
}

func check(role Role, owner string) error {
	if role != RolePrimary && role != RoleReplica && role != RoleRun {
		return fmt.Errorf("the role %q of an image is unknown", role)
	}
	if !filepath.IsAbs(owner) {
		return fmt.Errorf("the owner %q of an image is no absolute path", owner)
	}
	return nil
}

// Write makes the identity of an image durable, in place of the one it had. It
// asks nobody: Check first.
func Write(image string, id Identity) error {
	if err := write(image, &id); err != nil {
		return fmt.Errorf("write whose image %s is: %w", image, err)
	}
	return nil
}

func write(image string, id *Identity) error {
	if err := check(id.Role, id.Owner); err != nil {
		return err
	}
	path, err := Path(image)
	if err != nil || path == "" {
		return err
	}
	b, err := encode(id)
	if err != nil {
		return err
	}
	if len(b) > fileMax {
		return fmt.Errorf("%d bytes are too many", len(b))
	}
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// Also where it existed: whoever made it may not have come this far.
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := writeSynced(path+newSuffix, b); err != nil {
		_ = os.Remove(path + newSuffix)
		return err
	}
	if err := os.Rename(path+newSuffix, path); err != nil {
		_ = os.Remove(path + newSuffix)
		return err
	}
	return syncDir(dir)
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Remove removes the identity of an image, durably, and the directory it lies in
// if nothing else does. An image without one is left as it is.
func Remove(image string) error {
	path, err := Path(image)
	if err == nil && path != "" {
		err = remove(path)
	}
	if err != nil {
		return fmt.Errorf("remove whose image %s is: %w", image, err)
	}
	return nil
}

func remove(path string) error {
	dir := filepath.Dir(path)
	for _, p := range []string{path, path + newSuffix} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	switch err := syncDir(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	// Not empty: marks and latches of the image lie there too.
	if err := os.Remove(dir); err != nil {
		return nil
	}
	return syncDir(filepath.Dir(dir))
}

// An OwnedError says that an image is somebody's.
type OwnedError struct {
	Image string
	Identity
}

func (e *OwnedError) Error() string {
	switch e.Role {
	case RoleReplica:
		return fmt.Sprintf("%s is the replica of disk %s of VM %s, kept in %s", e.Image, e.Disk, e.Name, e.Owner)
	case RoleRun:
		return fmt.Sprintf("%s is what a failover of VM %s wrote to disk %s, kept in %s", e.Image, e.Name, e.Disk, e.Owner)
	}
	return fmt.Sprintf("%s is disk %s of VM %s, which the daemon with the state in %s serves", e.Image, e.Disk, e.Name, e.Owner)
}

// Hint says which daemon to turn to, and how.
func (e *OwnedError) Hint() string {
	if e.Role == RolePrimary {
		return fmt.Sprintf("open it through that daemon's export %s/%s, or take it away from the daemon first: afterimage vm remove %s", e.Name, e.Disk, e.Name)
	}
	return fmt.Sprintf("start a recovery point of it instead: afterimage failover test %s", e.Name)
}

// Check refuses an image that is not the owner's to write: with an *OwnedError
// if it is another's, or a replica, which is nobody's to write, and with what
// Read says where that cannot be told. The owner is the absolute path of a state
// directory; empty: of nobody.
func Check(image, owner string) error {
	id, err := Read(image)
	if err != nil {
		return err
	}
	if id == nil || id.Role != RoleReplica && owner != "" && id.Owner == filepath.Clean(owner) {
		return nil
	}
	return &OwnedError{image, *id}
}
