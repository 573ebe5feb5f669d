package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// A rawPeer is an upstream that speaks without HTTP's help. Which of its acts a request gets is what the request's
// User-Agent says.
type rawPeer struct {
	addr string
	mu   sync.Mutex
	seen map[string]int // heads by X-Scope-OrgID
}

// newRawPeer starts one. An act gets the connection when the head of a request has been read from it; the connection is
// closed when it returns.
func newRawPeer(t testing.TB, acts map[string]func(c net.Conn, br *bufio.Reader)) *rawPeer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &rawPeer{addr: l.Addr().String(), seen: map[string]int{}}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				r, err := http.ReadRequest(br)
				if err != nil {
					return
				}
				p.mu.Lock()
				p.seen[r.Header.Get("X-Scope-Orgid")]++
				p.mu.Unlock()
				acts[r.UserAgent()](c, br)
			}()
		}
	}()
	return p
}

func (p *rawPeer) heads(tenant string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen[tenant]
}

// speak is an act that writes s once the request's body of n bytes has been read, and then waits for the relay to hang
// up. It answers one request alone and says so.
func speak(n int, s string) func(net.Conn, *bufio.Reader) {
	s = strings.Replace(s, "Content-Length:", "Connection: close\r\nContent-Length:", 1)
	return func(c net.Conn, br *bufio.Reader) {
		io.CopyN(io.Discard, br, int64(n))
		io.WriteString(c, s)
		io.Copy(io.Discard, br)
	}
}

// repeat is an act that writes head and then tail over and over, every so often, until the relay hangs up.
func repeat(head, tail string, every time.Duration) func(net.Conn, *bufio.Reader) {
	return func(c net.Conn, br *bufio.Reader) {
		_, err := io.WriteString(c, head)
		for err == nil {
			_, err = io.WriteString(c, tail)
			time.Sleep(every) // the upstream's slowness is what is tested
		}
	}
}

// early is an act that answers without having read the body, and hangs up over it if told to.
func early(s string, hangUp bool) func(net.Conn, *bufio.Reader) {
	return func(c net.Conn, br *bufio.Reader) {
		io.WriteString(c, s)
		if !hangUp {
			io.Copy(io.Discard, io.LimitReader(br, 1)) // never more than the first byte
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// A hostility is one way an upstream can be trouble, and what comes of it.
type hostility struct {
	name     string
	act      func(net.Conn, *bufio.Reader)
	size     int // of the profile
	status   int // for the client
	attempts int
	says     string
}

const smallProfile, largeProfile = 7, 8 << 20

// TestHostileUpstreams: a hostile upstream costs its own attempts and nothing else.
func TestHostileUpstreams(t *testing.T) {
	t.Parallel()
	const small, large = smallProfile, largeProfile
	elsewhere := newPeer(t, nil)
	testHostility(t, nil, []hostility{
		{"endless answer", repeat("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", strings.Repeat("x", 1<<16), time.Millisecond), small, 502, 2, "answered too much"},
		{"endless chunks", repeat("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "8000\r\n"+strings.Repeat("x", 1<<15)+"\r\n", time.Millisecond), small, 502, 2, "answered too much"},
		{"endless refusal", repeat("HTTP/1.1 400 Bad Request\r\n\r\n", strings.Repeat("x", 1<<16), time.Millisecond), small, 400, 1, strings.Repeat("x", maxWords)},
		{"flood of 103", repeat("", strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 100), time.Millisecond), small, 502, 2, "could not be reached"},
		{"a few 1xx", speak(small, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nX: y\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), small, 200, 1, ""},
		{"another protocol", speak(small, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"), small, 502, 2, "HTTP status 101 Switching Protocols"},
		{"101 without an upgrade", speak(small, "HTTP/1.1 101 Switching Protocols\r\n\r\n"), small, 502, 2, "HTTP status 101 Switching Protocols"},
		{"huge head", repeat("HTTP/1.1 200 OK\r\n", "X: "+strings.Repeat("x", 1<<12)+"\r\n", time.Millisecond), small, 502, 2, "could not be reached"},
		{"garbage", speak(small, "SSH-2.0-x\r\n\r\n"), small, 502, 2, "could not be reached"},
		{"two lengths", speak(small, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"), small, 502, 2, "could not be reached"},
		{"negative length", speak(small, "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), small, 502, 2, "could not be reached"},
		{"cut answer", early("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", true), small, 502, 2, "could not be reached"},
		{"no answer", early("", true), small, 502, 2, "could not be reached"},
		{"redirect", speak(small, "HTTP/1.1 307 Temporary Redirect\r\nLocation: "+elsewhere.URL+"/ingest\r\nContent-Length: 0\r\n\r\n"), small, 502, 1, "HTTP status 307 Temporary Redirect"},
		{"bomb", speak(small, "HTTP/1.1 400 Bad Request\r\nContent-Encoding: gzip\r\nContent-Length: 999\r\n\r\n"+string(zip(strings.Repeat("0", 1<<16))[:999])), small, 400, 1, "HTTP status 400 Bad Request"},
		{"control characters", speak(small, "HTTP/1.1 403 Forbidden\r\nContent-Length: 10\r\n\r\n\x00a\r\nb\xff\u202e\x1b"), small, 403, 1, "a  b?"},
		{"Retry-After below zero", speak(small, "HTTP/1.1 503 x\r\nRetry-After: -5\r\nContent-Length: 0\r\n\r\n"), small, 503, 2, "HTTP status 503 Service Unavailable"},
		{"Retry-After soon", speak(small, "HTTP/1.1 503 x\r\nRetry-After: soon\r\nContent-Length: 0\r\n\r\n"), small, 503, 2, "HTTP status 503 Service Unavailable"},
		{"Retry-After for ever", speak(small, "HTTP/1.1 503 x\r\nRetry-After: 99999999999999999999\r\nContent-Length: 0\r\n\r\n"), small, 503, 2, "HTTP status 503 Service Unavailable"},
		{"early 413, then gone", early("HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge", true), large, 413, 1, "large"},
		{"early 401, still there", early("HTTP/1.1 401 Who\r\nContent-Length: 3\r\n\r\nwho", false), large, 401, 1, "who"},
	})
	if n := len(elsewhere.requests()); n != 0 {
		t.Errorf("%d redirects were followed", n)
	}
}

// TestSlowUpstreams: one that drips or says nothing costs the time of its attempts.
func TestSlowUpstreams(t *testing.T) {
	t.Parallel()
	const small = smallProfile
	testHostility(t, []string{"-remote-timeout", "150ms"}, []hostility{
		{"dripping answer", repeat("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "x", 20*time.Millisecond), small, 504, 2, "no answer in time"},
		{"dripping chunks", repeat("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", 20*time.Millisecond), small, 504, 2, "no answer in time"},
		{"dripping head", repeat("HTTP/1.1 200 OK\r\nX: ", "x", 20*time.Millisecond), small, 504, 2, "no answer in time"},
		{"dripping refusal", repeat("HTTP/1.1 403 No\r\nContent-Length: 9999\r\n\r\n", "x", 20*time.Millisecond), small, 403, 1, "xxx"},
		{"silence", speak(small, ""), small, 504, 2, "no answer in time"},
		{"never reads", func(c net.Conn, br *bufio.Reader) { time.Sleep(patience) }, largeProfile, 504, 2, "no answer in time"},
	})
}

// testHostility plays all of them at once against one relay, beside an upstream that takes everything.
func testHostility(t *testing.T, flags []string, rows []hostility) {
	t.Helper()
	good, acts := newPeer(t, nil), map[string]func(net.Conn, *bufio.Reader){}
	for _, row := range rows {
		acts[row.name] = row.act
	}
	bad := newRawPeer(t, acts)
	relay := start(t, append([]string{"-max-backoff-retries", "1", "-min-backoff-period", "1ms", "-max-backoff-period", "5ms",
		"-upstream", "http://" + bad.addr + ",name=u", "-upstream", good.URL + ",remote-timeout=20s"}, flags...)...)
	client := newClient(t, "HTTP/1.1")
	var all sync.WaitGroup
	for _, row := range rows {
		all.Go(func() { row.test(t, client, relay, bad, good) })
	}
	all.Wait()
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_bytes", 0)
	if sent := relay.metric(t, fmt.Sprintf(`pyroscope_write_sent_requests_total{endpoint="%s"}`, good.URL)); sent != float64(len(rows)) {
		t.Errorf("%v accepted by the other upstream, want %d", sent, len(rows))
	}
}

func (h *hostility) test(t *testing.T, client *http.Client, relay *program, bad *rawPeer, good *peer) {
	t.Helper()
	resp, err := tryPost(t.Context(), client, relay.url("/ingest"), make([]byte, h.size), "User-Agent", h.name, "X-Scope-OrgID", h.name)
	if err != nil {
		t.Error(err)
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	if resp.StatusCode != h.status || h.status != 200 && !strings.HasPrefix(string(body), "u: "+h.says) {
		t.Errorf("%s: %d %.90q, want %d %.90q", h.name, resp.StatusCode, body, h.status, h.says)
	}
	if n := bad.heads(h.name); n != h.attempts {
		t.Errorf("%s: %d attempts, want %d", h.name, n, h.attempts)
	}
	if n := len(good.of(h.name)); n != 1 {
		t.Errorf("%s: the other upstream has %d copies", h.name, n)
	}
	if told := resp.Header.Get("Retry-After"); told != "" && h.name != "Retry-After for ever" {
		t.Errorf("%s: the client is told Retry-After %q", h.name, told)
	}
}

// gated is an upstream that holds each request until the test lets it go on.
func gated(t *testing.T, answer func(http.ResponseWriter, *http.Request, int)) (p *peer, release func()) {
	t.Helper()
	open := make(chan struct{})
	release = sync.OnceFunc(func() { close(open) })
	p = newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		<-open
		answer(w, r, n)
	})
	t.Cleanup(release) // before the server is closed, which waits for its handlers
	return p, release
}

func acceptAll(w http.ResponseWriter, r *http.Request, _ int) { accept(w, r) }

// Upstreams are served side by side: one that does not answer keeps nobody's copy back, but the client waits for it.
func TestUpstreamsSideBySide(t *testing.T) {
	t.Parallel()
	slow, release := gated(t, acceptAll)
	before, after := newPeer(t, nil), newPeer(t, nil)
	relay := start(t, "-upstream", before.URL, "-upstream", slow.URL, "-upstream", after.URL)
	eachPath(t, func(t *testing.T, path string) {
		answered := make(chan response, 1)
		go func() {
			resp, err := tryPost(t.Context(), http.DefaultClient, relay.url(path), []byte("x"), "Content-Type", "application/proto", "X-Scope-OrgID", path)
			if err == nil {
				answered <- readAll(t, resp)
			}
		}()
		eventually(t, "all have their copy", func() bool {
			return len(before.of(path)) == 1 && len(slow.of(path)) == 1 && len(after.of(path)) == 1
		})
		select {
		case resp := <-answered:
			t.Errorf("answered %d before all upstreams had accepted", resp.StatusCode)
		default:
		}
		release()
		if resp := <-answered; resp.StatusCode != http.StatusOK {
			t.Errorf("%d %s", resp.StatusCode, resp.body)
		}
	})
}

// eachPath runs a test for both routes.
func eachPath(t *testing.T, test func(t *testing.T, path string)) {
	for _, path := range []string{ingestPath, pushPath} {
		t.Run(path, func(t *testing.T) { test(t, path) })
	}
}

// An upstream that restarts leaves dead connections in the pool; they must not cost a client its profile.
func TestRestartedUpstream(t *testing.T) {
	t.Parallel()
	addr, mux := "127.0.0.1:0", http.NewServeMux()
	mux.HandleFunc("/ingest", func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	serve := func() *http.Server {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		addr = l.Addr().String()
		s := &http.Server{Handler: mux}
		go s.Serve(l)
		return s
	}
	s := serve()
	relay := start(t, "-min-backoff-period", "5ms", "-max-backoff-period", "5ms", "-upstream", "http://"+addr+",name=u")
	client := newClient(t, "HTTP/1.1")
	for range 3 {
		var all sync.WaitGroup
		for range 4 { // connections in the pool
			all.Go(func() {
				resp, err := tryPost(t.Context(), client, relay.url("/ingest"), []byte("x"))
				if err != nil {
					t.Error(err)
				} else if r := readAll(t, resp); r.StatusCode != http.StatusOK {
					t.Errorf("%d %s", r.StatusCode, r.body)
				}
			})
		}
		all.Wait()
		s.Close()
		s = serve()
	}
	s.Close()
	relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="u"}`, 12)
}

// Connections that have silently died in the pool cost one attempt, not one each: after a timeout the next attempt dials.
func TestDeadPooledConnections(t *testing.T) {
	t.Parallel()
	const pooled = 3
	var warm sync.WaitGroup
	warm.Add(pooled)
	bad := newRawPeer(t, map[string]func(net.Conn, *bufio.Reader){
		"warm": func(c net.Conn, br *bufio.Reader) {
			warm.Done()
			warm.Wait() // all at once, so that each has a connection of its own
			io.CopyN(io.Discard, br, 1)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			io.Copy(io.Discard, br) // from here on it is dead
		},
		"cold": speak(1, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
	})
	relay := start(t, "-remote-timeout", "500ms", "-min-backoff-period", "5ms", "-max-backoff-period", "5ms", "-max-backoff-retries", "1",
		"-upstream", "http://"+bad.addr+",name=u")
	client := newClient(t, "HTTP/1.1")
	var all sync.WaitGroup
	for range pooled {
		all.Go(func() {
			resp, err := tryPost(t.Context(), client, relay.url("/ingest"), []byte("x"), "User-Agent", "warm")
			if err != nil {
				t.Error(err)
			} else if r := readAll(t, resp); r.StatusCode != http.StatusOK {
				t.Errorf("%d %s", r.StatusCode, r.body)
			}
		})
	}
	all.Wait()
	if resp := post(t, client, relay.url("/ingest"), []byte("x"), "User-Agent", "cold"); resp.StatusCode != http.StatusOK {
		t.Errorf("%d %s", resp.StatusCode, resp.body)
	}
	if n := relay.metric(t, `pyroscope_write_retries_total{endpoint="u"}`); n != 1 {
		t.Errorf("%v retries, want 1", n)
	}
}

// A client that hangs up has its profile delivered all the same, retries included, unless it had set a deadline.
func TestHangUps(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, path string
		header     []string
		abandoned  bool
	}{
		{"ingest", ingestPath, []string{"Connect-Timeout-Ms", "8000"}, false}, // not a deadline there
		{"push", pushPath, nil, false},
		{"push with a deadline", pushPath, []string{"Connect-Timeout-Ms", "8000"}, true},
	} {
		eachProto(t, func(t *testing.T, c *http.Client) {
			t.Run(tt.name, func(t *testing.T) {
				upstream, release := gated(t, func(w http.ResponseWriter, r *http.Request, n int) {
					if n == 1 {
						w.WriteHeader(503)
					}
					accept(w, r)
				})
				mirror := newPeer(t, nil)
				relay := start(t, fastRetries("-upstream", upstream.URL+",name=u", "-upstream", mirror.URL+",name=m,required=false")...)
				ctx, hangUp := context.WithCancel(t.Context())
				gone := make(chan error)
				go func() {
					_, err := tryPost(ctx, c, relay.url(tt.path), []byte("x"), append(tt.header, "Content-Type", "application/proto")...)
					gone <- err
				}()
				eventually(t, "the upstream has the profile", func() bool { return len(upstream.requests()) == 1 })
				hangUp()
				if err := <-gone; err == nil {
					t.Fatal("answered too early")
				}
				if tt.abandoned {
					relay.awaitMetric(t, `pyroscope_write_dropped_requests_total{endpoint="u",reason="abandoned"}`, 1)
				}
				get(t, relay.url("/ready")) // a round trip's time to see the client go
				release()
				if !tt.abandoned {
					relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="u"}`, 1)
				}
				relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="m"}`, 1)
				relay.awaitMetric(t, "pyroscope_receive_http_inflight_bytes", 0)
			})
		})
	}
}

// Mirrors neither delay nor change an answer. Together they hold a quarter of the memory for bodies, a shared body
// counted once; above that a copy is dropped for each.
func TestMirrors(t *testing.T) {
	t.Parallel()
	a, releaseA := gated(t, acceptAll)
	b, releaseB := gated(t, func(w http.ResponseWriter, _ *http.Request, _ int) { w.WriteHeader(400) })
	required := newPeer(t, nil)
	relay := start(t, "-max-inflight-bytes", "1MiB", "-max-body-size", "256KiB", "-upstream", a.URL+",name=a,required=false",
		"-upstream", required.URL+",name=r", "-upstream", b.URL+",name=b,required=false", "-upstream", "http://"+deadAddr(t)+",name=dead,required=false,max-backoff-retries=1,min-backoff-period=1ms")
	c := newClient(t, "HTTP/1.1")
	for range 3 {
		if resp := post(t, c, relay.url("/ingest"), make([]byte, 100<<10)); resp.StatusCode != http.StatusOK {
			t.Fatalf("%d %s", resp.StatusCode, resp.body)
		}
	}
	for _, name := range []string{"a", "b", "dead"} {
		if n := relay.metric(t, `pyroscope_write_dropped_requests_total{endpoint="`+name+`",reason="mirror_backlog"}`); n != 1 {
			t.Errorf("%s: %v copies dropped for want of room, want 1", name, n)
		}
		if n := relay.metric(t, `pyroscope_write_dropped_bytes_total{endpoint="`+name+`",reason="mirror_backlog"}`); n != 100<<10 {
			t.Errorf("%s: %v bytes dropped", name, n)
		}
	}
	if n := relay.metric(t, "pyroscope_receive_http_inflight_bytes"); n != 200<<10 {
		t.Errorf("%v bytes in flight, want those of two profiles", n)
	}
	releaseA()
	relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="a"}`, 2)
	releaseB()
	relay.awaitMetric(t, `pyroscope_write_dropped_requests_total{endpoint="b",reason="refused"}`, 2)
	relay.awaitMetric(t, `pyroscope_write_dropped_requests_total{endpoint="dead",reason="unavailable"}`, 2)
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_bytes", 0)
	if n := len(required.requests()); n != 3 {
		t.Errorf("the required upstream has %d profiles, want 3", n)
	}
	if resp := post(t, c, relay.url("/ingest"), make([]byte, 256<<10)); resp.StatusCode != http.StatusOK {
		t.Fatalf("%d %s", resp.StatusCode, resp.body)
	}
	relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="a"}`, 3) // the whole quarter is free again
}

// With mirrors alone there is nothing to wait for: success means that the profile was received.
func TestOnlyMirrors(t *testing.T) {
	t.Parallel()
	mirror, release := gated(t, acceptAll)
	relay := start(t, "-upstream", mirror.URL+",name=m,required=false")
	c := newClient(t, "HTTP/1.1")
	if resp := post(t, c, relay.url("/ingest"), []byte("x")); resp.StatusCode != http.StatusOK {
		t.Errorf("%d %s", resp.StatusCode, resp.body)
	}
	if v := dialects()[4].call(t, c, relay.url(pushPath), []byte("{}"), false); v.code != codeOK || string(v.reply) != "{}" {
		t.Errorf("%v %q %q", v.code, v.message, v.reply)
	}
	release()
	relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="m"}`, 2)
	relay.stop(t)
}

// A Retry-After that does not fit into the time left is passed on at once; one that fits is waited for.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		w.Header().Set("Retry-After", r.UserAgent())
		w.WriteHeader(429)
	})
	relay := start(t, fastRetries("-delivery-timeout", "5s", "-upstream", upstream.URL+",name=patient,max-backoff-period=1h")...)
	clamped := start(t, fastRetries("-delivery-timeout", "5s", "-upstream", upstream.URL+",name=clamped")...)
	c := newClient(t, "HTTP/1.1")
	for _, tt := range []struct {
		relay    *program
		after    string
		attempts int
	}{
		{relay, "600", 1}, {relay, time.Now().Add(time.Hour).UTC().Format(http.TimeFormat), 1}, {relay, "99999999999999999999", 1},
		{relay, "0", 3}, {clamped, "600", 3},
	} {
		tenant := fmt.Sprintf("%s %p", tt.after, tt.relay)
		resp := post(t, c, tt.relay.url("/ingest"), []byte("x"), "User-Agent", tt.after, "X-Scope-OrgID", tenant)
		if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != tt.after || len(upstream.of(tenant)) != tt.attempts {
			t.Errorf("%s: %d, Retry-After %q, %d attempts, want %d", tt.after, resp.StatusCode, resp.Header.Get("Retry-After"), len(upstream.of(tenant)), tt.attempts)
		}
	}
}

// A client is answered before the write timeout would cut it off, however late its body was whole.
func TestAnswerBeforeWriteTimeout(t *testing.T) {
	t.Parallel()
	relay := start(t, "-server-write-timeout", "1s", "-delivery-timeout", "900ms", "-upstream", "http://"+blackHole(t))
	c, err := net.Dial("tcp", relay.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, "POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
	time.Sleep(400 * time.Millisecond) // the client's slowness is what is tested
	io.WriteString(c, "b")
	if resp := readResponse(t, bufio.NewReader(c)); resp.StatusCode != http.StatusGatewayTimeout || string(resp.body) != "upstream-1: no answer in time\n" {
		t.Errorf("%d %s", resp.StatusCode, resp.body)
	}
}

// After a storm of everything at once, each upstream's books balance: every profile was either sent or dropped.
func TestAccounting(t *testing.T) {
	t.Parallel()
	const profiles, size = 150, 1000
	moody := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		switch n % 7 {
		case 0:
			w.WriteHeader(400)
		case 1:
			w.WriteHeader(503)
		case 2:
			panic(http.ErrAbortHandler)
		case 3:
			w.WriteHeader(302)
		}
	})
	fine := newPeer(t, nil)
	upstreams := []string{moody.URL + ",name=moody", fine.URL + ",name=fine", "http://" + deadAddr(t) + ",name=dead,required=false",
		"http://" + blackHole(t) + ",name=hole,required=false,remote-timeout=20ms", moody.URL + "/x,name=mirror,required=false", "log:,name=log"}
	args := []string{"-max-inflight-bytes", "400KB", "-max-body-size", "100KB"}
	for _, u := range upstreams {
		args = append(args, "-upstream", u)
	}
	relay := start(t, fastRetries(args...)...)
	clients := []*http.Client{newClient(t, "HTTP/1.1"), newClient(t, "h2c")}
	var all sync.WaitGroup
	for i := range profiles {
		all.Go(func() {
			path, header := "/ingest", []string{"Content-Type", "application/proto"}
			if i%2 == 0 {
				path = pushPath
			}
			if i%5 == 0 {
				header = append(header, "Connect-Timeout-Ms", "10")
			}
			resp, err := tryPost(t.Context(), clients[i%4/2], relay.url(path), make([]byte, size), header...)
			if err != nil {
				t.Error(err)
				return
			}
			readAll(t, resp)
			tryPost(t.Context(), clients[0], relay.url(pushPath), make([]byte, size), "Content-Type", "application/grpc") // refused, and counted nowhere
		})
	}
	all.Wait()
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_bytes", 0)
	for _, name := range []string{"moody", "fine", "dead", "hole", "mirror", "log"} {
		eventually(t, name+"'s books balance", func() bool {
			text := relay.metrics(t)
			requests := total(t, text, "pyroscope_write_sent_requests_total", name) + total(t, text, "pyroscope_write_dropped_requests_total", name)
			bytes := total(t, text, "pyroscope_write_sent_bytes_total", name) + total(t, text, "pyroscope_write_dropped_bytes_total", name)
			return requests == profiles && bytes == profiles*size
		})
	}
}

// total is the sum of all series of a metric for one endpoint.
func total(t *testing.T, text, metric, endpoint string) (sum int) {
	t.Helper()
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, metric+`{endpoint="`+endpoint+`"`) {
			var n int
			if _, err := fmt.Sscan(line[strings.LastIndex(line, " "):], &n); err != nil {
				t.Fatal(line, err)
			}
			sum += n
		}
	}
	return sum
}
