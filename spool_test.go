package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A flaky is an upstream that can be told to fail.
type flaky struct {
	*peer
	status atomic.Int64 // 0: take it
	seen   atomic.Int64 // requests, refused ones too

	mu  sync.Mutex
	got []received // what it took, in this order
}

func newFlaky(t testing.TB, status int) *flaky {
	f := &flaky{}
	f.status.Store(int64(status))
	f.peer = newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		f.seen.Add(1)
		if s := f.status.Load(); s != 0 {
			w.WriteHeader(int(s))
			return
		}
		got := f.peer.requests()[n-1]
		f.mu.Lock()
		f.got = append(f.got, got)
		f.mu.Unlock()
		accept(w, r)
	})
	return f
}

func (f *flaky) taken() []received {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.got)
}

// bodies are those of requests, as text.
func bodies(rs []received) []string {
	var all []string
	for _, r := range rs {
		all = append(all, string(r.body))
	}
	return all
}

// spoolFlags are those of a relay with a spool and one upstream called "up".
func spoolFlags(dir, url string, more ...string) []string {
	return append(fastRetries("-spool-dir", dir, "-upstream", url+",name=up"), more...)
}

// spoolFiles are the whole files that wait for an upstream, in their order.
func spoolFiles(t testing.TB, dir, upstream string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, folderName(upstream), "*"+fileSuffix))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// endpoint names one series of upstream "up".
func endpoint(metric string) string { return metric + `{endpoint="up"}` }

func droppedFor(reason string) string {
	return `pyroscope_write_dropped_requests_total{endpoint="up",reason="` + reason + `"}`
}

// checkBooks fails unless everything accepted or found at start is sent, dropped or in the spool.
func checkBooks(t testing.TB, p *program, acceptedAndFound int) {
	t.Helper()
	eventually(t, fmt.Sprintf("sent + dropped + spooled is %d", acceptedAndFound), func() bool {
		sum := p.metric(t, endpoint("pyroscope_write_sent_requests_total")) + p.metric(t, endpoint("pyroscope_relay_spool_files"))
		for _, reason := range dropReasons() {
			sum += p.metric(t, droppedFor(reason))
		}
		return int(sum) == acceptedAndFound
	})
}

func TestSpoolDeliversLaterWhatWasAnswered200(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 503), filepath.Join(t.TempDir(), "spool")
	relay := start(t, spoolFlags(dir, up.URL)...)
	client, names := newClient(t, "HTTP/1.1"), captures(t)
	var want []string
	for _, name := range names {
		raw := capture(t, name)
		resp := sendRaw(t, relay.addr, raw)
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: status %d: %s", name, resp.StatusCode, resp.body)
		}
		sent, body := parseRequest(t, raw)
		if strings.HasPrefix(sent.Header.Get("Content-Type"), "application/grpc") {
			body = body[envelopePrefix:]
		}
		want = append(want, string(body))
	}
	resp := post(t, client, relay.url("/ingest?name=a%7Bb%3Dc%7D&x=;&from=1"), []byte("one\n\ntwo\n\x00"), "X-Scope-OrgID", "team", "User-Agent", "sdk/1")
	if resp.StatusCode != http.StatusOK || len(resp.body) != 0 {
		t.Fatalf("status %d, body %q", resp.StatusCode, resp.body)
	}
	want = append(want, "one\n\ntwo\n\x00")
	if n := len(spoolFiles(t, dir, "up")); n != len(want) {
		t.Fatalf("%d files, want %d", n, len(want))
	}
	up.status.Store(0)
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
	if got := bodies(up.taken()); !slices.Equal(got, want) {
		t.Fatalf("%d bodies arrived, want %d; or in another order, or changed", len(got), len(want))
	}
	last := up.taken()[len(want)-1]
	if last.target != "/ingest?name=a%7Bb%3Dc%7D&x=;&from=1" || last.header.Get("X-Scope-OrgID") != "team" || last.header.Get("User-Agent") != "sdk/1" {
		t.Errorf("arrived as %s %v", last.target, last.header)
	}
	for series, want := range map[string]int{"spool_written_total": len(want), "spool_replayed_total": len(want), "spool_bytes": 0, "spool_oldest_seconds": 0} {
		relay.awaitMetric(t, endpoint("pyroscope_relay_"+series), float64(want))
	}
	checkBooks(t, relay, len(want))
	if n := len(spoolFiles(t, dir, "up")); n != 0 {
		t.Errorf("%d files are left", n)
	}
}

// What a client is told when its profile was spooled: success, with the empty message of its protocol.
func TestSpoolAnswersWithTheEmptyMessage(t *testing.T) {
	t.Parallel()
	relay := start(t, spoolFlags(t.TempDir(), "http://"+deadAddr(t))...)
	eachProto(t, func(t *testing.T, c *http.Client) {
		for _, test := range []struct{ contentType, body, want string }{
			{"application/proto", "x", ""},
			{"application/json", "{}", "{}"},
			{"application/grpc", "\x00\x00\x00\x00\x01x", "\x00\x00\x00\x00\x00"},
			{"application/grpc+json", "\x00\x00\x00\x00\x02{}", "\x00\x00\x00\x00\x02{}"},
			{"application/grpc-web", "\x00\x00\x00\x00\x01x", "\x00\x00\x00\x00\x00\x80\x00\x00\x00\x10grpc-status: 0\r\n"},
		} {
			resp := post(t, c, relay.url(pushPath), []byte(test.body), "Content-Type", test.contentType)
			if resp.StatusCode != http.StatusOK || string(resp.body) != test.want {
				t.Errorf("%s: status %d, body %q, want %q", test.contentType, resp.StatusCode, resp.body, test.want)
			}
		}
	})
}

// A dead upstream costs one client its attempt; those after it do not ask it at all, and keep their order.
func TestSpoolBacklogGoesStraightToDiskInOrder(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 503), t.TempDir()
	relay := start(t, "-spool-dir", dir, "-min-backoff-period", "300ms", "-max-backoff-period", "300ms", "-upstream", up.URL+",name=up")
	c := newClient(t, "HTTP/1.1")
	var want []string
	begun := time.Now()
	for i := range 20 {
		want = append(want, strconv.Itoa(i))
		if resp := post(t, c, relay.url("/ingest"), []byte(want[i])); resp.StatusCode != http.StatusOK {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	if n := up.seen.Load(); n > 1+int64(time.Since(begun)/(240*time.Millisecond)) {
		t.Errorf("the upstream was asked %d times in %v", n, time.Since(begun))
	}
	up.status.Store(0)
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
	post(t, c, relay.url("/ingest"), []byte("after"))
	if got := bodies(up.taken()); !slices.Equal(got, append(want, "after")) {
		t.Errorf("arrived as %v", got)
	}
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_written_total"), 20) // not the last one
	checkBooks(t, relay, 21)
}

func TestSpoolIsNotTouchedByAHealthyUpstream(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 0), t.TempDir()
	relay := start(t, spoolFlags(dir, up.URL)...)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if resp := post(t, newClient(t, "h2c"), relay.url("/ingest"), []byte("x")); resp.StatusCode != http.StatusOK {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	checkBooks(t, relay, 5)
	relay.stop(t)
}

// What is not the upstream's trouble is answered as ever; what someone will mend is spooled.
func TestSpoolTakesWhatMayStillBeDelivered(t *testing.T) {
	t.Parallel()
	up := newFlaky(t, 0)
	relay := start(t, spoolFlags(t.TempDir(), up.URL, "-retry-on-http-422")...)
	plain := start(t, spoolFlags(t.TempDir(), up.URL, "-retry-on-http-429=false")...)
	c := newClient(t, "HTTP/1.1")
	spooled := 0
	for _, test := range []struct {
		relay        *program
		status, want int
		path         string
	}{
		{relay, 400, 400, "/ingest"}, {relay, 401, 401, "/ingest"}, {relay, 413, 413, "/ingest"}, {relay, 501, 501, "/ingest"},
		{plain, 422, 422, "/ingest"}, {plain, 429, 429, "/ingest"}, {relay, 404, 501, pushPath}, {relay, 400, 400, pushPath},
		{relay, 302, 200, "/ingest"}, {relay, 408, 200, "/ingest"}, {relay, 422, 200, "/ingest"}, {relay, 429, 200, "/ingest"},
		{relay, 500, 200, "/ingest"}, {relay, 502, 200, "/ingest"}, {relay, 504, 200, "/ingest"}, {relay, 503, 200, pushPath},
		{relay, 202, 200, pushPath}, {relay, 301, 200, pushPath},
	} {
		up.status.Store(int64(test.status))
		resp := post(t, c, test.relay.url(test.path), []byte("x"), "Content-Type", "application/proto")
		if resp.StatusCode != test.want {
			t.Errorf("%s: an upstream's %d was answered with %d, want %d", test.path, test.status, resp.StatusCode, test.want)
		}
		up.status.Store(0)
		if test.want == http.StatusOK {
			spooled++
			relay.awaitMetric(t, endpoint("pyroscope_relay_spool_replayed_total"), float64(spooled))
			relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
		}
	}
	if n := plain.metric(t, endpoint("pyroscope_relay_spool_written_total")); n != 0 {
		t.Errorf("%v permanent refusals were spooled", n)
	}
	checkBooks(t, relay, 16)
	checkBooks(t, plain, 2)
}

// A profile that its upstream will not have is set aside, and holds up nothing.
func TestSpoolSetsAsideWhatIsRefused(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 503), t.TempDir()
	relay := start(t, spoolFlags(dir, up.URL)...)
	post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("bad"))
	up.status.Store(400)
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_rejected_total"), 1)
	relay.awaitMetric(t, droppedFor("spool_rejected"), 1)
	checkBooks(t, relay, 1)
	aside, err := filepath.Glob(filepath.Join(dir, "up", asideName, "*"))
	if err != nil || len(aside) != 1 {
		t.Fatalf("set aside: %v, %v", aside, err)
	}
	data, err := os.ReadFile(aside[0])
	if err != nil {
		t.Fatal(err)
	}
	if p, err := parseSpooled(data); err != nil || string(p.body) != "bad" {
		t.Errorf("the file in rejected/ holds %q, %v", data, err)
	}
	up.status.Store(0)
	post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("good"))
	if got := bodies(up.taken()); !slices.Equal(got, []string{"good"}) {
		t.Errorf("taken: %v", got)
	}
}

// A profile that its upstream answers with 500 is tried ten times, and the others pass it by.
func TestSpoolSetsPoisonAside(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/ingest", pushPath} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			var took, poisoned atomic.Int64
			up := newPeer(t, nil)
			up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if body, _ := io.ReadAll(r.Body); string(body) == "poison" {
					poisoned.Add(1)
					w.Header().Set("Content-Type", "application/json")
					w.WriteHeader(http.StatusInternalServerError)
					io.WriteString(w, `{"code":"unknown","message":"oops"}`)
					return
				}
				took.Add(1)
				accept(w, r)
			})
			relay := start(t, spoolFlags(t.TempDir(), up.URL)...)
			c := newClient(t, "HTTP/1.1")
			for _, body := range []string{"poison", "a", "b", "poison", "c"} {
				if resp := post(t, c, relay.url(path), []byte(body), "Content-Type", "application/proto"); resp.StatusCode != http.StatusOK {
					t.Fatalf("status %d", resp.StatusCode)
				}
			}
			eventually(t, "the others pass", func() bool { return took.Load() == 3 })
			relay.awaitMetric(t, endpoint("pyroscope_relay_spool_rejected_total"), 2)
			relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
			if n := poisoned.Load(); n < 2*poisonAnswers {
				t.Errorf("given up after %d answers to two profiles", n)
			}
			checkBooks(t, relay, 5)
		})
	}
}

func TestSpoolFullRejects(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	relay := start(t, spoolFlags(dir, "http://"+deadAddr(t), "-spool-max-bytes", "2KiB")...)
	c := newClient(t, "HTTP/1.1")
	body := bytes.Repeat([]byte("x"), 700)
	stored := 0
	for ; ; stored++ {
		resp := post(t, c, relay.url("/ingest"), body)
		if resp.StatusCode == http.StatusOK && stored < 3 {
			continue
		}
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") != "10" || !strings.HasPrefix(string(resp.body), "up: ") {
			t.Errorf("status %d, Retry-After %q, %s", resp.StatusCode, resp.Header.Get("Retry-After"), resp.body)
		}
		break
	}
	if stored != 2 {
		t.Errorf("%d files of 700 bytes and a head fitted into 2 KiB", stored)
	}
	resp := post(t, c, relay.url(pushPath), body, "Content-Type", "application/proto")
	if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(resp.body), `"code":"unavailable"`) {
		t.Errorf("Connect: status %d, %s", resp.StatusCode, resp.body)
	}
	resp = post(t, c, relay.url(pushPath), append([]byte("\x00\x00\x00\x02\xbc"), body...), "Content-Type", "application/grpc")
	if resp.Header.Get("Grpc-Status") != "14" {
		t.Errorf("gRPC: %v", resp.Header)
	}
	if n := relay.metric(t, `pyroscope_receive_http_rejected_total{reason="spool_full"}`); n != 3 {
		t.Errorf("rejected_total is %v", n)
	}
	if n := relay.metric(t, droppedFor("spool_full")); n != 3 {
		t.Errorf("dropped is %v", n)
	}
	checkBooks(t, relay, 5)
}

func TestSpoolFullDropsOldest(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 503), t.TempDir()
	relay := start(t, "-min-backoff-period", "1s", "-spool-dir", dir, "-upstream", up.URL+",name=up", "-spool-max-bytes", "2KiB", "-spool-full", "drop-oldest")
	c := newClient(t, "HTTP/1.1")
	for i := range 5 {
		if resp := post(t, c, relay.url("/ingest"), bytes.Repeat([]byte{byte('0' + i)}, 700)); resp.StatusCode != http.StatusOK {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	if resp := post(t, c, relay.url("/ingest"), make([]byte, 4<<10)); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("what can never fit was answered %d", resp.StatusCode)
	}
	if n := relay.metric(t, `pyroscope_write_dropped_bytes_total{endpoint="up",reason="spool_oldest"}`); n != 3*700 {
		t.Errorf("%v bytes dropped", n)
	}
	checkBooks(t, relay, 6)
	up.status.Store(0)
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
	got := bodies(up.taken())
	if len(got) != 2 || got[0][0] != '3' || got[1][0] != '4' {
		t.Errorf("the newest two are not what arrived: %d", len(got))
	}
}

// Without its directory the relay goes on: clients of a failing upstream are told to try again, all others notice nothing.
func TestSpoolDirectoryVanishes(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 503), t.TempDir()
	relay := start(t, spoolFlags(dir, up.URL)...)
	c := newClient(t, "HTTP/1.1")
	vanished := filepath.Join(dir, "up")
	if err := os.RemoveAll(vanished); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(vanished, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if resp := post(t, c, relay.url("/ingest"), []byte("x")); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") != "10" {
			t.Fatalf("status %d, Retry-After %q", resp.StatusCode, resp.Header.Get("Retry-After"))
		}
	}
	if n := strings.Count(relay.stderr.String(), "spool cannot take a profile"); n != 1 {
		t.Errorf("the log says it %d times", n)
	}
	up.status.Store(0)
	if resp := post(t, c, relay.url("/ingest"), []byte("x")); resp.StatusCode != http.StatusOK {
		t.Errorf("with a healthy upstream: status %d", resp.StatusCode)
	}
	if err := os.Remove(vanished); err != nil {
		t.Fatal(err)
	}
	up.status.Store(503)
	if resp := post(t, c, relay.url("/ingest"), []byte("again")); resp.StatusCode != http.StatusOK {
		t.Errorf("the folder was not made again: status %d", resp.StatusCode)
	}
	checkBooks(t, relay, 5)
}

// A file system that is really full, of bytes or of inodes.
func TestSpoolOnAFullDisk(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"size=64k", "size=1m,nr_inodes=12"} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if out, err := exec.Command("mount", "-t", "tmpfs", "-o", options, "tmpfs", dir).CombinedOutput(); err != nil {
				t.Skipf("no tmpfs can be mounted here: %v: %s", err, out)
			}
			t.Cleanup(func() { exec.Command("umount", dir).Run() })
			up := newFlaky(t, 503)
			relay := start(t, spoolFlags(dir, up.URL)...)
			c := newClient(t, "HTTP/1.1")
			var stored []string
			refused := 0
			for i := range 40 {
				body := fmt.Sprintf("%04d%s", i, strings.Repeat("x", 3000))
				switch resp := post(t, c, relay.url("/ingest"), []byte(body)); {
				case resp.StatusCode == http.StatusOK:
					stored = append(stored, body)
				case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") != "":
					refused++
				default:
					t.Fatalf("status %d: %s", resp.StatusCode, resp.body)
				}
			}
			if len(stored) == 0 || refused == 0 {
				t.Fatalf("%d stored, %d refused", len(stored), refused)
			}
			up.status.Store(0)
			relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
			if got := bodies(up.taken()); !slices.Equal(got, stored) {
				t.Errorf("%d arrived of %d", len(got), len(stored))
			}
			checkBooks(t, relay, 40)
			relay.stop(t)
		})
	}
}

func TestSpoolHasOneOwner(t *testing.T) {
	t.Parallel()
	dir, url := t.TempDir(), "http://"+deadAddr(t)
	relay := start(t, spoolFlags(dir, url)...)
	second, code := runProgram(t, nil, spoolFlags(dir, url, "-listen-port", "0", "-admin-address", "")...)
	if code != exitFailed || !strings.Contains(second.stderr.String(), "-spool-dir") {
		t.Errorf("a second process ended with %d: %s", code, second.stderr.String())
	}
	relay.signal(t, syscall.SIGKILL)
	relay.wait(t)
	start(t, spoolFlags(dir, url)...).stop(t)
}

// The lock must not go with the first collection of garbage: an os.File that nobody can reach is closed.
func TestSpoolStaysLocked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := newRelay(parse(t, "-spool-dir", dir, "-upstream", "http://127.0.0.1:1,name=up"), slog.New(slog.DiscardHandler))
	if err := r.openSpools(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		collected := make(chan struct{})
		runtime.SetFinalizer(new([64]byte), func(*[64]byte) { close(collected) })
		runtime.GC()
		<-collected
	}
	if d, err := openSpoolDir(dir); err == nil {
		t.Error("another could open the spool", d.close())
	}
	runtime.KeepAlive(r)
}

// What a crash leaves behind: a profile that is whole is delivered, a temporary file goes, a damaged one is set aside.
func TestSpoolAfterACrash(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 503), t.TempDir()
	flags := spoolFlags(dir, up.URL)
	relay := start(t, flags...)
	for _, body := range []string{"first", "second", "third"} {
		post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte(body))
	}
	relay.signal(t, syscall.SIGKILL)
	relay.wait(t)
	files := spoolFiles(t, dir, "up")
	if len(files) != 3 {
		t.Fatalf("%d files", len(files))
	}
	data, err := os.ReadFile(files[1])
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-1] ^= 1
	temp, stranger := filepath.Join(dir, "up", tempPrefix+"1"), filepath.Join(dir, "https:%2F%2Fgone")
	if err := errors.Join(os.WriteFile(files[1], data, 0o600), os.WriteFile(temp, data, 0o600), os.Mkdir(stranger, 0o700)); err != nil {
		t.Fatal(err)
	}
	up.status.Store(0)
	relay = start(t, flags...)
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
	if got := bodies(up.taken()); !slices.Equal(got, []string{"first", "third"}) {
		t.Errorf("arrived: %v", got)
	}
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_damaged_total"), 1)
	relay.awaitMetric(t, droppedFor("spool_damaged"), 1)
	checkBooks(t, relay, 3)
	if _, err := os.Stat(temp); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
	if _, err := os.Stat(stranger); err != nil || !strings.Contains(relay.stderr.String(), "https://gone") {
		t.Errorf("an unknown upstream's folder was not left alone and named: %v", err)
	}
	eventually(t, "the damaged file is in rejected/", func() bool {
		aside, _ := filepath.Glob(filepath.Join(dir, "up", asideName, "*.damaged"))
		return len(aside) == 1
	})
}

// kill -9 at random instants under load: all that was answered 200 arrives, exactly as it was sent.
// PYROSCOPE_RELAY_TEST_KILLS sets the number of rounds.
func TestSpoolSurvivesKills(t *testing.T) {
	t.Parallel()
	rounds, err := strconv.Atoi(os.Getenv("PYROSCOPE_RELAY_TEST_KILLS"))
	if err != nil {
		rounds = 3
	}
	up, dir := newFlaky(t, 0), t.TempDir()
	var acked sync.Map
	var sent, acks atomic.Int64
	for round := range rounds {
		up.status.Store(int64([]int{0, 503}[round%2]))
		relay := start(t, spoolFlags(dir, up.URL)...)
		ctx, stop := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		for i := range 8 {
			c := newClient(t, []string{"HTTP/1.1", "h2c"}[i%2])
			clients.Go(func() {
				for ctx.Err() == nil {
					body := fmt.Sprintf("%d %d %s", round, sent.Add(1), strings.Repeat("x", rand.IntN(20000)))
					resp, err := tryPost(ctx, c, relay.url("/ingest"), []byte(body))
					if err != nil {
						return // killed
					}
					if resp.StatusCode == http.StatusOK {
						acked.Store(body, true)
						acks.Add(1)
					}
					resp.Body.Close()
				}
			})
		}
		life := time.Duration(20+rand.IntN(80)) * time.Millisecond // of the relay: any instant must do
		flip := time.AfterFunc(life/2, func() { up.status.Store(int64([]int{503, 0}[round%2])) })
		time.Sleep(life)
		relay.signal(t, syscall.SIGKILL)
		relay.wait(t)
		flip.Stop()
		stop()
		clients.Wait()
	}
	up.status.Store(0)
	relay := start(t, spoolFlags(dir, up.URL)...)
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
	arrived := map[string]int{}
	for _, body := range bodies(up.taken()) {
		arrived[body]++
	}
	lost, twice := 0, 0
	acked.Range(func(body, _ any) bool {
		if arrived[body.(string)] == 0 {
			lost++
		}
		return true
	})
	for _, n := range arrived {
		if n > 1 {
			twice++
		}
	}
	t.Logf("%d kills: %d sent, %d acknowledged, %d arrived, %d of them more than once, %d lost", rounds, sent.Load(), acks.Load(), len(arrived), twice, lost)
	if lost > 0 || acks.Load() == 0 {
		t.Errorf("%d of %d acknowledged profiles are lost", lost, acks.Load())
	}
	if n := relay.metric(t, endpoint("pyroscope_relay_spool_damaged_total")); n != 0 {
		t.Errorf("%v files were damaged", n)
	}
}

// At SIGTERM what an upstream does not answer in time is spooled, and its client told so.
func TestSpoolTakesRequestsInFlightAtShutdown(t *testing.T) {
	t.Parallel()
	called := make(chan struct{}, 1)
	release := make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		called <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	defer close(release)
	dir := t.TempDir()
	relay := start(t, spoolFlags(dir, up.URL, "-shutdown-timeout", "1s")...)
	status := make(chan int, 1)
	go func() {
		resp, err := tryPost(t.Context(), newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("x"))
		if err != nil {
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	<-called
	relay.stop(t)
	if s := <-status; s != http.StatusOK {
		t.Errorf("status %d", s)
	}
	if n := len(spoolFiles(t, dir, "up")); n != 1 {
		t.Errorf("%d files", n)
	}
	if log := relay.stderr.String(); strings.Contains(log, "down") {
		t.Errorf("what the relay cut short itself is called an outage:\n%s", log)
	}
}

// A profile that is being replayed at SIGTERM is not cut off: it would be sent again after the restart.
func TestSpoolFinishesReplayAtShutdown(t *testing.T) {
	t.Parallel()
	called, release := make(chan struct{}), make(chan struct{})
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if n == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		close(called)
		<-release
	})
	dir := t.TempDir()
	relay := start(t, spoolFlags(dir, up.URL)...)
	post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("x"))
	<-called
	relay.signal(t, syscall.SIGTERM)
	eventually(t, "it is stopping", func() bool { return strings.Contains(relay.stderr.String(), "msg=stopping") })
	time.AfterFunc(100*time.Millisecond, func() { close(release) }) // enough to end if it did not wait
	if code := relay.wait(t); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	if n := len(spoolFiles(t, dir, "up")); n != 0 {
		t.Errorf("%d files are left", n)
	}
}

// With a spool there is one attempt in a client's time.
func TestSpoolDoesNotRetryWhileTheClientWaits(t *testing.T) {
	t.Parallel()
	up := newFlaky(t, 503)
	relay := start(t, "-spool-dir", t.TempDir(), "-upstream", up.URL+",name=up", "-min-backoff-period", "6s")
	resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("x"))
	if n := up.seen.Load(); n != 1 || resp.StatusCode != http.StatusOK {
		t.Errorf("%d attempts, status %d", n, resp.StatusCode)
	}
}

// A client's own deadline leaves time for the disk.
func TestSpoolWithinTheClientsDeadline(t *testing.T) {
	t.Parallel()
	relay := start(t, spoolFlags(t.TempDir(), "http://"+blackHole(t))...)
	resp := post(t, newClient(t, "h2c"), relay.url(pushPath), []byte("x"), "Content-Type", "application/proto", "Connect-Timeout-Ms", "1500")
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status %d: %s", resp.StatusCode, resp.body)
	}
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 1)
}

// Credentials go upstream and never to disk; a forwarded one is not there any more when the profile is replayed.
func TestSpoolHoldsNoCredential(t *testing.T) {
	t.Parallel()
	up, dir := newFlaky(t, 503), t.TempDir()
	relay := start(t, fastRetries("-spool-dir", dir, "-upstream", up.URL+",name=up,header=X-Own: sekret-1",
		"-forward-header", "Authorization", "-forward-header", "X-Api-Key", "-forward-header", "X-Zone", "-log-level", "debug")...)
	post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), []byte("x"), "Authorization", "sekret-2", "X-Api-Key", "sekret-3", "X-Zone", "eu")
	if up.requests()[0].header.Get("Authorization") != "sekret-2" {
		t.Error("the live request went without the client's credential")
	}
	files := spoolFiles(t, dir, "up")
	data, err := os.ReadFile(files[0])
	if err != nil || bytes.Contains(data, []byte("sekret")) || !bytes.Contains(data, []byte("X-Zone: eu\n")) {
		t.Errorf("%s, %v", data, err)
	}
	for path, want := range map[string]os.FileMode{files[0]: 0o600, filepath.Dir(files[0]): 0o700, filepath.Join(dir, "up", asideName): 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	up.status.Store(0)
	relay.awaitMetric(t, endpoint("pyroscope_relay_spool_files"), 0)
	got := up.taken()[0].header
	if got.Get("X-Own") != "sekret-1" || got.Get("X-Zone") != "eu" || got.Get("Authorization") != "" {
		t.Errorf("replayed with %v", got)
	}
	if log := relay.stderr.String(); strings.Contains(log, "sekret") || !strings.Contains(log, "header=Authorization") {
		t.Errorf("the log names a secret, or not the header: %s", log)
	}
}

func TestSpoolConfiguration(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		fault string
		args  []string
	}{
		{"-spool-full", []string{"-spool-full", "maybe"}},
		{"-spool-max-bytes", []string{"-spool-max-bytes", "0"}},
		{"-spool-dir", []string{"-spool-dir", file}},
		{"-spool-dir", []string{"-spool-dir", filepath.Join(file, "below")}},
		{"-upstream", []string{"-spool-dir", t.TempDir(), "-upstream", "http://a.example/" + strings.Repeat("/", 90) + "x"}},
		{"", []string{"-spool-dir", t.TempDir(), "-upstream", "http://a.example/" + strings.Repeat("/", 90) + "x,required=false"}},
		{"", []string{"-spool-dir", filepath.Join(t.TempDir(), "new"), "-spool-full", "drop-oldest"}},
	} {
		_, err := parseConfig(append([]string{"-upstream", "log:"}, test.args...))
		if test.fault == "" && err != nil || test.fault != "" && (err == nil || !strings.Contains(err.Error(), test.fault)) {
			t.Errorf("%v: %v", test.args, err)
		}
	}
	unable, code := runProgram(t, nil, "-listen-port", "0", "-admin-address", "", "-upstream", "http://a.example", "-spool-dir", "/proc/self/spool")
	if code != exitFailed || !strings.Contains(unable.stderr.String(), "-spool-dir") {
		t.Errorf("a directory that cannot be made: exit code %d: %s", code, unable.stderr.String())
	}
}

func TestSpoolFolderNames(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"prod": "prod", ".": "%2E", "..": "%2E%2E", ".lock": "%2Elock", "a.b": "a.b", "a/b": "a%2Fb", "a%2Fb": "a%252Fb",
		"https://x.example:4040/p": "https:%2F%2Fx.example:4040%2Fp", "Zürich 1": "Z%C3%BCrich%201",
	} {
		if got := folderName(name); got != want {
			t.Errorf("%q is in %q, want %q", name, got, want)
		}
	}
}

// A brokenDisk does what the disk under it does, up to a step; from then on it fails, as a dead process would.
type brokenDisk struct {
	disk
	left atomic.Int64 // steps that still work
	once bool         // only one step fails
	err  error
}

func (d *brokenDisk) step() error {
	if left := d.left.Add(-1); left == -1 || left < 0 && !d.once {
		return d.err
	}
	return nil
}

func (d *brokenDisk) create(name string) (diskFile, error) {
	if err := d.step(); err != nil {
		return nil, err
	}
	f, err := d.disk.create(name)
	return brokenFile{f, d}, err
}

func (d *brokenDisk) rename(from, to string) error {
	if err := d.step(); err != nil {
		return err
	}
	return d.disk.rename(from, to)
}

func (d *brokenDisk) remove(name string) error {
	if d.left.Load() < 0 && !d.once {
		return d.err
	}
	return d.disk.remove(name)
}

func (d *brokenDisk) sync() error {
	if err := d.step(); err != nil {
		return err
	}
	return d.disk.sync()
}

type brokenFile struct {
	diskFile
	disk *brokenDisk
}

func (f brokenFile) Write(p []byte) (int, error) {
	if err := f.disk.step(); err != nil {
		n, _ := f.diskFile.Write(p[:len(p)/2])
		return n, err
	}
	return f.diskFile.Write(p)
}

func (f brokenFile) Sync() error {
	if err := f.disk.step(); err != nil {
		return err
	}
	return f.diskFile.Sync()
}

// openTestSpool opens the spool of upstream "up" in dir, as the process would at start.
func openTestSpool(t testing.TB, dir string, max int64, dropOldest bool) *spool {
	t.Helper()
	d, err := openSpoolDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.close() })
	m := newMetrics()
	e := m.endpoint("up")
	s, err := d.open("up", max, dropOldest, e, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	e.spool = m.spool("up", s.status)
	d.lock.Close() // so that the test may open it again
	return s
}

func testPayload(body string) *payload {
	return &payload{route: routeIngest, query: "name=a", header: http.Header{"Content-Type": {"a", "b"}}, body: []byte(body), free: func() {}}
}

// stored are the bodies of all files of a spool that can be read back.
func stored(t testing.TB, s *spool) []string {
	t.Helper()
	var all []string
	for _, f := range s.files {
		data, err := s.disk.read(f.name())
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(data)) != f.size {
			t.Errorf("%s has %d bytes, booked are %d", f.name(), len(data), f.size)
		}
		p, err := parseSpooled(data)
		if err != nil {
			t.Fatalf("%s: %v", f.name(), err)
		}
		all = append(all, string(p.body))
	}
	return all
}

// The steps of writing one file are create, write, write, fsync, rename, fsync of the folder. Whichever fails, what was
// stored before is there, the profile is not said to be stored, and nothing half-written is ever seen.
func TestSpoolFaultsAtEachStep(t *testing.T) {
	t.Parallel()
	const steps = 6
	for _, once := range []bool{true, false} { // the disk fails once; the process dies
		for step := range steps {
			t.Run(fmt.Sprintf("once=%v step=%d", once, step), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				s := openTestSpool(t, dir, 1<<20, false)
				broken := &brokenDisk{disk: s.disk, once: once, err: syscall.EIO}
				broken.left.Store(int64(steps + step))
				s.disk = broken
				if err := s.add(t.Context(), testPayload("first")); err != nil {
					t.Fatal(err)
				}
				if err := s.add(t.Context(), testPayload("second")); !errors.Is(err, syscall.EIO) {
					t.Fatalf("the fault was not reported: %v", err)
				}
				want := []string{"first"}
				if once {
					if err := s.add(t.Context(), testPayload("third")); err != nil {
						t.Fatal(err)
					}
					want = append(want, "third")
				}
				if n := s.pending.Load(); n != int64(len(want)) || s.reserved != 0 {
					t.Errorf("pending %d, reserved %d", n, s.reserved)
				}
				temps := filepath.Join(dir, "up", tempPrefix+"*")
				if left, err := filepath.Glob(temps); err != nil || once && len(left) != 0 {
					t.Errorf("left over at once: %v", left)
				}
				got := stored(t, openTestSpool(t, dir, 1<<20, false))
				if !once && step == steps-1 {
					want = append(want, "second") // it was renamed: delivered, though nobody was told so
				}
				if !slices.Equal(got, want) {
					t.Errorf("after a restart: %v, want %v", got, want)
				}
				if left, err := filepath.Glob(temps); err != nil || len(left) != 0 {
					t.Errorf("left over after a restart: %v", left)
				}
			})
		}
	}
}

func TestSpoolDropsOldestWhenTheDiskIsFull(t *testing.T) {
	t.Parallel()
	s := openTestSpool(t, t.TempDir(), 1<<20, true)
	broken := &brokenDisk{disk: s.disk, once: true, err: syscall.ENOSPC}
	broken.left.Store(12)
	s.disk = broken
	for _, body := range []string{"1", "2", "3"} {
		if err := s.add(t.Context(), testPayload(body)); err != nil {
			t.Fatal(err)
		}
	}
	if got := stored(t, s); !slices.Equal(got, []string{"2", "3"}) {
		t.Errorf("stored: %v", got)
	}
	if n := s.metrics.droppedRequests[dropSpoolOldest].Value(); n != 1 || s.pending.Load() != 2 {
		t.Errorf("dropped %d, pending %d", n, s.pending.Load())
	}
}

// Those who write at the same time share one limit.
func TestSpoolLimitHoldsForWritersTogether(t *testing.T) {
	t.Parallel()
	size := int64(len(spoolHead(testPayload(""))))
	s := openTestSpool(t, t.TempDir(), 3*size, false)
	var writers sync.WaitGroup
	for range 40 {
		writers.Go(func() {
			if err := s.add(t.Context(), testPayload("")); err != nil && !errors.Is(err, errSpoolFull) {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	if n := len(s.files); n != 3 || s.bytes != 3*size || s.pending.Load() != 3 {
		t.Errorf("%d files, %d bytes, pending %d", n, s.bytes, s.pending.Load())
	}
	s.suspect = s.files[0]
	if !s.makeRoom(2*size) || len(s.files) != 1 || s.suspect != nil {
		t.Errorf("%d files are left, suspect %v", len(s.files), s.suspect)
	}
	if full := openTestSpool(t, t.TempDir(), size-1, true); !errors.Is(full.add(t.Context(), testPayload("")), errSpoolFull) {
		t.Error("a byte too much was taken")
	}
}

// Who waits for a writer's place gives up with the client.
func TestSpoolWritersWaitNoLongerThanClients(t *testing.T) {
	t.Parallel()
	s := openTestSpool(t, t.TempDir(), 1<<20, false)
	s.writers = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.add(ctx, testPayload("")); !errors.Is(err, context.Canceled) || s.waiting() {
		t.Errorf("%v, waiting %v", err, s.waiting())
	}
}

// A stalledDisk fails, but not before the client has gone.
type stalledDisk struct {
	disk
	leave context.CancelFunc
}

func (d stalledDisk) create(string) (diskFile, error) {
	d.leave()
	return nil, syscall.EIO
}

// A fault of the disk is logged, also when it shows too late for the client.
func TestSpoolLogsLateFaults(t *testing.T) {
	t.Parallel()
	s := openTestSpool(t, t.TempDir(), 1<<20, false)
	var log bytes.Buffer
	s.log = slog.New(slog.NewTextHandler(&log, nil))
	ctx, cancel := context.WithCancel(t.Context())
	s.disk = stalledDisk{s.disk, cancel}
	if err := s.add(ctx, testPayload("")); !errors.Is(err, syscall.EIO) || !strings.Contains(log.String(), syscall.EIO.Error()) {
		t.Errorf("%v, logged %q", err, &log)
	}
	if err := s.add(ctx, testPayload("")); err == nil || strings.Count(log.String(), "level=ERROR") != 1 {
		t.Errorf("%v, logged %q", err, &log)
	}
}

// A fullDisk fails when the test lets it.
type fullDisk struct {
	disk
	asked, fail chan struct{}
}

func (d fullDisk) create(string) (diskFile, error) {
	d.asked <- struct{}{}
	<-d.fail
	return nil, syscall.ENOSPC
}

// While the disk fails nothing is stored: new profiles are not to follow into the spool one that is about to fail there,
// or a healthy upstream would get nothing more for as long as requests overlap.
func TestSpoolFaultsShutNobodyOut(t *testing.T) {
	t.Parallel()
	s := openTestSpool(t, t.TempDir(), 1<<20, false)
	whole := s.disk
	d := fullDisk{whole, make(chan struct{}), make(chan struct{})}
	s.disk = d
	results := make(chan error)
	try := func() {
		go func() { results <- s.add(t.Context(), testPayload("")) }()
		<-d.asked
	}
	try()
	if !s.waiting() {
		t.Error("a profile could overtake the one that is being written")
	}
	d.fail <- struct{}{}
	<-results
	try()
	if s.waiting() {
		t.Error("profiles follow one into a spool that fails")
	}
	d.fail <- struct{}{}
	<-results
	s.disk = whole
	if err := s.add(t.Context(), testPayload("")); err != nil || !s.waiting() {
		t.Errorf("%v, waiting %v", err, s.waiting())
	}
	s.removeLocked(s.files[0])
	s.disk = d
	try()
	if !s.waiting() {
		t.Error("a disk that works again is not trusted")
	}
	d.fail <- struct{}{}
	<-results
}

// Whose fault an answer may be.
func TestTrialOfAnOutcome(t *testing.T) {
	t.Parallel()
	retry := &retryPolicy{on429: true, on422: true}
	dial := &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	for _, test := range []struct {
		route  routeID
		answer answer
		err    error
		want   trial
	}{
		{routeIngest, answer{status: 204}, nil, trialAccepted},
		{routeIngest, answer{status: 400}, nil, trialRefused},
		{routeIngest, answer{status: 302}, nil, trialBusy},
		{routePush, answer{status: 202}, nil, trialBusy},
		{routeIngest, answer{status: 429}, nil, trialBusy},
		{routeIngest, answer{status: 503}, nil, trialBusy},
		{routeIngest, answer{}, dial, trialDown},
		{routeIngest, answer{}, io.ErrUnexpectedEOF, trialDoubtful},
		{routeIngest, answer{}, context.DeadlineExceeded, trialDoubtful},
		{routeIngest, answer{status: 502}, nil, trialDoubtful},
		{routeIngest, answer{status: 504}, nil, trialDoubtful},
		{routeIngest, answer{status: 500}, nil, trialPoison},
		{routeIngest, answer{status: 422}, nil, trialPoison},
		{routePush, answer{status: 500}, nil, trialPoison},
		{routePush, answer{status: 599, mediaType: "application/json", body: []byte(`{"code":"unknown"}`)}, nil, trialPoison},
		{routePush, answer{status: 599, mediaType: "application/json", body: []byte(`{"code":"internal"}`)}, nil, trialPoison},
		{routePush, answer{status: 409, mediaType: "application/json", body: []byte(`{"code":"aborted"}`)}, nil, trialDoubtful},
	} {
		p := &payload{route: test.route, header: http.Header{"Content-Type": {"application/proto"}}}
		out := judge(p, &test.answer, test.err, retry, strings.TrimSpace)
		if got := out.trial(test.route); got != test.want {
			t.Errorf("%v %d %v: trial %d, want %d", test.route, test.answer.status, test.err, got, test.want)
		}
	}
}

// rejected/ holds a tenth of the cap: its oldest make room, and what is larger than all of it is not kept.
func TestSpoolRejectedIsLimited(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTestSpool(t, dir, 10<<10, false)
	one := testPayload(strings.Repeat("x", 500-len(spoolHead(testPayload("")))))
	setAside := func(p *payload) {
		t.Helper()
		if err := s.add(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		f, _, _ := s.next(time.Now())
		s.finish(f, trialRefused, 0)
	}
	for range 2 {
		setAside(one)
	}
	first := s.aside[0].name
	if s.asideBytes != 1000 || len(s.aside) != 2 {
		t.Fatalf("%d bytes in %d files", s.asideBytes, len(s.aside))
	}
	setAside(one)
	setAside(testPayload(strings.Repeat("x", 2000)))
	s = openTestSpool(t, dir, 10<<10, false)
	if s.asideBytes != 1000 || len(s.aside) != 2 || s.aside[0].name == first || len(s.files) != 0 {
		t.Errorf("%d bytes in %v", s.asideBytes, s.aside)
	}
}

// Any damage, at any place, is noticed.
func TestSpoolNoticesDamage(t *testing.T) {
	t.Parallel()
	p := testPayload("body\n\nof it")
	data := append(spoolHead(p), p.body...)
	if _, err := parseSpooled(data); err != nil {
		t.Fatal(err)
	}
	for i := range data {
		if _, err := parseSpooled(data[:i]); err == nil {
			t.Errorf("cut to %d bytes, it is read", i)
		}
		for bit := range 8 {
			flipped := bytes.Clone(data)
			flipped[i] ^= 1 << bit
			if _, err := parseSpooled(flipped); err == nil {
				t.Errorf("with bit %d of byte %d flipped, it is read", bit, i)
			}
		}
	}
	if _, err := parseSpooled(append(data, 0)); err == nil {
		t.Error("with a byte more, it is read")
	}
}

// scripted is a recipient that answers as it is told, by body.
type scripted struct {
	mu     sync.Mutex
	answer func(body string) trial
	seen   []string
}

func (r *scripted) retake(_ context.Context, p *payload) (trial, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, string(p.body))
	return r.answer(string(p.body)), 0
}

func (r *scripted) patience(n int, _ time.Duration, _ float64) time.Duration {
	return min(time.Second<<min(n, 9), time.Minute)
}

// runSpool stores bodies, replays them to answer for an hour of fake time, and returns what was sent in which order.
func runSpool(t *testing.T, answer func(body string, since time.Duration) trial, bodies ...string) (*spool, []string) {
	t.Helper()
	r := &scripted{}
	var s *spool
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r.answer = func(body string) trial { return answer(body, time.Since(began)) }
		s = openTestSpool(t, dir, 1<<20, false)
		for _, body := range bodies {
			if err := s.add(t.Context(), testPayload(body)); err != nil {
				t.Fatal(err)
			}
		}
		s.start(t.Context(), r)
		time.Sleep(time.Hour)
		s.stop(t.Context())
	})
	return s, r.seen
}

func numbered(n int) (bodies []string) {
	for i := range n {
		bodies = append(bodies, strconv.Itoa(i))
	}
	return bodies
}

// During an outage the upstream is asked seldom, and afterwards everything arrives in order, whatever the outage looks
// like.
func TestReplayAfterAnOutage(t *testing.T) {
	t.Parallel()
	for _, outage := range []trial{trialDown, trialBusy, trialDoubtful, trialPoison} {
		t.Run(strconv.Itoa(int(outage)), func(t *testing.T) {
			t.Parallel()
			tries := 0
			var took []string
			s, _ := runSpool(t, func(body string, since time.Duration) trial {
				if since < 20*time.Minute {
					tries++
					return outage
				}
				took = append(took, body)
				return trialAccepted
			}, numbered(20)...)
			if len(took) != 20 || len(s.files) != 0 || s.waiting() {
				t.Fatalf("%d arrived, %d are left", len(took), len(s.files))
			}
			if (outage == trialDown || outage == trialBusy) && !slices.Equal(took, numbered(20)) {
				t.Errorf("order: %v", took)
			}
			if s.streak != 20 || s.failures != 0 {
				t.Errorf("%d in a row, after %d failures", s.streak, s.failures)
			}
			if slices.Sort(took); tries > 80 {
				t.Errorf("asked %d times in 20 minutes of outage", tries)
			}
			if n := s.metrics.spool.rejected.Value(); n != 0 {
				t.Errorf("%d profiles were blamed for the outage", n)
			}
		})
	}
}

// Poison is tried ten times while others pass, wherever it is; and a profile that its upstream cannot be asked about
// stays.
func TestReplayAroundPoison(t *testing.T) {
	t.Parallel()
	poison := func(body string) bool { return body == "0" || body == "1" || body == "7" || body == "19" }
	s, seen := runSpool(t, func(body string, _ time.Duration) trial {
		if poison(body) {
			return trialPoison
		}
		return trialAccepted
	}, numbered(20)...)
	times := map[string]int{}
	for _, body := range seen {
		times[body]++
	}
	for _, body := range numbered(20) {
		switch n := times[body]; {
		case poison(body) && n < poisonAnswers:
			t.Errorf("%s was given up after %d answers", body, n)
		case !poison(body) && n != 1:
			t.Errorf("%s was sent %d times", body, n)
		}
	}
	if n := s.metrics.spool.rejected.Value(); n+int64(len(s.files)) != 4 || n == 0 {
		t.Errorf("%d set aside, %d left", n, len(s.files))
	}
}

// An upstream that is known to turn one tenant away is not left alone for each of its profiles.
func TestReplayBesideATenantsStream(t *testing.T) {
	t.Parallel()
	const good = 600
	r, took := &scripted{}, 0
	r.answer = func(body string) trial {
		if body == "busy" {
			return trialBusy
		}
		took++
		return trialAccepted
	}
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := openTestSpool(t, dir, 1<<20, false)
		s.start(t.Context(), r)
		for i := range good {
			if i%5 == 0 {
				s.add(t.Context(), testPayload("busy"))
			}
			s.add(t.Context(), testPayload("good"))
			time.Sleep(time.Second)
		}
		time.Sleep(time.Minute)
		s.stop(t.Context())
	})
	if took != good {
		t.Errorf("%d of %d arrived", took, good)
	}
}

// A profile that waits alone for its upstream is not overtaken by those that come later.
func TestReplayOfALoneOneInOrder(t *testing.T) {
	t.Parallel()
	for _, outage := range []trial{trialBusy, trialDoubtful} {
		r := &scripted{}
		var took []string
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			r.answer = func(body string) trial {
				if time.Since(began) < 5*time.Minute {
					return outage
				}
				took = append(took, body)
				return trialAccepted
			}
			s := openTestSpool(t, dir, 1<<20, false)
			s.start(t.Context(), r)
			for i, body := range numbered(20) {
				if err := s.add(t.Context(), testPayload(body)); err != nil {
					t.Fatal(err)
				}
				if i == 0 {
					time.Sleep(5*time.Minute + time.Second)
				}
				time.Sleep(time.Second)
			}
			time.Sleep(time.Hour)
			s.stop(t.Context())
		})
		if !slices.Equal(took, numbered(20)) {
			t.Errorf("%v: order %v", outage, took)
		}
	}
}

// An upstream may be too busy for some profiles alone: those that are too large, or those of one tenant, however many
// they are. They do not starve the others, and are kept.
func TestReplayAroundWhatIsNotTaken(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		all, good int
		busy      func(n int) bool
		within    time.Duration
	}{
		{20, 18, func(n int) bool { return n == 0 || n == 3 }, 2 * time.Minute},
		{30, 10, func(n int) bool { return n < 10 || n%2 == 0 }, 50 * time.Minute},
	} {
		took, last := 0, time.Duration(0)
		s, seen := runSpool(t, func(body string, since time.Duration) trial {
			if n, _ := strconv.Atoi(body); test.busy(n) {
				return trialBusy
			}
			took, last = took+1, since
			return trialAccepted
		}, numbered(test.all)...)
		if took != test.good || last > test.within {
			t.Errorf("%d of %d arrived, the last after %v", took, test.good, last)
		}
		if n := s.metrics.spool.rejected.Value(); n != 0 || len(s.files) != test.all-test.good || len(seen) > 100*test.all {
			t.Errorf("%d set aside, %d left, asked %d times in an hour", n, len(s.files), len(seen))
		}
	}
}

// Who was turned away while others were taken is not to blame for an outage that comes later.
func TestReplayBlamesNoTenant(t *testing.T) {
	t.Parallel()
	s, _ := runSpool(t, func(body string, since time.Duration) trial {
		switch {
		case since > 30*time.Minute:
			return trialPoison
		case body != "2":
			return trialBusy
		}
		return trialAccepted
	}, numbered(3)...)
	if n := s.metrics.spool.rejected.Value(); n != 0 || len(s.files) != 2 {
		t.Errorf("%d set aside, %d left", n, len(s.files))
	}
}

// An outage is not held against a profile that was poison before it.
func TestReplayOfPoisonInAnOutage(t *testing.T) {
	t.Parallel()
	calls := 0
	s, _ := runSpool(t, func(body string, since time.Duration) trial {
		calls++
		if calls == 1 || calls > 2 && since < 20*time.Minute {
			return trialPoison
		}
		return trialAccepted
	}, numbered(20)...)
	if n := s.metrics.spool.replayed.Value(); n != 20 {
		t.Errorf("%d of 20 arrived", n)
	}
}

func TestReplayOfALonePoison(t *testing.T) {
	t.Parallel()
	s, seen := runSpool(t, func(string, time.Duration) trial { return trialPoison }, "x")
	if len(seen) != poisonAnswers || s.metrics.spool.rejected.Value() != 1 || s.waiting() {
		t.Errorf("sent %d times", len(seen))
	}
}

// A profile that brings its upstream down each time does not keep the others waiting for ever.
func TestReplayAroundAKiller(t *testing.T) {
	t.Parallel()
	var back time.Duration
	s, _ := runSpool(t, func(body string, since time.Duration) trial {
		switch {
		case since < back:
			return trialDown
		case body == "0":
			back = since + 500*time.Millisecond
			return trialDoubtful
		}
		return trialAccepted
	}, numbered(10)...)
	if len(s.files) != 1 {
		t.Errorf("%d are left", len(s.files))
	}
}

// While all that is left is under way, nothing is to be looked at again until one of them is done.
func TestReplayWaitsForWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	s := openTestSpool(t, t.TempDir(), 1<<30, false)
	s.streak = 1000 * replayStep
	s.files = append(s.files, &spooled{id: 1}, &spooled{id: 2})
	for range s.files {
		s.next(time.Now())
	}
	if f, wait, _ := s.next(time.Now()); f != nil || wait != math.MaxInt64 {
		t.Errorf("file %v, wait %v", f, wait)
	}
}

// What is under way at once grows with success, and is bounded in bytes.
func TestReplayWidth(t *testing.T) {
	t.Parallel()
	s := openTestSpool(t, t.TempDir(), 1<<30, false)
	s.to = &scripted{}
	for i := range int64(100) {
		s.files = append(s.files, &spooled{id: i, size: 1 << 20})
	}
	take := func() (n int) {
		for {
			f, _, _ := s.next(time.Now())
			if f == nil {
				return n
			}
			n++
		}
	}
	if n := take(); n != 1 {
		t.Errorf("%d at first", n)
	}
	s.streak = replayStep
	if n := take(); n != 1 {
		t.Errorf("%d more after %d in a row", n, replayStep)
	}
	s.streak = 1000 * replayStep
	if n := take(); n != replayWidth-2 {
		t.Errorf("%d more in the end", n)
	}
	s.files = append(s.files, &spooled{id: 100, size: replayBytes})
	s.busy, s.busyBytes = 1, replayBytes
	if n := take(); n != 0 {
		t.Errorf("%d beyond the bytes", n)
	}
}

// Many files are found quickly, in their order, and their temporary companions are gone.
func TestSpoolOpensManyFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTestSpool(t, dir, 1<<30, false)
	const n = 3000
	for i := range n {
		f := &spooled{id: int64(n - i), body: 3}
		if err := os.WriteFile(filepath.Join(dir, "up", f.name()), []byte("abc"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = openTestSpool(t, dir, 1<<30, false)
	if len(s.files) != n || s.bytes != 3*n || !slices.IsSortedFunc(s.files, byID) {
		t.Fatalf("%d files, %d bytes", len(s.files), s.bytes)
	}
	if err := s.add(t.Context(), testPayload("x")); err != nil {
		t.Fatal(err)
	}
	if s.files[n].id <= n {
		t.Error("a new file does not come last")
	}
}

// Names keep their order when the clock is set back.
func TestSpoolOrderWhenTheClockIsWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTestSpool(t, dir, 1<<20, false)
	s.last = time.Now().Add(time.Hour).UnixNano()
	for _, body := range []string{"1", "2"} {
		if err := s.add(t.Context(), testPayload(body)); err != nil {
			t.Fatal(err)
		}
	}
	s = openTestSpool(t, dir, 1<<20, false)
	if err := s.add(t.Context(), testPayload("3")); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, s); !slices.Equal(got, []string{"1", "2", "3"}) {
		t.Errorf("order: %v", got)
	}
	if _, _, oldest := s.status(); oldest != 0 {
		t.Errorf("oldest: %v s", oldest)
	}
}

// Whatever is in a file, reading it does not fail in another way than "damaged"; what is read is written the same again.
func FuzzParseSpooled(f *testing.F) {
	p := testPayload("body")
	f.Add(append(spoolHead(p), p.body...))
	f.Add([]byte("POST /push.v1.PusherService/Push\nA: b\nA: c\n\n\n\n"))
	f.Add([]byte("POST /ingest?\n: x\n\nx"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := parseSpooled(data); err != nil && !errors.Is(err, errDamaged) {
			t.Fatal(err)
		}
		sum := sha256.Sum256(data) // once more, with a checksum that holds
		p, err := parseSpooled(append([]byte(spoolMagic+hex.EncodeToString(sum[:])+"\n"), data...))
		if err != nil {
			return
		}
		again, err := parseSpooled(append(spoolHead(p), p.body...))
		if err != nil {
			t.Fatalf("%q was read, but not when it was written again", data)
		}
		if again.query != p.query || again.route != p.route || !bytes.Equal(again.body, p.body) {
			t.Errorf("%q changed when it was written again", data)
		}
		for name, values := range p.header {
			if !secret(name) && !slices.Equal(again.header[name], values) {
				t.Errorf("%s: %q became %q", name, values, again.header[name])
			}
		}
	})
}
