package main

import (
	"bufio"
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

const smallProfile, largeProfile = 7, 16 << 20

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
