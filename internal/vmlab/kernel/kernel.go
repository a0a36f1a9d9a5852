// Package kernel keeps Debian's stock kernel in a directory of the user's, for
// the VM lab to boot: unpacked, never installed.
//
//	kernel.go   where it is
//	fetch.go    from Debian's package into the directory, once, by `make deps`
//	bzimage.go  the kernel out of its own unpacker, which takes a guest 3 seconds
//
// The directory is $AFTERIMAGE_VMLAB, or else afterimage/vmlab in the user's
// cache directory ($XDG_CACHE_HOME, ~/.cache). Each kernel in it has a
// directory, named for its version, that appears with all it has:
//
//	VERSION/kernel                what QEMU boots
//	VERSION/lib/modules/VERSION/  its modules, with what depmod says of them
package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// DirVariable is the environment variable that names the directory.
const DirVariable = "AFTERIMAGE_VMLAB"

// Dir is where kernels are kept.
func Dir() (string, error) {
	if dir := os.Getenv(DirVariable); dir != "" {
		return dir, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("where kernels are kept: %w (or set %s)", err, DirVariable)
	}
	return filepath.Join(cache, "afterimage", "vmlab"), nil
}

// A Kernel is one that lies ready.
type Kernel struct {
	Version string // as uname -r has it
	Image   string // the file to boot
	Modules string // lib/modules/VERSION
}

// ErrNone says that there is no kernel yet.
var ErrNone = errors.New("no kernel for the VM lab: run `make deps`, which fetches Debian's")

// Find returns the kernel of a directory. Of several it takes the one that was
// fetched last.
func Find(dir string) (Kernel, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Kernel{}, fmt.Errorf("look for a kernel: %w", err)
	}
	var found Kernel
	var newest int64
	for _, e := range entries {
		k := at(filepath.Join(dir, e.Name()), e.Name())
		st, err := os.Stat(k.Image)
		if err != nil {
			continue // not one of ours, or still being unpacked
		}
		if when := st.ModTime().UnixNano(); found.Version == "" || when > newest {
			found, newest = k, when
		}
	}
	if found.Version == "" {
		return Kernel{}, fmt.Errorf("%w (looked in %s)", ErrNone, dir)
	}
	return found, nil
}

func at(dir, version string) Kernel {
	return Kernel{
		Version: version,
		Image:   filepath.Join(dir, "kernel"),
		Modules: filepath.Join(dir, "lib", "modules", version),
	}
}
