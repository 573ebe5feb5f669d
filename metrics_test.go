package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A sample is one line of /metrics.
type sample struct {
	name, labels string // labels as written, without the braces
	value        float64
}

// An exposition is one family of /metrics.
type exposition struct {
	name, kind string
	samples    []sample
}

// parseExposition reads the Prometheus text format, version 0.0.4, and accepts nothing that is doubtful in it: each
// family once, HELP then TYPE then its samples, no series twice, numbers as Prometheus reads them.
func parseExposition(text string) (families []exposition, err error) {
	help := regexp.MustCompile(`^# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) [^\\]+$`)
	kind := regexp.MustCompile(`^# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (counter|gauge|histogram)$`)
	const oneLabel = `[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\[\\"n])*"`
	line := regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(` + oneLabel + `(?:,` + oneLabel + `)*)\})? (\S+)$`)
	if !strings.HasSuffix(text, "\n") {
		return nil, fmt.Errorf("the last line has no end")
	}
	seen, described := map[string]bool{}, ""
	for s := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
		if m := help.FindStringSubmatch(s); m != nil {
			described = m[1]
		} else if m := kind.FindStringSubmatch(s); m != nil && m[1] == described && !seen["# "+m[1]] {
			seen["# "+m[1]] = true
			families = append(families, exposition{name: m[1], kind: m[2]})
		} else if m := line.FindStringSubmatch(s); m != nil && len(families) > 0 && !seen[m[1]+"{"+m[2]+"}"] {
			seen[m[1]+"{"+m[2]+"}"] = true
			f := &families[len(families)-1]
			value, err := strconv.ParseFloat(m[3], 64)
			if err != nil || !f.owns(m[1]) || described != f.name || f.kind == "counter" && value < 0 {
				return nil, fmt.Errorf("this does not belong here: %s", s)
			}
			f.samples = append(f.samples, sample{m[1], m[2], value})
		} else {
			return nil, fmt.Errorf("cannot read: %q", s)
		}
	}
	return families, nil
}

func (f *exposition) owns(name string) bool {
	if f.kind != "histogram" {
		return name == f.name
	}
	return slices.Contains([]string{"_bucket", "_sum", "_count"}, strings.TrimPrefix(name, f.name))
}

// expose parses what m shows.
func expose(t testing.TB, text string) []exposition {
	t.Helper()
	families, err := parseExposition(text)
	if err != nil {
		t.Fatalf("%v in:\n%s", err, text)
	}
	return families
}

func TestExpositionParserIsStrict(t *testing.T) {
	t.Parallel()
	const head = "# HELP a b\n# TYPE a counter\n"
	for _, text := range []string{
		head + "a 1", head + "a -1\n", head + "b 1\n", head + "a 1\na 2\n", head + "a{} 1\n", head + "a{x=\"\\x\"} 1\n",
		head + "a{x=\"1\",} 1\n", head + "a{x=\"\"\"} 1\n", head + "a  1\n", head + "\n", head + head, "a 1\n", "# TYPE a counter\na 1\n",
		head + "a one\n", "# HELP a b\n# TYPE a histogram\na 1\n",
	} {
		if f, err := parseExposition(text); err == nil {
			t.Errorf("accepted as %v:\n%s", f, text)
		}
	}
	expose(t, head+"a{x=\"\\\\ \\\" \\n }\",y=\"\"} 1\n")
}

// histogramOf are the buckets of one series, by le in order.
func histogramOf(t testing.TB, f exposition, labels string) (le []string, n []float64, sum, count float64) {
	t.Helper()
	for _, s := range f.samples {
		if rest, ok := strings.CutPrefix(s.labels, labels+`,le="`); ok {
			le, n = append(le, strings.TrimSuffix(rest, `"`)), append(n, s.value)
		} else if s.labels == labels && strings.HasSuffix(s.name, "_sum") {
			sum = s.value
		} else if s.labels == labels && strings.HasSuffix(s.name, "_count") {
			count = s.value
		}
	}
	return le, n, sum, count
}

func TestMetricsAreValidAndTheSameInBothForms(t *testing.T) {
	t.Parallel()
	p, refusing := newPeer(t, nil), newPeer(t, func(w http.ResponseWriter, _ *http.Request, _ int) { http.Error(w, "no", http.StatusForbidden) })
	relay := start(t, "-upstream", p.URL+`,"name=quo""te, back\slash"`, "-upstream", refusing.URL+",name=mirror,required=false", "-max-body-size", "1KiB")
	c := newClient(t, "h2c")
	post(t, c, relay.url("/ingest?name=a"), []byte("12345"))
	post(t, c, relay.url("/ingest"), make([]byte, 1025))
	post(t, c, relay.url(pushPath), []byte{0, 0, 0, 0, 0}, "Content-Type", "application/grpc")
	post(t, c, relay.url(pushPath), []byte{0, 0}, "Content-Type", "application/grpc")
	post(t, c, relay.url(pushPath), nil, "Content-Type", "text/plain")
	get(t, relay.url("/ready"))
	get(t, relay.url("/metrics"))
	get(t, relay.url("/no/such/path"))
	c.CloseIdleConnections()
	relay.awaitMetric(t, `pyroscope_write_dropped_requests_total{endpoint="mirror",reason="refused"}`, 2)
	relay.awaitMetric(t, "pyroscope_receive_http_tcp_connections", 0)

	const quoted = `endpoint="quo\"te, back\\slash"`
	for series, want := range map[string]float64{
		`pyroscope_receive_http_requests_total{route="ingest",code="200"}`:        1,
		`pyroscope_receive_http_requests_total{route="ingest",code="413"}`:        1,
		`pyroscope_receive_http_requests_total{route="push",code="grpc-0"}`:       1,
		`pyroscope_receive_http_requests_total{route="push",code="grpc-3"}`:       1,
		`pyroscope_receive_http_requests_total{route="push",code="415"}`:          1,
		`pyroscope_receive_http_requests_total{route="ready",code="200"}`:         1,
		`pyroscope_receive_http_requests_total{route="other",code="404"}`:         2,
		`pyroscope_receive_http_rejected_total{reason="body_size"}`:               1,
		`pyroscope_receive_http_rejected_total{reason="protocol"}`:                2,
		`pyroscope_receive_http_request_bytes_total{route="ingest"}`:              5,
		`pyroscope_receive_http_tcp_connections_limit`:                            16384,
		`pyroscope_receive_http_inflight_requests`:                                0,
		`pyroscope_receive_http_inflight_bytes`:                                   0,
		`pyroscope_write_sent_requests_total{` + quoted + `}`:                     2,
		`pyroscope_write_sent_bytes_total{` + quoted + `}`:                        5,
		`pyroscope_write_latency_count{` + quoted + `,type="ingest_downstream"}`:  1,
		`pyroscope_write_latency_count{` + quoted + `,type="push_endpoint"}`:      1,
		`pyroscope_write_dropped_bytes_total{endpoint="mirror",reason="refused"}`: 5,
	} {
		if got := relay.metric(t, series); got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}

	families := expose(t, relay.metrics(t))
	status, vars := get(t, "http://"+relay.admin+"/debug/vars")
	var all map[string]any
	if err := json.Unmarshal([]byte(vars), &all); err != nil || status != http.StatusOK {
		t.Fatalf("status %d, %v: %s", status, err, vars)
	}
	if len(all) != len(families) {
		t.Errorf("/debug/vars has %d names, /metrics %d families", len(all), len(families))
	}
	for _, f := range families {
		if strings.HasSuffix(f.name, "_total") != (f.kind == "counter") {
			t.Errorf("%s is a %s", f.name, f.kind)
		}
		compareForms(t, f, all[f.name])
	}
	relay.stop(t)
}

// compareForms checks that one family of /metrics has the same series and values in /debug/vars.
func compareForms(t *testing.T, f exposition, vars any) {
	t.Helper()
	series, labelled := vars.(map[string]any)
	if f.kind == "histogram" {
		for labels, v := range series {
			compareHistogram(t, f, labels, v.(map[string]any))
		}
		return
	}
	if labelled && len(series) != len(f.samples) {
		t.Errorf("%s has %d series, in /debug/vars %d", f.name, len(f.samples), len(series))
	}
	for _, s := range f.samples {
		v := vars
		if labelled {
			v = series[s.labels]
		}
		if got, ok := v.(float64); !ok || got != s.value && !strings.HasPrefix(f.name, "go_") {
			t.Errorf("%s{%s} is %v, in /debug/vars %v", f.name, s.labels, s.value, v)
		}
	}
}

func compareHistogram(t *testing.T, f exposition, labels string, vars map[string]any) {
	t.Helper()
	le, n, sum, count := histogramOf(t, f, labels)
	buckets := vars["buckets"].(map[string]any)
	if vars["count"] != count || vars["sum"] != sum || len(buckets) != len(le) || len(vars) != 3 {
		t.Errorf("%s{%s}: count %v, sum %v; in /debug/vars %v", f.name, labels, count, sum, vars)
	}
	if len(le) == 0 || le[len(le)-1] != "+Inf" || n[len(n)-1] != count || !slices.IsSorted(n) || !slices.Contains(le, "0.005") {
		t.Errorf("%s{%s}: buckets %v of %v, count %v", f.name, labels, n, le, count)
	}
	for i := range le {
		if buckets[le[i]] != n[i] {
			t.Errorf("%s{%s}: bucket %s is %v, in /debug/vars %v", f.name, labels, le[i], n[i], buckets[le[i]])
		}
	}
}

// The runtime's own variables of package expvar would show the command line, with what secrets it may hold.
func TestOnlyTheAdminPortShowsMetrics(t *testing.T) {
	t.Parallel()
	relay := start(t, "-upstream", "log:", "-forward-header", "X-"+planted)
	for path, want := range map[string]int{
		"/metrics": 200, "/debug/vars": 200, "/ready": 200, "/": 404, "/debug/vars/": 404, "/debug/pprof/": 404, "/debug/pprof/cmdline": 404,
		"/ingest": 404, pushPath: 404, "/metrics/x": 404, "/healthz": 404,
	} {
		status, body := get(t, "http://"+relay.admin+path)
		if status != want || strings.Contains(body, planted) || strings.Contains(body, "cmdline") || strings.Contains(body, "memstats") {
			t.Errorf("admin %s answered %d, want %d: %s", path, status, want, body)
		}
		if path == "/ready" {
			continue
		}
		if status, _ := get(t, relay.url(path)); status != 404 && status != 405 {
			t.Errorf("data port %s answered %d", path, status)
		}
	}
	resp := post(t, newClient(t, "HTTP/1.1"), "http://"+relay.admin+"/metrics", nil)
	if resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") == "" {
		t.Errorf("POST /metrics answered %d, Allow %q", resp.StatusCode, resp.Header.Get("Allow"))
	}
	resp = readAll(t, must(http.Get("http://"+relay.admin+"/metrics")))
	if got := resp.Header.Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("Content-Type %q", got)
	}

	without := start(t, "-upstream", "log:", "-admin-address", "")
	if without.admin != "" || strings.Contains(without.stderr.String(), "admin") {
		t.Errorf("admin port %q although it is off", without.admin)
	}
	without.stop(t)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// everyMetric has all families that the relay can show, with the series of these upstreams.
func everyMetric(endpoints ...string) *metrics {
	m := newMetrics()
	for _, name := range endpoints {
		m.endpoint(name)
		m.spool(name, func() (files, bytes int64, oldest float64) { return 0, 0, 0 })
	}
	m.certificate(func() any { return 0 })
	return m
}

// Every label value that is not a status is there from the start, at zero: an alert on a rate needs it.
func TestSeriesAreThereFromTheStart(t *testing.T) {
	t.Parallel()
	m := everyMetric("a", "b")
	have := map[string]bool{}
	for _, f := range expose(t, textOf(m)) {
		if len(f.samples) == 0 {
			t.Errorf("%s has no series", f.name)
		}
		for _, s := range f.samples {
			have[s.name+"{"+s.labels+"}"] = true
			if s.value != 0 && f.name != "pyroscope_relay_build_info" && !strings.HasPrefix(f.name, "go_") {
				t.Errorf("%s{%s} begins at %v", s.name, s.labels, s.value)
			}
		}
	}
	for _, reason := range rejectReasons() {
		if want := `pyroscope_receive_http_rejected_total{reason="` + reason + `"}`; !have[want] {
			t.Errorf("no %s", want)
		}
	}
	for _, endpoint := range []string{"a", "b"} {
		for _, reason := range dropReasons() {
			for _, what := range []string{"bytes", "requests"} {
				if want := fmt.Sprintf(`pyroscope_write_dropped_%s_total{endpoint=%q,reason=%q}`, what, endpoint, reason); !have[want] {
					t.Errorf("no %s", want)
				}
			}
		}
		for _, kind := range []string{"push_downstream", "ingest_downstream", "push_endpoint", "ingest_endpoint"} {
			if want := fmt.Sprintf(`pyroscope_write_latency_count{endpoint=%q,type=%q}`, endpoint, kind); !have[want] {
				t.Errorf("no %s", want)
			}
		}
	}
}

func textOf(m *metrics) string {
	var b bytes.Buffer
	m.writeText(&b)
	return b.String()
}

func TestHistogramBuckets(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	h := m.endpoint("a").attempt[routeIngest]
	for _, d := range []time.Duration{0, time.Millisecond, time.Millisecond + 1, 5 * time.Millisecond, 10 * time.Second, 10*time.Second + 1, time.Hour} {
		h.observe(d)
	}
	families := expose(t, textOf(m))
	i := slices.IndexFunc(families, func(f exposition) bool { return f.name == "pyroscope_write_latency" })
	le, n, sum, count := histogramOf(t, families[i], `endpoint="a",type="ingest_downstream"`)
	want := map[string]float64{"0.001": 2, "0.005": 4, "5": 4, "10": 5, "+Inf": 7}
	for i := range le {
		if w, ok := want[le[i]]; ok && n[i] != w {
			t.Errorf("bucket %s is %v, want %v", le[i], n[i], w)
		}
	}
	if len(le) != bucketCount+1 || count != 7 || sum < 3620 || sum > 3621 {
		t.Errorf("%d buckets, count %v, sum %v", len(le), count, sum)
	}
}

// labelNames are those of a series, in order.
func labelNames(labels string) (names []string) {
	for _, m := range regexp.MustCompile(`([a-z]+)="(?:[^"\\]|\\.)*"`).FindAllStringSubmatch(labels, -1) {
		if m[1] != "le" {
			names = append(names, m[1])
		}
	}
	return names
}

func TestReadmeListsTheMetrics(t *testing.T) {
	t.Parallel()
	rows := table(t, "### Metrics")
	m := everyMetric("a")
	var names []string
	for _, f := range expose(t, textOf(m)) {
		names = append(names, f.name)
		row := rows[f.name]
		if row == nil {
			continue
		}
		if row[1] != f.kind {
			t.Errorf("README.md says %s is a %s, it is a %s", f.name, row[1], f.kind)
		}
		for _, s := range f.samples {
			if got := strings.Join(labelNames(s.labels), ", "); got != strings.ReplaceAll(row[2], "`", "") {
				t.Errorf("README.md says %s has the labels %q, it has %q", f.name, row[2], got)
			}
		}
	}
	sameKeys(t, "metric", slices.Collect(maps.Keys(rows)), names)
}

// The reasons in the README are those of the program.
func TestReadmeListsTheReasons(t *testing.T) {
	t.Parallel()
	sameKeys(t, "reason of rejected_total", slices.Collect(maps.Keys(table(t, "#### Reasons of `rejected_total`"))), rejectReasons())
	sameKeys(t, "reason of dropped_*_total", slices.Collect(maps.Keys(table(t, "#### Reasons of `dropped_*_total`"))), dropReasons())
}

func TestThrottle(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	var once throttle
	l := newLogger(&out, parse(t))
	for range 5 {
		once.log(l, 0, "often", "n", 1)
	}
	if got := strings.Count(out.String(), "msg=often n=1 unlogged=0"); got != 1 || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("logged:\n%s", out.String())
	}
	once.next = time.Time{} // as if the quiet time were over
	once.log(l, 0, "often", "n", 2)
	if !strings.Contains(out.String(), "msg=often n=2 unlogged=4") {
		t.Errorf("logged:\n%s", out.String())
	}
}

// The alerts watch metrics of the relay.
func TestAlertsNameMetricsThatExist(t *testing.T) {
	t.Parallel()
	rules, err := os.ReadFile("deploy/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	rows := table(t, "### Metrics")
	for _, name := range regexp.MustCompile(`pyroscope_[a-z_]+`).FindAllString(string(rules), -1) {
		if rows[name] == nil {
			t.Errorf("deploy/alerts.yml has %s, which does not exist", name)
		}
	}
}

// The flags in deploy/ are flags of the relay.
func TestDeployNamesFlagsThatExist(t *testing.T) {
	t.Parallel()
	c := parse(t)
	paths, err := filepath.Glob("deploy/*")
	if err != nil || len(paths) == 0 {
		t.Fatal("nothing in deploy/", err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?:^|[\s"])-(upstream|healthcheck|[a-z]+(?:-[a-z]+)+)`).FindAllStringSubmatch(string(text), -1) {
			if c.flags.Lookup(m[1]) == nil {
				t.Errorf("%s has the flag -%s, which does not exist", path, m[1])
			}
		}
	}
}

// Latencies are those of the upstream: of each attempt, and of all of them with what lies between.
func TestLatencies(t *testing.T) {
	t.Parallel()
	const slow = 20 * time.Millisecond
	up := newPeer(t, func(w http.ResponseWriter, r *http.Request, n int) {
		time.Sleep(slow)
		if n == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	relay := start(t, fastRetries("-upstream", up.URL+",name=up")...)
	if resp := post(t, newClient(t, "HTTP/1.1"), relay.url("/ingest"), nil); resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	for kind, count := range map[string]float64{"ingest_downstream": 2, "ingest_endpoint": 1} {
		labels := `{endpoint="up",type="` + kind + `"}`
		sum := relay.metric(t, "pyroscope_write_latency_sum"+labels)
		if n := relay.metric(t, "pyroscope_write_latency_count"+labels); n != count || sum < (2*slow).Seconds() || sum > patience.Seconds() {
			t.Errorf("%s: %v seconds in %v", kind, sum, n)
		}
	}
}

// A slowWriter is an answer to somebody who reads HELP and TYPE of the first family, and no more.
type slowWriter struct {
	httptest.ResponseRecorder
	asked, read chan struct{}
}

func (w *slowWriter) Write(b []byte) (int, error) {
	if bytes.Count(b, []byte("\n")) == 2 {
		return len(b), nil
	}
	select {
	case <-w.asked:
	default:
		close(w.asked)
	}
	<-w.read
	return len(b), nil
}

// Nobody waits for somebody who reads metrics slowly: not even the first request with a new code.
func TestSlowScraperHoldsNothingUp(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	for code := range 400 {
		m.request(routeIngest, strconv.Itoa(code))
	}
	w := &slowWriter{asked: make(chan struct{}), read: make(chan struct{})}
	var scrape sync.WaitGroup
	scrape.Go(func() {
		m.adminHandler(func() bool { return true }).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	})
	<-w.asked
	counted := make(chan struct{})
	go func() {
		defer close(counted)
		for _, f := range m.families { // whichever of them is being written
			f.series.Add(`new="yes"`, 1)
		}
	}()
	select {
	case <-counted:
	case <-time.After(patience):
		t.Error("a new series waited for the reader")
	}
	close(w.read)
	scrape.Wait()
}
