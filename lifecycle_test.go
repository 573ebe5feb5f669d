package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// refusesConnections waits until the relay has closed its listener.
func (p *program) refusesConnections(t testing.TB) {
	t.Helper()
	eventually(t, "the listener is closed", func() bool {
		c, err := net.Dial("tcp", p.addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
}

// Between the signal and the closing of the listener the relay says that it goes, and serves on; a second signal ends
// it at once.
func TestShutdownDelay(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if r.URL.RawQuery == "name=stuck" {
			<-release
		}
	})
	defer close(release)
	relay := start(t, "-upstream", up.URL, "-shutdown-delay", "10m")
	for _, port := range []string{relay.addr, relay.admin} {
		if status, text := get(t, "http://"+port+"/ready"); status != http.StatusOK || text != "ready" {
			t.Errorf("%d %q before the signal", status, text)
		}
	}
	relay.signal(t, syscall.SIGTERM)
	for _, port := range []string{relay.addr, relay.admin} {
		eventually(t, "/ready says that the relay drains", func() bool {
			status, text := get(t, "http://"+port+"/ready")
			return status == http.StatusServiceUnavailable && text == "draining"
		})
	}
	eachProtoInOrder(t, func(t *testing.T, c *http.Client) {
		resp := post(t, c, relay.url("/ingest"), []byte("late"))
		if resp.StatusCode != http.StatusOK || resp.ProtoMajor == 1 && !resp.Close {
			t.Errorf("status %d, close %v", resp.StatusCode, resp.Close)
		}
	})
	c := dial(t, relay.addr)
	write(t, c, "GET /nowhere HTTP/1.1\r\nHost: relay\r\n\r\n")
	if resp := readResponse(t, bufio.NewReader(c)); !resp.Close {
		t.Error("an answer to no profile does not ask the client to go")
	}
	for _, path := range []string{"/ingest", "/nowhere"} {
		c := dialHTTP2(t, relay.addr)
		write(t, c, frame(frameHeaders, flagEnd|flagEndHeaders, 1, requestBlock(path)))
		gone := false
		frames(t, bufio.NewReader(c), func(f gotFrame) bool {
			gone = gone || f.kind == frameGoAway
			return gone
		})
		if !gone {
			t.Errorf("no GOAWAY with the answer to %s", path)
		}
	}
	stuck := dial(t, relay.addr)
	write(t, stuck, "POST /ingest?name=stuck HTTP/1.1\r\nHost: relay\r\nContent-Length: 2\r\n\r\nhi")
	eventually(t, "the request has arrived", func() bool { return len(up.requests()) == 4 })
	relay.signal(t, syscall.SIGINT)
	if code := relay.wait(t); code != exitFailed {
		t.Errorf("exit code %d, want 1", code)
	}
	if log := relay.stderr.String(); !strings.Contains(log, "told again") || !strings.Contains(log, up.URL+": 1") {
		t.Errorf("the log does not say what was lost:\n%s", log)
	}
}

// eachProtoInOrder is eachProto without waiting for the end of the test.
func eachProtoInOrder(t *testing.T, test func(t *testing.T, c *http.Client)) {
	for _, proto := range []string{"HTTP/1.1", "h2c"} {
		t.Run(proto, func(t *testing.T) { test(t, newClient(t, proto)) })
	}
}

// Requests in flight are finished after the signal, retries and all.
func TestDrainFinishesRetries(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if n <= 2 {
			<-release
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	relay := start(t, fastRetries("-upstream", up.URL)...)
	var requests sync.WaitGroup
	for _, proto := range []string{"HTTP/1.1", "h2c"} {
		c := newClient(t, proto)
		requests.Go(func() {
			resp, err := tryPost(t.Context(), c, relay.url("/ingest"), []byte("x"))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("%s: status %d", proto, resp.StatusCode)
			}
		})
	}
	eventually(t, "both requests have arrived", func() bool { return len(up.requests()) == 2 })
	relay.signal(t, syscall.SIGTERM)
	relay.refusesConnections(t)
	close(release)
	requests.Wait()
	if code := relay.wait(t); code != exitOK {
		t.Errorf("exit code %d, want 0", code)
	}
	if n := len(up.requests()); n != 4 {
		t.Errorf("%d attempts, want 4", n)
	}
}

// A request whose body is still arriving when the relay is told to stop is served to its end.
func TestDrainWaitsForArrivingRequests(t *testing.T) {
	t.Parallel()
	up := newPeer(t, nil)
	relay := start(t, "-upstream", up.URL)
	body, head, idle := dial(t, relay.addr), dial(t, relay.addr), dial(t, relay.addr)
	keepAlive(t, idle)
	write(t, body, ingestHead("Content-Length: 4\r\n")+"ab")
	write(t, head, "POST /ingest HTTP/1.1\r\nHost: relay\r\nContent-")
	relay.awaitMetric(t, "pyroscope_receive_http_inflight_requests", 1)
	relay.awaitMetric(t, connectionsSeries, 3)
	relay.signal(t, syscall.SIGTERM)
	relay.refusesConnections(t)
	write(t, head, "Length: 0\r\n\r\n")
	write(t, body, "cd")
	for _, c := range []net.Conn{body, head} {
		if resp := readResponse(t, bufio.NewReader(c)); resp.StatusCode != http.StatusOK || !resp.Close {
			t.Errorf("status %d, close %v", resp.StatusCode, resp.Close)
		}
	}
	if said := ended(t, idle); said != "" {
		t.Errorf("the idle connection was told %q", said)
	}
	if code := relay.wait(t); code != exitOK {
		t.Errorf("exit code %d, want 0", code)
	}
}

// A request on HTTP/2 outlives its connection, and the relay waits for it.
func TestDrainWaitsForClientsThatAreGone(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if n == 1 {
			<-release
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	relay := start(t, fastRetries("-upstream", up.URL)...)
	c := dialHTTP2(t, relay.addr)
	write(t, c, frame(frameHeaders, flagEnd|flagEndHeaders, 1, requestBlock("/ingest")))
	eventually(t, "the request has arrived", func() bool { return len(up.requests()) == 1 })
	c.Close()
	relay.awaitMetric(t, connectionsSeries, 0)
	relay.signal(t, syscall.SIGTERM)
	relay.refusesConnections(t)
	close(release)
	if code := relay.wait(t); code != exitOK {
		t.Errorf("exit code %d, want 0", code)
	}
	if n := len(up.requests()); n != 2 {
		t.Errorf("%d attempts, want 2", n)
	}
}

// Connections that nothing comes from do not hold the relay up: net/http alone would wait five seconds for some.
func TestStopIsNotDelayed(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", newPeer(t, nil).URL, "-conn-limit", "5", "-shutdown-timeout", "4s")
	keepAlive(t, dial(t, relay.addr))
	post(t, newClient(t, "h2c"), relay.url("/ingest"), nil)
	write(t, dialHTTP2(t, relay.addr), frame(frameHeaders, 0, 1, requestBlock("/ingest"))) // half a head
	dial(t, relay.addr)
	write(t, dial(t, relay.addr), "POST /ing")
	relay.awaitMetric(t, connectionsSeries, 5)
	for range 5 { // some of them take the places of idle ones, and then one is parked
		dial(t, relay.addr)
	}
	relay.awaitMetric(t, waitsSeries, 4)
	relay.stop(t)
}

// Requests that cannot be finished in time are named, and the exit code says that they were lost.
func TestShutdownTimeout(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", "http://"+blackHole(t)+",name=hole", "-upstream", newPeer(t, nil).URL, "-shutdown-timeout", "100ms")
	c := dial(t, relay.addr)
	write(t, c, ingestHead("Content-Length: 2\r\n")+"hi")
	relay.awaitMetric(t, `pyroscope_receive_http_request_bytes_total{route="ingest"}`, 2)
	relay.signal(t, syscall.SIGTERM)
	if code := relay.wait(t); code != exitFailed {
		t.Errorf("exit code %d, want 1", code)
	}
	if log := relay.stderr.String(); !strings.Contains(log, `requests=1 undelivered="hole: 1"`) || !strings.Contains(log, "-shutdown-timeout is over") {
		t.Errorf("the log does not say what was lost:\n%s", log)
	}
}

// Addresses that cannot be listened on end the program with 1 and say which flag it was.
func TestAddressInUse(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", "log:")
	_, port, _ := net.SplitHostPort(relay.addr)
	for name, args := range map[string][]string{
		"-listen-port":    {"-listen-address", "127.0.0.1", "-listen-port", port, "-admin-address", ""},
		"-admin-address":  {"-listen-address", "127.0.0.1", "-listen-port", "0", "-admin-address", relay.admin},
		"-listen-address": {"-listen-address", "192.0.2.1", "-listen-port", "0", "-admin-address", ""},
	} {
		p, code := runProgram(t, nil, append(args, "-upstream", "log:")...)
		if code != exitFailed || !strings.Contains(p.stderr.String(), name) {
			t.Errorf("%s: exit code %d, want 1:\n%s", name, code, p.stderr.String())
		}
	}
}

// The service manager hears when the relay is ready, that it lives, and when it stops.
func TestServiceManagerIsNotified(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("there is no sd_notify")
	}
	dir, err := os.MkdirTemp("", "relay") // t.TempDir is too long for a socket's path on some systems
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	names := []string{filepath.Join(dir, "notify")}
	if runtime.GOOS == "linux" {
		names = append(names, "@"+names[0])
	}
	for _, name := range names {
		l, err := net.ListenPacket("unixgram", name)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		l.SetDeadline(time.Now().Add(patience))
		relay := startEnv(t, []string{"NOTIFY_SOCKET=" + name, "WATCHDOG_USEC=20000"}, "-upstream", "log:")
		expect := func(want string) {
			t.Helper()
			for {
				b := make([]byte, 100)
				n, _, err := l.ReadFrom(b)
				switch got := string(b[:n]); {
				case err != nil:
					t.Fatal(err)
				case got == want:
					return
				case got != "WATCHDOG=1":
					t.Fatalf("got %q, want %q", got, want)
				}
			}
		}
		expect("READY=1")
		expect("WATCHDOG=1")
		expect("WATCHDOG=1")
		relay.signal(t, syscall.SIGTERM)
		expect("STOPPING=1")
		if code := relay.wait(t); code != exitOK {
			t.Errorf("exit code %d", code)
		}
	}
}

// A watchdog meant for another process, or a manager that is gone, is no reason not to run.
func TestServiceManagerOfAnother(t *testing.T) {
	t.Parallel()
	relay := startEnv(t, []string{"NOTIFY_SOCKET=/nowhere/notify", "WATCHDOG_USEC=1000", "WATCHDOG_PID=1", "LISTEN_PID=1", "LISTEN_FDS=1"}, "-upstream", "log:")
	served(t, relay)
	relay.stop(t)
	if n := strings.Count(relay.stderr.String(), "cannot notify"); n != 2 {
		t.Errorf("%d warnings, want 2, for READY and STOPPING", n)
	}
}

// passed is a listening socket of 127.0.0.1 to hand to a relay.
func passed(t testing.TB) (addr string, socket *os.File) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err = l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	return l.Addr().String(), socket
}

// With a socket from the service manager, no connection is lost while the relay is restarted under load.
func TestRestartWithPassedSocket(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("there is no LISTEN_FDS")
	}
	up := newPeer(t, nil)
	addr, socket := passed(t)
	adminAddr, adminSocket := passed(t)
	launch := func() *program {
		p := command(t, []string{"LISTEN_FDS=2", "LISTEN_FDNAMES=data:admin"}, "-listen-port", "1", "-admin-address", "", "-conn-limit", "3", "-upstream", up.URL)
		p.cmd.ExtraFiles = []*os.File{socket, adminSocket}
		p.begin(t)
		if p.addr != addr || p.admin != adminAddr {
			t.Fatalf("listening on %s and %s, not on the sockets passed", p.addr, p.admin)
		}
		return p
	}
	relay := launch()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var sent atomic.Int64
	var load sync.WaitGroup
	for i := range 6 {
		c := newClient(t, []string{"HTTP/1.1", "h2c"}[i%2])
		load.Go(func() {
			for ctx.Err() == nil {
				resp, err := tryPost(t.Context(), c, "http://"+addr+"/ingest", []byte("x"))
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, resp.Body)
				if resp.Body.Close(); resp.StatusCode != http.StatusOK {
					t.Errorf("status %d", resp.StatusCode)
				}
				sent.Add(1)
				c.CloseIdleConnections()
			}
		})
	}
	for range 3 {
		enough := sent.Load() + 50
		eventually(t, "requests flow", func() bool { return sent.Load() >= enough || t.Failed() })
		relay.stop(t)
		relay = launch()
	}
	stop()
	load.Wait()
	if n := len(up.requests()); int64(n) != sent.Load() {
		t.Errorf("%d requests arrived, %d were answered 200", n, sent.Load())
	}
	relay.stop(t)
}

// What cannot be a passed socket ends the program.
func TestBadPassedSockets(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("there is no LISTEN_FDS")
	}
	_, socket := passed(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for name, test := range map[string]struct {
		env   []string
		files []*os.File
	}{
		"no number":       {[]string{"LISTEN_FDS=x"}, nil},
		"three":           {[]string{"LISTEN_FDS=3"}, nil},
		"not a socket":    {[]string{"LISTEN_FDS=1"}, []*os.File{null}},
		"two for data":    {[]string{"LISTEN_FDS=2"}, []*os.File{socket, socket}},
		"two for admin":   {[]string{"LISTEN_FDS=2", "LISTEN_FDNAMES=admin:admin"}, []*os.File{socket, socket}},
		"one is not open": {[]string{"LISTEN_FDS=1"}, nil},
	} {
		p := command(t, test.env, "-upstream", "log:", "-listen-port", "0", "-admin-address", "")
		p.cmd.ExtraFiles = test.files
		p.cmd.Run()
		if code := p.cmd.ProcessState.ExitCode(); code != exitFailed || !strings.Contains(p.stderr.String(), "LISTEN_FDS") {
			t.Errorf("%s: exit code %d, want 1:\n%s", name, code, p.stderr.String())
		}
	}
}

// Whoever reads the log may go: the relay goes on without.
func TestLogWithoutReader(t *testing.T) {
	t.Parallel()
	p := command(t, nil, "-listen-address", "127.0.0.1", "-listen-port", "0", "-admin-address", "", "-upstream", "log:")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = w
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
	w.Close()
	line, err := bufio.NewReader(r).ReadString('\n')
	_, addr, ok := strings.Cut(strings.TrimSpace(line), "msg=listening addr=")
	if !ok || err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	r.Close()
	for range 2 {
		if resp := post(t, newClient(t, "HTTP/1.1"), "http://"+addr+"/ingest", nil); resp.StatusCode != http.StatusOK {
			t.Error(resp.Status)
		}
	}
}

// -healthcheck asks the admin port, and needs nothing else.
func TestHealthcheck(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", "log:", "-shutdown-delay", "10m")
	_, port, _ := net.SplitHostPort(relay.admin)
	check := func(want int, says string, env []string, args ...string) {
		t.Helper()
		p, code := runProgram(t, env, args...)
		if all := p.stdout.String() + p.stderr.String(); code != want || !strings.Contains(all, says) {
			t.Errorf("%v %v: exit code %d, want %d: %s", env, args, code, want, all)
		}
	}
	check(exitOK, "ready", nil, "-healthcheck", "-admin-address", relay.admin)
	check(exitOK, "ready", nil, "--healthcheck", "-admin-address", ":"+port)
	check(exitOK, "ready", nil, "-healthcheck", "-admin-address", "0.0.0.0:"+port)
	check(exitOK, "ready", []string{"PYROSCOPE_RELAY_HEALTHCHECK=true", "PYROSCOPE_RELAY_ADMIN_ADDRESS=" + relay.admin,
		"http_proxy=http://" + deadAddr(t), "PYROSCOPE_RELAY_UPSTREAM=log:"})
	broken := "PYROSCOPE_RELAY_UPSTREAM=https://a.example,tls-ca-file=/no/such/file" // for a moment, while it is replaced
	check(exitOK, "ready", []string{broken}, "-healthcheck", "-admin-address", relay.admin)
	check(exitFailed, "refused", nil, "-healthcheck", "-admin-address", deadAddr(t))
	check(exitUsage, "-admin-address", nil, "-healthcheck", "-admin-address", "")
	check(exitUsage, "-admin-address", nil, "-healthcheck", "-admin-address", "8081")
	relay.signal(t, syscall.SIGTERM)
	eventually(t, "/ready says that the relay drains", func() bool {
		status, _ := get(t, "http://"+relay.admin+"/ready")
		return status == http.StatusServiceUnavailable
	})
	check(exitFailed, "not ready", nil, "-healthcheck", "-admin-address", relay.admin)
}
