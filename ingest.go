package main

// POST /ingest in, payload out: the body, the raw query and the allow-listed headers go upstream as they came, and
// nothing is looked into. https://grafana.com/docs/pyroscope/latest/reference-server-api/

import (
	"net/http"
	"strconv"
	"time"
)

// ingestPath is where profiles of the multipart, pprof, JFR and text kinds are posted, here and upstream.
const ingestPath = "/ingest"

// An ingest is one POST /ingest. The query is raw: URL.Query would drop pairs that hold a semicolon.
type ingest struct{ query string }

// beginIngest takes any head: what it means is the upstreams' to judge.
func beginIngest(r *http.Request) (exchange, *fault) {
	return &ingest{query: r.URL.RawQuery}, nil
}

// timeout is none: the route has no header for one.
func (x *ingest) timeout() (time.Duration, bool) { return 0, false }

// payload never fails. A body may be empty: that too is for the upstreams to judge.
func (x *ingest) payload(header http.Header, body []byte) (*payload, *fault) {
	return &payload{route: routeIngest, query: x.query, header: header, body: body}, nil
}

// accept answers 200 with an empty body: SDKs take no other status for success.
func (x *ingest) accept(w http.ResponseWriter, _ reply) string {
	w.WriteHeader(http.StatusOK)
	return "200"
}

// refuse answers with the fault's status and its public text.
func (x *ingest) refuse(w http.ResponseWriter, f *fault) string {
	if f.retryAfter != "" {
		w.Header().Set("Retry-After", f.retryAfter)
	}
	writeText(w, f.status, f.public+"\n")
	return strconv.Itoa(f.status)
}
