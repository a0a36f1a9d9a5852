package main

import (
	"context"
	"errors"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
)

// openOwn is openDisk for a disk that may be in no daemon's care: what a daemon
// replicates must not be written behind its back, and a replica's base is no disk
// as any VM had it. A VM's disk may be read while its daemon has let go of it.
func openOwn(ctx context.Context, name string, o diskOptions) (blockdev.Device, error) {
	dev, err := openDisk(ctx, name, o)
	if uriForm.MatchString(name) || err != nil && !errors.Is(err, blockdev.ErrInUse) {
		return dev, err
	}
	// Whoever uses it: that it is a daemon's says more.
	if owned := checkOwner(name, o.readOnly); owned != nil {
		if dev != nil {
			dev.Close()
		}
		return nil, owned
	}
	return dev, err
}

func checkOwner(image string, readOnly bool) error {
	err := owner.Check(image, "")
	var owned *owner.OwnedError
	if readOnly && errors.As(err, &owned) && owned.Role == owner.RolePrimary {
		return nil
	}
	return err
}
