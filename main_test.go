package main

import (
	"bytes"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// The main job: every real client's request arrives at two upstreams, unchanged.
func TestRealRequestsArriveUnchanged(t *testing.T) {
	t.Parallel()
	for _, name := range captures(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := newPeer(t, nil), newPeer(t, nil)
			relay := start(t, "-upstream", a.URL, "-upstream", b.URL)
			raw := capture(t, name)
			resp := sendRaw(t, relay.addr, raw)
			if resp.StatusCode != http.StatusOK {
				t.Fatalf("status %d: %s", resp.StatusCode, resp.body)
			}
			sent, body := parseRequest(t, raw)
			if bytes.HasPrefix([]byte(sent.Header.Get("Content-Type")), []byte("application/grpc")) {
				body = body[envelopePrefix:]
			}
			for _, p := range []*peer{a, b} {
				got := p.one(t)
				if !bytes.Equal(got.body, body) {
					t.Errorf("body changed: %d bytes sent, %d arrived", len(body), len(got.body))
				}
				if got.method != http.MethodPost {
					t.Errorf("method %s", got.method)
				}
			}
			relay.stop(t)
		})
	}
}

func TestJSONLogsReadLikeLogfmt(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	newLogger(&out, &config{logFormat: "json"}).Info("x", "route", routePush, "took", 1500*time.Millisecond, "addr", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80})
	for _, want := range []string{`"level":"INFO"`, `"route":"push"`, `"took":"1.5s"`, `"addr":"127.0.0.1:80"`, `"time":"20`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is missing in %s", want, out.String())
		}
	}
}
