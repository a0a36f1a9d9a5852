// Command fetch gets the VM lab its kernel, unless it has one: Debian's own
// package, unpacked and not installed. `make deps` runs it.
//
// Usage: fetch [-check]
//
// With -check it gets nothing: it prints what is missing, if anything is.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"afterimage/internal/vmlab/kernel"
)

// limit is for a slow line: the package has 70 MB.
const limit = 30 * time.Minute

func main() {
	check := flag.Bool("check", false, "only say whether it is missing")
	flag.Parse()
	if err := fetch(*check); err != nil {
		fmt.Fprintln(os.Stderr, "fetch:", err)
		os.Exit(1)
	}
}

func fetch(check bool) error {
	dir, err := kernel.Dir()
	if err != nil {
		return err
	}
	if check {
		_, err := kernel.Find(dir)
		if errors.Is(err, kernel.ErrNone) {
			fmt.Println("a kernel for the VM lab")
			return nil
		}
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	k, err := kernel.Fetch(ctx, dir)
	if err != nil {
		return err
	}
	fmt.Printf("deps: the VM lab's kernel is %s (in %s)\n", k.Version, dir)
	return nil
}
