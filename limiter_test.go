package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const (
	connectionsSeries = "pyroscope_receive_http_tcp_connections"
	reclaimedSeries   = "pyroscope_receive_http_tcp_connections_reclaimed_total"
	waitsSeries       = "pyroscope_receive_http_tcp_connections_limit_waits_total"
	inflightSeries    = "pyroscope_receive_http_inflight_bytes"
)

func rejectedSeries(reason string) string {
	return `pyroscope_receive_http_rejected_total{reason="` + reason + `"}`
}

// served checks that a well-behaved client gets its profile through.
func served(t testing.TB, p *program) {
	t.Helper()
	if resp := post(t, newClient(t, "HTTP/1.1"), p.url("/ingest?name=good"), []byte("good"), "Connection", "close"); resp.StatusCode != http.StatusOK {
		t.Fatalf("a well-behaved client got %d: %s", resp.StatusCode, resp.body)
	}
}

// dial opens a connection that is closed with the test.
func dial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

func write(t testing.TB, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

// ended reads until the relay ends the connection, and returns what it said.
func ended(t testing.TB, c net.Conn) string {
	t.Helper()
	b, err := io.ReadAll(c)
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		t.Fatalf("the relay did not end the connection; it said %q", b)
	}
	return string(b)
}

// ingestHead is the head of a POST /ingest with those header lines, each ending in CRLF.
func ingestHead(lines string) string {
	return "POST /ingest?name=x HTTP/1.1\r\nHost: relay\r\n" + lines + "\r\n"
}

// keepAlive posts a profile on a connection that stays open.
func keepAlive(t testing.TB, c net.Conn) response {
	t.Helper()
	write(t, c, ingestHead("Content-Length: 2\r\n")+"ok")
	resp := readResponse(t, bufio.NewReader(c))
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d: %s", resp.StatusCode, resp.body)
	}
	return resp
}

// Clients that stall are cut by the read timeout, whatever they stall in, and get no profile through.
func TestSlowClientsAreCut(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL, "-server-read-timeout", "300ms")
	for _, test := range []struct{ name, sent, answer string }{
		{"silent", "", ""},
		{"half a request line", "POST /ing", "HTTP/1.1 400 "},
		{"half a head", "POST /ingest HTTP/1.1\r\nHost: relay\r\nX-Slow: ", ""},
		{"half a body", ingestHead("Content-Length: 100\r\n") + "0123456789", "HTTP/1.1 408 "},
		{"half a chunk", ingestHead("Transfer-Encoding: chunked\r\n") + "64\r\n0123456789", "HTTP/1.1 408 "},
		{"half a preface", "PRI * HTTP/2.0\r\n\r\nSM", "HTTP/1.1 404 "},
		{"a preface alone", h2Preface, "\x00\x00"},
		{"HTTP/2, half a head", h2Preface + frame(frameSettings, 0, 0, "") + frame(frameHeaders, 0, 1, requestBlock("/ingest")), "\x00\x00"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, relay.addr)
			write(t, c, test.sent)
			served(t, relay)
			if said := ended(t, c); !strings.HasPrefix(said, test.answer) || test.answer == "" && said != "" {
				t.Errorf("the relay said %q, want %q", said, test.answer)
			}
		})
	}
	t.Cleanup(func() {
		relay.awaitMetric(t, connectionsSeries, 0)
		for _, r := range up.requests() {
			if string(r.body) != "good" {
				t.Errorf("a cut body was forwarded: %q", r.body)
			}
		}
	})
}

// A connection that has been served is cut when it stalls in a head, and kept when it is merely idle.
func TestSlowHeadAfterARequest(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", newPeer(t, nil).URL, "-server-read-timeout", "200ms")
	served := func(f gotFrame) bool { return f.kind == frameHeaders && f.flags&flagEnd != 0 }
	request := func(stream uint32) string {
		return frame(frameHeaders, flagEnd|flagEndHeaders, stream, requestBlock("/ingest"))
	}
	idle, stalled := dialHTTP2(t, relay.addr), dialHTTP2(t, relay.addr)
	ours, theirs := bufio.NewReader(idle), bufio.NewReader(stalled)
	for c, br := range map[net.Conn]*bufio.Reader{idle: ours, stalled: theirs} {
		write(t, c, request(1))
		frames(t, br, served)
	}
	write(t, stalled, frame(frameHeaders, 0, 3, requestBlock("/ingest")))
	frames(t, theirs, func(gotFrame) bool { return false }) // to the end of the connection
	answered := false
	write(t, idle, request(3))
	frames(t, ours, func(f gotFrame) bool {
		answered = f.stream == 3 && served(f)
		return answered
	})
	if !answered {
		t.Error("the idle connection was ended as well")
	}
	first := dial(t, relay.addr)
	keepAlive(t, first)
	write(t, first, "\r\n") // the server goes on waiting for four bytes
	ended(t, first)
}

// What is malformed or lies about itself is refused, and nothing of it is forwarded but what it said itself.
func TestMalformedRequests(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, raw string
		answers   []int // the connection ends after them
		forwarded string
	}{
		{"huge header", ingestHead("X-Huge: " + strings.Repeat("a", maxHeader+8<<10) + "\r\n"), []int{431}, ""},
		{"many headers", ingestHead(strings.Repeat("X-Many: a\r\n", maxHeader/8)), []int{431}, ""},
		{"length and chunked", ingestHead("Content-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n") + "2\r\nab\r\n0\r\n\r\n", []int{200}, "ab"},
		{"length and chunked, no end", ingestHead("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n") + "abcd", []int{400}, ""},
		{"two lengths", ingestHead("Content-Length: 4\r\nContent-Length: 5\r\n") + "abcde", []int{400}, ""},
		{"negative length", ingestHead("Content-Length: -4\r\n") + "abcd", []int{400}, ""},
		{"length with a sign", ingestHead("Content-Length: +4\r\n") + "abcd", []int{400}, ""},
		{"unknown coding", ingestHead("Transfer-Encoding: gzip, chunked\r\n") + "0\r\n\r\n", []int{501}, ""},
		{"bare LF in chunks", ingestHead("Transfer-Encoding: chunked\r\n") + "2\nab\n0\n\n", []int{400}, ""},
		{"bare LF after a chunk", ingestHead("Transfer-Encoding: chunked\r\n") + "2\r\nab\n0\r\n\r\n", []int{400}, ""},
		{"huge chunk size", ingestHead("Transfer-Encoding: chunked\r\n") + "ffffffffffffffffff\r\nab", []int{400}, ""},
		{"space before the colon", ingestHead("X-Scope-OrgID : a\r\nContent-Length: 0\r\n"), []int{400}, ""},
		{"folded header", ingestHead("X-Scope-OrgID: a\r\n b\r\nContent-Length: 0\r\nConnection: close\r\n"), []int{200}, ""},
		{"length too long", ingestHead("Content-Length: 9\r\n") + "abcd", []int{400}, ""},
		{"length too short", ingestHead("Content-Length: 2\r\n") + "abcd\r\n\r\n", []int{200, 400}, "ab"},
		{"no host", "POST /ingest HTTP/1.1\r\nContent-Length: 0\r\n\r\n", []int{400}, ""},
		{"not HTTP", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", []int{400}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			up := newPeer(t, nil)
			relay := start(t, "-upstream", up.URL, "-max-body-size", "1MiB")
			c := dial(t, relay.addr)
			go func() {
				io.WriteString(c, test.raw) // the relay may have hung up before the end of it
				c.CloseWrite()
			}()
			served(t, relay)
			if got := answers(t, c); !slices.Equal(got, test.answers) {
				t.Errorf("answers %v, want %v", got, test.answers)
			}
			forwarded := ""
			for _, r := range up.requests() {
				if r.target != "/ingest?name=good" {
					forwarded += string(r.body)
				}
			}
			if forwarded != test.forwarded {
				t.Errorf("%q was forwarded, want %q", forwarded, test.forwarded)
			}
		})
	}
}

// answers are the statuses of all answers on a connection, which ends after them.
func answers(t testing.TB, c net.Conn) (statuses []int) {
	t.Helper()
	br := bufio.NewReader(c)
	for {
		resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodPost})
		if err != nil {
			if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
				t.Fatal("the relay did not end the connection")
			}
			return statuses
		}
		io.Copy(io.Discard, resp.Body)
		statuses = append(statuses, resp.StatusCode)
	}
}

// HTTP/2 by hand (RFC 9113), for what no client library sends.
const (
	h2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

	frameData, frameHeaders, frameReset, frameSettings, frameGoAway, frameContinuation byte = 0, 1, 3, 4, 7, 9
	flagEnd, flagEndHeaders                                                            byte = 1, 4
)

func frame(kind, flags byte, stream uint32, payload string) string {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	return string(binary.BigEndian.AppendUint32(append(b, flags), stream)) + payload
}

// headerBlock is a list of names and values as literal fields without indexing (RFC 7541, section 6.2.2).
func headerBlock(fields ...string) string {
	var b []byte
	for i, s := range fields {
		if i%2 == 0 {
			b = append(b, 0)
		}
		if len(s) < 127 {
			b = append(b, byte(len(s)))
		} else {
			b = binary.AppendUvarint(append(b, 127), uint64(len(s)-127))
		}
		b = append(b, s...)
	}
	return string(b)
}

// requestBlock is the header block of a POST.
func requestBlock(path string, fields ...string) string {
	return headerBlock(append([]string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "relay"}, fields...)...)
}

// dialHTTP2 opens an h2c connection and sends what must come first.
func dialHTTP2(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c := dial(t, addr)
	write(t, c, h2Preface+frame(frameSettings, 0, 0, ""))
	return c
}

// A gotFrame is one frame from the relay.
type gotFrame struct {
	kind, flags byte
	stream      uint32
	payload     []byte
}

// frames reads the relay's frames until one that f says is the last, or the end of the connection.
func frames(t testing.TB, br *bufio.Reader, last func(gotFrame) bool) {
	t.Helper()
	var head [9]byte
	for {
		if _, err := io.ReadFull(br, head[:]); err != nil {
			if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
				t.Fatal("the relay neither answered nor ended the connection")
			}
			return
		}
		f := gotFrame{kind: head[3], flags: head[4], stream: binary.BigEndian.Uint32(head[5:])}
		f.payload = make([]byte, binary.BigEndian.Uint32(head[:4])>>8)
		io.ReadFull(br, f.payload)
		if last(f) {
			return
		}
	}
}

// goAway is the error code of the GOAWAY that the relay ends the connection with; 0 if it said nothing.
func goAway(t testing.TB, c net.Conn) (code uint32) {
	t.Helper()
	frames(t, bufio.NewReader(c), func(f gotFrame) bool {
		if f.kind == frameGoAway {
			code = binary.BigEndian.Uint32(f.payload[4:])
		}
		return false
	})
	return code
}

// A connection gets 250 requests at once; the one past that is refused, and the others are answered all the same.
func TestStreamFlood(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if r.URL.RawQuery != "name=good" {
			<-release
		}
	})
	relay := start(t, "-upstream", up.URL)
	c := dialHTTP2(t, relay.addr)
	var flood strings.Builder
	for i := range maxStreams + 1 {
		flood.WriteString(frame(frameHeaders, flagEnd|flagEndHeaders, uint32(2*i+1), requestBlock("/ingest")))
	}
	write(t, c, flood.String())
	br := bufio.NewReader(c)
	frames(t, br, func(f gotFrame) bool {
		if f.kind == frameReset && f.stream != 2*maxStreams+1 {
			t.Errorf("stream %d was refused", f.stream)
		}
		return f.kind == frameReset
	})
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", maxStreams)
	served(t, relay)
	close(release)
	answered := 0
	frames(t, br, func(f gotFrame) bool {
		if f.flags&flagEnd != 0 && (f.kind == frameHeaders || f.kind == frameData) {
			answered++
		}
		return answered == maxStreams
	})
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 0)
}

// resets sends n requests of which each is reset at once. It does not stop when the relay hangs up. It leaves c open: the
// server does not wait for its GOAWAY to be sent once the client has ended its side.
func resets(c *net.TCPConn, n int, flags byte) {
	for i := range n {
		id := uint32(2*i + 1)
		io.WriteString(c, frame(frameHeaders, flags, id, requestBlock("/ingest"))+frame(frameReset, 0, id, "\x00\x00\x00\x08"))
	}
}

// Requests that are begun and reset, over and over, reach no upstream and hold nothing afterwards.
func TestRapidReset(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	c := dialHTTP2(t, relay.addr)
	go func() {
		resets(c, 3000, flagEndHeaders)
		c.CloseWrite()
	}()
	served(t, relay)
	if code := goAway(t, c); code != 0 && code != 11 {
		t.Errorf("GOAWAY with code %d, want 11 (ENHANCE_YOUR_CALM) or none", code)
	}
	relay.awaitMetric(t, connectionsSeries, 0)
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 0)
	relay.awaitMetric(t, inflightSeries, 0)
	if n := len(up.requests()); n != 1 {
		t.Errorf("%d requests arrived upstream, want that of the well-behaved client alone", n)
	}
}

// Whole requests are delivered though they are reset, but never more than 250 of a connection at once, and a client
// that goes on ends its connection.
func TestRapidResetOfWholeRequests(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if r.URL.RawQuery != "name=good" {
			<-release
		}
	})
	relay := start(t, "-upstream", up.URL)
	c := dialHTTP2(t, relay.addr)
	go resets(c, 3000, flagEndHeaders|flagEnd)
	if code := goAway(t, c); code != 11 {
		t.Errorf("GOAWAY with code %d, want 11 (ENHANCE_YOUR_CALM)", code)
	}
	served(t, relay)
	if n := relay.metric(t, "pyroscope_receive_http_inflight_requests"); n > maxStreams {
		t.Errorf("%v requests in flight, want at most %d", n, maxStreams)
	}
	close(release)
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 0)
	relay.awaitMetric(t, connectionsSeries, 0)
}

// A head in endless CONTINUATION frames ends the connection, long before it fills the memory.
func TestContinuationFlood(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", newPeer(t, nil).URL)
	c := dialHTTP2(t, relay.addr)
	sent := make(chan int)
	go func() {
		n := 0
		write := func(s string) bool {
			m, err := io.WriteString(c, s)
			n += m
			return err == nil
		}
		write(frame(frameHeaders, 0, 1, requestBlock("/ingest")))
		for n < 64<<20 && write(frame(frameContinuation, 0, 1, headerBlock("x-flood", strings.Repeat("a", 8<<10)))) {
		}
		sent <- n
	}()
	served(t, relay)
	goAway(t, c)
	c.Close()
	if n := <-sent; n >= 64<<20 {
		t.Errorf("the relay read %d bytes of one head", n)
	}
	relay.awaitMetric(t, connectionsSeries, 0)
}

// A head somewhat over the limit is answered with 431 on HTTP/2 too, and the connection goes on.
func TestHugeHeadHTTP2(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", newPeer(t, nil).URL)
	c := dialHTTP2(t, relay.addr)
	head := frame(frameHeaders, flagEnd, 1, requestBlock("/ingest"))
	for range 3 {
		head += frame(frameContinuation, 0, 1, headerBlock("x-huge", strings.Repeat("a", maxHeader/4)))
	}
	write(t, c, head+frame(frameContinuation, flagEndHeaders, 1, headerBlock("x-huge", strings.Repeat("a", maxHeader/4+1<<10))))
	br := bufio.NewReader(c)
	answer := ""
	next := func(f gotFrame) bool {
		answer = string(f.payload)
		return f.kind == frameHeaders
	}
	if frames(t, br, next); !strings.Contains(answer, "431") {
		t.Errorf("answered %q, want 431", answer)
	}
	write(t, c, frame(frameHeaders, flagEnd|flagEndHeaders, 3, requestBlock("/ingest", "x-large", strings.Repeat("a", maxHeader/4))))
	if frames(t, br, next); !strings.HasPrefix(answer, "\x88") { // :status 200 in the static table
		t.Errorf("answered %q, want 200", answer)
	}
}

// A client that sends its whole body before it reads still gets to read why it was refused.
func TestRefusalsAreReadable(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) { <-release })
	relay := start(t, "-upstream", up.URL, "-max-body-size", "1MiB", "-max-inflight-bytes", "1MiB", "-delivery-timeout", "120s", "-remote-timeout", "120s", "-server-write-timeout", "150s", "-max-backoff-retries", "1")
	full := dial(t, relay.addr)
	write(t, full, ingestHead("Content-Length: 1048576\r\n")+strings.Repeat("x", 1<<20))
	relay.awaitMetric(t, inflightSeries, 1<<20)
	const size = 10 << 20
	large := strings.Repeat("x", size)
	for _, test := range []struct {
		name, raw string
		status    int
	}{
		{"declared too large", ingestHead("Content-Length: 10485760\r\n") + large, 413},
		{"chunked, no room", ingestHead("Transfer-Encoding: chunked\r\n") + "a00000\r\n" + large + "\r\n0\r\n\r\n", 503},
		{"declared, no room", ingestHead("Content-Length: 1048576\r\n") + large[:1<<20], 503},
		{"two tenants", ingestHead("Content-Length: 10485760\r\nX-Scope-OrgID: a\r\nX-Scope-OrgID: b\r\n") + large, 400},
		{"wrong path", "POST /other HTTP/1.1\r\nHost: relay\r\nContent-Length: 10485760\r\n\r\n" + large, 404},
		{"wrong method", "PUT /ingest HTTP/1.1\r\nHost: relay\r\nContent-Length: 10485760\r\n\r\n" + large, 405},
		{"cross-origin", ingestHead("Content-Length: 10485760\r\nSec-Fetch-Site: cross-site\r\n") + large, 403},
		{"Push, too large", "POST " + pushPath + " HTTP/1.1\r\nHost: relay\r\nContent-Type: application/proto\r\nContent-Length: 10485760\r\n\r\n" + large, 400},
		{"Push, unknown type", "POST " + pushPath + " HTTP/1.1\r\nHost: relay\r\nContent-Type: text/html\r\nContent-Length: 10485760\r\n\r\n" + large, 415},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			resp := sendRaw(t, relay.addr, []byte(test.raw)) // fails if the write does
			if resp.StatusCode != test.status {
				t.Errorf("status %d, want %d: %s", resp.StatusCode, test.status, resp.body)
			}
			if len(resp.body) == 0 {
				t.Error("no word of why")
			}
			if retry := resp.Header.Get("Retry-After"); (test.status == 503) != (retry == "1") {
				t.Errorf("Retry-After %q", retry)
			}
		})
	}
	t.Cleanup(func() {
		if n := len(up.requests()); n != 1 {
			t.Errorf("%d requests arrived upstream, want the first alone", n)
		}
		close(release)
	})
}

// A client that waits for 100 Continue is refused without it, and is not waited for.
func TestRefusalInsteadOfContinue(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", newPeer(t, nil).URL, "-max-body-size", "1MiB")
	c := dial(t, relay.addr)
	write(t, c, ingestHead("Content-Length: 1048577\r\nExpect: 100-continue\r\n"))
	if said := ended(t, c); !strings.HasPrefix(said, "HTTP/1.1 413 ") {
		t.Errorf("the relay said %q", said)
	}
	c = dial(t, relay.addr)
	write(t, c, ingestHead("Content-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n"))
	br := bufio.NewReader(c)
	if line, err := br.ReadString('\n'); line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatalf("the relay said %q: %v", line, err)
	}
	br.ReadString('\n')
	write(t, c, "ok")
	if resp := readResponse(t, br); resp.StatusCode != http.StatusOK {
		t.Errorf("status %d", resp.StatusCode)
	}
}

// lingering is an answer whose connection can be given a deadline, and the request's body.
type lingering struct {
	http.ResponseWriter
	flushed  bool
	deadline time.Duration
	read     int
}

func (l *lingering) Flush() { l.flushed = true }

func (l *lingering) SetReadDeadline(t time.Time) error {
	l.deadline = time.Until(t)
	return nil
}

func (l *lingering) Read(p []byte) (int, error) {
	l.read += len(p)
	if l.read > 1<<20 {
		return 0, io.EOF
	}
	return len(p), nil
}

func (l *lingering) Close() error { return nil }

// The rest of a body is read where somebody is sending it, and no longer than the read timeout.
func TestLinger(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		timeout time.Duration
		request http.Request
		want    time.Duration // 0: not read
	}{
		{"no timeout", 0, http.Request{ProtoMajor: 1, ContentLength: 1}, lingerTime},
		{"short timeout", time.Second, http.Request{ProtoMajor: 1, ContentLength: -1}, time.Second},
		{"no body", 0, http.Request{ProtoMajor: 1}, 0},
		{"HTTP/2", 0, http.Request{ProtoMajor: 2, ContentLength: 1}, 0},
		{"100-continue", 0, http.Request{ProtoMajor: 1, ContentLength: 1, Header: http.Header{"Expect": {"100-continue"}}}, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			l := &lingering{}
			test.request.Body = l
			(&gate{readTimeout: test.timeout}).linger(l, &test.request)
			if l.deadline != test.want || l.flushed != (test.want > 0) || (l.read > 1<<20) != (test.want > 0) {
				t.Errorf("%s: %+v", test.name, l)
			}
		})
	}
}

// The routes of the data port.
func TestRoutes(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, test := range []struct {
			method, path string
			status       int
			allow        string
		}{
			{"GET", "/ready", 200, ""},
			{"HEAD", "/ready", 200, ""},
			{"GET", "//ready", 200, ""},
			{"POST", "/ready", 405, "GET, HEAD"},
			{"GET", "/ingest", 405, "POST"},
			{"PUT", "/pyroscope/ingest", 405, "POST"},
			{"OPTIONS", "/ingest", 405, "POST"},
			{"GET", pushPath, 405, "POST"},
			{"POST", "/ingest", 200, ""},
			{"POST", "//ingest", 200, ""},
			{"POST", "///pyroscope//ingest", 200, ""},
			{"POST", "/pyroscope/ingest", 200, ""},
			{"POST", "/ingest/", 404, ""},
			{"POST", "/x/../ingest", 404, ""},
			{"POST", "/x/ingest", 404, ""},
			{"POST", "/./ingest", 404, ""},
			{"POST", "/INGEST", 404, ""},
			{"POST", "/pyroscope" + pushPath, 404, ""},
			{"GET", "/", 404, ""},
			{"GET", "/metrics", 404, ""},
			{"GET", "/debug/vars", 404, ""},
			{"GET", "/debug/pprof/", 404, ""},
		} {
			r, err := http.NewRequestWithContext(t.Context(), test.method, relay.url(test.path), nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.Transport.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			got := readAll(t, resp)
			if got.StatusCode != test.status || got.Header.Get("Allow") != test.allow {
				t.Errorf("%s %s: %d, Allow %q, want %d, %q", test.method, test.path, got.StatusCode, got.Header.Get("Allow"), test.status, test.allow)
			}
		}
		resp := post(t, c, relay.url("//pyroscope/ingest?from=1;2&name=a%20b&&"), nil)
		got := up.requests()
		if target := got[len(got)-1].target; resp.StatusCode != 200 || !strings.HasPrefix(target, "/ingest") {
			t.Errorf("status %d, target %s", resp.StatusCode, target)
		}
	})
}

// What the relay itself refuses, in the words of each protocol, and what it counts.
func TestRefusals(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL, "-max-body-size", "1KiB")
	long := strings.Repeat("t", maxTenant)
	over := make([]byte, 1<<10+1)
	for _, test := range []struct {
		name   string
		body   []byte
		header []string
		status int // on /ingest
		code   code
		reason string // "" = accepted
	}{
		{"nothing special", nil, nil, 200, 0, ""},
		{"body at the limit", over[1:], nil, 200, 0, ""},
		{"body over the limit", over, nil, 413, codeInvalidArgument, rejectBodySize},
		{"tenant at the limit", nil, []string{"X-Scope-OrgID", long}, 200, 0, ""},
		{"tenant over the limit", nil, []string{"X-Scope-OrgID", long + "t"}, 400, codeInvalidArgument, rejectTenant},
		{"the same tenant twice", nil, []string{"X-Scope-OrgID", "a", "X-Scope-OrgID", "a"}, 200, 0, ""},
		{"two tenants", nil, []string{"X-Scope-OrgID", "a", "X-Scope-OrgID", "b"}, 400, codeInvalidArgument, rejectTenant},
		{"tenant with a tab", nil, []string{"X-Scope-OrgID", "a\tb"}, 400, codeInvalidArgument, rejectTenant},
		{"tenant beyond ASCII", nil, []string{"X-Scope-OrgID", "\xc3\xa9"}, 400, codeInvalidArgument, rejectTenant},
		{"another relay's mark", nil, []string{"Via", "1.1 pyroscope-relay-0123456789abcdef"}, 200, 0, ""},
		{"from the same origin", nil, []string{"Sec-Fetch-Site", "same-origin", "Origin", "http://a"}, 200, 0, ""},
	} {
		eachProto(t, func(t *testing.T, c *http.Client) {
			resp := post(t, c, relay.url("/ingest"), test.body, test.header...)
			if resp.StatusCode != test.status {
				t.Errorf("%s: /ingest answered %d, want %d: %s", test.name, resp.StatusCode, test.status, resp.body)
			}
			resp = post(t, c, relay.url(pushPath), test.body, append(test.header, "Content-Type", "application/proto")...)
			name, status := test.code.describe()
			if resp.StatusCode != status || test.code != codeOK && !strings.Contains(string(resp.body), `"`+name+`"`) {
				t.Errorf("%s: Push answered %d, want %d: %s", test.name, resp.StatusCode, status, resp.body)
			}
		})
	}
	t.Cleanup(func() {
		for reason, want := range map[string]float64{rejectBodySize: 4, rejectTenant: 16, rejectInflight: 0, rejectBodyRead: 0} {
			if got := relay.metric(t, rejectedSeries(reason)); got != want {
				t.Errorf("%v requests counted as %s, want %v", got, reason, want)
			}
		}
	})
}

// A browser's cross-origin request is refused.
func TestCrossOrigin(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	c := newClient(t, "HTTP/1.1")
	for _, header := range [][]string{
		{"Sec-Fetch-Site", "cross-site"},
		{"Sec-Fetch-Site", "same-site"},
		{"Origin", "https://elsewhere.example"},
	} {
		for _, path := range []string{"/ingest", pushPath} {
			if resp := post(t, c, relay.url(path), nil, append(header, "Content-Type", "application/json")...); resp.StatusCode != http.StatusForbidden {
				t.Errorf("%v on %s: %d, want 403", header, path, resp.StatusCode)
			}
		}
	}
	if n := relay.metric(t, rejectedSeries(rejectCrossOrigin)); n != 6 || len(up.requests()) != 0 {
		t.Errorf("%v counted, %d forwarded", n, len(up.requests()))
	}
}

// A relay whose upstream leads back to it says so instead of going round.
func TestLoop(t *testing.T) {
	t.Parallel()
	var relay *program
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		again, _ := http.NewRequest(http.MethodPost, relay.url(r.URL.Path), nil)
		again.Header = r.Header
		resp, err := http.DefaultTransport.RoundTrip(again)
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	})
	relay = start(t, "-upstream", up.URL)
	c := newClient(t, "HTTP/1.1")
	if resp := post(t, c, relay.url("/ingest"), nil); resp.StatusCode != http.StatusLoopDetected {
		t.Errorf("/ingest answered %d, want 508: %s", resp.StatusCode, resp.body)
	}
	resp := post(t, c, relay.url(pushPath), nil, "Content-Type", "application/proto")
	if resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(resp.body), `"failed_precondition"`) {
		t.Errorf("Push answered %d: %s", resp.StatusCode, resp.body)
	}
	if n := relay.metric(t, rejectedSeries(rejectLoop)); n != 2 {
		t.Errorf("%v loops counted, want 2", n)
	}
}

// Only allow-listed headers go upstream, as they came.
func TestForwardedHeaders(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL, "-forward-header", "x-mine", "-forward-header", "X-Nominated")
	c := dial(t, relay.addr)
	write(t, c, ingestHead("Content-Length: 0\r\nContent-Type: text/a\r\nContent-Type: text/b\r\nContent-Encoding: x-own\r\nUser-Agent: Agent/1\r\n"+
		"Accept: */*;a=1\r\nx-scope-orgid: tenant\r\nTraceparent: tp\r\nTracestate: ts\r\nUber-Trace-Id: ut\r\nX-Mine: 1\r\nX-Mine: 2\r\n"+
		"X_Scope_OrgID: alias\r\nAuthorization: Basic c2VjcmV0\r\nCookie: secret\r\nForwarded: for=secret\r\nX-Forwarded-For: secret\r\n"+
		"X-Forwarded-Host: secret\r\nX-Real-Ip: secret\r\nProxy-Authorization: secret\r\nTe: trailers\r\nX-Nominated: secret\r\n"+
		"Keep-Alive: secret\r\nX-Other: secret\r\nVia: 1.0 before\r\nConnection: close, x-nominated\r\n"))
	ended(t, c)
	got := up.one(t).header
	for name, want := range map[string][]string{
		"Content-Type": {"text/a", "text/b"}, "Content-Encoding": {"x-own"}, "User-Agent": {"Agent/1"}, "Accept": {"*/*;a=1"},
		"X-Scope-Orgid": {"tenant"}, "Traceparent": {"tp"}, "Tracestate": {"ts"}, "Uber-Trace-Id": {"ut"}, "X-Mine": {"1", "2"},
	} {
		if !slices.Equal(got[name], want) {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
		delete(got, name)
	}
	if via := got["Via"]; len(via) != 2 || via[0] != "1.0 before" || !strings.HasPrefix(via[1], "1.1 pyroscope-relay-") {
		t.Errorf("Via: %q", via)
	}
	delete(got, "Via")
	delete(got, "Content-Length")
	if len(got) != 0 {
		t.Errorf("these went upstream too: %v", got)
	}
}

// The version in Via is that of the request (RFC 9110, section 7.6.3), and a query goes into a request line: it may not
// end it.
func TestOtherVersions(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	c := dial(t, relay.addr)
	write(t, c, "POST /ingest HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
	ended(t, c)
	c = dialHTTP2(t, relay.addr)
	var statuses []byte // in the static table of HPACK
	br := bufio.NewReader(c)
	for i, path := range []string{"/ingest?a=%20", "/ingest?a b", "/ingest?a=HTTP/1.0 HTTP/1.1"} {
		write(t, c, frame(frameHeaders, flagEnd|flagEndHeaders, uint32(2*i+1), requestBlock(path)))
		frames(t, br, func(f gotFrame) bool {
			if f.kind == frameHeaders {
				statuses = append(statuses, f.payload[0]&0x7f)
			}
			return f.kind == frameHeaders
		})
	}
	if want := []byte{8, 12, 12}; !bytes.Equal(statuses, want) { // 200, 400, 400
		t.Errorf("statuses %d, want %d", statuses, want)
	}
	var vias, targets []string
	for _, r := range up.requests() {
		version, _, _ := strings.Cut(r.header.Get("Via"), " ")
		vias, targets = append(vias, version), append(targets, r.target)
	}
	if !slices.Equal(vias, []string{"1.0", "2"}) || !slices.Equal(targets, []string{"/ingest", "/ingest?a=%20"}) {
		t.Errorf("Via %q, targets %q", vias, targets)
	}
}

// HTTP/1.0 knows no chunks: a body without a length would be lost in silence, and one that is in chunks all the same
// would be read as further requests.
func TestHTTP10(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	hidden := "POST /ingest?hidden HTTP/1.1\r\nHost: relay\r\nContent-Length: 0\r\n\r\n"
	for _, test := range []struct{ raw, answer string }{
		{"POST /ingest HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "HTTP/1.0 411 "},
		{"POST /ingest HTTP/1.0\r\nConnection: keep-alive\r\n\r\nabcdef", "HTTP/1.0 411 "},
		{"POST /ingest HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc" + hidden, "HTTP/1.0 200 "},
	} {
		c := dial(t, relay.addr)
		write(t, c, test.raw)
		c.CloseWrite()
		if said := ended(t, c); !strings.HasPrefix(said, test.answer) || strings.Count(said, "HTTP/1.") != 1 {
			t.Errorf("%q: answered %q", test.raw, said)
		}
	}
	if r := up.one(t); string(r.body) != "abc" {
		t.Errorf("%q arrived", r.body)
	}
}

// Connection may not take the tenant away from a request.
func TestNominatedTenant(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	for _, line := range []string{"Connection: X-Scope-OrgID\r\n", "Connection: close\r\nConnection: a, x-scope-orgid\r\n", "Connection:x-scope-orgid\t,\r\n"} {
		resp := sendRaw(t, relay.addr, []byte(ingestHead("Content-Length: 0\r\nX-Scope-OrgID: a\r\n"+line)))
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%q: %d, want 400", line, resp.StatusCode)
		}
	}
	if n := relay.metric(t, rejectedSeries(rejectTenant)); n != 3 || len(up.requests()) != 0 {
		t.Errorf("%v counted, %d forwarded", n, len(up.requests()))
	}
}

// A body may have the size of -max-body-size and not a byte more, however it comes, and a refused one reaches nobody.
func TestBodySize(t *testing.T) {
	t.Parallel()
	const most = 100 << 10 // more than the first step, and no power of two
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL, "-max-body-size", "100KiB", "-max-inflight-bytes", "100KiB")
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, chunked := range []bool{false, true} {
			for _, size := range []int{0, 1, firstStep, most - 1, most, most + 1} {
				var body io.Reader = strings.NewReader(strings.Repeat("b", size))
				if chunked {
					body = struct{ io.Reader }{body} // of a length that the client does not know
				}
				r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, relay.url("/ingest"), body)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := c.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				want := http.StatusOK
				if size > most {
					want = http.StatusRequestEntityTooLarge
				}
				if got := readAll(t, resp); got.StatusCode != want {
					t.Errorf("%d bytes, chunked %v: %d, want %d: %s", size, chunked, got.StatusCode, want, got.body)
				}
			}
		}
	})
	t.Cleanup(func() {
		for _, r := range up.requests() {
			if len(r.body) > most {
				t.Errorf("%d bytes were forwarded", len(r.body))
			}
		}
		if n := relay.metric(t, inflightSeries); n != 0 {
			t.Errorf("%v bytes still held", n)
		}
	})
}

// A body that its client cuts short reaches no upstream.
func TestCutBodies(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	for _, raw := range []string{
		ingestHead("Content-Length: 10\r\n") + "12345",
		ingestHead("Content-Length: 10\r\n"),
		ingestHead("Transfer-Encoding: chunked\r\n") + "a\r\n12345",
		ingestHead("Transfer-Encoding: chunked\r\n") + "5\r\n12345\r\n",
		ingestHead("Transfer-Encoding: chunked\r\n") + "5\r\n12345\r\n0\r\n",
	} {
		c := dial(t, relay.addr)
		write(t, c, raw)
		c.CloseWrite()
		if got := answers(t, c); !slices.Equal(got, []int{http.StatusBadRequest}) {
			t.Errorf("%q: answers %v, want 400", raw, got)
		}
	}
	c := dialHTTP2(t, relay.addr)
	write(t, c, frame(frameHeaders, flagEndHeaders, 1, requestBlock("/ingest", "content-length", "10"))+frame(frameData, 0, 1, "12345")+
		frame(frameHeaders, flagEndHeaders, 3, requestBlock("/ingest", "content-length", "10"))+frame(frameData, flagEnd, 3, "12345")+
		frame(frameHeaders, flagEndHeaders, 5, requestBlock("/ingest"))+frame(frameData, 0, 5, "12345")+frame(frameReset, 0, 5, "\x00\x00\x00\x08"))
	relay.awaitMetric(t, rejectedSeries(rejectBodyRead), 7)
	c.Close()
	relay.awaitMetric(t, rejectedSeries(rejectBodyRead), 8)
	if n := len(up.requests()); n != 0 {
		t.Errorf("%d cut bodies were forwarded", n)
	}
	relay.awaitMetric(t, inflightSeries, 0)
}

// At the limit the longest idle connection makes room, on HTTP/1 and HTTP/2, and a busy one never does.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	let := sync.OnceFunc(func() { close(release) })
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if r.URL.RawQuery == "name=busy" {
			<-release
		}
	})
	t.Cleanup(let)
	relay := start(t, "-upstream", up.URL, "-conn-limit", "3")
	busy := dial(t, relay.addr)
	write(t, busy, "POST /ingest?name=busy HTTP/1.1\r\nHost: relay\r\nContent-Length: 0\r\n\r\n")
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 1)
	first := dial(t, relay.addr)
	keepAlive(t, first)
	h2 := newClient(t, "h2c")
	for range 20 { // and meanwhile the server surely notices that first is idle
		post(t, h2, relay.url("/ingest"), nil)
	}
	relay.awaitMetric(t, connectionsSeries, 3)
	second := dial(t, relay.addr)
	keepAlive(t, second) // takes the place of first
	if said := ended(t, first); said != "" {
		t.Errorf("the reclaimed connection was told %q", said)
	}
	third := dial(t, relay.addr)
	keepAlive(t, third) // takes the place of the HTTP/2 connection
	keepAlive(t, second)
	if reclaimed, waits := relay.metric(t, reclaimedSeries), relay.metric(t, waitsSeries); reclaimed != 2 || waits != 2 {
		t.Errorf("%v reclaimed, %v waited, want 2 of both", reclaimed, waits)
	}
	if n := relay.metric(t, connectionsSeries); n != 3 {
		t.Errorf("%v connections, want 3", n)
	}
	post(t, h2, relay.url("/ingest"), nil) // its client notices, and takes the place of third
	let()
	if resp := readResponse(t, bufio.NewReader(busy)); resp.StatusCode != http.StatusOK {
		t.Errorf("the busy connection got %d", resp.StatusCode)
	}
	if n := strings.Count(relay.stderr.String(), "connection limit reached"); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
}

// When nobody is idle, a client waits for the first answer, and that says that its connection ends.
func TestBusyConnectionMakesRoomWithItsAnswer(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) { <-release })
	relay := start(t, "-upstream", up.URL, "-conn-limit", "1")
	busy, waiting := dial(t, relay.addr), dial(t, relay.addr)
	write(t, busy, ingestHead("Content-Length: 0\r\n"))
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 1)
	write(t, waiting, ingestHead("Content-Length: 0\r\n"))
	relay.awaitMetric(t, waitsSeries, 1)
	close(release)
	resp := readResponse(t, bufio.NewReader(busy))
	if resp.StatusCode != http.StatusOK || !resp.Close {
		t.Errorf("the busy connection got %d, close %v", resp.StatusCode, resp.Close)
	}
	if resp := readResponse(t, bufio.NewReader(waiting)); resp.StatusCode != http.StatusOK || resp.Close {
		t.Errorf("the waiting one got %d, close %v", resp.StatusCode, resp.Close)
	}
}

// What was invited by 100 Continue is read to its end too, when it is refused on the way.
func TestRefusalAfterContinue(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", newPeer(t, nil).URL, "-max-body-size", "64KiB")
	c := dial(t, relay.addr)
	br := bufio.NewReader(c)
	write(t, c, ingestHead("Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n"))
	if line, err := br.ReadString('\n'); !strings.Contains(line, " 100 ") || err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	br.ReadString('\n')
	chunk := "10000\r\n" + strings.Repeat("x", 64<<10) + "\r\n"
	for range 160 {
		write(t, c, chunk) // fails if the relay has hung up
	}
	write(t, c, "0\r\n\r\n")
	if resp := readResponse(t, br); resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d, want 413", resp.StatusCode)
	}
}

// A handler that panics is a fault of the relay's: it is logged, whatever the level, and costs that request alone.
func TestPanicsAreLogged(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	g := &gate{metrics: newMetrics(), log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError})),
		ready: func() bool { return true }, origins: http.NewCrossOriginProtection(),
		ingest: func(*http.Request) (exchange, *fault) { panic("boom") }}
	defer func() {
		if v := recover(); v != http.ErrAbortHandler || !strings.Contains(log.String(), "panic=boom") || !strings.Contains(log.String(), "stack=") {
			t.Errorf("%v, logged %q", v, &log)
		}
		if n := g.metrics.inflightRequests.Value(); n != 0 {
			t.Errorf("%v requests in flight", n)
		}
	}()
	g.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, ingestPath, nil))
}

// At the debug level each answer is logged, also those that no profile has a part in.
func TestEveryAnswerIsLoggedAtDebug(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", "log:", "-log-level", "debug")
	get(t, relay.url("/nowhere"))
	get(t, relay.url("/ingest"))
	for _, want := range []string{"route=other code=404", "route=ingest code=405"} {
		eventually(t, want+" is logged", func() bool { return strings.Contains(relay.stderr.String(), want) })
	}
}

// A connection that was refused is read for a while: another is to make room meanwhile.
func TestRefusedConnectionMakesNoRoom(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) { <-release })
	relay := start(t, "-upstream", up.URL, "-conn-limit", "2", "-max-body-size", "10")
	refused, busy, waiting := dial(t, relay.addr), dial(t, relay.addr), dial(t, relay.addr)
	write(t, refused, "POST ")
	write(t, busy, ingestHead("Content-Length: 0\r\n"))
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 1)
	write(t, waiting, ingestHead("Content-Length: 0\r\n"))
	relay.awaitMetric(t, waitsSeries, 1)
	write(t, refused, strings.TrimPrefix(ingestHead("Content-Length: 11\r\n"), "POST "))
	relay.awaitMetric(t, rejectedSeries(rejectBodySize), 1)
	close(release)
	if resp := readResponse(t, bufio.NewReader(busy)); resp.StatusCode != http.StatusOK || !resp.Close {
		t.Errorf("the busy connection got %d, close %v", resp.StatusCode, resp.Close)
	}
	readResponse(t, bufio.NewReader(waiting))
}

// Many more clients than slots, all of them busy and idle in turn: each gets every answer, and no slot is lost.
func TestChurnAtTheLimit(t *testing.T) {
	t.Parallel()
	const limit, clients, rounds = 4, 24, 6
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL, "-conn-limit", "4")
	var all sync.WaitGroup
	for i := range clients {
		c := newClient(t, []string{"HTTP/1.1", "h2c"}[i%2])
		all.Go(func() {
			for range rounds {
				resp, err := tryPost(t.Context(), c, relay.url("/ingest"), []byte("x"))
				if err != nil {
					t.Error(err)
					return
				}
				if resp.Body.Close(); resp.StatusCode != http.StatusOK {
					t.Errorf("status %d", resp.StatusCode)
				}
				c.CloseIdleConnections() // a request that crosses with the closing of its connection would be lost
			}
		})
	}
	all.Wait()
	if n := relay.metric(t, connectionsSeries); n > limit {
		t.Errorf("%v connections, the limit is %d", n, limit)
	}
	if n := len(up.requests()); n != clients*rounds {
		t.Errorf("%d requests arrived, want %d", n, clients*rounds)
	}
}

// Thousands of connections that end in every way leave neither a slot taken nor a goroutine behind.
func TestAbortedConnectionsLeaveNothing(t *testing.T) {
	t.Parallel()
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) { w.Header().Set("Connection", "close") })
	relay := start(t, "-upstream", up.URL, "-conn-limit", "64")
	served(t, relay)
	relay.awaitMetric(t, connectionsSeries, 0)
	before := relay.metric(t, "go_goroutines")
	starts := []string{
		"", "POST", ingestHead("Content-Length: 10\r\n") + "123", ingestHead("Transfer-Encoding: chunked\r\n") + "5\r\n1",
		"PRI * HT", h2Preface, h2Preface + frame(frameSettings, 0, 0, "") + frame(frameHeaders, flagEndHeaders, 1, requestBlock("/ingest")),
		ingestHead("Content-Length: 2\r\n") + "ok", "\x16\x03\x01", "junk\r\n\r\n",
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for i := range 250 {
				c, err := net.Dial("tcp", relay.addr)
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(c, starts[i%len(starts)])
				if i%3 > 0 {
					c.(*net.TCPConn).SetLinger(0) // a reset
				}
				c.Close()
			}
		})
	}
	all.Wait()
	relay.awaitMetric(t, connectionsSeries, 0)
	relay.awaitMetric(t, inflightSeries, 0)
	served(t, relay)
	eventually(t, "the goroutines are gone", func() bool { return relay.metric(t, "go_goroutines") <= before+2 })
	relay.stop(t)
}

// pipes is a listener whose connections are pipes in memory.
type pipes struct {
	offered chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func newPipes() *pipes { return &pipes{offered: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.offered:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial() net.Conn {
	client, server := net.Pipe()
	p.offered <- server
	return client
}

// acceptOne is a connection that l accepts, and its other end.
func acceptOne(t *testing.T, p *pipes, l *connLimiter) (*limitedConn, net.Conn) {
	t.Helper()
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result)
	go func() {
		c, err := l.Accept()
		done <- result{c, err}
	}()
	client := p.dial()
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	return got.c.(*limitedConn), client
}

// reader notes what a Read in the background comes to.
func reader(c net.Conn) <-chan string {
	done := make(chan string, 1)
	go func() {
		b := make([]byte, 100)
		n, err := c.Read(b)
		done <- fmt.Sprint(string(b[:n]), err)
	}()
	return done
}

const cut = "i/o timeout" // what a reclaimed connection reads

// rest brings a connection to where the server waits for its next request.
func rest(t *testing.T, l *connLimiter, c *limitedConn, client net.Conn, request string) {
	t.Helper()
	got := reader(c)
	write(t, client, request)
	if s := <-got; s != request+"<nil>" {
		t.Fatalf("read %q", s)
	}
	l.state(c, http.StateActive)
	go io.ReadFull(client, make([]byte, 2))
	c.Write([]byte("ok"))
	l.state(c, http.StateIdle)
}

// inBubble runs a test of a limiter with fake time.
func inBubble(t *testing.T, limit int, test func(t *testing.T, p *pipes, l *connLimiter, m *metrics)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, p := newMetrics(), newPipes()
		l := limitListener(p, limit, m, slog.New(slog.DiscardHandler))
		defer l.Close()
		test(t, p, l, m)
	})
}

// park makes one more connection wait, until the test accepts it from the channel.
func park(p *pipes, l *connLimiter) <-chan net.Conn {
	done := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		done <- c
	}()
	p.dial()
	synctest.Wait()
	return done
}

func TestIdleConnectionIsLookedAtOnceMore(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		c, client := acceptOne(t, p, l)
		rest(t, l, c, client, "GET")
		c.SetReadDeadline(time.Now().Add(time.Hour)) // as the server does
		got := reader(c)
		next := park(p, l)
		time.Sleep(lastLook / 2)
		write(t, client, "late") // the request crosses with the wish to close
		if s := <-got; s != "late<nil>" {
			t.Fatalf("the request was lost: %s", s)
		}
		l.state(c, http.StateActive)
		time.Sleep(time.Minute)
		if len(next) != 0 || m.reclaimed.Value() != 0 {
			t.Fatal("a busy connection was reclaimed")
		}
		got = reader(c)
		time.Sleep(time.Hour) // the server's own deadline was put back
		if s := <-got; s != cut {
			t.Fatalf("read %s", s)
		}
		c.Close()
		c.Close()
		(<-next).Close()
		if m.connections.Value() != 0 || len(l.slots) != 0 {
			t.Errorf("%d connections, %d slots taken", m.connections.Value(), len(l.slots))
		}
	})
}

func TestReclaimedConnectionEnds(t *testing.T) {
	inBubble(t, 2, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		longest, client := acceptOne(t, p, l)
		rest(t, l, longest, client, "GET")
		other, client := acceptOne(t, p, l)
		rest(t, l, other, client, "GET")
		gone, stays := reader(longest), reader(other)
		start := time.Now()
		next := park(p, l)
		if s := <-gone; s != cut || time.Since(start) != lastLook {
			t.Fatalf("read %s after %v", s, time.Since(start))
		}
		if s := <-reader(longest); s != cut {
			t.Fatalf("read again: %s", s)
		}
		longest.Close()
		l.state(longest, http.StateClosed)
		c := <-next
		time.Sleep(time.Second)
		if len(stays) != 0 || m.reclaimed.Value() != 1 || m.limitWaits.Value() != 1 || m.connections.Value() != 2 {
			t.Errorf("reclaimed %v, waits %v, connections %v", m.reclaimed, m.limitWaits, m.connections)
		}
		c.Close()
		other.Close()
		<-stays
	})
}

func TestRoomMadeByAnother(t *testing.T) {
	inBubble(t, 2, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		idle, client := acceptOne(t, p, l)
		rest(t, l, idle, client, "GET")
		busy, _ := acceptOne(t, p, l)
		next := park(p, l) // asks idle, whose server has not come to read yet
		busy.Close()
		c := <-next
		got := reader(idle)
		time.Sleep(time.Second)
		if len(got) != 0 || m.reclaimed.Value() != 0 {
			t.Fatal("an idle connection was closed although the room was there")
		}
		park(p, l) // and it is the first to go the next time
		if s := <-got; s != cut {
			t.Errorf("read %s", s)
		}
		idle.Close()
		c.Close()
	})
}

func TestHTTP2ConnectionMustBeQuiet(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		c, client := acceptOne(t, p, l)
		rest(t, l, c, client, h2Preface)
		got := reader(c)
		next := park(p, l)
		if s := <-got; s != cut {
			t.Fatalf("read %s", s)
		}
		c.Close()
		c = (<-next).(*limitedConn)
		_ = c.Close()

		c, client = acceptOne(t, p, l)
		rest(t, l, c, client, h2Preface)
		got = reader(c)
		write(t, client, "half a head")
		<-got
		got = reader(c)
		start := time.Now()
		next = park(p, l)
		time.Sleep(quietHTTP2 - time.Millisecond)
		if len(got) != 0 {
			t.Fatal("closed while a request may have been arriving")
		}
		if s := <-got; s != cut || time.Since(start) != quietHTTP2 {
			t.Errorf("read %s after %v", s, time.Since(start))
		}
		c.Close()
		(<-next).Close()
	})
}

// Half a head is cut by the read timeout, which the server does not see to: where the preface came in two pieces, where
// room was to be made meanwhile, and where the server of HTTP/1 waits for its first four bytes as for an idle client.
func TestHalfAHeadIsCut(t *testing.T) {
	stalls := func(t *testing.T, l *connLimiter, c *limitedConn, client net.Conn, sent string, disturb func()) {
		t.Helper()
		l.readTimeout = time.Second
		c.SetReadDeadline(time.Now().Add(time.Hour)) // as the server does
		got := reader(c)
		write(t, client, sent)
		<-got
		got = reader(c)
		start := time.Now()
		disturb()
		if s := <-got; s != cut || time.Since(start) != l.readTimeout {
			t.Errorf("read %s after %v", s, time.Since(start))
		}
		c.Close()
	}
	inBubble(t, 1, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		c, client := acceptOne(t, p, l)
		got := reader(c)
		write(t, client, h2Preface[:2])
		<-got
		rest(t, l, c, client, h2Preface[2:])
		stalls(t, l, c, client, "half a head", func() {})

		c, client = acceptOne(t, p, l)
		rest(t, l, c, client, "GET")
		stalls(t, l, c, client, "\r\n", func() {})

		c, client = acceptOne(t, p, l)
		rest(t, l, c, client, "GET")
		l.state(c, http.StateActive)
		stalls(t, l, c, client, "\r", func() { l.state(c, http.StateIdle) }) // it came before the server was done
	})
}

func TestHalfAHeadIsCutAfterAll(t *testing.T) {
	inBubble(t, 2, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		l.readTimeout = time.Second
		busy, _ := acceptOne(t, p, l)
		c, client := acceptOne(t, p, l)
		rest(t, l, c, client, h2Preface)
		got := reader(c)
		write(t, client, "half a head")
		<-got
		start := time.Now()
		next := park(p, l) // asks c
		busy.Close()
		got = reader(c)
		if s := <-got; s != cut || time.Since(start) != l.readTimeout {
			t.Errorf("read %s after %v", s, time.Since(start))
		}
		c.Close()
		(<-next).Close()
	})
}

// A tardy listener hands a connection over that was there before Close.
type tardy struct {
	*pipes
	release chan struct{}
}

func (l tardy) Accept() (net.Conn, error) {
	<-l.release
	c, _ := net.Pipe()
	return c, nil
}

func TestWaitSeesWhatIsJustAccepted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := tardy{newPipes(), make(chan struct{})}
		l := limitListener(p, 1, newMetrics(), slog.New(slog.DiscardHandler))
		accepted, waited := make(chan net.Conn), make(chan bool, 1)
		go func() {
			c, _ := l.Accept()
			accepted <- c
		}()
		synctest.Wait()
		l.Close()
		go func() { waited <- l.wait(t.Context()) }()
		synctest.Wait()
		close(p.release)
		c := <-accepted
		synctest.Wait()
		if len(waited) != 0 {
			t.Error("done before the connection was")
		}
		c.Close()
		<-waited
	})
}

// A pinged connection stays on the list, and one that begins a request leaves it.
func TestHTTP2ConnectionBecomesActive(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		c, client := acceptOne(t, p, l)
		rest(t, l, c, client, h2Preface)
		got := reader(c)
		next := park(p, l)
		write(t, client, "a head")
		<-got
		l.state(c, http.StateActive)
		got = reader(c)
		time.Sleep(time.Hour)
		if len(got) != 0 || len(next) != 0 {
			t.Fatal("a connection with a request was closed")
		}
		l.state(c, http.StateIdle)
		if s := <-got; s != cut {
			t.Errorf("read %s", s)
		}
		c.Close()
		(<-next).Close()
	})
}

func TestCloseSeesArrivalsThrough(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		silent, _ := acceptOne(t, p, l)
		got, next := reader(silent), park(p, l)
		start := time.Now()
		l.Close()
		l.Close()
		late := (<-next).(*limitedConn) // over the limit rather than lost
		if s := <-got; s != cut || time.Since(start) != arrivalTime {
			t.Errorf("a silent connection ended with %s after %v", s, time.Since(start))
		}
		silent.Close()
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after Close: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		go func() {
			<-reader(late)
			late.Close()
		}()
		if !l.wait(ctx) || len(l.slots) != 0 || m.connections.Value() != 0 {
			t.Errorf("%d slots, %v connections left", len(l.slots), m.connections)
		}
	})
}

// Before its first request a connection gets one read timeout and not another, although the server would give it.
func TestSilenceIsCutOnce(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		c, _ := acceptOne(t, p, l)
		l.state(c, http.StateNew)
		for _, want := range []time.Duration{time.Minute, 0} {
			start := time.Now()
			c.SetReadDeadline(start.Add(time.Minute))
			if s := <-reader(c); s != cut || time.Since(start) != want {
				t.Fatalf("read %s after %v, want %v", s, time.Since(start), want)
			}
		}
		c.Close()
	})
}

func TestConnectionWithoutLimit(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		for range 3 {
			acceptOne(t, p, l)
		}
		if m.connections.Value() != 3 || l.wantsRoom() {
			t.Errorf("%v connections, wants room %v", m.connections, l.wantsRoom())
		}
	})
}

// The budget is given in the order of the claims, to the last byte and not beyond it.
func TestBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMetrics()
		b := newBudget(100, m)
		if !b.take(t.Context(), &share{limit: 100}, 100, roomWait) || !b.take(t.Context(), &share{}, 0, roomWait) {
			t.Fatal("there was room")
		}
		start := time.Now()
		if b.take(t.Context(), &share{limit: 1}, 1, roomWait) || time.Since(start) != roomWait {
			t.Fatalf("one past the limit: waited %v", time.Since(start))
		}
		gone, leave := context.WithCancel(t.Context())
		large, small := make(chan bool, 1), make(chan bool, 1)
		go func() { large <- b.take(gone, &share{limit: 60}, 60, time.Hour) }()
		synctest.Wait()
		go func() { small <- b.take(t.Context(), &share{limit: 10}, 10, time.Hour) }()
		synctest.Wait()
		b.give(50)
		synctest.Wait()
		if len(large)+len(small) != 0 {
			t.Fatal("a claim was passed over")
		}
		leave()
		if <-large || !<-small {
			t.Fatal("the claim behind one that was given up must be served")
		}
		if b.give(10); m.inflightBytes.Value() != 50 || b.free != 50 {
			t.Errorf("%v counted, %d free", m.inflightBytes, b.free)
		}
	})
}

// Bodies that fill the budget together take turns: none begins that could leave others, and itself, waiting for ever.
func TestBudgetTakesTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(100, newMetrics())
		x, y, z := &share{limit: 80}, &share{limit: 80}, &share{limit: 20}
		if !b.take(t.Context(), x, 20, 0) || !b.take(t.Context(), y, 20, 0) {
			t.Fatal("two can begin: 60 are left, which one of them may take")
		}
		if b.take(t.Context(), &share{limit: 80}, 20, 0) {
			t.Fatal("three of them cannot: 40 would be left, and none could end")
		}
		if !b.take(t.Context(), z, 20, 0) {
			t.Fatal("one that needs no more harms nobody")
		}
		grown, fresh := make(chan bool, 2), make(chan bool, 1)
		go func() { fresh <- b.take(t.Context(), &share{limit: 50}, 50, time.Hour) }()
		synctest.Wait()
		go func() { grown <- b.take(t.Context(), y, 60, time.Hour) }()
		synctest.Wait()
		if !b.take(t.Context(), x, 20, 0) {
			t.Fatal("one that has begun does not wait behind one that has not")
		}
		if len(grown)+len(fresh) != 0 {
			t.Fatal("room came from nowhere")
		}
		b.whole(x)
		b.give(x.held)
		synctest.Wait()
		if len(grown) != 1 || len(fresh) != 0 {
			t.Fatal("the one that has begun is next, though it came later")
		}
		b.give(y.held)
		if !<-fresh || b.free != 30 || len(b.growing) != 0 {
			t.Errorf("%d free, %d growing", b.free, len(b.growing))
		}
	})
}

// A body does not queue behind those that wait for more than there is, where its own room is there.
func TestBudgetPassesBodiesThatGrow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(100, newMetrics())
		x := &share{limit: 80}
		if !b.take(t.Context(), x, 20, 0) || !b.take(t.Context(), &share{limit: 40}, 40, 0) {
			t.Fatal("there was room")
		}
		grown := make(chan bool, 1)
		go func() { grown <- b.take(t.Context(), x, 60, time.Hour) }()
		synctest.Wait()
		start := time.Now()
		if !b.take(t.Context(), &share{limit: 1}, 1, time.Hour) || time.Since(start) != 0 {
			t.Errorf("waited %v", time.Since(start))
		}
		b.give(40)
		if !<-grown {
			t.Error("the one that grows was not served")
		}
	})
}

// One that waits for those that have begun like it, and not for room, holds nobody else up, however long it waits.
func TestBudgetPassesBodiesThatMustWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(100, newMetrics())
		x, y := &share{limit: 80}, &share{limit: 80}
		if !b.take(t.Context(), x, 20, 0) || !b.take(t.Context(), y, 20, 0) || !b.take(t.Context(), x, 20, 0) {
			t.Fatal("there was room")
		}
		grown := make(chan bool, 1)
		go func() { grown <- b.take(t.Context(), y, 20, time.Hour) }()
		time.Sleep(2 * fairWait)
		start := time.Now()
		if !b.take(t.Context(), &share{limit: 10}, 10, time.Hour) || time.Since(start) != 0 {
			t.Errorf("waited %v", time.Since(start))
		}
		b.whole(x)
		b.give(x.held)
		if !<-grown {
			t.Error("the one that grows was not served")
		}
	})
}

// A body that has begun and only lacks room is not passed over for ever by small ones.
func TestBudgetFinishesBodiesThatGrow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(100, newMetrics())
		x := &share{limit: 80}
		if !b.take(t.Context(), x, 20, 0) {
			t.Fatal("there was room")
		}
		grown := make(chan bool, 1)
		var small sync.WaitGroup
		for range 4 { // they hold 40 at any time
			small.Go(func() {
				for len(grown) == 0 {
					s := &share{limit: 10}
					if !b.take(t.Context(), s, 10, roomWait) {
						t.Error("a small one found no room")
						return
					}
					time.Sleep(100 * time.Millisecond)
					b.give(s.held)
				}
			})
			time.Sleep(25 * time.Millisecond)
		}
		start := time.Now()
		if !b.take(t.Context(), x, 60, roomWait) || time.Since(start) > 2*fairWait {
			t.Errorf("waited %v", time.Since(start))
		}
		grown <- true
		b.give(x.held)
		small.Wait()
	})
}

// Thousands of bodies that have begun and find no more room cost little to keep waiting, and to let go.
func TestBudgetStormEnds(t *testing.T) {
	t.Parallel()
	const clients, step, limit = 1000, 10, 200
	b := newBudget(clients*step+limit, newMetrics())
	var all, begun sync.WaitGroup
	begun.Add(clients)
	for range clients {
		s := &share{limit: limit}
		all.Go(func() {
			b.take(t.Context(), s, step, patience)
			begun.Done()
			begun.Wait()
			for b.take(t.Context(), s, step, time.Second) && s.need() > 0 { // and sends nothing that would end it
			}
			b.whole(s)
			b.give(s.held)
		})
	}
	ended := make(chan struct{})
	go func() {
		all.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the budget is busy with itself")
	}
	if b.free != b.size || len(b.growing) != 0 || b.waiting.Len() != 0 {
		t.Errorf("%d free of %d, %d growing, %d waiting", b.free, b.size, len(b.growing), b.waiting.Len())
	}
}

// The banker's check, against trying every order.
func TestBudgetIsSafe(t *testing.T) {
	t.Parallel()
	var canEnd func(spare int64, shares []*share) bool
	canEnd = func(spare int64, shares []*share) bool {
		for i, s := range shares {
			if s.need() <= spare && canEnd(spare+s.held, slices.Delete(slices.Clone(shares), i, i+1)) {
				return true
			}
		}
		return len(shares) == 0
	}
	random := rand.New(rand.NewPCG(1, 2))
	safe := 0
	const rounds = 2000
	for range rounds {
		b := newBudget(100, newMetrics())
		var shares []*share
		spare := b.size
		for range random.IntN(5) {
			s := &share{held: random.Int64N(30), limit: 30 + random.Int64N(70)}
			shares, spare, b.growing[s] = append(shares, s), spare-s.held, true
		}
		want := canEnd(spare, shares)
		if got := b.safeLocked(); got != want {
			t.Fatalf("%v, want %v: %v spare of %v", got, want, spare, shares)
		}
		if want {
			safe++
		}
	}
	if safe == 0 || safe == rounds {
		t.Errorf("%d of %d were safe: nothing was tested", safe, rounds)
	}
}

// Buffers are used again, up to a bound, never by two at once, and waste little.
func TestBuffers(t *testing.T) {
	t.Parallel()
	b := newBudget(gigabyte, newMetrics())
	for n := int64(smallestReused); n <= largestReused; n += n/50 + 1 {
		class, capacity := bufferClass(n)
		if again, same := bufferClass(capacity); again != class || same != capacity || capacity < n || capacity > n+n/16+1 {
			t.Fatalf("%d bytes: class %d of %d bytes, which is in class %d of %d", n, class, capacity, again, same)
		}
		if next, _ := bufferClass(capacity + 1); next == class {
			t.Fatalf("%d and %d bytes share class %d", capacity, capacity+1, class)
		}
	}
	first := b.buffer(100_000)
	first = append(first, "mine"...)
	second := b.buffer(100_000)
	if b.discard(first); cap(second) == 0 || &second[:1][0] == &first[0] {
		t.Error("two hold the same buffer")
	}
	if third := b.buffer(100_000); len(third) != 0 || &third[:1][0] != &first[0] {
		t.Error("a buffer was not used again")
	}
	for range 2 * maxKept / largestReused {
		b.discard(make([]byte, largestReused))
	}
	if b.keptBytes > maxKept || b.litter == 0 {
		t.Errorf("%d bytes kept, %d let go", b.keptBytes, b.litter)
	}
}

const gigabyte = 1 << 30

// trickle is a body that comes in pieces, with pauses.
type trickle struct {
	pieces []string
	pause  time.Duration
	end    error
}

func (b *trickle) Read(p []byte) (int, error) {
	if len(b.pieces) == 0 {
		return 0, b.end
	}
	time.Sleep(b.pause)
	n := copy(p, b.pieces[0])
	if b.pieces[0] = b.pieces[0][n:]; b.pieces[0] == "" {
		b.pieces = b.pieces[1:]
	}
	return n, nil
}

func (b *trickle) Close() error { return nil }

// A body takes room as its bytes come, waits for it, and gives all of it back when it fails.
func TestReadTakesRoomAsItGoes(t *testing.T) {
	t.Parallel()
	const kib = 1 << 10
	piece := strings.Repeat("p", 48*kib)
	for _, test := range []struct {
		name         string
		proto        int
		length, room int64
		body         trickle
		charged      int64
		status       int // 0: read
		after        time.Duration
	}{
		{"empty", 1, 0, 0, trickle{end: io.EOF}, 0, 0, 0},
		{"declared", 1, 96 * kib, 96 * kib, trickle{[]string{piece, piece}, 0, io.EOF}, 96 * kib, 0, 0},
		{"declared, room one short", 1, 96 * kib, 96*kib - 1, trickle{end: io.EOF}, 0, 503, roomWait},
		{"chunked", 1, -1, 1 << 20, trickle{[]string{piece}, 0, io.EOF}, firstStep, 0, 0},
		{"chunked, a full buffer is not grown", 1, -1, firstStep, trickle{[]string{piece, piece[:firstStep-48*kib]}, 0, io.EOF}, firstStep, 0, 0},
		{"HTTP/2 declares much, sends little", 2, 1 << 20, 1 << 20, trickle{[]string{"p"}, 0, io.ErrUnexpectedEOF}, 0, 400, 0},
		{"at the limit", 1, -1, 1 << 20, trickle{[]string{strings.Repeat("p", 1<<20)}, 0, io.EOF}, 1 << 20, 0, 0},
		{"past the limit", 1, -1, 1 << 20, trickle{[]string{strings.Repeat("p", 1<<20), "p"}, 0, io.EOF}, 0, 413, 0},
		{"declared past the limit", 1, 1<<20 + 1, 0, trickle{}, 0, 413, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMetrics()
				g := &gate{maxBody: 1 << 20, room: newBudget(test.room, m), metrics: m}
				if test.length < 0 {
					g.maxBody = min(g.maxBody, test.room) // as the flags demand
				}
				want := strings.Join(test.body.pieces, "")
				r := &http.Request{ProtoMajor: test.proto, ContentLength: test.length, Body: &test.body}
				start := time.Now()
				body, charged, f := g.read(nil, r, routeIngest, time.Time{}, roomWait)
				switch {
				case f == nil && (test.status != 0 || string(body) != want), f != nil && f.status != test.status:
					t.Errorf("fault %v, %d bytes", f, len(body))
				case charged != test.charged || m.inflightBytes.Value() != charged || time.Since(start) != test.after:
					t.Errorf("charged %d, counted %v, after %v", charged, m.inflightBytes, time.Since(start))
				}
			})
		})
	}
}

// The listener's user hears once for each thousand connections more.
func TestConnectionPeaksAreTold(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, p *pipes, l *connLimiter, m *metrics) {
		var told []int
		l.grown = func(most int) { told = append(told, most) }
		for range 2 {
			var open []net.Conn
			for range 2*connStep + 1 {
				c, _ := acceptOne(t, p, l)
				open = append(open, c)
			}
			for _, c := range open {
				c.Close()
			}
		}
		if !slices.Equal(told, []int{2 * connStep, 3 * connStep}) {
			t.Errorf("told %v", told)
		}
	})
}

// Far more bodies than there is room for, all at once: they are served in turn, in little more memory than the budget.
func TestStorm(t *testing.T) {
	t.Parallel()
	const clients, size = 120, 256 << 10
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) { time.Sleep(20 * time.Millisecond) })
	relay := start(t, "-upstream", up.URL, "-max-inflight-bytes", "4MiB", "-max-body-size", "1MiB", "-conn-limit", "100")
	body := strings.Repeat("s", size)
	http1, h2c := newClient(t, "HTTP/1.1"), newClient(t, "h2c")
	var all sync.WaitGroup
	var served, refused atomic.Int64
	for i := range clients {
		all.Go(func() {
			c, r := http1, io.Reader(strings.NewReader(body))
			if i%2 == 0 {
				r = struct{ io.Reader }{r} // chunked
			}
			if i%8 == 0 {
				c = h2c
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, relay.url("/ingest"), r)
			if err != nil {
				t.Error(err)
				return
			}
			req.Close = c == http1 // none is idle while others wait: its next request might cross with its closing
			resp, err := c.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			switch {
			case resp.StatusCode == http.StatusOK:
				served.Add(1)
			case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") == "1":
				refused.Add(1)
			default:
				t.Errorf("status %d", resp.StatusCode)
			}
		})
	}
	all.Wait()
	if served.Load()+refused.Load() != clients || served.Load() == 0 || int(served.Load()) != len(up.requests()) {
		t.Errorf("%d served, %d refused, %d arrived", served.Load(), refused.Load(), len(up.requests()))
	}
	if n := relay.metric(t, "go_memory_classes_total_bytes"); n > 68<<20 { // includes what was returned since
		t.Errorf("%v bytes of memory were in use", n)
	}
	relay.awaitMetric(t, inflightSeries, 0)
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 0)
	relay.stop(t)
}

// What the collector has not found yet counts against the budget's memory.
func TestBudgetTidiesUp(t *testing.T) {
	b := newBudget(maxLitter, newMetrics())
	collections := func() uint32 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.NumForcedGC
	}
	before := collections()
	b.discard(make([]byte, 2*maxLitter))
	if b.buffer(1); collections() != before {
		t.Error("collected although there was room for the litter")
	}
	b.discard(make([]byte, 1))
	if b.buffer(1); collections() == before {
		t.Error("not collected although the litter exceeds the budget")
	}
}

// The buffer of a body that is refused is used again or counted as garbage, as that of any other.
func TestRefusedBodiesAreTakenBack(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	g := &gate{maxBody: 1 << 20, room: newBudget(1<<20, m), metrics: m}
	r := &http.Request{ProtoMajor: 1, ContentLength: 96 << 10, Body: &trickle{[]string{"cut"}, 0, io.ErrUnexpectedEOF}}
	if _, _, f := g.read(nil, r, routeIngest, time.Time{}, roomWait); f == nil || g.room.keptBytes == 0 {
		t.Errorf("%v; %d bytes kept", f, g.room.keptBytes)
	}
}

// The room and the buffer of a body that its protocol refuses are free again.
func TestMalformedBodyIsGivenBack(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	g := &gate{maxBody: size, room: newBudget(size, newMetrics()), metrics: newMetrics(), via: newVia(), deliveryTimeout: time.Second}
	r := httptest.NewRequest(http.MethodPost, pushPath, bytes.NewReader(make([]byte, smallestReused)))
	r.Header.Set("Content-Type", "application/grpc")
	x, f := beginPush(r)
	if f != nil {
		t.Fatal(f)
	}
	if _, f := g.relay(nil, r, routePush, x, time.Now()); f == nil || f.reason != rejectProtocol {
		t.Errorf("got %v, want a fault of the protocol", f)
	}
	if g.room.free != size || g.room.keptBytes == 0 {
		t.Errorf("%d of %d bytes free, %d bytes kept", g.room.free, size, g.room.keptBytes)
	}
}
