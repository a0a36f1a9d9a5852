// Package bench measures what a guest gets from our server beside what it gets
// from its rivals: the same file, the same client, in one run.
//
//	servers.go   who is measured, and with which command line
//	workload.go  what is asked of them
//	process.go   a server while it runs
//	fio.go       the client, and what it reports
//	run.go       rounds in changing order, and what one cell of them is
//	verify.go    is the log that was written beside the image the whole truth?
//	stats.go     medians, spreads, ratios, and when two figures are equal
//	result.go    from the samples to the result; the fields of its JSON
//	table.go     the result for people
//	host.go      on which machine, with which versions; CPU time of a process
//	gonbd.go     the rival that is a library and has no program of its own
//
// # What makes a figure fair
//
// A rival runs with each of the settings known to be good, and the best of them
// in this run is what we are compared with; the command line is in the result.
// Every server gets the same image, in a process begun for one cell. The order
// of the servers changes from round to round, so that a machine that slows down
// slows all of them.
//
// # What makes a figure honest
//
// One rival is measured twice, under two names: the control. What the two
// differ by in a round is what this machine does to any two equal servers, and a
// ratio no further from 1 than that is called equal. A row with the tee on is
// void unless the log, replayed onto a copy of the image as it was, gives the
// image as it is, and unless not one block became a gap.
//
// Nothing here judges a figure: a slow server is a result, not a failure.
package bench
