package shim

import (
	"os"
	"path/filepath"
)

// What belongs to an image and must share its fate lies beside it, in the
// directory IMAGE.afterimage. For a block device or a disk of another host that
// is not possible (a /dev does not survive a boot): there it lies with the log.
const (
	besideSuffix = ".afterimage"
	latchName    = "latch"
)

// besideImage is the directory beside the image, or empty if it can have none.
// It is made only when there is something to put into it.
func besideImage(image string) (string, error) {
	if image == "" {
		return "", nil
	}
	// Under whatever name the image is opened, it is the same one.
	path, err := filepath.EvalSymlinks(image)
	if err != nil {
		return "", err
	}
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !st.Mode().IsRegular() {
		return "", nil
	}
	return path + besideSuffix, nil
}
