// Package primary has the parts of a power cut under a replicating VM, which run in a
// guest of the lab: primary and replica are the product's own, on one file system.
package primary
