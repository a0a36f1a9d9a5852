package nbd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"afterimage/blockdev"
	"afterimage/internal/testenv"
)

// run runs a program that must succeed, and returns what it said.
func run(t testing.TB, program string, args ...string) string {
	t.Helper()
	out, err := try(t, program, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return out
}

func try(t testing.TB, program string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), testenv.Need(t, program), args...)
	cmd.Dir = t.TempDir() // fio leaves files behind
	// nbdsh needs the Python that its module was made for.
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func uriOf(socket, export string) string { return "nbd+unix:///" + export + "?socket=" + socket }

// image makes an image file and a Queue over it.
func image(t testing.TB, size int64) (string, blockdev.Queue) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := blockdev.CreateFile(path, size); err != nil {
		t.Fatal(err)
	}
	f, err := blockdev.OpenFile(path, blockdev.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return path, blockdev.NewPool(f, 8)
}

func TestRealNbdinfo(t *testing.T) {
	s := quiet()
	add(t, s, Export{Name: "disk", Description: "a disk", Queue: memPool(3 << 20)})
	add(t, s, Export{Name: "fixed", Queue: memPool(5 << 20), ReadOnly: true})
	add(t, s, Export{Name: "", Queue: memPool(1 << 20), Unlisted: true})
	socket := serve(t, s)

	for export, size := range map[string]string{"disk": "3145728", "fixed": "5242880", "": "1048576"} {
		if got := strings.TrimSpace(run(t, "nbdinfo", "--size", uriOf(socket, export))); got != size {
			t.Errorf("size of %q: %s, want %s", export, got, size)
		}
	}
	for _, c := range []struct {
		export, can string
		want        int // nbdinfo: 0 yes, 2 no
	}{
		{"disk", "connect", 0}, {"disk", "flush", 0}, {"disk", "fua", 0}, {"disk", "trim", 0}, {"disk", "zero", 0},
		{"disk", "fast-zero", 0}, {"disk", "multi-conn", 0}, {"disk", "write", 0}, {"disk", "cache", 2}, {"disk", "df", 2},
		{"fixed", "write", 2}, {"fixed", "flush", 0}, {"fixed", "trim", 2}, {"fixed", "zero", 2}, {"fixed", "multi-conn", 0},
	} {
		out, err := try(t, "nbdinfo", "--can", c.can, uriOf(socket, c.export))
		code := 0
		if e, ok := err.(*exec.ExitError); ok {
			code = e.ExitCode()
		}
		if code != c.want {
			t.Errorf("nbdinfo --can %s %s: exit status %d, want %d\n%s", c.can, c.export, code, c.want, out)
		}
	}
	list := run(t, "nbdinfo", "--list", uriOf(socket, ""))
	if !strings.Contains(list, `export="disk"`) || !strings.Contains(list, "a disk") || !strings.Contains(list, `export="fixed"`) || strings.Contains(list, `export=""`) {
		t.Errorf("nbdinfo --list:\n%s", list)
	}
	info := run(t, "nbdinfo", uriOf(socket, "disk"))
	for _, want := range []string{"protocol: newstyle-fixed without TLS, using simple packets", "block_size_minimum: 1\n", "block_size_preferred: 4096\n", "block_size_maximum: 67108864\n"} {
		if !strings.Contains(info, want) {
			t.Errorf("nbdinfo lacks %q:\n%s", want, info)
		}
	}
	if out, err := try(t, "nbdinfo", uriOf(socket, "none")); err == nil {
		t.Errorf("nbdinfo of an unknown export:\n%s", out)
	}
}

func TestRealQemuIO(t *testing.T) {
	path, q := image(t, 8<<20)
	s := quiet()
	add(t, s, Export{Name: "disk", Queue: q})
	socket := serve(t, s)
	u := uriOf(socket, "disk")
	run(t, "qemu-io", "-f", "raw",
		"-c", "write -P 0xaa 0 1M", "-c", "write -f -P 0xbb 1M 4k", "-c", "read -P 0xaa 0 1M", "-c", "write -z 64k 64k",
		"-c", "read -P 0 64k 64k", "-c", "write -z -u 0 64k", "-c", "read -P 0 0 64k", "-c", "read -P 0xaa 128k 896k",
		"-c", "read -P 0xbb 1M 4k", "-c", "discard 2M 1M", "-c", "write -P 0xcc 8191k 1k", "-c", "flush",
		"-c", "aio_write -P 0xdd 3M 3M", "-c", "aio_flush", "-c", "read -P 0xdd 3M 3M", "-c", "map", u)
	run(t, "qemu-img", "info", u)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for off, want := range map[int]byte{0: 0, 128 << 10: 0xaa, 1 << 20: 0xbb, 3 << 20: 0xdd, 8<<20 - 1: 0xcc} {
		if b[off] != want {
			t.Errorf("byte %d of the image is %#x, want %#x", off, b[off], want)
		}
	}
	run(t, "qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", u, path)
}

func TestRealFioVerify(t *testing.T) {
	s := quiet()
	_, q := image(t, 64<<20)
	add(t, s, Export{Name: "disk", Queue: q})
	socket := serve(t, s)
	run(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uriOf(socket, "disk"), "--rw=randwrite", "--bsrange=512-128k",
		"--blockalign=512", "--iodepth=16", "--size=32M", "--io_size=64M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1")
	run(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uriOf(socket, "disk"), "--rw=randwrite", "--bs=4k", "--numjobs=4",
		"--iodepth=32", "--size=8M", "--offset_increment=16M", "--fsync=8", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1")
}

// TestRealNbdcopy sends random data through us and back; the oracle knows every
// byte of it.
func TestRealNbdcopy(t *testing.T) {
	oracle := tempSocket(t)
	startNbdkit(t, oracle, "sparse-random", "size=200M", "seed=1", "percent=30")
	s := quiet()
	_, q := image(t, 200<<20)
	add(t, s, Export{Name: "disk", Queue: q})
	socket := serve(t, s)
	nbdcopy(t, uriOf(oracle, ""), uriOf(socket, "disk"), "--flush")
	nbdcopy(t, uriOf(socket, "disk"), uriOf(oracle, ""))
	// Requests as large as any client makes, and as small as they get.
	nbdcopy(t, uriOf(oracle, ""), uriOf(socket, "disk"), "--request-size=33554432")
	nbdcopy(t, uriOf(socket, "disk"), uriOf(oracle, ""), "--request-size=4096", "--connections=4")

	// The oracle is one: a wrong byte is found.
	if err := blockdev.Do1(devOf(q), &blockdev.Request{Op: blockdev.OpWrite, Off: 12345, Len: 1, Buf: []byte{1}}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "out.raw")
	run(t, "nbdcopy", uriOf(socket, "disk"), file)
	if out, err := try(t, "nbdcopy", file, uriOf(oracle, "")); err == nil {
		t.Errorf("a wrong byte went unnoticed:\n%s", out)
	}
}

// nbdcopy copies between two servers by way of a file. From one to the other
// directly the nbdcopy of libnbd 1.14 fails at times by itself, whoever serves:
// what it does with one connection outdates what it was told of the other.
func nbdcopy(t testing.TB, from, to string, options ...string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "between.raw")
	run(t, "nbdcopy", append(options, from, file)...)
	run(t, "nbdcopy", append(options, file, to)...)
}

// TestRealNbdsh does what the other clients do not: requests of 50 MB, a thousand
// at once, lengths of zero, what was not offered.
func TestRealNbdsh(t *testing.T) {
	s := quiet()
	add(t, s, Export{Name: "disk", Description: "a disk", Queue: memPool(128 << 20)})
	add(t, s, Export{Name: "fixed", Queue: memPool(1 << 20), ReadOnly: true})
	socket := serve(t, s)
	script := `
import errno, os
def fails(want, f, *args, **kw):
    try: f(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == want, (e.errnum, want, f)
    else: raise AssertionError((f, args))
h.set_strict_mode(0)
h.set_export_name("disk")
h.set_opt_mode(True)
h.connect_unix(sock)
names = []
h.opt_list(lambda name, desc: names.append((name, desc)))
assert names == [("disk", "a disk"), ("fixed", "")], names
h.set_export_name("none")
fails(errno.ENOENT, h.opt_go)
h.set_export_name("fixed")
h.opt_info()
assert h.get_size() == 1 << 20 and h.is_read_only()
h.set_export_name("disk")
h.opt_go()
assert h.get_size() == 128 << 20 and not h.is_read_only()
assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero() and h.can_multi_conn()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 64 << 20
b = os.urandom(0x2f8e400)
h.pwrite(b, 12345, nbd.CMD_FLAG_FUA)
assert h.pread(len(b), 12345) == b
big = os.urandom(64 << 20)
h.pwrite(big, 64 << 20)
assert h.pread(64 << 20, 64 << 20) == big
h.zero(1 << 20, 12345, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1 << 20, 12345) == bytes(1 << 20)
h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
h.trim(1 << 20, 1 << 20)
h.flush()
fails(errno.EINVAL, h.pread, 512, 128 << 20)
fails(errno.EINVAL, h.pread, 2, (128 << 20) - 1)
fails(errno.ENOSPC, h.pwrite, b"12", (128 << 20) - 1)
fails(errno.ENOSPC, h.zero, 2, (128 << 20) - 1)
fails(errno.EINVAL, h.trim, 2, (128 << 20) - 1)
fails(errno.EINVAL, h.cache, 512, 0)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
h.pwrite(b"", 0)
h.trim(0, 0)
cookies = {}
for i in range(3000):
    buf = nbd.Buffer.from_bytearray(bytearray([i & 255]) * 4096)
    cookies[h.aio_pwrite(buf, i * 4096)] = buf
while cookies:
    h.poll(-1)
    for c in list(cookies):
        if h.aio_command_completed(c): del cookies[c]
for i in range(0, 3000, 97): assert h.pread(4096, i * 4096) == bytes([i & 255]) * 4096
h.shutdown()
f = nbd.NBD()
f.set_strict_mode(0)
f.set_export_name("fixed")
f.connect_unix(sock)
fails(errno.EPERM, f.pwrite, b"x", 0)
fails(errno.EPERM, f.trim, 512, 0)
fails(errno.EPERM, f.zero, 512, 0)
f.flush()
f.shutdown()
`
	run(t, "nbdsh", "-c", "sock = '"+socket+"'", "-c", script)
}

// TestRealNbdkitInFront puts other people's filters between a client and us.
func TestRealNbdkitInFront(t *testing.T) {
	s := quiet()
	_, q := image(t, 64<<20)
	add(t, s, Export{Name: "disk", Queue: q})
	socket := serve(t, s)
	front := tempSocket(t)
	startNbdkit(t, front, "--filter=blocksize", "--filter=cow", "nbd", "uri="+uriOf(socket, "disk"), "maxlen=4K")
	oracle := tempSocket(t)
	startNbdkit(t, oracle, "sparse-random", "size=64M", "seed=3", "percent=20")
	nbdcopy(t, uriOf(oracle, ""), uriOf(front, ""), "--flush")
	nbdcopy(t, uriOf(front, ""), uriOf(oracle, ""))
	direct := tempSocket(t)
	startNbdkit(t, direct, "--filter=retry", "--filter=fua", "nbd", "uri="+uriOf(socket, "disk"), "fuamode=force")
	nbdcopy(t, uriOf(oracle, ""), uriOf(direct, ""))
	nbdcopy(t, uriOf(direct, ""), uriOf(oracle, ""))
}
