package ship_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"afterimage/blockdev"
	"afterimage/hrl/wire"
)

// BenchmarkCompare compares a disk with a replica that has the same, over a loopback
// connection with TLS: both hosts are this one, so each byte is read and hashed twice.
func BenchmarkCompare(b *testing.B) {
	const size = 1 << 30
	w := newWorld(b, 1, size)
	dev, err := blockdev.OpenFile(w.image(0), blockdev.FileOptions{})
	if err != nil {
		b.Fatal(err)
	}
	w.fill(w.model[0])
	if err := errors.Join(blockdev.WriteAt(dev, w.model[0], 0), dev.Close()); err != nil {
		b.Fatal(err)
	}
	w.startPrimary()
	point := func() wire.PointID {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		id, err := w.s.Sync(ctx)
		if err != nil {
			b.Fatal(err)
		}
		return id
	}
	point()
	if err := w.replicaVM().Settle(context.Background()); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(size)
	for b.Loop() {
		if !w.vm.Disks()[0].GapAll() {
			b.Fatal("the log takes no gap")
		}
		point()
	}
	if sent := w.s.Status().Totals.ShippedRawBytes; sent > size {
		b.Errorf("%d bytes were sent of %d", sent, int64(size))
	}
}
