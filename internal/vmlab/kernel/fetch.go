package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// metaPackage always names the newest kernel of this Debian. The smaller
// linux-image-cloud-amd64 has neither Fibre Channel nor most of the rest.
const metaPackage = "linux-image-amd64"

// unpacking is the prefix of a directory in which a Fetch works. A Find takes
// none for a kernel: whatever is in it lies deeper.
const unpacking = ".unpacking-"

// Fetch downloads Debian's kernel and unpacks it into dir, unless there is one.
// It needs no root, but apt's lists must be fresh. It leaves behind, if it is
// killed, a directory that is not taken for a kernel.
func Fetch(ctx context.Context, dir string) (Kernel, error) {
	if k, err := Find(dir); !errors.Is(err, ErrNone) {
		return k, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Kernel{}, fmt.Errorf("where kernels are kept: %w", err)
	}
	tmp, err := os.MkdirTemp(dir, unpacking)
	if err != nil {
		return Kernel{}, err
	}
	defer os.RemoveAll(tmp)
	deb, err := download(ctx, tmp)
	if err != nil {
		return Kernel{}, err
	}
	return unpack(ctx, deb, tmp, dir)
}

// download gets the package that metaPackage depends on.
func download(ctx context.Context, to string) (string, error) {
	out, err := run(ctx, to, "apt-cache", "depends", "--important", metaPackage)
	if err != nil {
		return "", err
	}
	m := regexp.MustCompile(`(?m)^\s*Depends: (linux-image-\d\S*)$`).FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("apt knows of no kernel: %s depends on nothing that is one; run apt-get update", metaPackage)
	}
	if _, err := run(ctx, to, "apt-get", "download", "-q", string(m[1])); err != nil {
		return "", fmt.Errorf("%w\n(if apt's lists are old, run apt-get update)", err)
	}
	debs, err := filepath.Glob(filepath.Join(to, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("apt-get download %s has left %d packages (%v)", m[1], len(debs), err)
	}
	return debs[0], nil
}

// unpack makes of a package, within tmp, a directory as the package's
// documentation has it, and moves it into dir under the kernel's version: at one
// stroke, so that a Find beside it sees all of it or nothing.
func unpack(ctx context.Context, deb, tmp, dir string) (Kernel, error) {
	root := filepath.Join(tmp, "root")
	if _, err := run(ctx, tmp, "dpkg-deb", "-x", deb, root); err != nil {
		return Kernel{}, err
	}
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return Kernel{}, fmt.Errorf("%s has %d kernels in /boot (%v)", filepath.Base(deb), len(images), err)
	}
	version := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	k := at(filepath.Join(tmp, "done"), version)
	if err := os.MkdirAll(filepath.Dir(k.Modules), 0o755); err != nil {
		return Kernel{}, err
	}
	from := filepath.Join(root, "lib", "modules", version)
	if _, err := os.Stat(from); err != nil { // newer Debians have all of /lib there
		from = filepath.Join(root, "usr", "lib", "modules", version)
	}
	if err := os.Rename(from, k.Modules); err != nil {
		return Kernel{}, fmt.Errorf("the modules of %s: %w", filepath.Base(deb), err)
	}
	// Newer Debians compress each module. A guest would have to unpack them.
	if _, err := run(ctx, tmp, "find", k.Modules, "-name", "*.ko.xz", "-exec", "xz", "-d", "--", "{}", "+"); err != nil {
		return Kernel{}, err
	}
	if _, err := run(ctx, tmp, "/sbin/depmod", "-b", filepath.Join(tmp, "done"), version); err != nil {
		return Kernel{}, err
	}
	packed, err := os.ReadFile(images[0])
	if err != nil {
		return Kernel{}, err
	}
	image, err := bare(ctx, packed)
	if err != nil {
		return Kernel{}, fmt.Errorf("unpack %s: %w", filepath.Base(images[0]), err)
	}
	if err := os.WriteFile(k.Image, image, 0o644); err != nil {
		return Kernel{}, err
	}
	if err := os.Rename(filepath.Join(tmp, "done"), filepath.Join(dir, version)); err != nil {
		if k, err := Find(dir); err == nil {
			return k, nil // another Fetch was quicker
		}
		return Kernel{}, err
	}
	return at(filepath.Join(dir, version), version), nil
}

// run runs a program in a directory and returns what it has printed. An error
// has what it said about itself.
func run(ctx context.Context, dir, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, bytes.TrimSpace(said.Bytes()))
	}
	return out, nil
}
