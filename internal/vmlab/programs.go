package vmlab

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"afterimage/internal/testenv"
)

// merged are directories that on most hosts are links into /usr by now. The
// guest has the same links: a program or a library is found by both paths.
var merged = []string{"/bin", "/sbin", "/lib", "/lib64"}

func (l *Lab) addPrograms(w image) error {
	if len(l.o.Programs) == 0 {
		return nil
	}
	for _, dir := range merged {
		target, err := os.Readlink(dir)
		if err != nil {
			continue // a directory of its own
		}
		if err := w.Symlink(dir, target); err != nil {
			return err
		}
		if err := w.Dir(filepath.Join("/", target)); err != nil {
			return err
		}
	}
	for _, name := range l.o.Programs {
		path := lookup(l.t, name)
		files, err := libraries(path)
		if err != nil {
			return fmt.Errorf("program %s: %w", name, err)
		}
		for _, f := range append(files, path) {
			if err := w.asHere(f); err != nil {
				return fmt.Errorf("program %s: %w", name, err)
			}
		}
	}
	return nil
}

// lookup finds a program of this host, also where only root has it in the path,
// or fails the test.
func lookup(t testing.TB, name string) string {
	t.Helper()
	if strings.Contains(name, "/") {
		return name
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return testenv.Need(t, name)
}

// asHere adds a file at the path it has here, less the links that lead to its
// directory: the guest has those of merged. The last part of the path stays, for
// many a program goes by the name it is called by.
func (w image) asHere(path string) error {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return err
	}
	inside := filepath.Join(dir, filepath.Base(path))
	if w.Has(inside) {
		return nil // another program needs it too
	}
	return w.tree(inside, path)
}

// libraries are the files without which a program does not start: none if it
// is static.
func libraries(program string) ([]string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return nil, nil
	}
	out, err := exec.Command("ldd", program).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w\n%s", program, err, bytes.TrimSpace(out))
	}
	return parseLdd(string(out))
}

// A line of ldd is one of
//
//	libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f…)
//	/lib64/ld-linux-x86-64.so.2 (0x00007f…)
//	linux-vdso.so.1 (0x00007f…)     part of the kernel
//	libgone.so.1 => not found
var lddLine = regexp.MustCompile(`^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$`)

func parseLdd(out string) ([]string, error) {
	var files []string
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		if strings.HasSuffix(line, "=> not found") {
			return nil, fmt.Errorf("a library is missing: %s", strings.TrimSpace(line))
		}
		if m := lddLine.FindStringSubmatch(line); m != nil {
			files = append(files, m[1])
		}
	}
	return files, nil
}
