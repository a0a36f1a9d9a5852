// Command simtool says how good the simulator is.
//
//	simtool cover              how much of the product the histories reach
//	simtool mutants [NAME ...] whether each broken rule is found
//
// Both run in the module's root. A mutant is a patch of internal/sim/mutants whose
// first line says which rule it breaks; one that is not found, or does not apply any
// more, is an error.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"
)

func main() {
	f := flag.NewFlagSet("simtool", flag.ExitOnError)
	budget := f.Duration("time", 2*time.Minute, "how long the histories of a mutant, or of the coverage, are played")
	third := f.Int("third", 0, "only every third mutant, from the 1st, 2nd or 3rd on; 0: all")
	least := f.Float64("least", 85, "per cent of each package that have to be reached")
	at := f.Int("j", 1, "mutants at a time")
	f.Usage = func() {
		fmt.Fprintln(f.Output(), "usage: simtool [FLAG ...] cover | mutants [NAME ...]")
		f.PrintDefaults()
	}
	_ = f.Parse(os.Args[1:]) // it exits
	var err error
	switch f.Arg(0) {
	case "cover":
		err = cover(*budget, *least)
	case "mutants":
		err = mutants(f.Args()[1:], *budget, *third, *at)
	default:
		f.Usage()
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "simtool:", err)
		os.Exit(1)
	}
}
