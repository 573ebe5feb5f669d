package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A dialect is one way to speak to the Push route.
type dialect struct {
	protocol    protocol
	contentType string
	codec       string // content type upstream
}

func dialects() []dialect {
	return []dialect{
		{connect, "application/proto", "application/proto"},
		{connect, "application/json", "application/json"},
		{grpc, "application/grpc", "application/proto"},
		{grpc, "application/grpc+proto", "application/proto"},
		{grpc, "application/grpc+json", "application/json"},
		{grpcWeb, "application/grpc-web", "application/proto"},
		{grpcWeb, "application/grpc-web+proto", "application/proto"},
		{grpcWeb, "application/grpc-web+json", "application/json"},
	}
}

// A verbal is what a client of the Push route makes of an answer.
type verbal struct {
	response
	code       code
	message    string
	reply      []byte
	compressed bool
}

func zip(s string) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.HuffmanOnly) // the quickest
	io.WriteString(w, s)
	w.Close()
	return b.Bytes()
}

// envelope is one gRPC message with its prefix.
func envelope(flags byte, message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flags}, uint32(len(message))), message...)
}

// call sends one message, as it is; zipped says that it is gzip'd.
func (d dialect) call(t testing.TB, c *http.Client, url string, message []byte, zipped bool, header ...string) verbal {
	t.Helper()
	header = append(header, "Content-Type", d.contentType)
	if d.protocol == connect {
		if zipped {
			header = append(header, "Content-Encoding", "gzip")
		}
		return d.understand(t, post(t, c, url, message, header...))
	}
	flags := byte(0)
	if zipped {
		flags = flagCompressed
		header = append(header, "Grpc-Encoding", "gzip")
	}
	return d.understand(t, post(t, c, url, envelope(flags, message), header...))
}

// understand reads an answer the way a strict client would.
func (d dialect) understand(t testing.TB, resp response) verbal {
	t.Helper()
	v := verbal{response: resp}
	if d.protocol == connect {
		v.understandConnect(t, d)
		return v
	}
	if got := resp.Header.Get("Content-Type"); got != d.contentType || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: status %d, Content-Type %q: %s", d.contentType, resp.StatusCode, got, resp.body)
	}
	status, message := resp.Header.Values("Grpc-Status"), resp.Header.Get("Grpc-Message")
	if len(status) == 0 {
		rest := v.open(t, resp.body)
		status, message = resp.Trailer.Values("Grpc-Status"), resp.Trailer.Get("Grpc-Message")
		if d.protocol == grpcWeb {
			status, message = webTrailers(t, rest), ""
		} else if len(rest) != 0 {
			t.Fatalf("%q after the message", rest)
		}
		if v.compressed && resp.Header.Get("Grpc-Encoding") != "gzip" {
			t.Errorf("compressed by %q", resp.Header.Get("Grpc-Encoding"))
		}
	} else if len(resp.body) != 0 || len(resp.Trailer) != 0 {
		t.Fatalf("status in the headers, and yet a body %q and trailers %v", resp.body, resp.Trailer)
	}
	if len(status) != 1 {
		t.Fatalf("grpc-status %q", status)
	}
	n, err := strconv.Atoi(status[0])
	if err != nil {
		t.Fatal(err)
	}
	v.code, v.message = code(n), decodeGRPCMessage(t, message)
	return v
}

func (v *verbal) understandConnect(t testing.TB, d dialect) {
	t.Helper()
	want := "application/json"
	if v.StatusCode == http.StatusOK {
		want, v.reply = d.codec, v.body
		v.compressed = v.Header.Get("Content-Encoding") == "gzip"
	}
	if got := v.Header.Get("Content-Type"); got != want {
		t.Fatalf("Content-Type %q with status %d: %s", got, v.StatusCode, v.body)
	}
	if v.StatusCode == http.StatusOK {
		return
	}
	var e struct{ Code, Message string }
	if err := json.Unmarshal(v.body, &e); err != nil {
		t.Fatalf("%v: %s", err, v.body)
	}
	v.code, v.message = codeByName(e.Code), e.Message
	if _, status := v.code.describe(); status != v.StatusCode {
		t.Errorf("status %d with code %s", v.StatusCode, e.Code)
	}
}

// open takes the message out of body and returns what follows.
func (v *verbal) open(t testing.TB, body []byte) (rest []byte) {
	t.Helper()
	if len(body) < envelopePrefix || body[0]&^flagCompressed != 0 {
		t.Fatalf("not a message: %q", body)
	}
	n := int(binary.BigEndian.Uint32(body[1:]))
	body, v.compressed = body[envelopePrefix:], body[0] == flagCompressed
	if n > len(body) {
		t.Fatalf("a message of %d bytes in %d", n, len(body))
	}
	v.reply = body[:n]
	return body[n:]
}

// webTrailers are the values of grpc-status in a gRPC-Web trailer frame.
func webTrailers(t testing.TB, frame []byte) (status []string) {
	t.Helper()
	if len(frame) < envelopePrefix || frame[0] != flagTrailers || int(binary.BigEndian.Uint32(frame[1:])) != len(frame)-envelopePrefix {
		t.Fatalf("not a trailer frame: %q", frame)
	}
	for line := range strings.Lines(string(frame[envelopePrefix:])) {
		value, ok := strings.CutPrefix(line, "grpc-status: ")
		if !ok || !strings.HasSuffix(value, "\r\n") {
			t.Fatalf("trailer line %q", line)
		}
		status = append(status, strings.TrimSpace(value))
	}
	return status
}

func decodeGRPCMessage(t testing.TB, s string) string {
	t.Helper()
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' {
			t.Fatalf("grpc-message has the byte 0x%02x: %q", c, s)
		}
	}
	decoded, err := url.PathUnescape(s)
	if err != nil {
		t.Fatal(err)
	}
	return decoded
}

// of are the requests of one tenant.
func (p *peer) of(tenant string) (got []received) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.got {
		if t := p.got[i].header["X-Scope-Orgid"]; len(t) == 1 && t[0] == tenant {
			got = append(got, p.got[i])
		}
	}
	return got
}

// A scenario is one way an upstream answers Push, and what the client must be told.
type scenario struct {
	name     string
	answer   http.HandlerFunc
	code     code
	attempts int
	says     string // in the error's text
}

// says answers with a status and a text; header is a list of names and values.
func says(status int, text string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header()[header[i]] = []string{header[i+1]}
		}
		w.WriteHeader(status)
		io.WriteString(w, text)
	}
}

// connectError answers with a Connect error.
func connectError(status int, name string, header ...string) http.HandlerFunc {
	return says(status, `{"code":"`+name+`","message":"own words"}`, append(header, "Content-Type", "application/json")...)
}

func ownMessage(w http.ResponseWriter, r *http.Request) {
	w.Header()["Content-Type"] = r.Header["Content-Type"]
	if r.Header.Get("Content-Encoding") == "gzip" { // connect-go answers in kind
		w.Header().Set("Content-Encoding", "gzip")
		w.Write(zip("own message"))
		return
	}
	io.WriteString(w, "own message")
}

// pushScenarios are the rows of the limits table that concern what upstreams do. Retries: two.
func pushScenarios() []scenario {
	hangUp := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	cut := func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Content-Type"] = r.Header["Content-Type"]
		w.Header().Set("Content-Length", "10")
		io.WriteString(w, "half")
	}
	return []scenario{
		{"success", ownMessage, codeOK, 1, ""},
		{"500", says(500, "broken"), codeUnavailable, 3, "u: broken"},
		{"500 with a code", connectError(500, "internal"), codeInternal, 3, "u: own words"},
		{"503", says(503, ""), codeUnavailable, 3, "u: HTTP status 503 Service Unavailable"},
		{"503 with a code", connectError(503, "unavailable"), codeUnavailable, 3, "u: own words"},
		{"505", says(505, "no"), codeUnavailable, 3, "u: no"},
		{"599", says(599, ""), codeUnavailable, 3, "u: HTTP status 599"},
		{"408", says(408, "slow"), codeUnavailable, 3, "u: slow"},
		{"408 with a code", connectError(408, "deadline_exceeded"), codeDeadlineExceeded, 3, "u: own words"},
		{"aborted", connectError(409, "aborted"), codeAborted, 3, "u: own words"},
		{"501", says(501, "no Push here"), codeUnimplemented, 1, "u: no Push here"},
		{"501 with a code", connectError(501, "unavailable"), codeUnimplemented, 1, "u: own words"},
		{"508", says(508, "loop"), codeFailedPrecondition, 1, "u: loop"},
		{"301", says(301, "<a>", "Location", "http://10.1.2.3/"), codeUnavailable, 1, "u: HTTP status 301 Moved Permanently"},
		{"307", says(307, "", "Location", "/elsewhere"), codeUnavailable, 1, "u: HTTP status 307 Temporary Redirect"},
		{"201", func(w http.ResponseWriter, r *http.Request) {
			says(201, "", "Content-Type", r.Header.Get("Content-Type"))(w, r)
		}, codeUnavailable, 1, "u: HTTP status 201 Created"},
		{"204", says(204, ""), codeUnavailable, 1, "u: HTTP status 204 No Content"},
		{"a login page", says(200, "<h1>Log in", "Content-Type", "text/html"), codeUnavailable, 1, "u: HTTP status 200 OK"},
		{"no content type", func(w http.ResponseWriter, r *http.Request) { w.Header()["Content-Type"] = nil }, codeUnavailable, 1, "u: HTTP status 200 OK"},
		{"400", says(400, "bad profile"), codeInvalidArgument, 1, "u: bad profile"},
		{"400 with a code", connectError(400, "out_of_range"), codeOutOfRange, 1, "u: own words"},
		{"401", says(401, ""), codeUnauthenticated, 1, "u: HTTP status 401 Unauthorized"},
		{"403", says(403, "forbidden"), codePermissionDenied, 1, "u: forbidden"},
		{"404", says(404, "page not found\n"), codeUnimplemented, 1, "u: page not found"},
		{"404 with a code", connectError(404, "not_found"), codeNotFound, 1, "u: own words"},
		{"404 with a code of no meaning", connectError(404, "nonsense"), codeUnimplemented, 1, "nonsense"},
		{"409", says(409, "conflict"), codeInvalidArgument, 1, "u: conflict"},
		{"413", says(413, "too large"), codeInvalidArgument, 1, "u: too large"},
		{"422", says(422, "no"), codeInvalidArgument, 1, "u: no"},
		{"429", says(429, "slow down", "Retry-After", "7"), codeResourceExhausted, 3, "u: slow down"},
		{"429 with another code", connectError(429, "unavailable", "Retry-After", "7"), codeResourceExhausted, 3, "u: own words"},
		{"hangs up", hangUp, codeUnavailable, 3, "u: could not be reached"},
		{"cut answer", cut, codeUnavailable, 3, "u: could not be reached"},
	}
}

// Every protocol over every HTTP version, with both codecs, compressed and not: the same answer of the upstream comes
// out right in each, and the upstream cannot tell them apart.
func TestPushSpeaksEveryProtocol(t *testing.T) {
	t.Parallel()
	scenarios := pushScenarios()
	upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		i, err := strconv.Atoi(r.UserAgent())
		if err != nil {
			t.Errorf("User-Agent %q did not pass", r.UserAgent())
			return
		}
		scenarios[i].answer(w, r)
	})
	relay := start(t, "-min-backoff-period", "1ms", "-max-backoff-period", "1ms", "-max-backoff-retries", "2", "-upstream", upstream.URL+",name=u")
	var tenants atomic.Int64
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, d := range dialects() {
			for _, zipped := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s zipped=%v", d.contentType, zipped), func(t *testing.T) {
					t.Parallel()
					for i, s := range scenarios {
						if i > 0 && strings.HasSuffix(d.contentType, "+proto") {
							break // another name for what is tested already
						}
						tenant := fmt.Sprintf("tenant-%d", tenants.Add(1))
						d.playScenario(t, c, relay, upstream, s, i, zipped, tenant)
					}
				})
			}
		}
	})
}

func (d dialect) playScenario(t *testing.T, c *http.Client, relay *program, upstream *peer, s scenario, i int, zipped bool, tenant string) {
	t.Helper()
	message := []byte("a profile for " + tenant)
	if zipped {
		message = zip(string(message))
	}
	v := d.call(t, c, relay.url(pushPath), message, zipped, "User-Agent", strconv.Itoa(i), "X-Scope-OrgID", tenant)
	if v.code != s.code || !strings.Contains(v.message, s.says) {
		t.Errorf("%s: %v %q, want %v %q", s.name, v.code, v.message, s.code, s.says)
	}
	if s.code == codeResourceExhausted && v.Header.Get("Retry-After") != "7" {
		t.Errorf("%s: Retry-After %q", s.name, v.Header.Get("Retry-After"))
	}
	if s.code == codeOK {
		want := []byte("own message")
		if zipped {
			want = zip("own message")
		}
		if !bytes.Equal(v.reply, want) || v.compressed != zipped {
			t.Errorf("reply %q, compressed %v", v.reply, v.compressed)
		}
	}
	got := upstream.of(tenant)
	// A pooled connection that ends without a word may only have been idle for too long: then once more is no retry.
	if n := len(got); n != s.attempts && !(s.name == "hangs up" && n > s.attempts && n <= 2*s.attempts) {
		t.Errorf("%s: %d attempts, want %d", s.name, n, s.attempts)
	}
	for _, r := range got {
		d.checkUpstream(t, r, message, zipped)
	}
}

// checkUpstream holds a request against the one Connect unary POST it must be.
func (d dialect) checkUpstream(t testing.TB, r received, message []byte, zipped bool) {
	t.Helper()
	if r.method != http.MethodPost || r.target != pushPath || !bytes.Equal(r.body, message) {
		t.Errorf("%s %s with %q", r.method, r.target, r.body)
	}
	want := map[string]string{
		"Content-Type": d.codec, "Connect-Protocol-Version": "1", "Accept-Encoding": "identity",
		"Content-Length": strconv.Itoa(len(message)),
	}
	if zipped {
		want["Content-Encoding"] = "gzip"
	}
	for _, name := range []string{"User-Agent", "X-Scope-Orgid", "Via"} {
		want[name] = r.header.Get(name)
	}
	got := map[string]string{}
	for name, values := range r.header {
		got[name] = strings.Join(values, "|")
	}
	if !maps.Equal(got, want) {
		t.Errorf("%s: upstream saw %v, want %v", d.contentType, got, want)
	}
}

// What goes over the wire on HTTP/1.1, to the byte: real trailers for gRPC, a frame of them for gRPC-Web.
func TestAnswersToTheByte(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		if r.Header.Get("X-Scope-Orgid") == "no" {
			says(400, "50% of it\nis bad: é")(w, r)
			return
		}
		accept(w, r)
	})
	relay := start(t, "-upstream", upstream.URL+",name=u")
	for _, tt := range []struct{ contentType, tenant, want string }{
		{"application/grpc", "yes", "Content-Type: application/grpc\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n\x00\x00\x00\x00\x00\r\n0\r\nGrpc-Status: 0\r\n\r\n"},
		{"application/grpc+json", "yes", "Content-Type: application/grpc+json\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n\x00\x00\x00\x00\x02{}\r\n0\r\nGrpc-Status: 0\r\n\r\n"},
		{"application/grpc-web", "yes", "Content-Type: application/grpc-web\r\nContent-Length: 26\r\n\r\n\x00\x00\x00\x00\x00\x80\x00\x00\x00\x10grpc-status: 0\r\n"},
		{"application/grpc", "no", "Content-Type: application/grpc\r\nGrpc-Message: u: 50%25 of it is bad: %C3%A9\r\nGrpc-Status: 3\r\nContent-Length: 0\r\n\r\n"},
		{"application/grpc-web+proto", "no", "Content-Type: application/grpc-web+proto\r\nGrpc-Message: u: 50%25 of it is bad: %C3%A9\r\nGrpc-Status: 3\r\nContent-Length: 0\r\n\r\n"},
		{"application/proto", "yes", "Content-Type: application/proto\r\nContent-Length: 0\r\n\r\n"},
		{"application/json", "yes", "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"},
	} {
		t.Run(tt.contentType+" "+tt.tenant, func(t *testing.T) {
			t.Parallel()
			body := "{}"
			if tt.contentType != "application/proto" && tt.contentType != "application/json" {
				body = string(envelope(0, []byte(body)))
			}
			raw := rawAnswer(t, relay.addr, "POST "+pushPath+" HTTP/1.1\r\nHost: x\r\nContent-Type: "+tt.contentType+
				"\r\nX-Scope-OrgID: "+tt.tenant+"\r\nConnection: close\r\nContent-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"+body)
			if head, want := sortedHead(raw), sortedHead("HTTP/1.1 200 OK\r\nConnection: close\r\n"+tt.want); head != want {
				t.Errorf("got  %q\nwant %q", head, want)
			}
		})
	}
}

// rawAnswer sends raw and returns every byte that comes back until the relay closes.
func rawAnswer(t testing.TB, addr, raw string) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, raw)
	all, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(all)
}

// sortedHead is a raw answer with its header lines in order and without the date.
func sortedHead(raw string) string {
	head, body, _ := strings.Cut(raw, "\r\n\r\n")
	lines := strings.Split(head, "\r\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "Date: ") })
	slices.Sort(lines[1:])
	return strings.Join(lines, "\r\n") + "\r\n\r\n" + body
}

// An envelope that is not exactly one message is refused in the client's own protocol, and nothing goes upstream.
func TestMalformedEnvelopes(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	tests := []struct {
		name string
		body []byte
		code code
	}{
		{"nothing", nil, codeInvalidArgument},
		{"a cut prefix", []byte{0, 0, 0, 0}, codeInvalidArgument},
		{"longer than it says", append(envelope(0, []byte("one")), 'x'), codeInvalidArgument},
		{"shorter than it says", envelope(0, []byte("one"))[:7], codeInvalidArgument},
		{"a length of 4 GiB", []byte{0, 255, 255, 255, 255, 'x'}, codeInvalidArgument},
		{"two messages", append(envelope(0, []byte("one")), envelope(0, []byte("two"))...), codeInvalidArgument},
		{"a trailer frame", envelope(flagTrailers, []byte("grpc-status: 0\r\n")), codeInvalidArgument},
		{"an unknown flag", envelope(0x02, []byte("one")), codeInvalidArgument},
		{"compressed by nothing", envelope(flagCompressed, zip("one")), codeInternal},
	}
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, d := range dialects() {
			if d.protocol == connect {
				continue
			}
			for _, tt := range tests {
				v := d.understand(t, post(t, c, relay.url(pushPath), tt.body, "Content-Type", d.contentType, "Grpc-Encoding", "identity"))
				if v.code != tt.code || v.message == "" {
					t.Errorf("%s, %s: %v %q", d.contentType, tt.name, v.code, v.message)
				}
			}
		}
	})
	t.Cleanup(func() {
		if n := len(upstream.requests()); n != 0 {
			t.Errorf("%d requests went upstream", n)
		}
	})
}

// A deadline that cannot be met or read is answered at once; a good one is passed on, less the time already spent.
func TestDeadlinesOfClients(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	c := newClient(t, "HTTP/1.1")
	for i, tt := range []struct {
		connect, grpc string
		code          code
		most          int // of Connect-Timeout-Ms upstream
	}{
		{"0", "0m", codeDeadlineExceeded, 0},
		{"-1", "-1S", codeDeadlineExceeded, 0},
		{"-999999999", "-99999999H", codeDeadlineExceeded, 0},
		{"", "", codeInvalidArgument, 0},
		{"soon", "1", codeInvalidArgument, 0},
		{"1s", "1x", codeInvalidArgument, 0},
		{"1.5", "S", codeInvalidArgument, 0},
		{"12345678901", "123456789n", codeInvalidArgument, 0},
		{"0x10", "+5S", codeInvalidArgument, 0},
		{"5000", "5S", codeOK, 5000},
		{"5000", "5000m", codeOK, 5000},
		{"5000", "5000000u", codeOK, 5000},
		{"9999999999", "99999999H", codeOK, 9000},
		{"60000", "1M", codeOK, 9000},
	} {
		for _, d := range dialects() {
			name, value := "Grpc-Timeout", tt.grpc
			if d.protocol == connect {
				name, value = "Connect-Timeout-Ms", tt.connect
			}
			tenant := fmt.Sprintf("%d %s", i, d.contentType)
			v := d.call(t, c, relay.url(pushPath), []byte("{}"), false, name, value, "X-Scope-OrgID", tenant)
			if v.code != tt.code {
				t.Errorf("%s %q: %v %q", name, value, v.code, v.message)
			}
			got := upstream.of(tenant)
			if tt.code != codeOK {
				if len(got) != 0 {
					t.Errorf("%s %q went upstream", name, value)
				}
				continue
			}
			left, err := strconv.Atoi(got[0].header.Get("Connect-Timeout-Ms"))
			if err != nil || left <= 0 || left > tt.most {
				t.Errorf("%s %q: Connect-Timeout-Ms %q upstream", name, value, got[0].header.Get("Connect-Timeout-Ms"))
			}
			if got[0].header.Get("Grpc-Timeout") != "" {
				t.Error("grpc-timeout went upstream")
			}
		}
	}
}

// Time that runs out is deadline_exceeded, an address where nobody answers is unavailable.
func TestPushWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	dead := start(t, fastRetries("-upstream", "http://"+deadAddr(t))...)
	hole := start(t, "-upstream", "http://"+blackHole(t))
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, d := range dialects() {
			v := d.call(t, c, dead.url(pushPath), []byte("{}"), false)
			if v.code != codeUnavailable || v.message != "upstream-1: could not be reached" {
				t.Errorf("%s, refused: %v %q", d.contentType, v.code, v.message)
			}
			v = d.call(t, c, hole.url(pushPath), []byte("{}"), false, "Connect-Timeout-Ms", "30", "Grpc-Timeout", "30m")
			if v.code != codeDeadlineExceeded || v.message != "upstream-1: no answer in time" {
				t.Errorf("%s, silent: %v %q", d.contentType, v.code, v.message)
			}
		}
	})
}

// A body over the limit, declared or not, is invalid_argument; the gRPC prefix counts.
func TestPushBodyLimit(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL, "-max-body-size", "1000")
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, d := range dialects() {
			fits := 1000
			if d.protocol != connect {
				fits -= envelopePrefix
			}
			if v := d.call(t, c, relay.url(pushPath), make([]byte, fits), false); v.code != codeOK {
				t.Errorf("%s, %d bytes: %v %q", d.contentType, fits, v.code, v.message)
			}
			if v := d.call(t, c, relay.url(pushPath), make([]byte, fits+1), false); v.code != codeInvalidArgument {
				t.Errorf("%s, %d bytes: %v %q", d.contentType, fits+1, v.code, v.message)
			}
			streamed := struct{ io.Reader }{bytes.NewReader(envelope(0, make([]byte, 996)))} // of unknown length
			resp, err := c.Post(relay.url(pushPath), d.contentType, streamed)
			if err != nil {
				t.Fatal(err)
			}
			if v := d.understand(t, readAll(t, resp)); v.code != codeInvalidArgument {
				t.Errorf("%s, streamed: %v %q", d.contentType, v.code, v.message)
			}
		}
	})
}

// What the route does not serve is 415, with the list of what it does; a gRPC client finds a status there too.
func TestUnservedContentTypes(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	c := newClient(t, "HTTP/1.1")
	for _, tt := range []struct {
		contentType []string
		grpcStatus  string
	}{
		{nil, ""},
		{[]string{""}, ""},
		{[]string{"application/x-protobuf"}, ""},
		{[]string{"application/proto; charset=utf-8"}, ""},
		{[]string{"application/json; charset=latin1"}, ""},
		{[]string{"application/json; charset=utf-8; q=1"}, ""},
		{[]string{"application/json", "application/json"}, ""},
		{[]string{"application/connect+proto"}, ""},
		{[]string{"multipart/form-data; boundary=x"}, ""},
		{[]string{"application/grpc-web-text"}, "12"},
		{[]string{"Application/GRPC-web-text+proto"}, "12"},
		{[]string{"application/grpc+thrift"}, "12"},
		{[]string{"application/grpc; a=b"}, "12"},
		{[]string{"Application/grpc; ;;"}, "12"},
	} {
		var header []string
		for _, v := range tt.contentType {
			header = append(header, "Content-Type", v)
		}
		resp := post(t, c, relay.url(pushPath), []byte("{}"), header...)
		if resp.StatusCode != http.StatusUnsupportedMediaType || resp.Header.Get("Accept-Post") != acceptPost {
			t.Errorf("%q: status %d, Accept-Post %q", tt.contentType, resp.StatusCode, resp.Header.Get("Accept-Post"))
		}
		text, kind := string(resp.body), "text/plain; charset=utf-8"
		if tt.grpcStatus != "" {
			text, kind = resp.Header.Get("Grpc-Message")+string(resp.body)+"\n", "application/grpc"
		}
		if text != "this content type is not served here; Accept-Post lists those that are\n" || resp.Header.Get("Content-Type") != kind {
			t.Errorf("%q: %q, Content-Type %q", tt.contentType, text, resp.Header.Get("Content-Type"))
		}
		if got := resp.Header.Get("Grpc-Status"); got != tt.grpcStatus {
			t.Errorf("%q: grpc-status %q, want %q", tt.contentType, got, tt.grpcStatus)
		}
	}
	if n := len(upstream.requests()); n != 0 {
		t.Errorf("%d requests went upstream", n)
	}
}

// Types do not regard case, and JSON may say its charset: the client's own words go upstream.
func TestContentTypeSpellings(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	c := newClient(t, "HTTP/1.1")
	for _, tt := range []struct{ sent, upstream, answered string }{
		{"APPLICATION/Proto", "APPLICATION/Proto", "application/proto"},
		{"application/json; charset=utf-8", "application/json; charset=utf-8", "application/json"},
		{`Application/JSON;Charset="UTF-8"`, `Application/JSON;Charset="UTF-8"`, "application/json"},
		{"Application/gRPC", "application/proto", "application/grpc"},
		{"application/grpc+json; charset=UTF-8", "application/json", "application/grpc+json"},
		{"application/GRPC-WEB+JSON;charset=utf-8", "application/json", "application/grpc-web+json"},
	} {
		resp := post(t, c, relay.url(pushPath), envelope(0, []byte("{}")), "Content-Type", tt.sent, "X-Scope-OrgID", tt.sent)
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != tt.answered {
			t.Errorf("%s: status %d, Content-Type %q: %s", tt.sent, resp.StatusCode, resp.Header.Get("Content-Type"), resp.body)
			continue
		}
		if got := upstream.of(tt.sent)[0].header["Content-Type"]; len(got) != 1 || got[0] != tt.upstream {
			t.Errorf("%s: upstream saw %q", tt.sent, got)
		}
	}
}

// An agent without any Connect header is a Connect client; one that asks for another version is told so.
func TestConnectProtocolVersion(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	bare := rawAnswer(t, relay.addr, "POST "+pushPath+"?a=1;b HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
	if !strings.HasPrefix(bare, "HTTP/1.1 200 OK\r\n") {
		t.Errorf("answer %q", bare)
	}
	got := upstream.one(t)
	if got.target != pushPath+"?a=1;b" {
		t.Errorf("target %q", got.target)
	}
	if _, named := got.header["User-Agent"]; named {
		t.Errorf("the relay spoke for a nameless client: %q", got.header["User-Agent"])
	}
	c := newClient(t, "HTTP/1.1")
	if v := dialects()[0].call(t, c, relay.url(pushPath), nil, false, "Connect-Protocol-Version", "2"); v.code != codeInvalidArgument {
		t.Errorf("version 2: %v", v.code)
	}
	if v := dialects()[0].call(t, c, relay.url(pushPath), nil, false, "Connect-Protocol-Version", "1"); v.code != codeOK {
		t.Errorf("version 1: %v", v.code)
	}
}

// The header of codec and protocol goes upstream even when the client calls it its own connection's.
func TestNominatedContentType(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	raw := rawAnswer(t, relay.addr, "POST "+pushPath+" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close, content-type, user-agent\r\nUser-Agent: x\r\n\r\n{}")
	if !strings.HasPrefix(raw, "HTTP/1.1 200 OK\r\n") {
		t.Errorf("answer %q", raw)
	}
	if h := upstream.one(t).header; h.Get("Content-Type") != "application/json" || h.Get("User-Agent") != "" {
		t.Errorf("upstream saw %v", h)
	}
}

// The code table is the one of the Connect protocol.
func TestCodes(t *testing.T) {
	t.Parallel()
	want := []string{"ok 200", "canceled 499", "unknown 500", "invalid_argument 400", "deadline_exceeded 504", "not_found 404",
		"already_exists 409", "permission_denied 403", "resource_exhausted 429", "failed_precondition 400", "aborted 409",
		"out_of_range 400", "unimplemented 501", "internal 500", "unavailable 503", "data_loss 500", "unauthenticated 401"}
	if len(want) != int(codes) {
		t.Fatalf("%d codes", codes)
	}
	for c := range codes {
		name, status := c.describe()
		if got := fmt.Sprintf("%s %d", name, status); got != want[c] {
			t.Errorf("code %d is %s, want %s", c, got, want[c])
		}
		if c != codeOK && codeByName(name) != c {
			t.Errorf("%s is code %d", name, codeByName(name))
		}
	}
	for _, name := range []string{"ok", "", "UNAVAILABLE", "unavailable "} {
		if codeByName(name) != codeOK {
			t.Errorf("%q is a code", name)
		}
	}
}

func TestParseGRPCTimeout(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]time.Duration{
		"1H": time.Hour, "2M": 2 * time.Minute, "3S": 3 * time.Second, "4m": 4 * time.Millisecond, "5u": 5 * time.Microsecond, "6n": 6,
		"00000000S": 0, "-1n": -1, "99999999n": 99999999, "99999999S": 99999999 * time.Second, "99999999H": math.MaxInt64, "-99999999H": -math.MaxInt64,
	} {
		if got, ok := parseGRPCTimeout(s); !ok || got != want {
			t.Errorf("%q is %v, %v", s, got, ok)
		}
	}
	for _, s := range []string{"", "S", "1", "-S", "--1S", "1s", "1h", " 1S", "1 S", "1.0S", "123456789S", "1S ", "+1S", "١S", "1_0S"} {
		if got, ok := parseGRPCTimeout(s); ok {
			t.Errorf("%q is %v", s, got)
		}
	}
}

func TestParseConnectTimeout(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]time.Duration{
		"1": time.Millisecond, "0": 0, "-7": -7 * time.Millisecond, "9999999999": 9999999999 * time.Millisecond,
	} {
		if got, ok := parseConnectTimeout(s); !ok || got != want {
			t.Errorf("%q is %v, %v", s, got, ok)
		}
	}
	for _, s := range []string{"", " 1", "1 ", "1ms", "1.5", "0x1", "00000000001", "99999999999", "1_0"} {
		if got, ok := parseConnectTimeout(s); ok {
			t.Errorf("%q is %v", s, got)
		}
	}
}

func FuzzParseGRPCTimeout(f *testing.F) {
	for _, s := range []string{"", "1S", "99999999H", "-5m", "123456789n", "x", "S"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, ok := parseGRPCTimeout(s)
		if !ok {
			if d != 0 {
				t.Errorf("%q refused, and yet %v", s, d)
			}
			return
		}
		if len(s) < 2 || len(s) > 10 || !strings.ContainsAny(s[len(s)-1:], "HMSmun") || (s[0] == '-') != (d < 0) && d != 0 {
			t.Errorf("%q is %v", s, d)
		}
	})
}

func FuzzParseConnectTimeout(f *testing.F) {
	for _, s := range []string{"", "1", "0", "-1", "9999999999", "10000000000", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, ok := parseConnectTimeout(s)
		if n, err := strconv.ParseInt(s, 10, 64); ok && (err != nil || len(s) > 10 || d != time.Duration(n)*time.Millisecond || d/time.Millisecond != time.Duration(n)) {
			t.Errorf("%q is %v", s, d)
		}
	})
}

// FuzzOpenEnvelope: a body is either refused, or it is the prefix and the message, to the byte.
func FuzzOpenEnvelope(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(envelope(0, nil))
	f.Add(envelope(1, []byte("message")))
	f.Add(append(envelope(0, []byte("one")), envelope(0, []byte("two"))...))
	f.Add([]byte{0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		message, compressed, fault := openEnvelope(body)
		if fault != nil {
			if message != nil || compressed || fault.code != codeInvalidArgument || fault.public == "" {
				t.Errorf("refused with %v, and yet %q", fault, message)
			}
			return
		}
		flags := byte(0)
		if compressed {
			flags = 1
		}
		if !bytes.Equal(envelope(flags, message), body) || !bytes.Equal(body, before) {
			t.Errorf("%q is %q, compressed %v", body, message, compressed)
		}
	})
}

func FuzzEncodeGRPCMessage(f *testing.F) {
	for _, s := range []string{"", "plain", "50%", "é\n", "\xff\x00", "%41"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got := decodeGRPCMessage(t, encodeGRPCMessage(s)); got != s {
			t.Errorf("%q came back as %q", s, got)
		}
	})
}

// FuzzRecognise: whatever the header says, the route takes only what it can answer.
func FuzzRecognise(f *testing.F) {
	for _, d := range dialects() {
		f.Add(d.contentType)
	}
	f.Add("application/json; charset=utf-8")
	f.Add("application/grpc-web-text; charset=utf-8")
	f.Fuzz(func(t *testing.T, s string) {
		r := httptest.NewRequest(http.MethodPost, pushPath, nil)
		r.Header["Content-Type"] = []string{s}
		x, fault := beginPush(r)
		c := x.(*call)
		if (fault == nil) != (c.protocol != unknownProtocol) {
			t.Fatalf("%q: %+v, %v", s, c, fault)
		}
		w := httptest.NewRecorder()
		if fault != nil {
			if c.refuse(w, fault) != "415" || w.Code != http.StatusUnsupportedMediaType {
				t.Errorf("%q: %d", s, w.Code)
			}
			return
		}
		known := slices.IndexFunc(dialects(), func(d dialect) bool {
			return d.protocol == c.protocol && d.contentType == c.contentType && d.codec == c.codec
		})
		if known < 0 {
			t.Errorf("%q: %+v", s, c)
		}
	})
}

// FuzzPushRequest: whatever a client sends, it gets one well-formed answer, and nothing refused goes upstream.
func FuzzPushRequest(f *testing.F) {
	f.Add("application/grpc", "1S", "gzip", envelope(1, []byte("x")))
	f.Add("application/proto", "5", "", []byte("x"))
	f.Add("application/grpc-web+json", "0n", "identity", envelope(0, nil))
	f.Fuzz(func(t *testing.T, contentType, timeout, encoding string, body []byte) {
		r := httptest.NewRequest(http.MethodPost, pushPath, nil)
		r.Header["Content-Type"] = []string{contentType}
		r.Header["Grpc-Timeout"] = []string{timeout}
		r.Header["Connect-Timeout-Ms"] = []string{timeout}
		r.Header["Grpc-Encoding"] = []string{encoding}
		x, fault := beginPush(r)
		w := httptest.NewRecorder()
		if fault == nil {
			var p *payload
			if p, fault = x.payload(http.Header{"Content-Type": {contentType}}, body); fault == nil {
				if !bytes.HasSuffix(body, p.body) || p.mediaType() != "application/proto" && p.mediaType() != "application/json" {
					t.Errorf("%q became %q, %v", body, p.body, p.header)
				}
				x.accept(w, reply{})
				return
			}
		}
		x.refuse(w, fault)
		if _, err := http.ReadResponse(bufio.NewReader(strings.NewReader(fmt.Sprintf("HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n", w.Code))), nil); err != nil {
			t.Errorf("status %d: %v", w.Code, err)
		}
	})
}

// On a gRPC request the headers of Connect mean nothing, and none of them goes upstream as if it did.
func TestConnectHeadersOnGRPC(t *testing.T) {
	t.Parallel()
	upstream := newPeer(t, nil)
	relay := start(t, "-upstream", upstream.URL)
	v := dialects()[2].call(t, newClient(t, "HTTP/1.1"), relay.url(pushPath), []byte("x"), false,
		"Connect-Timeout-Ms", "0", "Content-Encoding", "br", "Connect-Protocol-Version", "2")
	if h := upstream.one(t).header; v.code != codeOK || h["Connect-Timeout-Ms"] != nil || h["Content-Encoding"] != nil || h.Get("Connect-Protocol-Version") != "1" {
		t.Errorf("%v, upstream saw %v", v.code, h)
	}
}
