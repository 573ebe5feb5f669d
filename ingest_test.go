package main

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// The body, the raw query and the content headers reach the upstream as they came, below its base path.
func TestIngestIsVerbatim(t *testing.T) {
	t.Parallel()
	const query = "name=my.app{env=prod,a=b%20c}&from=1;until=2&x=%20+%2b%zz&empty=&&=#frag?"
	for base, want := range map[string]string{
		"":                 "/ingest",
		"/":                "/ingest",
		"/pre/fix":         "/pre/fix/ingest",
		"/pre/fix/":        "/pre/fix/ingest",
		"/a%2Fb":           "/a%2Fb/ingest",
		"/a%2Fb%2F":        "/a%2Fb%2F/ingest",
		"/t%7B1%7D/":       "/t%7B1%7D/ingest",
		"/already/ingest/": "/already/ingest/ingest",
	} {
		t.Run(base, func(t *testing.T) {
			t.Parallel()
			upstream := newPeer(t, nil)
			relay := start(t, "-upstream", upstream.URL+base)
			body := "bytes \x00\xff of no known kind"
			raw := rawAnswer(t, relay.addr, "POST //pyroscope//ingest?"+query+" HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Type: a; b\r\n"+
				"Content-Encoding: GZIP\r\nContent-Encoding: br\r\nConnection: close\r\n"+fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body))
			if !strings.HasPrefix(raw, "HTTP/1.1 200 OK\r\n") || !strings.HasSuffix(raw, "\r\n\r\n") {
				t.Errorf("answer %q", raw)
			}
			got := upstream.one(t)
			if got.method != http.MethodPost || got.target != want+"?"+query {
				t.Errorf("%s %s, want %s", got.method, got.target, want+"?"+query)
			}
			if h := fmt.Sprintf("%q %q", got.header["Content-Type"], got.header["Content-Encoding"]); h != `["text/plain" "a; b"] ["GZIP" "br"]` {
				t.Errorf("content headers %s", h)
			}
			if string(got.body) != body {
				t.Errorf("body %q", got.body)
			}
			for _, name := range []string{"User-Agent", "Accept-Encoding", "Connect-Protocol-Version", "Connection"} {
				if got.header[name] != nil {
					t.Errorf("the relay added %s: %q", name, got.header[name])
				}
			}
		})
	}
}

// A profile without a byte or a query is one all the same.
func TestIngestOfNothing(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	eachProto(t, func(t *testing.T, c *http.Client) {
		if resp := post(t, c, relay.url("/ingest"), nil); resp.StatusCode != http.StatusOK || len(resp.body) != 0 {
			t.Errorf("%d %q", resp.StatusCode, resp.body)
		}
	})
	t.Cleanup(func() {
		for _, got := range upstream.requests() {
			if got.target != "/ingest" || len(got.body) != 0 || got.header.Get("Content-Length") != "0" || got.header["Content-Type"] != nil {
				t.Errorf("%s %v", got.target, got.header)
			}
		}
	})
}

// Each status of an upstream is answered as the limits table says: which the client gets, after how many attempts, and
// in what words.
func TestIngestAnswers(t *testing.T) {
	t.Parallel()
	type row struct {
		upstream, client, attempts int
		says                       string
	}
	rows := []row{
		{200, 200, 1, ""}, {201, 200, 1, ""}, {202, 200, 1, ""}, {204, 200, 1, ""},
		{301, 502, 1, "HTTP status 301 Moved Permanently"}, {302, 502, 1, "HTTP status 302 Found"}, {304, 502, 1, "HTTP status 304 Not Modified"},
		{307, 502, 1, "HTTP status 307 Temporary Redirect"}, {308, 502, 1, "HTTP status 308 Permanent Redirect"},
		{400, 400, 1, "words"}, {401, 401, 1, "words"}, {403, 403, 1, "words"}, {404, 404, 1, "words"}, {409, 409, 1, "words"},
		{413, 413, 1, "words"}, {415, 415, 1, "words"}, {418, 418, 1, "words"}, {422, 422, 1, "words"}, {499, 499, 1, "words"},
		{408, 502, 3, "words"}, {429, 429, 3, "words"},
		{500, 502, 3, "words"}, {502, 502, 3, "words"}, {503, 503, 3, "words"}, {504, 502, 3, "words"}, {505, 502, 3, "words"},
		{511, 502, 3, "words"}, {599, 502, 3, "words"}, {501, 501, 1, "words"}, {508, 508, 1, "words"},
	}
	upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		var status int
		fmt.Sscan(r.UserAgent(), &status)
		w.Header().Set("Location", "/elsewhere")
		w.Header().Set("Retry-After", "3")
		w.WriteHeader(status)
		if status != http.StatusNoContent && status != http.StatusNotModified {
			fmt.Fprint(w, " words\r\n")
		}
	})
	relay := start(t, fastRetries("-upstream", upstream.URL+",name=u")...)
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, row := range rows {
			tenant := fmt.Sprintf("%p-%d", c, row.upstream)
			resp := post(t, c, relay.url("/ingest"), []byte("profile"), "User-Agent", fmt.Sprint(row.upstream), "X-Scope-OrgID", tenant)
			want := ""
			if row.client != http.StatusOK {
				want = "u: " + row.says + "\n"
			}
			if resp.StatusCode != row.client || string(resp.body) != want {
				t.Errorf("%d: %d %q, want %d %q", row.upstream, resp.StatusCode, resp.body, row.client, want)
			}
			if got := len(upstream.of(tenant)); got != row.attempts {
				t.Errorf("%d: %d attempts, want %d", row.upstream, got, row.attempts)
			}
			if told := resp.Header.Get("Retry-After") != ""; told != (row.client == 429 || row.client == 503) {
				t.Errorf("%d: Retry-After %q", row.upstream, resp.Header.Get("Retry-After"))
			}
		}
	})
}

// The rules for 422 and 429 can be turned round, for all upstreams or for one.
func TestIngestRetryOptions(t *testing.T) {
	t.Parallel()
	status := func(w http.ResponseWriter, r *http.Request, _ int) {
		var status int
		fmt.Sscan(r.UserAgent(), &status)
		w.WriteHeader(status)
	}
	turned, own := newPeer(t, status), newPeer(t, status)
	relay := start(t, "-min-backoff-period", "1ms", "-max-backoff-period", "1ms", "-max-backoff-retries", "5",
		"-retry-on-http-429=false", "-retry-on-http-422", "-upstream", turned.URL, "-upstream", own.URL+",retry-on-http-422=false,retry-on-http-429=true")
	c := newClient(t, "HTTP/1.1")
	for _, tt := range []struct {
		path           string
		status, answer int
		turned, own    int // attempts
	}{
		{"/ingest", 422, 422, 3, 1}, {pushPath, 422, 400, 1, 1}, {"/ingest", 429, 429, 1, 6}, {pushPath, 429, 429, 1, 6},
	} {
		tenant := fmt.Sprint(tt.path, tt.status)
		resp := post(t, c, relay.url(tt.path), nil, "Content-Type", "application/proto", "User-Agent", fmt.Sprint(tt.status), "X-Scope-OrgID", tenant)
		a, b := len(turned.of(tenant)), len(own.of(tenant))
		if resp.StatusCode != tt.answer || a != tt.turned || b != tt.own {
			t.Errorf("%s %d: status %d, attempts %d and %d; want %d, %d and %d", tt.path, tt.status, resp.StatusCode, a, b, tt.answer, tt.turned, tt.own)
		}
	}
}

// A client learns what its upstreams said, a line for each that failed, and nothing of where they are.
func TestIngestErrorText(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", 2000)
	a := newPeer(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		http.Error(w, "first\nsecond\x1b[31m\t"+long, 400)
	})
	b := newPeer(t, nil)
	dead := deadAddr(t)
	_, port, _ := strings.Cut(dead, ":")
	relay := start(t, fastRetries("-upstream", a.URL+",header=X-Secret: hunter2", "-upstream", b.URL, "-upstream", "http://"+dead, "-upstream", "http://"+dead+"/x,name=named")...)
	resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest?name=a"), []byte("x"))
	if resp.StatusCode != http.StatusBadGateway {
		t.Errorf("status %d", resp.StatusCode)
	}
	lines := strings.Split(strings.TrimSuffix(string(resp.body), "\n"), "\n")
	want := []string{"upstream-1: first second [31m " + long[:maxWords-len("first second [31m ")], "upstream-3: could not be reached", "named: could not be reached"}
	if len(lines) != len(want) {
		t.Fatalf("%q", resp.body)
	}
	for i := range want {
		if lines[i] != want[i] {
			t.Errorf("line %d is %q, want %q", i, lines[i], want[i])
		}
	}
	all := fmt.Sprint(string(resp.body), resp.Header)
	for _, secret := range []string{"127.0.0.1", port, "hunter2", "refused", "dial"} {
		if strings.Contains(all, secret) {
			t.Errorf("the client is told %q: %s", secret, all)
		}
	}
}

// The built-in upstream logs a line for each profile.
func TestLogUpstream(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", "log:")
	c := newClient(t, "h2c")
	post(t, c, relay.url("/ingest?name=a{b=c}&secret=1"), []byte("abc"), "Content-Type", "text/plain")
	if resp := post(t, c, relay.url(pushPath), envelope(0, []byte("{}")), "Content-Type", "application/grpc+json"); resp.Trailer.Get("Grpc-Status") != "0" || !bytes.Equal(resp.body, envelope(0, []byte("{}"))) {
		t.Errorf("%q %v", resp.body, resp.Trailer)
	}
	if resp := post(t, c, relay.url(pushPath), nil, "Content-Type", "application/proto"); resp.StatusCode != 200 || len(resp.body) != 0 {
		t.Errorf("%d %q", resp.StatusCode, resp.body)
	}
	eventually(t, "all lines are there", func() bool { return strings.Count(relay.stderr.String(), "\n") >= 5 })
	log := relay.stderr.String()
	for _, line := range []string{
		`msg=profile route=ingest query="name=a{b=c}&secret=1" content_type=text/plain bytes=3 sha256=ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad`,
		`msg=profile route=push query="" content_type=application/json bytes=2 sha256=44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a`,
		`msg=profile route=push query="" content_type=application/proto bytes=0 sha256=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855`,
	} {
		if strings.Count(log, line) != 1 {
			t.Errorf("no line %s", line)
		}
	}
	if n := strings.Count(log, "\n"); n != 5 {
		t.Errorf("%d lines in the log, want the three and two of the start", n)
	}
}
