package main

// What the person on call sees: every counter, in one struct, shown twice on the admin port (expvar JSON and
// Prometheus text) from the same values; and the logger that keeps a flood of one warning readable.
//
// Nothing registers itself globally, label values are fixed at start, and nothing here waits: an increment is one
// atomic addition on the line of the decision it counts.

import (
	"bytes"
	"context"
	"expvar"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// routeID says which door a request came in by. It is the value of the route label. The two that bring profiles come
// first: arrays about profiles have room for these alone.
type routeID int

const (
	routeIngest routeID = iota
	routePush
	routeReady
	routeOther
	routes // how many there are
)

func (r routeID) String() string {
	return [routes]string{"ingest", "push", "ready", "other"}[r]
}

// Reasons of pyroscope_receive_http_rejected_total: why the relay itself turned a request away.
const (
	rejectBodySize    = "body_size"    // over -max-body-size
	rejectBodyRead    = "body_read"    // the body ended early, or came too slowly
	rejectInflight    = "inflight"     // no room in -max-inflight-bytes
	rejectTenant      = "tenant"       // two, one that cannot be, or one that Connection nominates
	rejectProtocol    = "protocol"     // no valid Connect, gRPC or gRPC-Web call, or a space in the query
	rejectCrossOrigin = "cross_origin" // from a browser on another site
	rejectLoop        = "loop"         // it has been here before
	rejectSpoolFull   = "spool_full"   // the spool of a required upstream could not take it
)

// rejectReasons lists all of them: one that is missing here has no counter, and counting it would be a nil dereference.
func rejectReasons() []string {
	return []string{rejectBodySize, rejectBodyRead, rejectInflight, rejectTenant, rejectProtocol, rejectCrossOrigin, rejectLoop, rejectSpoolFull}
}

// Reasons of pyroscope_write_dropped_*_total: why one upstream did not get a profile that the relay had accepted.
const (
	dropRefused     = "refused"        // a permanent answer
	dropUnavailable = "unavailable"    // retries ran out
	dropDeadline    = "deadline"       // time ran out
	dropAbandoned   = "abandoned"      // the client gave up
	dropBacklog     = "mirror_backlog" // mirrors held all the memory they may
	dropShutdown    = "shutdown"       // the relay was stopped before it was done

	dropSpoolFull     = "spool_full"     // the spool could not take it
	dropSpoolOldest   = "spool_oldest"   // made room for another
	dropSpoolRejected = "spool_rejected" // set aside: refused, or failed too often
	dropSpoolDamaged  = "spool_damaged"  // the file was not as it was written, or gone
)

// dropReasons lists all of them, as rejectReasons does.
func dropReasons() []string {
	return []string{dropRefused, dropUnavailable, dropDeadline, dropAbandoned, dropBacklog, dropShutdown,
		dropSpoolFull, dropSpoolOldest, dropSpoolRejected, dropSpoolDamaged}
}

// A family is one metric name: its series share help text and kind. The kind is counter, gauge or histogram, the TYPE
// of the Prometheus text format. The help is written as it is: no backslash and no line break may be in it.
type family struct {
	name, help, kind string
	series           *expvar.Map // label text -> value; the one key "" where there are no labels
}

// metrics holds every number the relay keeps. All methods and fields are safe for concurrent use; the set of families
// is complete once newMetrics and certificate have returned, and their series, but for those of requests, once endpoint
// and spool have.
type metrics struct {
	families []family

	connections, connectionsLimit, reclaimed, limitWaits *expvar.Int
	handshakeErrors, inflightRequests, inflightBytes     *expvar.Int

	requests     *expvar.Map // by route and code
	requestBytes [routes]*expvar.Int
	rejected     map[string]*expvar.Int // by reason; read-only after start

	// By endpoint, and some by reason or type. They are here for endpoint and spool to add series to: who counts does
	// so in endpointMetrics.
	sentBytes, sentRequests, droppedBytes, droppedRequests, retries, latency *expvar.Map

	spoolFiles, spoolBytes, spoolOldest, spoolWritten, spoolReplayed, spoolRejected, spoolDamaged *expvar.Map
}

// newMetrics declares every family but the certificate's, in the order in which they are shown.
func newMetrics() *metrics {
	m := &metrics{rejected: map[string]*expvar.Int{}}
	m.connections = m.number("pyroscope_receive_http_tcp_connections", "Client connections that hold a slot.", "gauge")
	m.connectionsLimit = m.number("pyroscope_receive_http_tcp_connections_limit", "Most client connections at once; 0 = no limit.", "gauge")
	m.reclaimed = m.number("pyroscope_receive_http_tcp_connections_reclaimed_total", "Idle client connections closed to make room for another.", "counter")
	m.limitWaits = m.number("pyroscope_receive_http_tcp_connections_limit_waits_total", "Client connections that found no free slot and had to wait.", "counter")
	m.handshakeErrors = m.number("pyroscope_receive_http_tls_handshake_errors_total", "Client connections that ended before their TLS handshake was done.", "counter")
	m.requests = m.family("pyroscope_receive_http_requests_total", "Requests answered, by route and HTTP status or grpc-N.", "counter")
	bytes := m.family("pyroscope_receive_http_request_bytes_total", "Request body bytes read from clients.", "counter")
	for r := range routes {
		m.requestBytes[r] = add(bytes, label("route", r.String()))
	}
	// A counter that begins at 1 has no increase for Prometheus to see: these are there before the first request.
	for _, r := range []routeID{routeIngest, routePush} {
		m.requests.Add(requestLabels(r, "200"), 0)
	}
	m.inflightRequests = m.number("pyroscope_receive_http_inflight_requests", "Requests being served.", "gauge")
	m.inflightBytes = m.number("pyroscope_receive_http_inflight_bytes", "Request body bytes held in memory.", "gauge")
	rejected := m.family("pyroscope_receive_http_rejected_total", "Requests the relay itself turned away, by reason.", "counter")
	for _, reason := range rejectReasons() {
		m.rejected[reason] = add(rejected, label("reason", reason))
	}
	m.sentBytes = m.family("pyroscope_write_sent_bytes_total", "Body bytes an upstream accepted.", "counter")
	m.sentRequests = m.family("pyroscope_write_sent_requests_total", "Profiles an upstream accepted.", "counter")
	m.droppedBytes = m.family("pyroscope_write_dropped_bytes_total", "Body bytes an upstream did not get, by reason.", "counter")
	m.droppedRequests = m.family("pyroscope_write_dropped_requests_total", "Profiles an upstream did not get, by reason.", "counter")
	m.retries = m.family("pyroscope_write_retries_total", "Attempts after the first one.", "counter")
	m.latency = m.family("pyroscope_write_latency", "Seconds for one attempt (_downstream) or all of them (_endpoint).", "histogram")
	m.spoolFamilies()
	m.buildInfo()
	m.runtimeGauges()
	return m
}

// family declares a metric with labels; its series are added to the map that is returned, by the text of their labels.
// The name must be new: the text format allows it one TYPE line. Call it at start only.
func (m *metrics) family(name, help, kind string) *expvar.Map {
	f := family{name: name, help: help, kind: kind, series: new(expvar.Map).Init()}
	m.families = append(m.families, f)
	return f.series
}

// number declares a metric without labels.
func (m *metrics) number(name, help, kind string) *expvar.Int {
	return add(m.family(name, help, kind), "")
}

// gauge declares a metric without labels whose value is worked out when somebody looks, perhaps several at once. It
// must be a finite number, as its JSON is its text for Prometheus too.
func (m *metrics) gauge(name, help string, value func() any) {
	m.family(name, help, "gauge").Set("", expvar.Func(value))
}

// add declares a series, which begins at 0. labels is as label writes it, joined by commas.
func add(series *expvar.Map, labels string) *expvar.Int {
	v := new(expvar.Int)
	series.Set(labels, v)
	return v
}

// label writes one label in the Prometheus text format, which escapes backslash, quote and newline.
func label(name, value string) string {
	return name + `="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(value) + `"`
}

// requestLabels is label for the two of a request, in which nothing needs escaping.
func requestLabels(r routeID, code string) string {
	return `route="` + r.String() + `",code="` + code + `"`
}

// request counts one answered request. code is an HTTP status or "grpc-" and a gRPC status number. It alone makes
// series after start, at the first answer with a code: most codes are never seen.
func (m *metrics) request(r routeID, code string) {
	m.requests.Add(requestLabels(r, code), 1)
}

// certificate declares the gauge of the server certificate's end. expiry gives it in Unix seconds, and is asked
// whenever somebody looks, since the certificate may be replaced.
func (m *metrics) certificate(expiry func() any) {
	m.gauge("pyroscope_relay_tls_certificate_expiry_seconds", "Unix time at which the server's certificate expires.", expiry)
}

// buildInfo declares the gauge that says which build runs here.
func (m *metrics) buildInfo() {
	b := readBuild()
	add(m.family("pyroscope_relay_build_info", "Always 1; the labels say which build this is.", "gauge"),
		label("version", b.version)+","+label("goversion", b.goVersion)+","+label("revision", b.revision)).Set(1)
}

// runtimeGauges declares what package runtime/metrics knows about this process. All of its samples used here are whole
// numbers; Uint64 panics at any other kind.
func (m *metrics) runtimeGauges() {
	for _, g := range []struct{ name, help, sample string }{
		{"go_goroutines", "Goroutines.", "/sched/goroutines:goroutines"},
		{"go_memory_classes_heap_objects_bytes", "Bytes of live and not yet swept heap objects.", "/memory/classes/heap/objects:bytes"},
		{"go_memory_classes_total_bytes", "All bytes the Go runtime mapped.", "/memory/classes/total:bytes"},
		{"go_gc_cycles_total_gc_cycles", "Completed garbage collections.", "/gc/cycles/total:gc-cycles"},
	} {
		m.gauge(g.name, g.help, func() any {
			s := []runtimemetrics.Sample{{Name: g.sample}}
			runtimemetrics.Read(s)
			return s[0].Value.Uint64()
		})
	}
}

// endpointMetrics are the counters of one upstream. Their accounts close: profiles accepted from clients and files
// found at start are sent, dropped, in the spool or under way, each exactly one of these. Safe for concurrent use.
type endpointMetrics struct {
	sentBytes, sentRequests, retries *expvar.Int
	droppedBytes, droppedRequests    map[string]*expvar.Int // by reason; read-only
	attempt, whole                   [2]*histogram          // one try, all of a delivery; by routeIngest, routePush
	spool                            *spoolMetrics          // nil: there is no spool
}

// endpoint declares the series of one upstream. Call it at start only, once for each name.
func (m *metrics) endpoint(name string) *endpointMetrics {
	l := label("endpoint", name)
	e := &endpointMetrics{
		sentBytes: add(m.sentBytes, l), sentRequests: add(m.sentRequests, l), retries: add(m.retries, l),
		droppedBytes: map[string]*expvar.Int{}, droppedRequests: map[string]*expvar.Int{},
	}
	for _, reason := range dropReasons() {
		e.droppedBytes[reason] = add(m.droppedBytes, l+","+label("reason", reason))
		e.droppedRequests[reason] = add(m.droppedRequests, l+","+label("reason", reason))
	}
	for _, r := range []routeID{routeIngest, routePush} {
		e.attempt[r], e.whole[r] = new(histogram), new(histogram)
		m.latency.Set(l+","+label("type", r.String()+"_downstream"), e.attempt[r])
		m.latency.Set(l+","+label("type", r.String()+"_endpoint"), e.whole[r])
	}
	return e
}

// sent counts a profile that the upstream accepted. bytes are those of its body as it goes upstream: of a gRPC call,
// without the envelope.
func (e *endpointMetrics) sent(bytes int) {
	e.sentRequests.Add(1)
	e.sentBytes.Add(int64(bytes))
}

// dropped counts a profile that the upstream will not get. reason is one of dropReasons, bytes are as for sent.
func (e *endpointMetrics) dropped(reason string, bytes int) {
	e.droppedRequests[reason].Add(1)
	e.droppedBytes[reason].Add(int64(bytes))
}

// spoolMetrics are the counters of one upstream's spool.
type spoolMetrics struct{ written, replayed, rejected, damaged *expvar.Int }

// spoolFamilies declares the families of all spools. Without a spool they have no series.
func (m *metrics) spoolFamilies() {
	m.spoolFiles = m.family("pyroscope_relay_spool_files", "Profiles in the spool.", "gauge")
	m.spoolBytes = m.family("pyroscope_relay_spool_bytes", "Bytes of the files in the spool.", "gauge")
	m.spoolOldest = m.family("pyroscope_relay_spool_oldest_seconds", "Age of the oldest profile in the spool; 0 if there is none.", "gauge")
	m.spoolWritten = m.family("pyroscope_relay_spool_written_total", "Profiles put into the spool.", "counter")
	m.spoolReplayed = m.family("pyroscope_relay_spool_replayed_total", "Profiles that an upstream accepted out of the spool.", "counter")
	m.spoolRejected = m.family("pyroscope_relay_spool_rejected_total", "Profiles set aside because an upstream would not take them.", "counter")
	m.spoolDamaged = m.family("pyroscope_relay_spool_damaged_total", "Files set aside because they were not as they were written.", "counter")
}

// spool declares the series of one upstream's spool. status is asked whenever somebody looks, by each gauge for itself:
// oldest is in seconds. Call it at start only, once for each name.
func (m *metrics) spool(name string, status func() (files, bytes int64, oldest float64)) *spoolMetrics {
	l := label("endpoint", name)
	m.spoolFiles.Set(l, expvar.Func(func() any { n, _, _ := status(); return n }))
	m.spoolBytes.Set(l, expvar.Func(func() any { _, n, _ := status(); return n }))
	m.spoolOldest.Set(l, expvar.Func(func() any { _, _, age := status(); return age }))
	return &spoolMetrics{add(m.spoolWritten, l), add(m.spoolReplayed, l), add(m.spoolRejected, l), add(m.spoolDamaged, l)}
}

// bucketCount is how many bounds there are.
const bucketCount = 12

// bounds are the upper limits of the latency buckets, in seconds: the defaults of client_golang, and 1 ms below them,
// for upstreams nearby. The last is the default of -remote-timeout.
func bounds() [bucketCount]float64 {
	return [...]float64{0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}
}

// A histogram counts durations in buckets. The zero value is ready; safe for concurrent use.
type histogram struct {
	buckets [bucketCount + 1]atomic.Int64 // each for itself; the last is everything above
	nanos   atomic.Int64                  // the sum, in nanoseconds
}

// observe counts d. A duration that equals a bound is in its bucket: le means less or equal.
func (h *histogram) observe(d time.Duration) {
	i := 0
	for _, limit := range bounds() {
		if d.Seconds() > limit {
			i++
		}
	}
	h.buckets[i].Add(1)
	h.nanos.Add(int64(d))
}

// each calls f for every bucket with its upper limit as text and the count up to it; then returns count and sum, the
// sum in seconds. The count is that of the last bucket, as the text format demands, whatever is observed meanwhile; the
// sum may have a few durations more or fewer than the count.
func (h *histogram) each(f func(le string, n int64)) (count int64, sum float64) {
	for i := range h.buckets {
		count += h.buckets[i].Load()
		le := "+Inf"
		if i < bucketCount {
			le = strconv.FormatFloat(bounds()[i], 'g', -1, 64)
		}
		f(le, count)
	}
	return count, time.Duration(h.nanos.Load()).Seconds()
}

// String is the JSON form, as [expvar.Var] asks.
func (h *histogram) String() string {
	var buckets []string
	count, sum := h.each(func(le string, n int64) { buckets = append(buckets, fmt.Sprintf("%q: %d", le, n)) })
	return fmt.Sprintf(`{"count": %d, "sum": %g, "buckets": {%s}}`, count, sum, strings.Join(buckets, ", "))
}

// text is the Prometheus form. labels must not be empty.
func (h *histogram) text(w io.Writer, name, labels string) {
	count, sum := h.each(func(le string, n int64) {
		fmt.Fprintf(w, "%s_bucket{%s,le=%q} %d\n", name, labels, le, n)
	})
	fmt.Fprintf(w, "%s_sum{%s} %g\n%s_count{%s} %d\n", name, labels, sum, name, labels, count)
}

// writeText writes all metrics in the Prometheus text exposition format, version 0.0.4. It is no snapshot: what is
// counted meanwhile may be in one series and not in another. Errors of w are not looked at, and it should not be slow.
func (m *metrics) writeText(w io.Writer) {
	for _, f := range m.families {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", f.name, f.help, f.name, f.kind)
		f.series.Do(func(kv expvar.KeyValue) {
			if h, ok := kv.Value.(*histogram); ok {
				h.text(w, f.name, kv.Key)
			} else if kv.Key == "" {
				fmt.Fprintf(w, "%s %s\n", f.name, kv.Value)
			} else {
				fmt.Fprintf(w, "%s{%s} %s\n", f.name, kv.Key, kv.Value)
			}
		})
	}
}

// writeJSON writes all metrics as one JSON object, the way /debug/vars of package expvar does. That one's own handler
// would show the command line too, where there may be secrets.
func (m *metrics) writeJSON(w io.Writer) {
	all := new(expvar.Map).Init()
	for _, f := range m.families {
		if v := f.series.Get(""); v != nil {
			all.Set(f.name, v)
		} else {
			all.Set(f.name, f.series)
		}
	}
	fmt.Fprintln(w, all)
}

// adminHandler serves /metrics, /debug/vars and /ready, and nothing else. ready is asked at each request. The mux takes
// HEAD for GET, and answers other methods 405.
func (m *metrics) adminHandler(ready func() bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		var b bytes.Buffer // not straight to a client: one that is slow would keep a lock that new series need
		m.writeText(&b)
		w.Write(b.Bytes())
	})
	mux.HandleFunc("GET /debug/vars", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		m.writeJSON(w)
	})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) { writeReady(w, ready()) })
	return mux
}

// writeReady is the answer of /ready on both ports; it returns the status.
func writeReady(w http.ResponseWriter, ready bool) int {
	status, text := http.StatusOK, "ready"
	if !ready {
		status, text = http.StatusServiceUnavailable, "draining"
	}
	writeText(w, status, text)
	return status
}

// writeText answers with a few plain words. X-Content-Type-Options keeps a browser from seeing markup in them. The
// length is stated because gate.linger flushes before the handler ends: without it HTTP/1.1 would go on in chunks.
func writeText(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	io.WriteString(w, text)
}

// build says which build of the relay this is, as far as the Go toolchain recorded it.
type build struct{ version, goVersion, revision string }

// readBuild never fails. The revision is "unknown" unless go build found a checkout.
func readBuild() build {
	b := build{version: "unknown", revision: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	b.version, b.goVersion = info.Main.Version, info.GoVersion
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			b.revision = s.Value
		}
	}
	return b
}

// quietFor is how often one kind of warning is logged at most: often enough to see that it goes on, and six lines a
// minute where every request would have one.
const quietFor = 10 * time.Second

// A throttle lets one log line through in every quietFor and counts the others. The zero value is ready; safe for
// concurrent use.
type throttle struct {
	mu     sync.Mutex
	next   time.Time // no line before this
	missed int       // lines swallowed since the last one
}

// log writes the line, with the number of those it swallowed since the last one as "unlogged". No lock is held while it
// writes: a slow log holds up nobody whose line is swallowed.
func (t *throttle) log(l *slog.Logger, level slog.Level, msg string, args ...any) {
	t.mu.Lock()
	now, missed := time.Now(), t.missed
	if now.Before(t.next) {
		t.missed++
		t.mu.Unlock()
		return
	}
	t.next, t.missed = now.Add(quietFor), 0
	t.mu.Unlock()
	l.Log(context.Background(), level, msg, append(args, "unlogged", missed)...)
}
