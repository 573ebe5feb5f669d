package main

// What the tests share: the relay as a real process, upstreams that note what reaches them, clients that send real
// requests over HTTP/1.1 and h2c. All on 127.0.0.1, no fixed ports.

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// asProgram makes the test binary behave as the relay: see TestMain.
const asProgram = "PYROSCOPE_RELAY_TEST_AS_PROGRAM"

// patience is how long a test waits for something that must happen.
const patience = 20 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Unsetenv(asProgram)
		main()
	}
	os.Exit(m.Run())
}

// output collects what a process writes. Safe for concurrent use.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// A program is a relay that runs as a process of its own.
type program struct {
	cmd            *exec.Cmd
	stdout, stderr output
	addr, admin    string // host:port of both ports
	exited         chan struct{}
}

// command prepares the relay with exactly these arguments and extra environment variables.
func command(t testing.TB, env []string, args ...string) *program {
	t.Helper()
	p := &program{cmd: exec.Command(os.Args[0], args...), exited: make(chan struct{})}
	p.cmd.Env = append(append(os.Environ(), asProgram+"=1", "GORACE=atexit_sleep_ms=0"), env...) // or each exit takes a second
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	return p
}

// runProgram runs the relay to its end and returns it and its exit code.
func runProgram(t testing.TB, env []string, args ...string) (*program, int) {
	t.Helper()
	p := command(t, env, args...)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { p.cmd.Process.Kill() })
	defer stop()
	p.cmd.Wait()
	return p, p.cmd.ProcessState.ExitCode()
}

// start runs the relay on free ports of 127.0.0.1 until the test ends. Later arguments win over these.
func start(t testing.TB, args ...string) *program {
	t.Helper()
	return startEnv(t, nil, args...)
}

func startEnv(t testing.TB, env []string, args ...string) *program {
	t.Helper()
	p := command(t, env, append([]string{"-listen-address", "127.0.0.1", "-listen-port", "0", "-admin-address", "127.0.0.1:0"}, args...)...)
	p.begin(t)
	return p
}

// begin starts a prepared relay, which runs until the test ends, and waits until it listens.
func (p *program) begin(t testing.TB) {
	t.Helper()
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("log of the relay:\n%s", tail(p.stderr.String()))
		}
		if strings.Contains(p.stderr.String(), "DATA RACE") || strings.Contains(p.stderr.String(), "panic") {
			t.Errorf("the relay panicked or raced:\n%s", tail(p.stderr.String()))
		}
	})
	listening := regexp.MustCompile(`msg=listening addr=(\S+)`)
	admin := regexp.MustCompile(`msg="admin listening" addr=(\S+)`)
	eventually(t, "the relay listens", func() bool {
		select {
		case <-p.exited:
			t.Fatalf("the relay ended with %d:\n%s", p.cmd.ProcessState.ExitCode(), p.stderr.String())
		default:
		}
		m := listening.FindStringSubmatch(p.stderr.String())
		if m == nil {
			return false
		}
		p.addr = m[1]
		if m := admin.FindStringSubmatch(p.stderr.String()); m != nil {
			p.admin = m[1]
		}
		return true
	})
}

// tail is the end of a long log.
func tail(s string) string {
	const most = 8 << 10
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}

// eventually waits until a condition that another process or goroutine brings about holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain until %s", patience, what)
		}
		time.Sleep(2 * time.Millisecond) // the condition is looked at again, not assumed
	}
}

func (p *program) url(path string) string { return "http://" + p.addr + path }

func (p *program) signal(t testing.TB, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// wait returns the exit code once the relay has ended.
func (p *program) wait(t testing.TB) int {
	t.Helper()
	select {
	case <-p.exited:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		t.Fatalf("the relay did not end within %v", patience)
		return -1
	}
}

// stop asks the relay to drain and expects a clean end.
func (p *program) stop(t testing.TB) {
	t.Helper()
	p.signal(t, syscall.SIGTERM)
	if code := p.wait(t); code != 0 {
		t.Fatalf("exit code %d after SIGTERM, want 0", code)
	}
}

// metrics is the text of /metrics.
func (p *program) metrics(t testing.TB) string {
	t.Helper()
	status, body := get(t, "http://"+p.admin+"/metrics")
	if status != http.StatusOK {
		t.Fatalf("/metrics answered %d", status)
	}
	return body
}

// metric is the value of one series, written as in /metrics: name{labels}. 0 if it is not there.
func (p *program) metric(t testing.TB, series string) float64 {
	t.Helper()
	for line := range strings.Lines(p.metrics(t)) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			return f
		}
	}
	return 0
}

// awaitMetric waits until a series has a value.
func (p *program) awaitMetric(t testing.TB, series string, want float64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s is %v", series, want), func() bool { return p.metric(t, series) == want })
}

func get(t testing.TB, url string) (int, string) {
	t.Helper()
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// received is one request as it reached an upstream.
type received struct {
	method, target, proto, host string
	header                      http.Header
	body                        []byte
	at                          time.Time
}

// A peer is an upstream: a real HTTP server that notes every whole request.
type peer struct {
	*httptest.Server
	mu  sync.Mutex
	got []received
}

// newPeer starts an upstream. answer is called for each request, with its number from 1 and its whole body read; nil
// answers what Pyroscope does on success.
func newPeer(t testing.TB, answer func(w http.ResponseWriter, r *http.Request, n int)) *peer {
	t.Helper()
	if answer == nil {
		answer = func(w http.ResponseWriter, r *http.Request, _ int) { accept(w, r) }
	}
	p := &peer{}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // it never was whole
		}
		p.mu.Lock()
		p.got = append(p.got, received{r.Method, r.RequestURI, r.Proto, r.Host, r.Header.Clone(), body, time.Now()})
		n := len(p.got)
		p.mu.Unlock()
		answer(w, r, n)
	}))
	t.Cleanup(func() {
		p.CloseClientConnections()
		p.Close()
	})
	return p
}

// accept is what Pyroscope answers on success.
func accept(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == pushPath {
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		if strings.HasSuffix(r.Header.Get("Content-Type"), "json") {
			io.WriteString(w, "{}")
		}
	}
}

// requests is what has arrived so far.
func (p *peer) requests() []received {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]received(nil), p.got...)
}

// one is the only request that has arrived.
func (p *peer) one(t testing.TB) received {
	t.Helper()
	got := p.requests()
	if len(got) != 1 {
		t.Fatalf("the upstream got %d requests, want 1", len(got))
	}
	return got[0]
}

// deadAddr is an address of 127.0.0.1 that refuses connections: the client's end of one. Its port stays taken until the
// test ends, so that no other test listens there.
func deadAddr(t testing.TB) string {
	t.Helper()
	c, err := net.Dial("tcp", blackHole(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr().String()
}

// blackHole is the address of a server that accepts connections and never reads or answers.
func blackHole(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	return l.Addr().String()
}

// fastRetries are flags that make attempts follow each other quickly.
func fastRetries(args ...string) []string {
	return append([]string{"-min-backoff-period", "5ms", "-max-backoff-period", "20ms", "-max-backoff-retries", "2"}, args...)
}

// capture is a real client's request from testdata, byte for byte.
func capture(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// captures are the names of all of them.
func captures(t testing.TB) []string {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.http")
	if err != nil || len(paths) == 0 {
		t.Fatal("no captures", err)
	}
	var names []string
	for _, p := range paths {
		names = append(names, filepath.Base(p))
	}
	return names
}

// parseRequest is a capture as a request to send again, and its body.
func parseRequest(t testing.TB, raw []byte) (*http.Request, []byte) {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r, body
}

// A response is an answer, read whole.
type response struct {
	*http.Response
	body []byte
}

// sendRaw puts bytes on a connection of their own and reads one answer.
func sendRaw(t testing.TB, addr string, raw []byte) response {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(raw); err != nil {
		t.Fatal(err)
	}
	return readResponse(t, bufio.NewReader(c))
}

func readResponse(t testing.TB, br *bufio.Reader) response {
	t.Helper()
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodPost})
	if err != nil {
		t.Fatal(err)
	}
	return readAll(t, resp)
}

func readAll(t testing.TB, resp *http.Response) response {
	t.Helper()
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response{resp, body}
}

// newClient is an HTTP client that speaks HTTP/1.1 or h2c, as its name says: "HTTP/1.1" or "h2c".
func newClient(t testing.TB, proto string) *http.Client {
	t.Helper()
	tr := &http.Transport{DisableCompression: true, Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(proto != "h2c")
	tr.Protocols.SetUnencryptedHTTP2(proto == "h2c")
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

// eachProto runs a test over HTTP/1.1 and over h2c.
func eachProto(t *testing.T, test func(t *testing.T, c *http.Client)) {
	for _, proto := range []string{"HTTP/1.1", "h2c"} {
		t.Run(proto, func(t *testing.T) {
			t.Parallel()
			test(t, newClient(t, proto))
		})
	}
}

// post sends a body with headers, given as names and values.
func post(t testing.TB, c *http.Client, url string, body []byte, header ...string) response {
	t.Helper()
	resp, err := tryPost(t.Context(), c, url, body, header...)
	if err != nil {
		t.Fatal(err)
	}
	return readAll(t, resp)
}

func tryPost(ctx context.Context, c *http.Client, url string, body []byte, header ...string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header[http.CanonicalHeaderKey(header[i])] = append(r.Header[http.CanonicalHeaderKey(header[i])], header[i+1])
	}
	return c.Do(r)
}
