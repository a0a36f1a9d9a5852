package daemon

import (
	"slices"
	"testing"

	"afterimage/hrl/wire"
	"afterimage/internal/admin"
)

// TestUnreadablePoint: what the primary could not read is told of a point beside damage,
// and is a warning.
func TestUnreadablePoint(t *testing.T) {
	p := wire.PointInfo{Kind: wire.KindCrash, Disks: []wire.PointDisk{
		{Disk: wire.Disk{Name: "root", Size: 1 << 20}, Unreadable: [][2]int64{{4096, 8192}, {64 << 10, 4096}}},
		{Disk: wire.Disk{Name: "data", Size: 1 << 20}},
	}}
	info := pointInfo(p)
	if want := []admin.Unreadable{{Disk: "root", Offset: 4096, Bytes: 8192}, {Disk: "root", Offset: 64 << 10, Bytes: 4096}}; !slices.Equal(info.Unreadable, want) || info.Damaged {
		t.Errorf("%+v", info)
	}
	st := admin.Replication{Health: admin.HealthNormal, LastPoint: &admin.LastPoint{ID: wire.PointID{Generation: 1, Incarnation: 2, Epoch: 3}}}
	judgeUnreadable(&st, "")
	if st.Health != admin.HealthNormal || st.Reasons != nil {
		t.Errorf("without any: %+v", st)
	}
	judgeUnreadable(&st, p.Unread())
	if st.Health != admin.HealthWarning || len(st.Reasons) != 1 ||
		st.Reasons[0] != "point 1.2.3: disk root [4096, +8192), disk root [65536, +4096): unreadable at the primary when the point was made, older content stands there" {
		t.Errorf("%+v", st)
	}
	st.Health = admin.HealthCritical
	judgeUnreadable(&st, p.Unread())
	if st.Health != admin.HealthCritical {
		t.Error("less than critical")
	}
}
