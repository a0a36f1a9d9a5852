package vmlab

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/internal/vmlab/testdata/inside"
)

const insidePackage = "./testdata/inside"

// formatted makes a raw file with an empty ext4.
func formatted(t *testing.T) string { return formattedOf(t, 128<<20) }

func formattedOf(t *testing.T, size int64) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "data.raw")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(lookup(t, "mkfs.ext4"), "-q", "-F", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return image
}

// cutUnderLoad boots, runs the tests named, waits until some files were made
// durable, cuts the power and looks for them.
func cutUnderLoad(t *testing.T, lab *Lab, first ...string) (after *VM) {
	t.Helper()
	vm := lab.Boot()
	for _, test := range first {
		vm.Test(t, insidePackage, test)
	}
	p := vm.StartTest(insidePackage, "TestWriteForever")
	synced := 0
	const enough = 8
	for e := range p.Events() {
		synced++
		if e != fmt.Sprintf("synced %d", synced) {
			t.Fatalf("the %dth event is %q", synced, e)
		}
		if synced == enough {
			break
		}
	}
	time.Sleep(rand.N(100 * time.Millisecond)) // anywhere in the next files
	vm.PowerCut()
	for range p.Events() { // those that were on their way
		synced++
	}
	if r := p.Wait(); !r.Lost || synced < enough {
		t.Fatalf("after %d files the test had ended: %+v", synced, r)
	}
	t.Logf("%d files were durable", synced)
	vm = lab.Boot()
	vm.Test(t, insidePackage, "TestSynced", fmt.Sprintf("SYNCED=%d", synced))
	return vm
}

func powerCutOptions(d Drive) Options {
	d.Name = "data"
	return Options{
		Modules: []string{"ext4"}, Programs: []string{"fsck.ext4"},
		Tests: []string{insidePackage}, Drives: []Drive{d},
	}
}

func TestLabPowerCut(t *testing.T) {
	lab := New(t, powerCutOptions(Drive{Source: formatted(t)}))
	vm := cutUnderLoad(t, lab)
	// The other way to end: what nobody has synced is there too.
	vm.PowerOff()
	vm = lab.Boot()
	vm.Test(t, insidePackage, "TestLate")
}

// A disk that loses what was not flushed still keeps what ext4 has synced, and
// the file system is one. Beside it, a disk without a file system shows that
// something is lost.
func TestLabPowerCutVolatile(t *testing.T) {
	raw := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(raw, make([]byte, inside.RawSectors*blockdev.SectorSize), 0o644); err != nil {
		t.Fatal(err)
	}
	disk := NewVolatileDisk(t, raw)
	o := powerCutOptions(Drive{Volatile: NewVolatileDisk(t, formatted(t))})
	o.Drives = append(o.Drives, Drive{Name: "raw", Volatile: disk})
	lab := New(t, o)
	vm := cutUnderLoad(t, lab, "TestWriteRaw")
	vm.PowerOff()
	vm = lab.Boot()
	vm.Must("fsck.ext4", "-fn", "/dev/vmlab/data")

	found := map[byte]int{}
	for i := range int64(inside.RawSectors) {
		p := make([]byte, blockdev.SectorSize)
		if err := disk.Read(p, i*blockdev.SectorSize); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, bytes.Repeat(p[:1], len(p))) {
			t.Fatalf("sector %d is torn", i)
		}
		found[p[0]]++
	}
	if found[inside.RawFlushed] == 0 || found[inside.RawWritten] == 0 || len(found) != 2 {
		t.Errorf("versions and their sectors: %v; want %d and %d, some of each", found, inside.RawFlushed, inside.RawWritten)
	}
}
