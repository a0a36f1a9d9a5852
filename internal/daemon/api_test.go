package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"afterimage/blockdev"
	"afterimage/blockdev/owner"
	"afterimage/hrl"
	"afterimage/hrl/replica"
	"afterimage/hrl/ship"
	"afterimage/hrl/wire"
	"afterimage/internal/admin"
	"afterimage/internal/pki"
)

// TestAPIRefuses: what is not understood is refused, with a status and words.
func TestAPIRefuses(t *testing.T) {
	h, _ := newHosts(t)
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", h.d.Info().Admin)
	}}}
	defer client.CloseIdleConnections()
	for _, tt := range []struct {
		ask, body string
		status    int
		words     string
	}{
		{"POST /v1/vms", `{"name":"web","mood":"good"}`, 400, "newer than the daemon"},
		{"POST /v1/vms", `{"name":`, 400, "cannot be understood"},
		{"POST /v1/vms", ``, 400, "cannot be understood"},
		{"POST /v1/vms", `{} {}`, 400, "goes on"},
		{"POST /v1/vms", `{"name":"` + strings.Repeat("x", 2*bodyMax) + `"}`, 400, "cannot be understood"},
		{"POST /v1/vms/web/sync", `what`, 200, "no VM web"},
		{"POST /v1/vms/web/points/serve", `{"disk":1}`, 400, "cannot be understood"},
		{"POST /v1/vms/web/points/serve", `{"socket":"p"}`, 200, "absolute"},
		{"GET /v1/vms/web", ``, 404, "no VM web"},
		{"GET /v2/vms", ``, 404, ""},
		{"PUT /v1/vms", ``, 405, ""},
	} {
		method, path, _ := strings.Cut(tt.ask, " ")
		req, err := http.NewRequestWithContext(t.Context(), method, "http://x"+path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		var v json.RawMessage
		if json.NewDecoder(resp.Body).Decode(&v) == nil {
			b.Write(v)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.status || !strings.Contains(b.String(), tt.words) {
			t.Errorf("%s with %.40q: %s %s; want %d, %q", tt.ask, tt.body, resp.Status, b.String(), tt.status, tt.words)
		}
	}
}

// TestStatusOf: what an error becomes for the command that met it.
func TestStatusOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want admin.Status
	}{
		{fmt.Errorf("anything"), admin.StatusFailed},
		{&admin.Error{Status: admin.StatusUsage}, admin.StatusUsage},
		{&ship.UnreachableError{Addr: "h:1", Err: fs.ErrNotExist}, admin.StatusUnreachable},
		{&wire.Error{Code: wire.CodeNotAllowed}, admin.StatusUnreachable},
		{&wire.Error{Code: wire.CodeVersion}, admin.StatusUnreachable},
		{&wire.Error{Code: wire.CodeSender}, admin.StatusUnreachable},
		{&wire.Error{Code: wire.CodeRole}, admin.StatusRefused},
		{&wire.Error{Code: wire.CodeNoRoom}, admin.StatusRefused},
		{&wire.Error{Code: wire.CodeDamaged}, admin.StatusDamaged},
		{replica.ErrNoVM, admin.StatusNotFound},
		{replica.ErrNoPoint, admin.StatusNotFound},
		{replica.ErrInUse, admin.StatusRefused},
		{&replica.JournalError{}, admin.StatusDamaged},
		{&pki.Error{Reason: pki.Missing}, admin.StatusNotFound},
		{&pki.Error{Reason: pki.Expired}, admin.StatusRefused},
		{&owner.OwnedError{}, admin.StatusRefused},
		{ship.ErrPaused, admin.StatusRefused},
		{&ship.RoleError{}, admin.StatusRefused},
		{hrl.ErrLocked, admin.StatusRefused},
		{unix.ENOSPC, admin.StatusRefused},
		{blockdev.ErrAlignment, admin.StatusUsage},
	} {
		err := fmt.Errorf("step: %w", tt.err)
		if got := refusal(err); got.Status != tt.want || got.Message != err.Error() {
			t.Errorf("%T %v: %+v, want %d", tt.err, tt.err, got, tt.want)
		}
	}
	hinted := refusal(fmt.Errorf("step: %w", &wire.Error{Message: "m", Advice: "do this"}))
	if hinted.Advice != "do this" {
		t.Errorf("the hint is lost: %+v", hinted)
	}
}
