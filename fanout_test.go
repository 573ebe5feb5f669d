package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"
	"weak"
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
	testHostility(t, []string{"-remote-timeout", "500ms"}, []hostility{
		{"dripping answer", repeat("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "x", 20*time.Millisecond), small, 504, 2, "no answer in time"},
		{"dripping chunks", repeat("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", 20*time.Millisecond), small, 504, 2, "no answer in time"},
		{"dripping head", repeat("HTTP/1.1 200 OK\r\nX: ", "x", 20*time.Millisecond), small, 504, 2, "no answer in time"},
		{"dripping refusal", repeat("HTTP/1.1 403 No\r\nContent-Length: 9999\r\n\r\n", "x", 20*time.Millisecond), small, 403, 1, ""},
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
	// On a busy machine an attempt may end before the upstream has seen it.
	if n := bad.heads(h.name); n > h.attempts || n < h.attempts && h.status != http.StatusGatewayTimeout {
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
	for _, path := range []string{ingestPath, pushPath} {
		slow, release := gated(t, acceptAll)
		before, after := newPeer(t, nil), newPeer(t, nil)
		relay := start(t, "-upstream", before.URL, "-upstream", slow.URL, "-upstream", after.URL)
		client, answered := newClient(t, "HTTP/1.1"), make(chan string, 1)
		go func() {
			resp, err := tryPost(t.Context(), client, relay.url(path), []byte("x"), "Content-Type", "application/proto")
			if err != nil {
				answered <- err.Error()
				return
			}
			resp.Body.Close()
			answered <- resp.Status
		}()
		eventually(t, "all have their copy", func() bool {
			return len(before.requests()) == 1 && len(slow.requests()) == 1 && len(after.requests()) == 1
		})
		select {
		case status := <-answered:
			t.Errorf("answered %s before all upstreams had accepted", status)
		default:
		}
		release()
		if status := <-answered; status != "200 OK" {
			t.Error(status)
		}
	}
}

// An upstream that restarts leaves dead connections in the pool; they must not cost a client its profile.
func TestRestartedUpstream(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-min-backoff-period", "5ms", "-max-backoff-period", "5ms", "-upstream", upstream.URL+",name=u")
	client := newClient(t, "HTTP/1.1")
	for range 5 {
		var all sync.WaitGroup
		for range 4 { // connections in the pool
			all.Go(func() {
				resp, err := tryPost(t.Context(), client, relay.url("/ingest"), []byte("x"))
				if err != nil {
					t.Error(err)
					return
				}
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					t.Error(resp.Status)
				}
			})
		}
		all.Wait()
		upstream.CloseClientConnections()
	}
	relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="u"}`, 20)
}

// Connections that have silently died in the pool cost one attempt, not one each: after a timeout the next attempt dials.
func TestDeadPooledConnections(t *testing.T) {
	t.Parallel()
	const pooled = 3
	var arrived atomic.Int32
	allHere := make(chan struct{})
	bad := newRawPeer(t, map[string]func(net.Conn, *bufio.Reader){
		"warm": func(c net.Conn, br *bufio.Reader) {
			if arrived.Add(1) == pooled {
				close(allHere)
			}
			<-allHere // so that each has a connection of its own
			io.CopyN(io.Discard, br, 1)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			io.Copy(io.Discard, br) // from here on it is dead
		},
		"cold": speak(1, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
	})
	relay := start(t, "-remote-timeout", "1s", "-min-backoff-period", "5ms", "-max-backoff-period", "5ms", "-max-backoff-retries", "1",
		"-upstream", "http://"+bad.addr+",name=u")
	client := newClient(t, "HTTP/1.1")
	var all sync.WaitGroup
	for range pooled {
		all.Go(func() {
			resp, err := tryPost(t.Context(), client, relay.url("/ingest"), []byte("x"), "User-Agent", "warm")
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Error(resp.Status)
			}
		})
	}
	all.Wait()
	const retries = `pyroscope_write_retries_total{endpoint="u"}`
	before := relay.metric(t, retries)
	if resp := post(t, client, relay.url("/ingest"), []byte("x"), "User-Agent", "cold"); resp.StatusCode != http.StatusOK {
		t.Errorf("%d %s", resp.StatusCode, resp.body)
	}
	if n := relay.metric(t, retries) - before; n != 1 {
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
				relay := start(t, fastRetries("-delivery-timeout", "25s", "-upstream", upstream.URL+",name=u", "-upstream", mirror.URL+",name=m,required=false")...)
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
					relay.awaitMetric(t, `pyroscope_receive_http_requests_total{route="push",code="499"}`, 1)
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

// One that has time for an attempt does say something, though its last attempt is short.
func TestSilenceIsAnOutage(t *testing.T) {
	t.Parallel()
	relay := start(t, fastRetries("-upstream", "http://"+blackHole(t)+",name=hole", "-delivery-timeout", "600ms")...)
	for _, timeout := range []string{"500", "10000"} {
		resp := post(t, newClient(t, "HTTP/1.1"), relay.url(pushPath), []byte("x"), "Content-Type", "application/proto", "Connect-Timeout-Ms", timeout)
		if resp.StatusCode != http.StatusGatewayTimeout {
			t.Errorf("answered %s", resp.Status)
		}
	}
	eventually(t, "the upstream is said to be down", func() bool { return strings.Contains(relay.stderr.String(), "upstream is down") })
}

// A client in haste says nothing of the upstream: it is not down, and its spool does not rest.
func TestHastyClients(t *testing.T) {
	t.Parallel()
	for _, spool := range []bool{false, true} {
		upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				<-r.Context().Done()
				return
			}
			accept(w, r)
		})
		flags := []string{"-upstream", upstream.URL + ",name=up"}
		want := http.StatusGatewayTimeout
		if spool {
			flags, want = append(flags, "-spool-dir", t.TempDir()), http.StatusOK
		}
		relay := start(t, flags...)
		c := newClient(t, "HTTP/1.1")
		for _, status := range []int{want, http.StatusOK} {
			resp := post(t, c, relay.url(pushPath), []byte("x"), "Content-Type", "application/proto", "Connect-Timeout-Ms", "150")
			if resp.StatusCode != status {
				t.Errorf("spool %v: answered %s, want %d", spool, resp.Status, status)
			}
		}
		relay.awaitMetric(t, `pyroscope_write_sent_requests_total{endpoint="up"}`, map[bool]float64{false: 1, true: 2}[spool])
		if log := relay.stderr.String(); strings.Contains(log, "down") {
			t.Error("the upstream is said to be down")
		}
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
			resp.Body.Close()
			// Refused, and counted at no upstream.
			if resp, err = tryPost(t.Context(), clients[0], relay.url(pushPath), make([]byte, size), "Content-Type", "application/grpc"); err == nil {
				resp.Body.Close()
			}
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

// The wait doubles from the least to the most, with jitter within these bounds; Retry-After can only lengthen it.
func TestRetryDelay(t *testing.T) {
	t.Parallel()
	usual := retryPolicy{minBackoff: 500 * time.Millisecond, maxBackoff: 5 * time.Minute}
	even := retryPolicy{minBackoff: time.Second, maxBackoff: time.Second}
	for _, tt := range []struct {
		policy      *retryPolicy
		n           int
		retryAfter  time.Duration
		least, most time.Duration
	}{
		{&usual, 0, 0, 500 * time.Millisecond, 625 * time.Millisecond},
		{&usual, 1, 0, time.Second, 1250 * time.Millisecond},
		{&usual, 5, 0, 16 * time.Second, 20 * time.Second},
		{&usual, 9, 0, 4 * time.Minute, 5 * time.Minute},
		{&usual, 61, 0, 4 * time.Minute, 5 * time.Minute},
		{&usual, 62, 0, 4 * time.Minute, 5 * time.Minute},
		{&usual, 1 << 40, 0, 4 * time.Minute, 5 * time.Minute},
		{&even, 0, 0, time.Second, time.Second},
		{&even, 7, 0, time.Second, time.Second},
		{&usual, 0, 3 * time.Second, 3 * time.Second, 3 * time.Second},
		{&usual, 5, 3 * time.Second, 16 * time.Second, 20 * time.Second},
		{&usual, 0, time.Hour, 5 * time.Minute, 5 * time.Minute},
		{&usual, 0, math.MaxInt64, 5 * time.Minute, 5 * time.Minute},
	} {
		if d := tt.policy.delay(tt.n, tt.retryAfter, 0); d != tt.least {
			t.Errorf("%+v: at least %v", tt, d)
		}
		if d := tt.policy.delay(tt.n, tt.retryAfter, 0.999999); d > tt.most || d < tt.most-tt.most/1000 {
			t.Errorf("%+v: at most %v", tt, d)
		}
	}
}

// An attempt has its own time, but never more than three quarters of what is left while another may follow.
func TestAttemptTime(t *testing.T) {
	t.Parallel()
	r := retryPolicy{timeout: 10 * time.Second, retries: 2}
	forEver := retryPolicy{timeout: 10 * time.Second}
	for _, tt := range []struct {
		policy     *retryPolicy
		n          int
		left, want time.Duration
	}{
		{&r, 0, 8 * time.Second, 6 * time.Second},
		{&r, 1, 8 * time.Second, 6 * time.Second},
		{&r, 2, 8 * time.Second, 8 * time.Second},
		{&r, 0, time.Hour, 10 * time.Second},
		{&r, 2, time.Hour, 10 * time.Second},
		{&forEver, 99, 8 * time.Second, 6 * time.Second},
		{&forEver, 0, math.MaxInt64, 10 * time.Second},
		{&r, 0, -time.Second, -750 * time.Millisecond},
	} {
		if got := tt.policy.attemptTime(tt.n, tt.left); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

func TestRetriesAllowed(t *testing.T) {
	t.Parallel()
	three, forEver := retryPolicy{retries: 3}, retryPolicy{}
	for _, tt := range []struct {
		policy    *retryPolicy
		n, status int
		want      bool
	}{
		{&three, 0, 503, true}, {&three, 2, 503, true}, {&three, 3, 503, false},
		{&three, 1, 422, true}, {&three, 2, 422, false},
		{&forEver, 1 << 40, 503, true}, {&forEver, 1, 422, true}, {&forEver, 2, 422, false},
	} {
		if got := tt.policy.more(tt.n, tt.status); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

func TestParseRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		value string
		want  time.Duration
		ok    bool
	}{
		{"0", 0, true}, {"7", 7 * time.Second, true}, {"9223372036", 9223372036 * time.Second, true}, {"9223372037", math.MaxInt64, true},
		{"18446744073709551616", math.MaxInt64, true}, {"Fri, 20 Nov 2026 12:00:30 GMT", 30 * time.Second, true},
		{"Friday, 20-Nov-26 12:01:00 GMT", time.Minute, true}, {"Fri, 20 Nov 2026 11:00:00 GMT", 0, true}, {"Fri, 31 Dec 9999 23:59:59 GMT", math.MaxInt64, true},
		{"", 0, false}, {"-1", 0, false}, {"+1", 0, false}, {"1.5", 0, false}, {"soon", 0, false}, {"1_0", 0, false}, {"0x1", 0, false},
	} {
		got, ok := parseRetryAfter(tt.value, now)
		if ok != tt.ok || got != tt.want {
			t.Errorf("%q is %v, %v", tt.value, got, ok)
		}
	}
}

func FuzzParseRetryAfter(f *testing.F) {
	for _, s := range []string{"", "7", "-1", "99999999999999999999", "Fri, 20 Nov 2026 12:00:30 GMT", "Mon, 01 Jan 0001 00:00:00 GMT"} {
		f.Add(s)
	}
	r := retryPolicy{minBackoff: time.Second, maxBackoff: time.Minute}
	f.Fuzz(func(t *testing.T, s string) {
		d, ok := parseRetryAfter(s, time.Now())
		if d < 0 || !ok && d != 0 {
			t.Errorf("%q is %v, %v", s, d, ok)
		}
		if wait := r.delay(0, d, 0.5); wait < time.Second || wait > time.Minute {
			t.Errorf("%q makes the relay wait %v", s, wait)
		}
	})
}

func TestOneLine(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"": "", " a \n": "a", "a\r\nb\tc": "a  b c", "\x1b[31mred\x00": "[31mred", "\xff\xfeok": "?ok", "a\u202eb\u2028c": "a b c", "é世": "é世",
		strings.Repeat("x", maxWords+1):       strings.Repeat("x", maxWords),
		strings.Repeat("é", maxWords):         strings.Repeat("é", maxWords/2),
		"x" + strings.Repeat("é", maxWords):   "x" + strings.Repeat("é", maxWords/2-1),
		strings.Repeat("x ", maxWords) + "yy": strings.TrimSpace(strings.Repeat("x ", maxWords/2)),
	} {
		if got := oneLine(s); got != want {
			t.Errorf("%q became %q", s, got)
		}
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add("plain")
	f.Add("a\r\nb\x00\xff\u202e")
	f.Add(strings.Repeat("é ", maxWords))
	f.Fuzz(func(t *testing.T, s string) {
		got := oneLine(s)
		if len(got) > maxWords || !utf8.ValidString(got) || oneLine(got) != got {
			t.Errorf("%q became %q", s, got)
		}
		if i := strings.IndexFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("%q has %q at %d", s, got, i)
		}
	})
}

// judged is what the delivery makes of an answer on a route.
func judged(route routeID, a answer, r retryPolicy) outcome {
	p := &payload{route: route, header: http.Header{"Content-Type": {"application/proto"}}}
	return judge(p, &a, nil, &r, strings.TrimSpace)
}

func TestJudge(t *testing.T) {
	t.Parallel()
	usual := retryPolicy{on429: true}
	for _, tt := range []struct {
		route     routeID
		status    int
		mediaType string
		policy    retryPolicy
		want      verdict
	}{
		{routeIngest, 200, "", usual, accepted}, {routeIngest, 202, "text/html", usual, accepted}, {routeIngest, 299, "", usual, accepted},
		{routePush, 200, "application/proto", usual, accepted}, {routePush, 200, "application/json", usual, misplaced},
		{routePush, 200, "", usual, misplaced}, {routePush, 202, "application/proto", usual, misplaced},
		{routeIngest, 300, "", usual, misplaced}, {routePush, 399, "", usual, misplaced},
		{routeIngest, 400, "", usual, refused}, {routeIngest, 408, "", usual, transient}, {routeIngest, 409, "", usual, refused},
		{routeIngest, 429, "", usual, transient}, {routeIngest, 429, "", retryPolicy{}, refused},
		{routeIngest, 422, "", usual, refused}, {routeIngest, 422, "", retryPolicy{on422: true}, transient}, {routePush, 422, "", retryPolicy{on422: true}, refused},
		{routeIngest, 499, "", usual, refused}, {routeIngest, 500, "", usual, transient}, {routePush, 501, "", usual, refused},
		{routeIngest, 502, "", usual, transient}, {routeIngest, 508, "", usual, refused}, {routeIngest, 599, "", usual, transient},
		{routeIngest, 101, "", usual, transient}, {routeIngest, 999, "", usual, transient},
	} {
		if got := judged(tt.route, answer{status: tt.status, mediaType: tt.mediaType}, tt.policy); got.verdict != tt.want || (got.fault == nil) != (tt.want == accepted) {
			t.Errorf("%+v: %+v", tt, got)
		}
	}
}

// A Retry-After is passed on where it has a meaning, if it has one.
func TestJudgeRetryAfter(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		status      int
		value, want string
	}{{429, "7", "7"}, {503, "7", "7"}, {500, "7", ""}, {429, "soon", ""}, {503, "", ""}} {
		out := judged(routeIngest, answer{status: tt.status, retryAfter: tt.value}, retryPolicy{})
		if out.fault.retryAfter != tt.want {
			t.Errorf("%+v: %q", tt, out.fault.retryAfter)
		}
	}
}

// Of several failures one that may pass wins, the first of its kind; the text has a line for each.
func TestMerge(t *testing.T) {
	t.Parallel()
	upstreams := []*upstream{{public: "a"}, {public: "b"}, {public: "c"}}
	said := func(status int) outcome { return judged(routeIngest, answer{status: status}, retryPolicy{}) }
	timeout := judgeError(context.DeadlineExceeded)
	for _, tt := range []struct {
		outs []outcome
		want string
	}{
		{[]outcome{said(200), said(204), said(200)}, ""},
		{[]outcome{said(400), said(200), said(403)}, "400 invalid_argument\na: HTTP status 400 Bad Request\nc: HTTP status 403 Forbidden"},
		{[]outcome{said(400), said(503), said(500)}, "503 unavailable\na: HTTP status 400 Bad Request\nb: HTTP status 503 Service Unavailable\nc: HTTP status 500 Internal Server Error"},
		{[]outcome{said(500), said(503), said(400)}, "502 unavailable\na: HTTP status 500 Internal Server Error\nb: HTTP status 503 Service Unavailable\nc: HTTP status 400 Bad Request"},
		{[]outcome{said(200), said(501), timeout}, "504 deadline_exceeded\nb: HTTP status 501 Not Implemented\nc: no answer in time"},
		{[]outcome{said(413), said(302), said(200)}, "502 unavailable\na: HTTP status 413 Request Entity Too Large\nb: HTTP status 302 Found"},
		{[]outcome{said(401), said(429), said(200)}, "429 resource_exhausted\na: HTTP status 401 Unauthorized\nb: HTTP status 429 Too Many Requests"},
	} {
		got := ""
		if f := merge(upstreams, tt.outs); f != nil {
			got = fmt.Sprintf("%d %v\n%s", f.status, f.code, f.public)
		}
		if got != tt.want {
			t.Errorf("got  %q\nwant %q", got, tt.want)
		}
	}
	if kept := said(400).fault.public; kept != "HTTP status 400 Bad Request" {
		t.Errorf("merging changed a fault: %q", kept)
	}
}

// An attempt without an answer tells the client nothing of its cause.
func TestJudgeError(t *testing.T) {
	t.Parallel()
	dial := &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 4040}, Err: errors.New("refused")}
	for _, tt := range []struct {
		err    error
		status int
		code   code
		public string
	}{
		{dial, 502, codeUnavailable, "could not be reached"},
		{io.ErrUnexpectedEOF, 502, codeUnavailable, "could not be reached"},
		{errTooLong, 502, codeUnavailable, "answered too much"},
		{context.DeadlineExceeded, 504, codeDeadlineExceeded, "no answer in time"},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, 504, codeDeadlineExceeded, "no answer in time"},
	} {
		out := judgeError(tt.err)
		f := out.fault
		if out.verdict != transient || !f.transient || f.status != tt.status || f.code != tt.code || f.public != tt.public || !errors.Is(f, tt.err) || out.expired != (tt.status == 504) {
			t.Errorf("%v: %+v %+v", tt.err, out, f)
		}
	}
}

// A notebook is a log handler that keeps each line, with the time since it was made. Safe for concurrent use.
type notebook struct {
	mu    sync.Mutex
	start time.Time
	lines []string
}

func (n *notebook) Enabled(context.Context, slog.Level) bool { return true }
func (n *notebook) WithAttrs([]slog.Attr) slog.Handler       { return n }
func (n *notebook) WithGroup(string) slog.Handler            { return n }

func (n *notebook) Handle(_ context.Context, r slog.Record) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	line := fmt.Sprintf("%v %v %s", time.Since(n.start), r.Level, r.Message)
	r.Attrs(func(a slog.Attr) bool {
		line += " " + a.String()
		return true
	})
	n.lines = append(n.lines, line)
	return nil
}

// testUpstream is the upstream that -upstream with this value makes, under the usual flags and these.
func testUpstream(t *testing.T, log slog.Handler, flags ...string) (*upstream, *metrics) {
	t.Helper()
	c, err := parseConfig(flags)
	if err != nil {
		t.Fatal(err)
	}
	m := newMetrics()
	f := newFanout(c, m, slog.New(log))
	return append(f.required, f.mirrors...)[0], m
}

// An outage is a line when it begins, one every quietFor while it lasts, and one when it is over, with counts.
func TestHealthLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := &notebook{start: time.Now()}
		u, _ := testUpstream(t, n, "-upstream", "log:,name=u")
		p := &payload{}
		down := outcome{verdict: transient, fault: &fault{public: "no", cause: errors.New("because")}}
		for range 24 {
			u.settle(t.Context(), p, down)
			u.settle(t.Context(), p, down)
			time.Sleep(time.Second)
		}
		for range 5 {
			u.settle(t.Context(), p, outcome{verdict: accepted})
		}
		want := []string{
			"0s WARN upstream is down upstream=u failed=1 for=0s error=no: because",
			"10s WARN upstream is still down upstream=u failed=21 for=10s error=no: because",
			"20s WARN upstream is still down upstream=u failed=41 for=20s error=no: because",
			"24s INFO upstream is back upstream=u failed=48 for=24s",
		}
		if !slices.Equal(n.lines, want) {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(n.lines, "\n"), strings.Join(want, "\n"))
		}
	})
}

// An upstream that comes and goes does not fill the log, and neither does one that refuses much.
func TestQuietLogs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := &notebook{start: time.Now()}
		u, _ := testUpstream(t, n, "-upstream", "log:,name=u")
		p := &payload{}
		for range 100 {
			u.settle(t.Context(), p, outcome{verdict: transient, fault: &fault{public: "no"}})
			u.settle(t.Context(), p, outcome{verdict: accepted})
			u.settle(t.Context(), p, outcome{verdict: refused, status: 400, fault: &fault{public: "bad"}})
			time.Sleep(100 * time.Millisecond)
		}
		want := []string{
			"0s WARN upstream is down upstream=u failed=1 for=0s error=no",
			"0s INFO upstream is back upstream=u failed=1 for=0s",
			"0s WARN upstream refused a profile upstream=u route=ingest status=400 said=bad unlogged=0",
		}
		if !slices.Equal(n.lines, want) {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(n.lines, "\n"), strings.Join(want, "\n"))
		}
	})
}

// What became of a profile is counted under the reason that the person on call would give.
func TestDropReasons(t *testing.T) {
	t.Parallel()
	gone, hangUp := context.WithCancel(t.Context())
	hangUp()
	late, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	f := &fault{public: "no"}
	for _, tt := range []struct {
		ctx  context.Context
		out  outcome
		want string
	}{
		{t.Context(), outcome{verdict: refused, fault: f}, dropRefused},
		{t.Context(), outcome{verdict: misplaced, fault: f}, dropRefused},
		{gone, outcome{verdict: refused, fault: f}, dropRefused},
		{gone, outcome{verdict: transient, fault: f}, dropAbandoned},
		{gone, outcome{verdict: transient, expired: true, fault: f}, dropAbandoned},
		{late, outcome{verdict: transient, expired: true, fault: f}, dropDeadline},
		{late, outcome{verdict: transient, fault: f}, dropUnavailable},
		{t.Context(), outcome{verdict: transient, fault: f}, dropUnavailable},
	} {
		u, _ := testUpstream(t, slog.DiscardHandler, "-upstream", "log:")
		u.settle(tt.ctx, &payload{body: []byte("123")}, tt.out)
		for reason, n := range u.metrics.droppedRequests {
			if (n.Value() == 1) != (reason == tt.want) {
				t.Errorf("%+v: %s is %d", tt, reason, n.Value())
			}
		}
		if n := u.metrics.droppedBytes[tt.want].Value(); n != 3 {
			t.Errorf("%+v: %d bytes", tt, n)
		}
	}
}

// The delivery loop on a clock of its own: how often, how long, and when it gives up.
func TestDeliveryLoop(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		w.Header().Set("Connection", "close") // no goroutine of the relay waits for the network while its clock is to move
		if after := r.Header.Get("Accept"); after != "" {
			w.Header().Set("Retry-After", after)
		}
		w.WriteHeader(503)
	})
	for i, tt := range []struct {
		flags       []string
		time        time.Duration // for the delivery
		retryAfter  string
		attempts    int
		least, most time.Duration // that it takes
	}{
		{[]string{"-max-backoff-retries", "4"}, time.Hour, "", 5, 7500 * time.Millisecond, 9375 * time.Millisecond}, // .5+1+2+4
		{nil, 9400 * time.Millisecond, "", 5, 7500 * time.Millisecond, 9400 * time.Millisecond},
		{nil, 4400 * time.Millisecond, "", 4, 3500 * time.Millisecond, 4400 * time.Millisecond},
		{nil, 400 * time.Millisecond, "", 1, 0, 0},
		{[]string{"-max-backoff-retries", "0", "-max-backoff-period", "1s"}, 30 * time.Second, "", 0, 28 * time.Second, 30 * time.Second},
		{[]string{"-max-backoff-retries", "2"}, time.Minute, "20", 3, 40 * time.Second, 40 * time.Second},
		{[]string{"-max-backoff-retries", "2"}, 15 * time.Second, "20", 1, 0, 0},
		{[]string{"-max-backoff-retries", "2", "-max-backoff-period", "3s"}, time.Minute, "20", 3, 6 * time.Second, 6 * time.Second},
		{[]string{"-max-backoff-retries", "2"}, time.Minute, "soon", 3, 1500 * time.Millisecond, 1875 * time.Millisecond},
	} {
		tenant := fmt.Sprint("loop ", i)
		synctest.Test(t, func(t *testing.T) {
			u, _ := testUpstream(t, slog.DiscardHandler, append(tt.flags, "-upstream", upstream.URL)...)
			header := http.Header{"X-Scope-Orgid": {tenant}}
			if tt.retryAfter != "" {
				header["Accept"] = []string{tt.retryAfter}
			}
			start := time.Now()
			out := u.deliver(t.Context(), &payload{header: header, body: []byte("x")}, start.Add(tt.time))
			if took := time.Since(start); out.status != 503 || took < tt.least || took > tt.most {
				t.Errorf("%+v: status %d after %v", tt, out.status, took)
			}
			if n := int(u.metrics.retries.Value()) + 1; tt.attempts != 0 && n != tt.attempts || n != len(upstream.of(tenant)) {
				t.Errorf("%+v: %d attempts, %d arrived", tt, n, len(upstream.of(tenant)))
			}
		})
	}
}

// A wait between attempts ends with the client's patience.
func TestDeliveryLoopAbandoned(t *testing.T) {
	t.Parallel()
	dead := deadAddr(t)
	synctest.Test(t, func(t *testing.T) {
		u, _ := testUpstream(t, slog.DiscardHandler, "-upstream", "http://"+dead, "-min-backoff-period", "1m")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(10*time.Second, cancel)
		start := time.Now()
		out := u.deliver(ctx, &payload{}, start.Add(time.Hour))
		if took := time.Since(start); took != 10*time.Second || out.verdict != transient || u.metrics.retries.Value() != 0 {
			t.Errorf("%v after %v", out, took)
		}
	})
}

// A failed write waits for the reader to have the last word, but not for ever.
func TestAttentiveConn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for _, closed := range []time.Duration{0, lastWords / 2, 2 * lastWords} {
			near, far := net.Pipe()
			far.Close()
			c := &attentiveConn{Conn: near, closed: make(chan struct{})}
			start := time.Now()
			time.AfterFunc(closed, func() { c.Close() })
			if n, err := c.Write([]byte("x")); n != 0 || err == nil || time.Since(start) != min(closed, lastWords) {
				t.Errorf("closed after %v: %d, %v after %v", closed, n, err, time.Since(start))
			}
			time.Sleep(2 * lastWords)
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// Each attempt says how much of the client's own time is left, and nothing where the client set none.
func TestRemainingTime(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if n%2 == 1 {
			w.WriteHeader(503)
			return
		}
		accept(w, r)
	})
	relay := start(t, "-min-backoff-period", "20ms", "-max-backoff-period", "20ms", "-upstream", upstream.URL)
	c := newClient(t, "HTTP/1.1")
	header := []string{"Content-Type", "application/proto"}
	post(t, c, relay.url(pushPath), nil, header...)
	post(t, c, relay.url(pushPath), nil, append(header, "Connect-Timeout-Ms", "8000")...)
	var left []int
	for _, r := range upstream.requests() {
		n, _ := strconv.Atoi(r.header.Get("Connect-Timeout-Ms"))
		left = append(left, n)
	}
	if len(left) != 4 || left[0] != 0 || left[1] != 0 || left[2] > 8000 || left[3] > left[2]-20 || left[3] <= 0 {
		t.Errorf("Connect-Timeout-Ms of the attempts: %v", left)
	}
}

// What is set for an upstream goes there in the place of what the client sent, and nowhere else.
func TestHeadersOfAnUpstream(t *testing.T) {
	t.Parallel()
	own, other := newPeer(t, nil), newPeer(t, nil)
	relay := start(t, "-upstream", own.URL+",header=x-scope-orgid: own,header=X-More: a,header=X-More: b,header=Host: virtual.example", "-upstream", other.URL)
	eachPath(t, func(t *testing.T, path string) {
		post(t, newClient(t, "h2c"), relay.url(path), nil, "Content-Type", "application/json", "X-Scope-OrgID", "client", "X-More", "client")
		got := own.requests()[len(own.requests())-1]
		if h := got.header; !slices.Equal(h["X-Scope-Orgid"], []string{"own"}) || !slices.Equal(h["X-More"], []string{"a", "b"}) || got.host != "virtual.example" {
			t.Errorf("own headers: %v, host %s", h, got.host)
		}
		got = other.requests()[len(other.requests())-1]
		if h := got.header; !slices.Equal(h["X-Scope-Orgid"], []string{"client"}) || h["X-More"] != nil || "http://"+got.host != other.URL {
			t.Errorf("the other's headers: %v, host %s", h, got.host)
		}
	})
}

// eachPath runs a test for both routes.
func eachPath(t *testing.T, test func(t *testing.T, path string)) {
	for _, path := range []string{ingestPath, pushPath} {
		t.Run(path, func(t *testing.T) { test(t, path) })
	}
}

// Lines for each request and attempt are for debugging alone.
func TestRequestLines(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) { w.WriteHeader(503) })
	for level, want := range map[string]int{"info": 0, "debug": 4} {
		relay := start(t, fastRetries("-upstream", upstream.URL+",name=u", "-log-level", level)...)
		post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest?name=secret"), nil)
		relay.stop(t)
		log := relay.stderr.String()
		if n := strings.Count(log, "msg=request ") + strings.Count(log, `msg="attempt failed" upstream=u `); n != want {
			t.Errorf("%s: %d lines, want %d:\n%s", level, n, want, log)
		}
		if strings.Contains(log, "secret") {
			t.Errorf("%s: the query is in the log", level)
		}
	}
}

// What a crew runs never waits for what it ran before, and what it keeps of its goroutines is bounded.
func TestCrew(t *testing.T) {
	t.Parallel()
	c := crew{work: make(chan func())}
	for range 3 {
		const many = 3 * maxCrew
		var begun, done sync.WaitGroup
		begun.Add(many)
		done.Add(many)
		release := make(chan struct{})
		for range many {
			c.run(func() {
				defer done.Done()
				begun.Done()
				<-release
			})
		}
		begun.Wait() // all side by side
		close(release)
		done.Wait()
		eventually(t, "the crew is as large as it may be", func() bool { return c.idle.Load() == maxCrew })
	}
}

// A goroutine that is kept keeps nothing of what it ran: that would be bodies, outside the budget.
func TestCrewForgets(t *testing.T) {
	t.Parallel()
	c := crew{work: make(chan func())}
	body := new([1 << 20]byte)
	ref := weak.Make(body)
	var done sync.WaitGroup
	done.Add(1)
	c.run(func() {
		defer done.Done()
		body[0] = 1
	})
	done.Wait()
	eventually(t, "the goroutine is idle", func() bool { return c.idle.Load() == 1 })
	eventually(t, "what it ran is collected", func() bool {
		runtime.GC()
		return ref.Value() == nil
	})
}
