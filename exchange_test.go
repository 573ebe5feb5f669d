package main

// One request to one upstream: the hand-written HTTP/1.1 exchange against http.Transport, on servers that say anything,
// and that no byte of a body is read once its memory is another's.

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// quick is the time of an exchange that is meant to run out of it.
const quick = 150 * time.Millisecond

// newUpstreams are one upstream twice: spoken to by hand, and through http.Transport.
func newUpstreams(t testing.TB, base string, header http.Header) (direct, transport *upstream) {
	t.Helper()
	target, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	one := func() *upstream {
		u := &upstream{name: "test", url: target, link: newLink(), retry: retryPolicy{timeout: patience}, log: slog.New(slog.DiscardHandler)}
		u.link.own.Store(&ownHeader{header: header})
		u.client.Store(newTransport(&u.retry, u.link))
		t.Cleanup(func() { u.client.Load().CloseIdleConnections() })
		return u
	}
	direct, transport = one(), one()
	if direct.direct = newDirect(target); direct.direct == nil {
		t.Fatalf("%s does not go without a transport", base)
	}
	t.Cleanup(func() { direct.direct.forget(direct.direct.era) })
	return direct, transport
}

func newPayload(body []byte) *payload {
	p := &payload{route: routeIngest, query: "name=app&from=1", header: http.Header{"Content-Type": {"text/plain"}}, body: body}
	p.hold()
	return p
}

// tryOnce is one exchange with that much time.
func (u *upstream) tryOnce(p *payload, d time.Duration) (*answer, error) {
	return u.exchange(context.Background(), time.Now().Add(d), p)
}

func (d *direct) pooled() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.idle)
}

// A rawServer calls serve for each connection, with its number from 1, and closes it then.
type rawServer struct {
	net.Listener
	conns atomic.Int32
}

func newRawServer(t testing.TB, serve func(c *net.TCPConn, br *bufio.Reader, n int)) *rawServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &rawServer{Listener: l}
	var running sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		running.Wait()
	})
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n := int(s.conns.Add(1))
			stop := context.AfterFunc(t.Context(), func() { c.Close() })
			running.Go(func() {
				defer stop()
				defer c.Close()
				serve(c.(*net.TCPConn), bufio.NewReader(c), n)
			})
		}
	})
	return s
}

func (s *rawServer) url() string { return "http://" + s.Addr().String() }

// readWhole reads a request and returns its body; false at the end of the connection.
func readWhole(br *bufio.Reader) ([]byte, bool) {
	r, err := http.ReadRequest(br)
	if err != nil {
		return nil, false
	}
	body, err := io.ReadAll(r.Body)
	return body, err == nil
}

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

// What a script does once its answer is written.
type ending int

const (
	goOn   ending = iota // read the next request
	hold                 // keep silent
	hangUp               // close in order
	reset                // close with a reset
)

// A script is how a server answers one request. reused says whether the connection is to be used again.
type script struct {
	name, answer string
	then         ending
	early        bool // answer before the body is read
	reused       bool
	late         bool   // its time runs out
	body         int    // bytes in the request
	differs      string // why the two may come to different outcomes
}

func scripts() []script {
	long := strings.Repeat("x", maxAnswer)
	header := func(n int) string {
		head := "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Long: "
		return head + strings.Repeat("x", n-len(head)-len("\r\n\r\n")) + "\r\n\r\n"
	}
	return []script{
		{name: "plain", answer: okAnswer, reused: true},
		{name: "no reason", answer: "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", reused: true},
		{name: "line feeds", answer: "HTTP/1.1 200 OK\nContent-Length: 2\n\nab", reused: true},
		{name: "body", answer: "HTTP/1.1 400 No\r\nContent-Length: 3\r\nContent-Type: Text/Plain; charset=utf-8\r\n\r\nbad", reused: true},
		{name: "retry after", answer: "HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nbad", reused: true},
		{name: "chunked", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;ext=1\r\nc\r\n0\r\nX-Trailer: 1\r\n\r\n", reused: true},
		{name: "until close", answer: "HTTP/1.1 200 OK\r\n\r\nabc", then: hangUp},
		{name: "http/1.0", answer: "HTTP/1.0 200 OK\r\n\r\nabc", then: hangUp},
		{name: "http/1.0 keep-alive", answer: "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\na", reused: true},
		{name: "http/1.0 with length", answer: "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na"},
		{name: "connection close", answer: "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\na"},
		{name: "no content", answer: "HTTP/1.1 204 No Content\r\n\r\n", reused: true},
		{name: "not modified", answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", reused: true},
		{name: "redirect", answer: "HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", reused: true},
		{name: "interim", answer: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + okAnswer, reused: true},
		{name: "interim for ever", answer: strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", maxAnswerHeader/20), then: hold},
		{name: "interim with a body", answer: "HTTP/1.1 102 Processing\r\nContent-Length: 2\r\n\r\nab" + okAnswer},
		{name: "interim, then nothing", answer: "HTTP/1.1 100 Continue\r\n\r\n", then: hangUp},
		{name: "switching protocols", answer: "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nabc", then: hold},
		{name: "status 099", answer: "HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n"},
		{name: "status 999", answer: "HTTP/1.1 999 High\r\nContent-Length: 0\r\n\r\n", reused: true},
		{name: "more than the answer", answer: okAnswer + "HTTP/1.1 500 Smuggled\r\nContent-Length: 0\r\n\r\n"},
		{name: "more than no content", answer: "HTTP/1.1 204 No Content\r\n\r\nabc"},
		{name: "longest head", answer: header(maxAnswerHeader), reused: true},
		{name: "head too long", answer: header(maxAnswerHeader + 1)},
		{name: "head without end", answer: "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxAnswerHeader), then: hold},
		{name: "longest body", answer: fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", maxAnswer, long), reused: true},
		{name: "body too long", answer: fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%sx", maxAnswer+1, long)},
		{name: "body too long, refused", answer: "HTTP/1.1 400 No\r\n\r\n" + long + "x", then: hangUp},
		{name: "body cut short", answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", then: hangUp},
		{name: "body cut short, refused", answer: "HTTP/1.1 400 No\r\nContent-Length: 5\r\n\r\nabc", then: hangUp},
		{name: "body held back", answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", then: hold, late: true},
		{name: "body held back, refused", answer: "HTTP/1.1 400 No\r\nContent-Length: 5\r\n\r\nabc", then: hold, late: true},
		{name: "chunks cut short", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", then: hangUp},
		{name: "bad chunk", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n"},
		{name: "chunks and length", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n1\r\na\r\n0\r\n\r\n", reused: true},
		{name: "two lengths", answer: "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"},
		{name: "one length twice", answer: "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", reused: true},
		{name: "negative length", answer: "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"},
		{name: "unknown coding", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"},
		{name: "no HTTP", answer: "220 smtp.example ESMTP\r\n"},
		{name: "HTTP/2 settings", answer: "\x00\x00\x00\x04\x00\x00\x00\x00\x00", then: hold, late: true},
		{name: "TLS alert", answer: "\x15\x03\x01\x00\x02\x02\x46", then: hangUp},
		{name: "bad header", answer: "HTTP/1.1 200 OK\r\nno colon\r\n\r\n"},
		{name: "folded header", answer: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: a\r\n b\r\n\r\n", reused: true},
		{name: "silence", then: hold, late: true},
		{name: "hang-up", then: hangUp},
		{name: "reset", then: reset},
		{name: "half a head", answer: "HTTP/1.1 200 OK\r\nContent-", then: hangUp},
		{name: "half a head held", answer: "HTTP/1.1 200 OK\r\nContent-", then: hold, late: true},
		{name: "unread and held", then: hold, late: true, early: true, body: 8 << 20},
		{name: "unread and reset", then: reset, early: true, body: 8 << 20},
		{name: "early 413, held", answer: "HTTP/1.1 413 No\r\nContent-Length: 3\r\n\r\nbig", then: hold, early: true, body: 8 << 20},
		{name: "early 200, held", answer: okAnswer, then: hold, late: true, early: true, body: 8 << 20,
			differs: "outcome: a transport stops sending when it has the answer, by hand all is sent for as long as there is time"},
		{name: "early 401, read", answer: "HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno", then: goOn, early: true, body: 8 << 20,
			differs: "reuse: whether the body was gone before the answer is a matter of chance"},
		{name: "early 413, close", answer: "HTTP/1.1 413 No\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig", then: hangUp, early: true, body: 8 << 20,
			differs: "outcome: a transport may see its write fail first, and report that in place of the answer"},
	}
}

// serve plays the script to every request of a connection.
func (s *script) serve(ctx context.Context, c *net.TCPConn, br *bufio.Reader) {
	for {
		if s.early {
			if _, err := http.ReadRequest(br); err != nil { // its body is not read
				return
			}
		} else if _, ok := readWhole(br); !ok {
			return
		}
		if _, err := io.WriteString(c, s.answer); err != nil {
			return
		}
		switch s.then {
		case hold:
			<-ctx.Done()
			return
		case reset:
			c.SetLinger(0)
			return
		case hangUp:
			return
		}
		if s.early {
			io.CopyN(io.Discard, br, int64(s.body))
		}
	}
}

// A result is what the relay makes of an exchange.
type result struct {
	answer           *answer
	failed, timedOut bool
	long             bool
}

func resultOf(a *answer, err error) result {
	if err != nil {
		return result{failed: true, timedOut: judgeError(err).expired, long: errors.Is(err, errTooLong)}
	}
	return result{answer: a}
}

func (r result) String() string {
	if r.answer == nil {
		return fmt.Sprintf("failed, timed out %t, too long %t", r.timedOut, r.long)
	}
	a := *r.answer
	return fmt.Sprintf("status %d, type %q, encoding %q, retry after %q, %d bytes", a.status, a.mediaType, a.encoding, a.retryAfter, len(a.body))
}

// Every script comes to the same with both, and a connection is used again just where that is safe.
func TestDirectIsTransport(t *testing.T) {
	t.Parallel()
	for _, s := range scripts() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, _ int) { s.serve(t.Context(), c, br) })
			direct, transport := newUpstreams(t, server.url(), nil)
			limit := patience
			if s.late {
				limit = quick
			}
			p := newPayload(make([]byte, s.body))
			got := resultOf(direct.tryOnce(p, limit))
			again := resultOf(direct.tryOnce(p, limit))
			conns := server.conns.Load()
			if !reflect.DeepEqual(got, again) {
				t.Errorf("first %v,\nthen %v", got, again)
			}
			if reused := conns == 1; reused != s.reused && !strings.HasPrefix(s.differs, "reuse") {
				t.Errorf("used the connection again: %t, want %t", reused, s.reused)
			}
			want := resultOf(transport.tryOnce(p, limit))
			if !reflect.DeepEqual(got, want) && !strings.HasPrefix(s.differs, "outcome") {
				t.Errorf("by hand %v,\ntransport %v", got, want)
			}
		})
	}
}

// What is written is the same request, whichever way it goes.
func TestDirectSendsWhatTransportSends(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		base   string
		header http.Header
		timed  bool
	}{
		{base: ""},
		{base: "/some%2Fprefix/"},
		{header: http.Header{"Host": {"other.example"}, "Content-Type": {"text/x"}, "X-Extra": {"a", "b"}}},
		{timed: true},
		{timed: true, header: http.Header{"Connect-Timeout-Ms": {"1"}}},
	} {
		got := make(chan *http.Request, 1)
		server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, _ int) {
			if r, err := http.ReadRequest(br); err == nil {
				body, _ := io.ReadAll(r.Body)
				r.Body = io.NopCloser(bytes.NewReader(body))
				io.WriteString(c, okAnswer)
				got <- r
			}
		})
		direct, transport := newUpstreams(t, server.url()+test.base, test.header)
		p := newPayload([]byte("the body"))
		p.query = "name=a%20b;c&&x={%22}"
		p.header = http.Header{"Content-Type": {"text/plain", "text/html"}, "X-Scope-Orgid": {"me"}, "Via": {"1.1 relay"}}
		p.timed, p.expires = test.timed, time.Now().Add(-time.Second)
		send := func(u *upstream, lines []byte) (*http.Request, []byte) {
			p.lines = lines
			if _, err := u.tryOnce(p, patience); err != nil {
				t.Fatal(err)
			}
			r := <-got
			body, _ := io.ReadAll(r.Body)
			return r, body
		}
		b, bodyB := send(transport, nil)
		for _, lines := range [][]byte{nil, wire(p.header)} {
			a, bodyA := send(direct, lines)
			if a.RequestURI != b.RequestURI || a.Host != b.Host || a.ContentLength != b.ContentLength || !bytes.Equal(bodyA, bodyB) ||
				!reflect.DeepEqual(a.Header, b.Header) {
				t.Errorf("%+v:\nby hand   %s %s %v %q\ntransport %s %s %v %q", test, a.Host, a.RequestURI, a.Header, bodyA, b.Host, b.RequestURI, b.Header, bodyB)
			}
		}
	}
}

// Line breaks in a query fail; those in a header become spaces, or the header is left out.
func TestNoLineBreakInHead(t *testing.T) {
	t.Parallel()
	for _, evil := range []string{"a\r\nX: b", "a\nX: b", "a\rX: b", "\r\n\r\nPOST / HTTP/1.1"} {
		for name, set := range map[string]func(*payload){
			"value": func(p *payload) { p.header["Content-Type"] = []string{evil} },
			"name":  func(p *payload) { p.header[evil] = []string{"a"} },
			"query": func(p *payload) { p.query = evil },
		} {
			u, _ := newUpstreams(t, "http://a", nil)
			p := newPayload(nil)
			set(p)
			message, err := u.message(p)
			if name == "query" {
				if err == nil {
					t.Errorf("%q as query was let through", evil)
				}
				continue
			}
			head := slices.Concat(message[0], message[1])
			r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
			if err != nil || len(r.Header) > 2 || r.Header["X"] != nil || bytes.Count(head, []byte("\n")) != bytes.Count(head, []byte("\r\n")) {
				t.Errorf("%q as %s: %q (%v)", evil, name, head, err)
			}
		}
	}
}

func TestUpstreamsThatNeedATransport(t *testing.T) {
	t.Parallel()
	for base, want := range map[string]string{
		"https://a.example": "", "http://bücher.example": "", "http://[fe80::1%25eth0]:80": "",
		"http://a.example": "a.example:80", "http://a.example:": "a.example:80", "http://[::1]:4040/x": "[::1]:4040",
	} {
		target, err := url.Parse(base)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if d := newDirect(target); d != nil {
			got = d.addr
		}
		if got != want {
			t.Errorf("%s: %q, want %q", base, got, want)
		}
	}
	if newDirect(nil) != nil {
		t.Error("log: has a connection")
	}
}

// A pooled connection that the server has closed is thrown away before anything is written to it.
func TestStaleConnectionIsNotUsed(t *testing.T) {
	t.Parallel()
	for _, unasked := range []string{"", "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n"} {
		closing, late := make(chan struct{}), make(chan []byte, 1)
		server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, n int) {
			for _, ok := readWhole(br); ok; _, ok = readWhole(br) {
				io.WriteString(c, okAnswer)
				if n == 1 {
					<-closing
					io.WriteString(c, unasked)
					c.CloseWrite()
					rest, _ := io.ReadAll(br)
					late <- rest
					return
				}
			}
		})
		direct, _ := newUpstreams(t, server.url(), nil)
		p := newPayload([]byte("the body"))
		if _, err := direct.tryOnce(p, patience); err != nil {
			t.Fatal(err)
		}
		if n := direct.direct.pooled(); n != 1 {
			t.Fatalf("%d connections are pooled", n)
		}
		close(closing)
		eventually(t, "the closed connection has left the pool", func() bool { return direct.direct.pooled() == 0 })
		if _, err := direct.tryOnce(p, patience); err != nil {
			t.Fatal(err)
		}
		if rest := <-late; len(rest) > 0 {
			t.Errorf("the server had hung up, and was sent %q", rest)
		}
	}
}

// When a pooled connection ends just as it is used, the request is sent once more on a new one; but not when an answer
// had begun, nor when the connection was new.
func TestHangUpOnUse(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, last string // what the pooled connection still says to its second request
		others     bool   // new connections are served
		fails      bool   // the second exchange
		served     int
	}{
		{"once", "", true, false, 3},
		{"always", "", false, true, 3},
		{"answer begun", "HTTP/1.1 200", true, true, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var served atomic.Int32
			server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, n int) {
				for request := 1; ; request++ {
					if _, ok := readWhole(br); !ok {
						return
					}
					served.Add(1)
					if n == 1 && request == 2 {
						io.WriteString(c, test.last)
						return
					}
					if n > 1 && !test.others {
						return
					}
					io.WriteString(c, okAnswer)
				}
			})
			direct, _ := newUpstreams(t, server.url(), nil)
			p := newPayload([]byte("the body"))
			if _, err := direct.tryOnce(p, patience); err != nil {
				t.Fatal(err)
			}
			if _, err := direct.tryOnce(p, patience); (err != nil) != test.fails {
				t.Errorf("second exchange: %v", err)
			}
			if n := int(served.Load()); n != test.served {
				t.Errorf("%d requests, want %d", n, test.served)
			}
		})
	}
}

// fill makes n connections to a server that none is pooled to, and pools them.
func fill(t *testing.T, u *upstream, server *rawServer, n int, answer chan<- struct{}) {
	t.Helper()
	before := server.conns.Load()
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			if _, err := u.tryOnce(newPayload(nil), patience); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "each exchange has a connection of its own", func() bool { return server.conns.Load() == before+int32(n) })
	for range n {
		answer <- struct{}{}
	}
	all.Wait()
}

// After a timeout no connection from before it is used, not even one whose exchange went on meanwhile.
func TestPoolIsForgottenAfterFailure(t *testing.T) {
	t.Parallel()
	answer := make(chan struct{})
	server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, _ int) {
		for body, ok := readWhole(br); ok; body, ok = readWhole(br) {
			if string(body) == "black hole" {
				<-t.Context().Done()
				return
			}
			select {
			case <-answer:
			case <-t.Context().Done():
			}
			io.WriteString(c, okAnswer)
		}
	})
	u, _ := newUpstreams(t, server.url(), nil)
	fill(t, u, server, 3, answer)
	if n := u.direct.pooled(); n != 3 {
		t.Fatalf("%d connections pooled, want 3", n)
	}
	var slow sync.WaitGroup
	slow.Go(func() {
		if _, err := u.tryOnce(newPayload(nil), patience); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "a connection is in use", func() bool { return u.direct.pooled() == 2 })
	if _, err := u.tryOnce(newPayload([]byte("black hole")), quick); err == nil || !judgeError(err).expired {
		t.Errorf("got %v, want a timeout", err)
	} else if dial, ok := errors.AsType[*net.OpError](err); ok && dial.Op == "dial" {
		t.Errorf("got %v, but the upstream was reached", err)
	}
	if n := u.direct.pooled(); n != 0 {
		t.Errorf("%d connections pooled after a timeout", n)
	}
	answer <- struct{}{}
	slow.Wait()
	if n := u.direct.pooled(); n != 0 {
		t.Errorf("%d connections pooled that are older than a timeout", n)
	}
	fill(t, u, server, 1, answer)
	if n := server.conns.Load(); n != 4 {
		t.Errorf("%d connections in all, want 4", n)
	}
	u.direct.forget(u.direct.era)
	fill(t, u, server, 2, answer)
	hasty := newPayload([]byte("black hole"))
	hasty.hasty = true
	if _, err := u.tryOnce(hasty, quick); err == nil || u.direct.pooled() != 1 {
		t.Errorf("%v; after a timeout that proves nothing %d connections are pooled, want 1", err, u.direct.pooled())
	}
}

// A client that hangs up ends its exchange at once, wherever that is, and costs no other connection.
func TestCancelledExchange(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]script{
		"waiting": {then: hold}, "sending": {then: hold, early: true, body: 8 << 20},
		"reading": {answer: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", then: hold},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun := make(chan struct{})
			server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, n int) {
				if n == 1 {
					(&script{answer: okAnswer}).serve(t.Context(), c, br)
					return
				}
				br.Peek(1)
				close(begun)
				s.serve(t.Context(), c, br)
			})
			u, _ := newUpstreams(t, server.url(), nil)
			if _, err := u.tryOnce(newPayload(nil), patience); err != nil {
				t.Fatal(err)
			}
			first := u.direct.take()
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() {
				_, err := u.exchange(ctx, time.Now().Add(time.Hour), newPayload(make([]byte, s.body)))
				done <- err
			}()
			<-begun
			u.direct.put(first)
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if n := u.direct.pooled(); n != 1 {
				t.Errorf("%d connections pooled, want the first", n)
			}
		})
	}
}

// A dripping server costs the time of one attempt.
func TestDrippingAnswer(t *testing.T) {
	t.Parallel()
	server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, _ int) {
		readWhole(br)
		for _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nX: "); err == nil; _, err = io.WriteString(c, "x") {
			time.Sleep(time.Millisecond)
		}
	})
	u, _ := newUpstreams(t, server.url(), nil)
	if _, err := u.tryOnce(newPayload(nil), quick); err == nil || !judgeError(err).expired {
		t.Errorf("got %v, want a timeout", err)
	}
}

// The pool holds so many connections, and none for longer than idleUpstream.
func TestPoolIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, kept := &direct{}, 0
		for range maxIdleUpstream + 1 {
			here, there := net.Pipe()
			defer there.Close()
			d.put(d.adopt(here, 0))
		}
		synctest.Wait()
		if kept = d.pooled(); kept != maxIdleUpstream {
			t.Errorf("%d connections pooled, want %d", kept, maxIdleUpstream)
		}
		time.Sleep(idleUpstream - time.Second)
		d.put(d.take())
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if kept = d.pooled(); kept != 1 {
			t.Errorf("%d connections pooled after %v, want the one used since", kept, idleUpstream)
		}
		time.Sleep(idleUpstream)
		synctest.Wait()
		if kept = d.pooled(); kept != 0 {
			t.Errorf("%d connections pooled, want none", kept)
		}
	})
}

// The memory of a body is another's as soon as it is free: what an upstream reads after that must still be the body's
// own bytes, or nothing. It answers before it has read the body, so that the sender is caught in the middle.
func TestBodyIsNotReadOnceFree(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	for name, answer := range map[string]string{
		"refused": "HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n", "cut short": "HTTP/1.1 413 No\r\nContent-Length: 5\r\n\r\nab", "success": okAnswer,
	} {
		for _, mode := range []string{"direct", "direct, reading", "transport", "transport, reading"} {
			t.Run(name+", "+mode, func(t *testing.T) {
				t.Parallel()
				returned, all := make(chan struct{}), make(chan []byte, 1)
				server := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, _ int) {
					http.ReadRequest(br)
					io.WriteString(c, answer)
					if name == "cut short" {
						c.CloseWrite()
					}
					if !strings.Contains(mode, "reading") {
						<-returned
					}
					rest, _ := io.ReadAll(io.LimitReader(br, size))
					all <- rest
				})
				u, transport := newUpstreams(t, server.url(), nil)
				if strings.Contains(mode, "transport") {
					u = transport
				}
				p, freed := newPayload(bytes.Repeat([]byte("a"), size)), make(chan struct{})
				p.free = func() { close(freed) }
				limit := patience
				if name == "success" && !strings.Contains(mode, "reading") {
					limit = quick // it is none before all is sent
				}
				a, err := u.tryOnce(p, limit)
				p.release()
				<-freed
				for i := range p.body {
					p.body[i] = 'b'
				}
				close(returned)
				rest := <-all
				if bytes.ContainsRune(rest, 'b') {
					t.Error("the upstream got bytes of the next body")
				}
				if err == nil && a.status == http.StatusOK && len(rest) < size {
					t.Errorf("success, with %d of %d bytes sent", len(rest), size)
				}
			})
		}
	}
}

// Bodies of many sizes at once, two upstreams of which one is slow and one refuses early: each gets its own bytes only.
func TestBodiesKeepApart(t *testing.T) {
	t.Parallel()
	var mixed, whole atomic.Int32
	check := func(body []byte) {
		whole.Add(1)
		if len(body) > 0 && len(bytes.Trim(body, string(body[:1]))) > 0 {
			mixed.Add(1)
		}
	}
	good := newPeer(t, func(_ http.ResponseWriter, r *http.Request, _ int) {})
	early := newRawServer(t, func(c *net.TCPConn, br *bufio.Reader, n int) {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
		body, _ := io.ReadAll(r.Body)
		check(body)
	})
	relay := start(t, "-upstream", good.URL+",required=false", "-upstream", early.url())
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			client := newClient(t, []string{"HTTP/1.1", "h2c"}[i%2])
			for size := range 9 {
				body := bytes.Repeat([]byte{byte('a' + i)}, 1500<<size/(1+i%3))
				post(t, client, relay.url("/ingest"), body)
			}
		})
	}
	clients.Wait()
	relay.stop(t)
	for _, r := range good.requests() {
		check(r.body)
	}
	if mixed.Load() > 0 || whole.Load() == 0 {
		t.Errorf("%d of %d bodies held bytes of another", mixed.Load(), whole.Load())
	}
}

// Whatever a server answers, both exchanges make the same of it.
func FuzzAnswer(f *testing.F) {
	for _, s := range scripts() {
		if len(s.answer) < 1<<12 {
			f.Add([]byte(s.answer))
		}
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		d := &direct{}
		serve := func() net.Conn {
			here, there := net.Pipe()
			there.SetDeadline(time.Now().Add(patience))
			go func() {
				defer there.Close()
				if _, ok := readWhole(bufio.NewReader(there)); ok {
					there.Write(said)
				}
			}()
			return here
		}
		c := d.adopt(serve(), 0)
		byHand := c.exchange(t.Context(), time.Now().Add(patience), false, [3][]byte{[]byte("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n"), []byte("\r\n"), []byte("body")})
		c.Close()
		_, transport := newUpstreams(t, "http://a", nil)
		transport.client.Load().DialContext = func(context.Context, string, string) (net.Conn, error) { return serve(), nil }
		a, err := transport.tryOnce(newPayload([]byte("body")), patience)
		got, want := resultOf(byHand.answer, byHand.err), resultOf(a, err)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\nby hand   %v (%v)\ntransport %v (%v)", said, got, byHand.err, want, err)
		}
	})
}

// A client that hangs up while its request dials proves nothing about the connections in use.
func TestCancelledDialForgetsNothing(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d := &direct{addr: deadAddr(t)}
	if _, err := d.dial(ctx, time.Now().Add(time.Hour), false); !errors.Is(err, context.Canceled) || d.era != 0 {
		t.Errorf("%v, era %d", err, d.era)
	}
	if _, err := d.dial(t.Context(), time.Now().Add(time.Hour), false); err == nil || d.era != 1 {
		t.Errorf("%v, era %d", err, d.era)
	}
}
