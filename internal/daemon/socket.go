package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"afterimage/blockdev/nbd"
	"afterimage/internal/admin"
)

// listenAdmin listens for commands: the socket is its owner's alone (0600), and
// so must be its directory, which is made if it is not there.
func listenAdmin(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	st, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o022 != 0 && st.Mode()&fs.ModeSticky == 0 {
		return nil, &admin.Error{Status: admin.StatusRefused, Message: fmt.Sprintf("the directory of the admin socket %s may be written by others (mode %#o)", path, st.Mode().Perm()),
			Advice: "chmod 0700 " + dir + ", or name another place with --admin"}
	}
	return nbd.ListenUnix(path)
}

// listenNBD listens for the clients of disks. With a group, its members may
// connect: then they must be able to reach the socket, too.
//
// The socket is made for its owner alone and opened to the group afterwards: at
// no moment can more connect than should.
func listenNBD(path, group string) (net.Listener, error) {
	if group == "" {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		return nbd.ListenUnix(path)
	}
	gid, err := lookupGroup(group)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if err := reachable(filepath.Dir(path), gid); err != nil {
		return nil, err
	}
	ln, err := nbd.ListenUnix(path)
	if err != nil {
		return nil, err
	}
	if err = os.Chown(path, -1, gid); err == nil {
		err = os.Chmod(path, 0o660)
	}
	if err != nil {
		err = &admin.Error{Status: admin.StatusFailed, Message: fmt.Sprintf("give the NBD socket to group %s: %v", group, err),
			Advice: "run the daemon as root, or as a member of that group"}
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

func lookupGroup(group string) (int, error) {
	g, err := user.LookupGroup(group)
	if err != nil {
		if n, nerr := strconv.ParseUint(group, 10, 31); nerr == nil {
			return int(n), nil
		}
		return 0, &admin.Error{Status: admin.StatusUsage, Message: fmt.Sprintf("--nbd-group %s: %v", group, err), Advice: "name a group of this host (getent group), or its number"}
	}
	return strconv.Atoi(g.Gid)
}

// reachable says whether members of a group can get to what lies in a directory.
func reachable(dir string, gid int) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return err
	}
	for ; ; dir = filepath.Dir(dir) {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		if st.Mode&0o001 == 0 && (st.Mode&0o010 == 0 || int(st.Gid) != gid) {
			return &admin.Error{Status: admin.StatusUsage,
				Message: fmt.Sprintf("--nbd-group: the group cannot reach the NBD socket, for it may not enter %s (mode %#o)", dir, st.Mode&0o777),
				Advice:  "the state directory is its owner's alone: put the socket elsewhere, say --nbd /run/afterimage-nbd/nbd.sock"}
		}
		if dir == "/" {
			return nil
		}
	}
}
