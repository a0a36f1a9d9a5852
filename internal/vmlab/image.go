package vmlab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"

	"afterimage/internal/vmlab/cpio"
	"afterimage/internal/vmlab/modules"
	"afterimage/internal/vmlab/wire"
)

// baseModules carry the lab's own port, and the drives.
var baseModules = []string{"virtio_pci", "virtio_console", "virtio_blk"}

// moduleDir is where the modules lie in the guest.
const moduleDir = "/vmlab/modules"

// image is a guest's first file system while it is written. It is not
// compressed: the guest would take longer to unpack it than QEMU to load it.
type image struct{ *cpio.Writer }

func (l *Lab) writeImage(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := bufio.NewWriterSize(f, 1<<20)
	w := image{cpio.NewWriter(buf)}
	for _, step := range []func(image) error{
		l.addBase, l.addModules, l.addPrograms, l.addTests, l.addFiles,
		func(w image) error { return w.Close() },
	} {
		if err := step(w); err != nil {
			return err
		}
	}
	return errors.Join(buf.Flush(), f.Close())
}

// initProgram builds the guest's first process, once for all labs of a test
// program: its linking takes a second.
var initProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmlab-init-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "init")
	if err := goBuild("build", "-ldflags=-s -w", "-o", bin, "afterimage/internal/vmlab/init"); err != nil {
		return nil, err
	}
	return os.ReadFile(bin)
})

// goBuild runs the go command so that what it makes needs no library.
func goBuild(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, bytes.TrimSpace(out))
	}
	return nil
}

// addBase adds the init program and what it needs before anything is mounted.
func (l *Lab) addBase(w image) error {
	program, err := initProgram()
	if err != nil {
		return err
	}
	if err := w.File("/init", 0o755, program); err != nil {
		return err
	}
	// The kernel opens it for the first process, and nothing of /dev is there yet.
	return w.CharDevice("/dev/console", 0o600, 5, 1)
}

// addModules adds the modules, and the list by which the guest loads them.
func (l *Lab) addModules(w image) error {
	tree, err := modules.Open(l.kernel.Modules)
	if err != nil {
		return err
	}
	mods, err := tree.Resolve(slices.Concat(baseModules, l.o.Modules)...)
	if err != nil {
		return err
	}
	var c wire.Config
	for _, m := range mods {
		content, err := os.ReadFile(filepath.Join(tree.Root, m.Path))
		if err != nil {
			return err
		}
		inside := moduleDir + "/" + m.Name + ".ko"
		if err := w.File(inside, 0o644, content); err != nil {
			return err
		}
		c.Modules = append(c.Modules, wire.Module{Path: inside, Params: m.Params, Optional: m.Optional})
	}
	for _, d := range l.o.Drives {
		c.Drives = append(c.Drives, d.Name)
	}
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return w.File(wire.ConfigPath, 0o644, text)
}

func (l *Lab) addFiles(w image) error {
	for _, inside := range slices.Sorted(maps.Keys(l.o.Files)) {
		if err := w.tree(inside, l.o.Files[inside]); err != nil {
			return fmt.Errorf("file %s: %w", inside, err)
		}
	}
	return nil
}

// tree adds a file of this host, or a directory with all that is in it. Links
// are followed.
func (w image) tree(inside, from string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		name := filepath.Join(inside, rel)
		st, err := os.Stat(path)
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return w.Dir(name)
		case !st.Mode().IsRegular():
			return fmt.Errorf("%s is neither a file nor a directory", path)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return w.File(name, uint32(st.Mode().Perm()), content)
	})
}
