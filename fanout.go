package main

// One payload, N upstreams: attempts, retries, and the merging of what came of them. The only file that dials.
//
// Upstreams are served side by side and never wait for one another. There is one delivery loop (upstream.deliver),
// for both routes; what an answer means (judge), how long to wait (retryPolicy.delay) and which of several failures
// the client hears of (merge) are pure functions. The payload is immutable from here on.
//
// Two ways lead out: direct for plain http://, http.Transport for all else. Delivery is at least once: when an answer
// is lost, nobody can tell whether the upstream has the profile.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
)

// maxAnswer is how much of an upstream's answer is read, in bytes. Real ones are under 1 KiB. Answers are outside
// -max-inflight-bytes: this and maxAnswerHeader are what bounds them.
const maxAnswer = 1 << 20

// maxWords is how much of its own words an upstream may have repeated to the client, in bytes: enough for a sentence
// and its cause, and no page in every client's log.
const maxWords = 1 << 10

// maxAnswerHeader bounds the head of an upstream's answer, in bytes; http.Transport by itself would read 10 MiB.
const maxAnswerHeader = 64 << 10

// idleUpstream is how long an unused connection to an upstream is kept: less than the 60 s after which common load
// balancers hang up, so that a body is seldom risked on a connection that is being closed.
const idleUpstream = 30 * time.Second

// maxIdleUpstream is how many unused connections are kept for each upstream. http.Transport by itself would keep two,
// and dial for most requests of a burst.
const maxIdleUpstream = 256

// An HTTP/2 connection to an upstream is asked for a sign of life after pingAfter without a frame from there, and given
// up when none has come after pingPatience more. One that died silently would swallow requests for minutes otherwise.
const (
	pingAfter    = 10 * time.Second
	pingPatience = 5 * time.Second
)

// A small body counts in the mirrors' share of memory for minMirrorCharge bytes, as its bookkeeping is there even when the
// body is empty; but the share always has room for mirrorCount of them.
const (
	minMirrorCharge = 4 << 10
	mirrorCount     = 4 << 10
)

// code is a Connect error code; its number is the gRPC status of the same name. The zero value is no error.
// https://connectrpc.com/docs/protocol#error-codes
type code int

const (
	codeOK code = iota
	codeCanceled
	codeUnknown
	codeInvalidArgument
	codeDeadlineExceeded
	codeNotFound
	codeAlreadyExists
	codePermissionDenied
	codeResourceExhausted
	codeFailedPrecondition
	codeAborted
	codeOutOfRange
	codeUnimplemented
	codeInternal
	codeUnavailable
	codeDataLoss
	codeUnauthenticated
	codes // how many there are
)

// describe is the one table of codes: the Connect name and the HTTP status that goes with it. It panics for what is
// none of the constants.
func (c code) describe() (name string, status int) {
	row := [codes]struct {
		name   string
		status int
	}{
		codeOK:                 {"ok", 200},
		codeCanceled:           {"canceled", 499},
		codeUnknown:            {"unknown", 500},
		codeInvalidArgument:    {"invalid_argument", 400},
		codeDeadlineExceeded:   {"deadline_exceeded", 504},
		codeNotFound:           {"not_found", 404},
		codeAlreadyExists:      {"already_exists", 409},
		codePermissionDenied:   {"permission_denied", 403},
		codeResourceExhausted:  {"resource_exhausted", 429},
		codeFailedPrecondition: {"failed_precondition", 400},
		codeAborted:            {"aborted", 409},
		codeOutOfRange:         {"out_of_range", 400},
		codeUnimplemented:      {"unimplemented", 501},
		codeInternal:           {"internal", 500},
		codeUnavailable:        {"unavailable", 503},
		codeDataLoss:           {"data_loss", 500},
		codeUnauthenticated:    {"unauthenticated", 401},
	}[c]
	return row.name, row.status
}

func (c code) String() string {
	name, _ := c.describe()
	return name
}

// codeByName is the error code with that Connect name; codeOK if there is none. Case counts.
func codeByName(name string) code {
	for c := codeOK + 1; c < codes; c++ {
		if c.String() == name {
			return c
		}
	}
	return codeOK
}

// A fault is one failure with its two texts: what the client is told, and what only the log may say. It is made where
// the failure is seen and written to the client by the route's refuse method. It is not changed once made. status and
// code are both there: who makes it need not know the route.
type fault struct {
	status     int    // the answer on /ingest
	code       code   // the answer on Push
	public     string // a short sentence, or a line for each failed upstream
	cause      error  // private; may be nil
	retryAfter string // value of Retry-After; "" = none
	reason     string // of rejected_total; "" = upstreams failed, which their own counters say
	transient  bool   // the same request may succeed later
}

// Error is for the log alone: the cause may hold addresses of upstreams.
func (f *fault) Error() string {
	if f.cause == nil {
		return f.public
	}
	return f.public + ": " + f.cause.Error()
}

func (f *fault) Unwrap() error { return f.cause }

// badRequest is a fault of the client's that it must mend before it tries again. reason is one of rejectReasons.
func badRequest(reason, public string) *fault {
	return &fault{status: http.StatusBadRequest, code: codeInvalidArgument, public: public, reason: reason}
}

// A payload is what one client sent, ready to be copied. Everything in it is immutable and shared by all upstreams;
// the body's bytes stay counted as in flight until the last user has called release, and then become another body's. A
// new payload has no user: its maker calls hold before anybody else has it.
type payload struct {
	route  routeID     // routeIngest or routePush
	query  string      // raw
	header http.Header // canonical names, allow-listed
	body   []byte
	lines  []byte // what wire makes of header, for upstreams that set none; nil: not made
	timed  bool   // the client set a deadline of its own: forwarded, and the call is dropped when the client hangs up
	hasty  bool   // that deadline left less time than haste
	// expires is when its delivery ends; it is not set for a payload out of the spool.
	expires time.Time
	users   atomic.Int32
	free    func() // called once, by the last release; may be nil
}

// hold keeps the body in memory until release. Only who has a hold may pass one on: after the last release the body is
// gone.
func (p *payload) hold() { p.users.Add(1) }

// release ends one hold. The caller must not read the body any more.
func (p *payload) release() {
	if p.users.Add(-1) == 0 && p.free != nil {
		p.free()
	}
}

// path is the end of the URL at every upstream.
func (p *payload) path() string {
	if p.route == routePush {
		return pushPath
	}
	return ingestPath
}

// A reply is what the client gets on success: the message of the first required upstream on Push. The zero value is the
// empty message.
type reply struct {
	body     []byte
	encoding string // Content-Encoding of body
}

// retryPolicy says how one upstream is tried again. validateRetry tells which are valid; the zero value is not.
type retryPolicy struct {
	timeout    time.Duration // for one attempt; above 0
	minBackoff time.Duration // above 0
	maxBackoff time.Duration // not below minBackoff
	retries    int           // after the first attempt; 0 = as many as time allows
	on429      bool
	on422      bool // /ingest only
}

// max422Retries bounds the retries of an answer that most often means a bad profile.
const max422Retries = 2

// more tells whether another attempt may follow attempt number n (the first is 0), which was answered with status; 0
// stands for no answer.
func (r *retryPolicy) more(n, status int) bool {
	if status == http.StatusUnprocessableEntity && n >= max422Retries {
		return false
	}
	return r.retries == 0 || n < r.retries
}

// attemptTime is how long attempt n may take with that much time left: at most three quarters of it while another
// attempt is allowed, so that one dead connection cannot eat it all.
func (r *retryPolicy) attemptTime(n int, left time.Duration) time.Duration {
	if r.more(n, 0) {
		left = left / 4 * 3 // in this order: for replay it is the longest time there is
	}
	return min(r.timeout, left)
}

// delay is the wait after attempt n. It doubles from minBackoff to maxBackoff and never leaves these bounds, with up to
// a quarter of jitter; the upstream's own Retry-After, clamped to maxBackoff, can only lengthen it. random is in [0, 1).
// The jitter keeps those that failed together from coming back together.
func (r *retryPolicy) delay(n int, retryAfter time.Duration, random float64) time.Duration {
	base := r.maxBackoff
	// What does not come back when it is shifted back has overflowed: it is longer than any maximum.
	if n < 62 && r.minBackoff<<n>>n == r.minBackoff {
		base = min(r.minBackoff<<n, r.maxBackoff)
	}
	base = max(r.minBackoff, min(base, r.maxBackoff/5*4)) // leave room for the jitter under the maximum
	jittered := min(base+time.Duration(random*float64(base)/4), r.maxBackoff)
	return max(jittered, min(retryAfter, r.maxBackoff))
}

// parseRetryAfter reads a Retry-After value (RFC 9110, section 10.2.3: seconds or a date); false if there is none, or
// none that makes sense. The result is never negative; one beyond what time.Duration holds is as long as that.
func parseRetryAfter(value string, now time.Time) (time.Duration, bool) {
	if value == "" {
		return 0, false
	}
	n, err := strconv.ParseUint(value, 10, 64)
	if err == nil && n <= uint64(math.MaxInt64/time.Second) {
		return time.Duration(n) * time.Second, true
	}
	if err == nil || errors.Is(err, strconv.ErrRange) {
		return math.MaxInt64, true
	}
	t, err := http.ParseTime(value)
	return max(0, t.Sub(now)), err == nil
}

// verdict is what one answer means for the delivery.
type verdict int

const (
	accepted  verdict = iota // the upstream has it
	transient                // try again
	misplaced                // the address is wrong: no use to try again now, but someone will mend it
	refused                  // permanent
)

// An answer is what an upstream said. One that claims success was read whole; of another the body may be cut short.
type answer struct {
	status     int
	mediaType  string // of Content-Type, without parameters
	encoding   string // Content-Encoding; it is not undone
	retryAfter string // as it was sent; "" = none
	body       []byte // at most one byte more than maxAnswer
}

// An outcome is one attempt or, after the last one, the whole delivery.
type outcome struct {
	verdict verdict
	status  int           // 0: no answer
	fault   *fault        // nil just where verdict is accepted
	reply   reply         // where verdict is accepted
	wait    time.Duration // the upstream's Retry-After, however long; 0 = none
	expired bool          // no answer in time
}

// haste is the least time that a client must allow, by a deadline of its own, for what comes of it to say anything of the
// upstream: one that is in greater haste does not make it one that is down.
const haste = 250 * time.Millisecond

// errTooLong is an answer that does not end within maxAnswer.
var errTooLong = errors.New("the answer is longer than 1 MiB")

// judge says what one attempt came to: its answer, or err where there was none; then a is not looked at. What an
// unsuccessful answer says goes through hide. The client is shown a Retry-After as the upstream wrote it, if it makes
// sense and came with 429 or 503.
func judge(p *payload, a *answer, err error, r *retryPolicy, hide func(string) string) outcome {
	if err != nil {
		return judgeError(err)
	}
	out := outcome{status: a.status}
	if out.verdict = a.verdict(p, r, codeOK); out.verdict == accepted {
		out.reply = reply{body: a.body, encoding: a.encoding}
		return out
	}
	wait, sane := parseRetryAfter(a.retryAfter, time.Now())
	out.wait = wait
	words, own := a.words(p.route, hide)
	out.verdict = a.verdict(p, r, own)
	limited := a.status == http.StatusTooManyRequests // for the client to retry, even where the relay does not
	out.fault = &fault{
		status: ingestStatus(a.status), code: pushCode(a.status, own), public: words, transient: out.verdict != refused || limited,
		cause: fmt.Errorf("HTTP status %d, Content-Type %q", a.status, a.mediaType),
	}
	if sane && (limited || a.status == http.StatusServiceUnavailable) {
		out.fault.retryAfter = a.retryAfter
	}
	return out
}

// judgeError is the outcome of an attempt without an answer. Every one may pass. What err says stays private: it names
// addresses.
func judgeError(err error) outcome {
	if errors.Is(err, context.Canceled) {
		return outcome{verdict: transient, fault: &fault{
			status: http.StatusBadGateway, code: codeCanceled, public: "the client gave up", cause: err, transient: true,
		}}
	}
	if isTimeout(err) {
		return outcome{verdict: transient, expired: true, fault: &fault{
			status: http.StatusGatewayTimeout, code: codeDeadlineExceeded, public: "no answer in time", cause: err, transient: true,
		}}
	}
	public := "could not be reached"
	if errors.Is(err, errTooLong) {
		public = "answered too much"
	}
	return outcome{verdict: transient, fault: &fault{
		status: http.StatusBadGateway, code: codeUnavailable, public: public, cause: err, transient: true,
	}}
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout() || errors.Is(err, context.DeadlineExceeded)
}

// proves tells whether err says anything of the upstream and of the connections to it: a client that hangs up does not,
// nor does one in haste whose time is over.
func proves(err error, hasty bool) bool {
	return !errors.Is(err, context.Canceled) && !(hasty && isTimeout(err))
}

// verdict sorts an answer. own is the Connect code it carries, if any. On /ingest any 2xx will do. On Push it is 200
// with the content type of the request, as Connect has it: a login page must not swallow profiles. 501 and 508 come
// from a server that would say the same again, unlike other 5xx.
func (a *answer) verdict(p *payload, r *retryPolicy, own code) verdict {
	switch s := a.status; {
	case s/100 == 2 && p.route == routeIngest, s == http.StatusOK && a.mediaType == p.mediaType():
		return accepted
	case s/100 == 2 || s/100 == 3:
		return misplaced // a login page, a moved server
	case s == http.StatusNotImplemented || s == http.StatusLoopDetected:
		return refused
	// Below 200 it is a 101 that nobody asked for, or a number that is no status.
	case s >= 500 || s < 200 || s == http.StatusRequestTimeout || p.route == routePush && own == codeAborted:
		return transient
	case s == http.StatusTooManyRequests && r.on429, s == http.StatusUnprocessableEntity && r.on422 && p.route == routeIngest:
		return transient
	}
	return refused
}

// mediaType is that of the payload's first Content-Type.
func (p *payload) mediaType() string { return mediaType(p.header.Get("Content-Type")) }

// mediaType is the type in a Content-Type value, in lower case and without parameters; "" if it cannot be read.
func mediaType(contentType string) string {
	if contentType == "application/proto" {
		return contentType // nearly always
	}
	t, _, _ := mime.ParseMediaType(contentType)
	return t
}

// ingestStatus is the answer on /ingest to an upstream's unsuccessful status: the same where it tells the client what
// to do, else 502 (RFC 9110, section 15.6.3). A 408 is between the relay and the upstream, and no business of the
// client's.
func ingestStatus(s int) int {
	switch {
	case s/100 == 4 && s != http.StatusRequestTimeout,
		s == http.StatusNotImplemented, s == http.StatusServiceUnavailable, s == http.StatusLoopDetected:
		return s
	}
	return http.StatusBadGateway
}

// pushCode is the answer on Push to an upstream's unsuccessful status; own is the Connect code that came with it. 429,
// 501 and 508 mean one thing whatever code they come with. Without a code, 401, 403 and 404 are as Connect maps them
// (https://connectrpc.com/docs/protocol#http-to-error-code).
func pushCode(s int, own code) code {
	switch {
	case s == http.StatusTooManyRequests:
		return codeResourceExhausted
	case s == http.StatusNotImplemented:
		return codeUnimplemented
	case s == http.StatusLoopDetected:
		return codeFailedPrecondition
	case s/100 == 2 || s/100 == 3:
		return codeUnavailable
	case own != codeOK:
		return own
	case s == http.StatusUnauthorized:
		return codeUnauthenticated
	case s == http.StatusForbidden:
		return codePermissionDenied
	case s == http.StatusNotFound:
		return codeUnimplemented
	case s/100 == 4 && s != http.StatusRequestTimeout:
		return codeInvalidArgument // so that no client retries it
	}
	return codeUnavailable
}

// words is what an unsuccessful answer says, as one printable line, and on Push its Connect code (codeOK: none). The
// line is never empty: an answer without words is described by its status.
func (a *answer) words(route routeID, hide func(string) string) (string, code) {
	text, own := string(a.body), codeOK
	if route == routePush && a.mediaType == "application/json" {
		var e struct{ Code, Message string }
		if json.Unmarshal(a.body, &e) == nil && codeByName(e.Code) != codeOK {
			text, own = e.Message, codeByName(e.Code)
		}
	}
	if a.encoding != "" && a.encoding != "identity" || a.status/100 == 2 || a.status/100 == 3 || own == codeOK && escaped(text, hide) {
		text = "" // not readable, or a page for browsers, or not to be seen
	}
	text = hide(text) // before it is cut or made printable, or a part of a secret could stay
	text = oneLine(text[:min(len(text), 4*maxWords)])
	if text == "" {
		text = strings.TrimSpace(fmt.Sprintf("HTTP status %d %s", a.status, http.StatusText(a.status)))
	}
	return text, own
}

// escaped tells whether text is JSON in which hide would find something, were it not for JSON's escapes.
func escaped(text string, hide func(string) string) bool {
	if !strings.Contains(text, `\`) {
		return false
	}
	for d := json.NewDecoder(strings.NewReader(text)); ; {
		t, err := d.Token()
		if err != nil {
			return false
		}
		if s, ok := t.(string); ok && hide(s) != s {
			return true
		}
	}
}

// oneLine makes a foreign text safe to print: one line of valid UTF-8, no control characters, at most maxWords bytes.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	s = strings.TrimSpace(s)
	if len(s) > maxWords {
		s = strings.TrimSpace(strings.ToValidUTF8(s[:maxWords], "")) // the cut may go through a character
	}
	return s
}

// merge makes one fault of those of several upstreams, in their order; nil where all are nil. A transient one wins over
// a permanent one, so that a client that retries does; status, code and Retry-After are those of the first that wins,
// and the text has a line for each. upstreams and outs are of one length; the faults in outs are not changed.
func merge(upstreams []*upstream, outs []outcome) *fault {
	var worst *fault
	var lines []string
	for i, out := range outs {
		if out.fault == nil {
			continue
		}
		lines = append(lines, upstreams[i].public+": "+out.fault.public)
		if worst == nil || out.fault.transient && !worst.transient {
			worst = out.fault
		}
	}
	if worst == nil {
		return nil
	}
	merged := *worst
	merged.public = strings.Join(lines, "\n")
	return &merged
}

// An upstream is one server that gets a copy of everything. Safe for concurrent use; what is not atomic or locked is
// constant once the relay listens.
type upstream struct {
	name     string // in metrics and logs
	public   string // what clients hear it called: not its URL
	required bool
	url      *url.URL // nil: log every profile and accept it
	retry    retryPolicy
	link     *link
	client   atomic.Pointer[http.Transport] // replaced whole, never changed: see renew and redial
	direct   *direct                        // speaks to the upstream in place of client; nil: client does
	metrics  *endpointMetrics
	log      *slog.Logger
	health   health
	refusals throttle        // of warnings that a profile was not taken
	spool    *spool          // nil: none
	hurry    context.Context // with a spool: ends when what is under way must go there

	pending, pendingBytes atomic.Int64 // profiles being delivered
}

// deliver offers p until the upstream takes it, refuses it, or retries or the time until end run out; once, where there is
// a spool. It is the only place that retries in a client's time. It ends early when ctx is cancelled. The outcome is
// that of the last attempt, and the caller's to count. The caller has a hold on p.
func (u *upstream) deliver(ctx context.Context, p *payload, end time.Time) outcome {
	start := time.Now()
	u.pending.Add(1)
	u.pendingBytes.Add(int64(len(p.body)))
	defer func() {
		u.pending.Add(-1)
		u.pendingBytes.Add(-int64(len(p.body)))
		u.metrics.whole[p.route].observe(time.Since(start))
	}()
	for n := 0; ; n++ {
		out := u.attempt(ctx, p, n, end)
		if out.verdict != transient || u.spool != nil || !u.retry.more(n, out.status) {
			return out
		}
		// A wait that would outlast the client's time is not begun: the client is told now.
		wait := u.retry.delay(n, out.wait, rand.Float64())
		if wait >= time.Until(end) || !sleep(ctx, wait) {
			return out
		}
		u.metrics.retries.Add(1)
	}
}

// sleep waits for d, and reports true after that, or false at once when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// spoolTime is kept at the end of a profile's time for putting it into the spool: this, or half of what there is. Two
// syncs take milliseconds on a disk at rest, but there may be others before it in the queue.
const spoolTime = time.Second

// attemptBefore is how long one may try to deliver, with that much time left, so that the spool can still be used.
func attemptBefore(left time.Duration) time.Duration { return left - min(spoolTime, left/2) }

// offer delivers p for a client that waits for it, or puts it into the spool, and counts it: once, as sent, dropped or
// written. Behind a backlog p goes into the spool without an attempt. A misplaced one is kept as well: someone will
// mend the address.
func (u *upstream) offer(ctx context.Context, p *payload) outcome {
	if u.spool == nil || !u.spool.waiting() {
		out := u.deliverInTime(ctx, p)
		if u.spool == nil || out.verdict == accepted || out.verdict == refused || errors.Is(ctx.Err(), context.Canceled) {
			u.settle(ctx, p, out)
			return out
		}
		if u.failed(p, out) {
			u.spool.rest(out.wait)
		}
	}
	return u.spill(ctx, p)
}

// deliverInTime is deliver, cut short while there is time to use the spool. When u.hurry ends, the attempt is cut short
// by a context of its own: offer must be able to tell that from a client that hung up, whose profile is not kept.
func (u *upstream) deliverInTime(ctx context.Context, p *payload) outcome {
	if u.spool == nil {
		return u.deliver(ctx, p, p.expires)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(u.hurry, cancel)()
	return u.deliver(ctx, p, time.Now().Add(attemptBefore(time.Until(p.expires))))
}

// spill puts p into the spool. When that takes longer than the client has, the client is told so, and the file may be
// written all the same: that is why a goroutine with a hold of its own does it. It counts what it drops; what is
// stored counts as sent once it is replayed.
func (u *upstream) spill(ctx context.Context, p *payload) outcome {
	ctx, cancel := context.WithDeadline(ctx, p.expires)
	defer cancel()
	done := make(chan error, 1)
	p.hold()
	go func() {
		defer p.release()
		err := u.spool.add(ctx, p)
		switch {
		case err == nil:
		case errors.Is(err, context.Canceled):
			u.metrics.dropped(dropAbandoned, len(p.body))
		case errors.Is(err, context.DeadlineExceeded):
			u.metrics.dropped(dropDeadline, len(p.body))
		default:
			u.metrics.dropped(dropSpoolFull, len(p.body))
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil {
			return outcome{verdict: accepted}
		}
		if ctx.Err() == nil {
			return outcome{verdict: transient, fault: &fault{
				status: http.StatusServiceUnavailable, code: codeUnavailable, retryAfter: "10", reason: rejectSpoolFull, transient: true,
				public: "cannot take the profile now, and there is no room to keep it: try again", cause: err,
			}}
		}
	case <-ctx.Done():
	}
	return judgeError(ctx.Err())
}

// retake offers a profile out of the spool once; see recipient. Its time is that of one attempt. It counts an accepted
// profile as sent and a failure as a retry; what is dropped is the spool's to count.
func (u *upstream) retake(ctx context.Context, p *payload) (trial, time.Duration) {
	out := u.attempt(ctx, p, 0, time.Now().Add(math.MaxInt64))
	switch {
	case out.verdict == accepted:
		u.settle(ctx, p, out)
	case ctx.Err() != nil:
		return trialCut, 0
	case out.verdict == refused:
		u.refusals.log(u.log, slog.LevelWarn, "upstream refused a profile from the spool", "upstream", u.name, "route", p.route, "status", out.status, "said", out.fault.public)
	default:
		u.metrics.retries.Add(1)
		u.health.down(u, out.fault)
	}
	return out.trial(p.route), out.wait
}

// patience is the wait after a failure in replay; see recipient.
func (u *upstream) patience(n int, asked time.Duration, random float64) time.Duration {
	return u.retry.delay(n, asked, random)
}

// trial says whose fault an outcome may be: an upstream's own 500 is counted against the profile, as is the 422 that is
// retried; an upstream that was not reached is down; one that turns a profile away for now is busy, perhaps for that
// profile alone; of all else one cannot know.
func (o *outcome) trial(route routeID) trial {
	switch o.verdict {
	case accepted:
		return trialAccepted
	case refused:
		return trialRefused
	}
	dial, ok := errors.AsType[*net.OpError](o.fault)
	switch s := o.status; {
	case ok && dial.Op == "dial":
		return trialDown
	case o.verdict == misplaced, s == http.StatusTooManyRequests, s == http.StatusServiceUnavailable:
		return trialBusy
	case s == http.StatusInternalServerError, s == http.StatusUnprocessableEntity,
		s != 0 && route == routePush && (o.fault.code == codeUnknown || o.fault.code == codeInternal):
		return trialPoison
	}
	return trialDoubtful
}

// attempt offers p once, before end; n counts the attempts before this one. Its time is observed; what came of p is the
// caller's to count.
func (u *upstream) attempt(ctx context.Context, p *payload, n int, end time.Time) outcome {
	start := time.Now()
	defer func() { u.metrics.attempt[p.route].observe(time.Since(start)) }()
	if u.url == nil {
		return u.logProfile(p)
	}
	deadline := start.Add(u.retry.attemptTime(n, end.Sub(start)))
	a, err := u.exchange(ctx, deadline, p)
	out := judge(p, a, err, &u.retry, u.link.hide)
	if out.fault != nil {
		u.log.Debug("attempt failed", "upstream", u.name, "attempt", n+1, "took", time.Since(start), "error", out.fault)
	}
	return out
}

// exchange sends p and reads the answer to its end, by deadline. After an error the next exchange does not use a
// connection that was pooled before: it may just have proved dead, unless p was in haste. An error that is not nil is
// all that counts, whatever the answer. Afterwards a transport may still read the body, for which it has a hold of its
// own.
func (u *upstream) exchange(ctx context.Context, deadline time.Time, p *payload) (*answer, error) {
	if u.direct != nil {
		message, err := u.message(p)
		if err != nil {
			return nil, err
		}
		return u.direct.exchange(ctx, deadline, u.inHaste(p), message)
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	client, body := u.client.Load(), &heldBody{}
	resp, err := client.RoundTrip(u.request(ctx, p, func() (io.ReadCloser, error) {
		if len(p.body) == 0 {
			return http.NoBody, nil // any other would be sent in chunks
		}
		body = newHeldBody(p)
		return body, nil
	}))
	var a *answer
	if err == nil {
		defer resp.Body.Close()
		a, _, err = readAnswer(resp)
	}
	// The answer may be here before the transport is done with the body: only then is it known whether all of it went.
	if err == nil && a.status/100 == 2 && len(p.body) > 0 && !body.sent(ctx) {
		a, err = nil, cmp.Or(ctx.Err(), errTooSoon)
	}
	if err != nil && proves(err, u.inHaste(p)) {
		u.renew(client)
	}
	return a, err
}

// renew leaves the pooled connections of old behind, so that the next attempt dials: HTTP/2 would go on sharing a dead
// one. Of several failures of one client the first does it. Exchanges under way are not disturbed.
func (u *upstream) renew(old *http.Transport) {
	if u.client.CompareAndSwap(old, old.Clone()) {
		old.CloseIdleConnections()
	}
}

// redial makes a new client: the link has changed. Exchanges under way are not disturbed.
func (u *upstream) redial() {
	u.client.Swap(newTransport(&u.retry, u.link)).CloseIdleConnections()
}

// readAnswer reads resp to its end, if it has one within maxAnswer: whole says so. An answer counts only when it is
// whole, unless its status alone says that it is a failure: then err is nil. It does not close the body.
func readAnswer(resp *http.Response) (a *answer, whole bool, err error) {
	a = &answer{
		status: resp.StatusCode, mediaType: mediaType(resp.Header.Get("Content-Type")),
		encoding: resp.Header.Get("Content-Encoding"), retryAfter: resp.Header.Get("Retry-After"),
	}
	if resp.Body == http.NoBody || resp.StatusCode == http.StatusSwitchingProtocols { // what follows a 101 has no end
		return a, resp.Body == http.NoBody, nil
	}
	a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(a.body) > maxAnswer {
		err = errTooLong
	}
	if err != nil && resp.StatusCode/100 == 2 {
		return nil, false, err
	}
	return a, err == nil, nil
}

// request is p as it goes to this upstream through its client. body makes its body, which may be needed again: the
// transport asks for another when a pooled connection took nothing, or an HTTP/2 server says that it did not begin.
// Each has a hold on p.
func (u *upstream) request(ctx context.Context, p *payload, body func() (io.ReadCloser, error)) *http.Request {
	own := u.link.header()
	header := p.headers(own)
	if header["User-Agent"] == nil {
		header["User-Agent"] = []string{""} // or the transport would add its own
	}
	first, _ := body()
	return (&http.Request{
		Method: http.MethodPost, URL: target(u.url, p), Host: u.host(own), Header: header,
		Body: first, ContentLength: int64(len(p.body)), GetBody: body,
	}).WithContext(ctx)
}

// errTooSoon is an answer that claims success for a body that the upstream does not have.
var errTooSoon = errors.New("the upstream reported success before it had the whole body")

// A heldBody is the body of p as a transport reads it. It holds p until it is closed, which may be after RoundTrip has
// returned: a transport may still be sending when the answer is there.
type heldBody struct {
	mu     sync.Mutex    // HTTP/2 closes it during a Read
	p      *payload      // nil: closed
	rest   []byte        // what is not yet read
	closed chan struct{} // closed by Close; after that rest does not change
}

func newHeldBody(p *payload) *heldBody {
	p.hold()
	return &heldBody{p: p, rest: p.body, closed: make(chan struct{})}
}

// sent waits until the transport needs the body no longer, and tells whether it took all of it; false when ctx ends
// first.
func (b *heldBody) sent(ctx context.Context) bool {
	select {
	case <-b.closed:
		return len(b.rest) == 0
	case <-ctx.Done():
		return false
	}
}

func (b *heldBody) Read(into []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.p == nil {
		return 0, http.ErrBodyReadAfterClose
	}
	if len(b.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(into, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *heldBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.p != nil {
		b.p.release()
		b.p = nil
		close(b.closed)
	}
	return nil
}

// target is where p goes, at an upstream of that URL. Path and RawPath grow alike: url.URL drops a RawPath that does
// not decode to its Path, and with it a %2F as the user wrote it.
func target(base *url.URL, p *payload) *url.URL {
	target := *base
	target.Path += p.path()
	target.RawPath += p.path()
	target.RawQuery = p.query
	return &target
}

// host is the value of Host; own are the headers that are set for this upstream.
func (u *upstream) host(own http.Header) string { return cmp.Or(own.Get("Host"), u.url.Host) }

// headers are those of p as they go to an upstream that sets own, which wins; Host apart. The map is the caller's, its
// values are not to be changed.
func (p *payload) headers(own http.Header) http.Header {
	h := make(http.Header, len(p.header)+len(own)+1)
	maps.Copy(h, p.header)
	if p.timed {
		h["Connect-Timeout-Ms"] = []string{p.timeLeft()}
	}
	maps.Copy(h, own)
	delete(h, "Host")
	return h
}

// timeLeft is the value of Connect-Timeout-Ms for an attempt that begins now: at least 1, as the protocol has no 0.
func (p *payload) timeLeft() string {
	return strconv.FormatInt(max(1, time.Until(p.expires).Milliseconds()), 10)
}

// wire is h as the end of the head of a message of HTTP/1.1 (RFC 9112, section 2.1), the empty line included. Line
// breaks in values become spaces, and what is no name is left out: h can add no line of its own.
func wire(h http.Header) []byte {
	var b bytes.Buffer
	b.Grow(512)
	h.Write(&b) // to memory: no error
	b.WriteString("\r\n")
	return b.Bytes()
}

// logProfile is the built-in upstream log: one line for each profile. It is all that ever logs a query.
func (u *upstream) logProfile(p *payload) outcome {
	u.log.Info("profile", "route", p.route, "query", p.query, "content_type", p.header.Get("Content-Type"),
		"bytes", len(p.body), "sha256", fmt.Sprintf("%x", sha256.Sum256(p.body)))
	return outcome{verdict: accepted, status: http.StatusOK}
}

// newTransport makes the HTTP client of one upstream. It asks for no compression, follows nothing and uses no proxy
// from the environment. It speaks HTTP/2 where a server offers it in its TLS handshake. l's TLS is as it is now: redial
// is for when it changes.
func newTransport(r *retryPolicy, l *link) *http.Transport {
	// A transport dials apart from the request that asked for it: these timeouts bound a dial and a handshake, not the
	// attempt's deadline.
	dialer := &net.Dialer{Timeout: r.timeout}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &attentiveConn{Conn: c, closed: make(chan struct{})}, nil
	}
	t := &http.Transport{
		DialContext: dial, DisableCompression: true, TLSHandshakeTimeout: r.timeout,
		MaxIdleConnsPerHost: maxIdleUpstream, IdleConnTimeout: idleUpstream, MaxResponseHeaderBytes: maxAnswerHeader,
		TLSClientConfig: l.config(), Protocols: new(http.Protocols),
		HTTP2: &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingPatience},
	}
	t.Protocols.SetHTTP1(true)
	t.Protocols.SetHTTP2(true)
	if l.proxy != nil {
		t.Proxy = http.ProxyURL(l.proxy)
		// With a proxy this dials the proxy alone. TLS to the upstream goes through the tunnel, under TLSClientConfig.
		if l.proxy.Scheme == "https" {
			t.DialTLSContext = (&tls.Dialer{NetDialer: dialer, Config: l.proxyConfig()}).DialContext
		}
	}
	return t
}

// lastWords is how long a failed write waits for the answer that may explain it. It was sent before the connection
// ended, so that it is here or nearly so.
const lastWords = time.Second

// An attentiveConn hears an upstream out: one that refuses a body while it is being sent, and hangs up, has said why. A
// failed Write keeps its error to itself until the reader has closed the connection, or lastWords are over.
type attentiveConn struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

// Write fails like that of the connection inside, only later.
func (c *attentiveConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		select {
		case <-c.closed:
		case <-time.After(lastWords):
		}
	}
	return n, err
}

func (c *attentiveConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// settle counts what became of p at this upstream, once, and tells the person on call. ctx is cancelled where the
// client gave up: that says nothing about the upstream, and is counted but not logged.
func (u *upstream) settle(ctx context.Context, p *payload, out outcome) {
	if out.verdict == accepted {
		u.metrics.sent(len(p.body))
		u.health.up(u)
		return
	}
	reason := dropUnavailable
	switch {
	case out.verdict != transient:
		reason = dropRefused
	case errors.Is(ctx.Err(), context.Canceled):
		reason = dropAbandoned
	case out.expired:
		reason = dropDeadline
	}
	u.metrics.dropped(reason, len(p.body))
	switch reason {
	case dropRefused:
		u.refusals.log(u.log, slog.LevelWarn, "upstream refused a profile", "upstream", u.name, "route", p.route, "status", out.status, "said", out.fault.public)
	case dropDeadline, dropUnavailable:
		u.failed(p, out)
	}
}

// failed notes that the upstream is down, and reports it, unless what came of p says nothing of the upstream: its client
// was in haste, or the relay itself cut it short to stop.
func (u *upstream) failed(p *payload, out outcome) bool {
	if out.expired && u.inHaste(p) || u.hurry != nil && u.hurry.Err() != nil {
		return false
	}
	u.health.down(u, out.fault)
	return true
}

// inHaste tells whether the client left less time for p than any attempt at the upstream has by itself.
func (u *upstream) inHaste(p *payload) bool { return p.hasty && u.retry.timeout >= haste }

// health keeps the log of an upstream's outages short: a line when one begins, one every quietFor while it lasts, one
// when it is over. The zero value is an upstream that is up; safe for concurrent use.
type health struct {
	failing atomic.Bool // spares the lock while all is well
	mu      sync.Mutex
	since   time.Time // of this outage
	next    time.Time // no line before this, of this outage or another: there may be many short ones
	lost    int       // profiles that failed in this outage
	told    bool      // its beginning was logged
}

// down notes that u failed to take a profile, and why; the log may have the private cause.
func (h *health) down(u *upstream, why *fault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if !h.failing.Load() {
		h.since, h.lost, h.told = now, 0, false
		h.failing.Store(true)
	}
	h.lost++
	if now.Before(h.next) {
		return
	}
	msg := "upstream is down"
	if h.told {
		msg = "upstream is still down"
	}
	u.log.Warn(msg, "upstream", u.name, "failed", h.lost, "for", now.Sub(h.since).Round(time.Millisecond), "error", why)
	h.told, h.next = true, now.Add(quietFor)
}

// up notes that u took a profile. An outage that was never logged ends without a line as well.
func (h *health) up(u *upstream) {
	if !h.failing.Load() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.failing.Swap(false) && h.told {
		u.log.Info("upstream is back", "upstream", u.name, "failed", h.lost, "for", time.Since(h.since).Round(time.Millisecond))
	}
}

// A fanout copies payloads to all upstreams. Safe for concurrent use.
type fanout struct {
	required, mirrors []*upstream        // in the order of the command line; constant
	hurry             context.CancelFunc // see upstream.hurry; nil: no spool

	mirrorRoom int64          // bytes of bodies that mirrors may hold, all together
	mirrorHeld atomic.Int64   // bytes that they do hold, a body that several share once
	running    sync.WaitGroup // mirror deliveries, which outlive their requests
	crew       crew
}

// maxCrew is how many goroutines without work are kept: each costs the stack that it has grown.
const maxCrew = 64

// A crew runs functions, each on a goroutine of its own, and keeps some of these: a new one would have to grow its stack
// several times on the way down to the network, which costs as much as two system calls. Safe for concurrent use. work
// must be made; those that are kept stay until the process ends.
type crew struct {
	work chan func()  // unbuffered: goes to one that is idle
	idle atomic.Int32 // how many wait for work, or are about to
}

// run calls f on another goroutine, at once: where none is idle, on a new one. It does not wait for f, and an idle
// goroutine holds on to nothing of what it ran.
func (c *crew) run(f func()) {
	select {
	case c.work <- f:
	default:
		go c.stay(f)
	}
}

// stay calls f, and then what else there is to do.
func (c *crew) stay(f func()) {
	for {
		f()
		if c.idle.Add(1) > maxCrew {
			c.idle.Add(-1)
			return
		}
		f = <-c.work
		c.idle.Add(-1)
	}
}

// send offers p to every upstream and returns when every required one has accepted it, or has it in its spool, or has
// failed for good, or p.expires has come. ctx is the client's: when it is cancelled, a call with a deadline of its own
// is given up, all else is delivered all the same. The caller keeps its own hold on p, and may let go of it when send
// returns, though mirrors are not done. Without a required upstream it is success at once.
func (f *fanout) send(ctx context.Context, p *payload) (reply, *fault) {
	p.lines = wire(p.header) // once for all upstreams, and before any of them has p
	f.mirror(ctx, p)
	if !p.timed {
		ctx = context.WithoutCancel(ctx)
	}
	outs := make([]outcome, len(f.required))
	one := func(i int) {
		outs[i] = f.required[i].offer(ctx, p)
	}
	if len(outs) == 0 {
		return reply{}, nil
	}
	var others sync.WaitGroup
	for i := 1; i < len(outs); i++ {
		others.Add(1)
		f.crew.run(func() {
			defer others.Done()
			one(i)
		})
	}
	one(0)
	others.Wait()
	return outs[0].reply, merge(f.required, outs)
}

// mirror starts the deliveries that no client waits for, if they have room for the body. All mirrors share the room
// that is taken for it, and the last to be done gives it back; where there is none, none of them gets the body.
func (f *fanout) mirror(ctx context.Context, p *payload) {
	if len(f.mirrors) == 0 {
		return
	}
	charge := max(int64(cap(p.body)), min(minMirrorCharge, f.mirrorRoom/mirrorCount)) // of what it really holds
	// Taken first and then compared: two at once must not both find the last of it.
	if f.mirrorHeld.Add(charge) > f.mirrorRoom {
		f.mirrorHeld.Add(-charge)
		for _, u := range f.mirrors {
			u.metrics.dropped(dropBacklog, len(p.body))
			u.refusals.log(u.log, slog.LevelWarn, "mirror is too slow: its copy was dropped", "upstream", u.name)
		}
		return
	}
	var left atomic.Int32
	left.Store(int32(len(f.mirrors)))
	p.hold()
	for _, u := range f.mirrors {
		f.running.Go(func() {
			ctx := context.WithoutCancel(ctx) // the request's ends with its handler, before the mirrors are done
			u.settle(ctx, p, u.deliver(ctx, p, p.expires))
			if left.Add(-1) == 0 {
				f.mirrorHeld.Add(-charge)
				p.release()
			}
		})
	}
}

// startSpools begins to hand over what the spools hold. Call it once, before the first send.
func (f *fanout) startSpools() {
	for _, u := range f.required {
		if u.spool != nil {
			u.spool.start(u.hurry, u)
		}
	}
}

// stopSpools lets nothing more out of the spools. What is on its way gets a moment to arrive: cut short, it might
// arrive twice. That moment is spoolTime, or until ctx ends.
func (f *fanout) stopSpools(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, spoolTime)
	defer cancel()
	var stopping sync.WaitGroup
	defer stopping.Wait()
	for _, u := range f.required {
		if u.spool != nil {
			stopping.Go(func() { u.spool.stop(ctx) })
		}
	}
}

// wait returns once no mirror is being delivered to and the spools are at rest, or with false when ctx ends first. No
// send may be under way. What is not done by then goes on until the process ends.
func (f *fanout) wait(ctx context.Context) bool {
	f.stopSpools(ctx)
	done := make(chan struct{})
	go func() {
		f.running.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// abandon counts the profiles that are still being delivered as dropped, because the process is about to end, and
// returns a line for each upstream that has some. It stops none of them; those on their way into the spool are not
// counted.
func (f *fanout) abandon() (lines []string) {
	for _, u := range slices.Concat(f.required, f.mirrors) {
		if n := u.pending.Load(); n > 0 {
			u.metrics.droppedRequests[dropShutdown].Add(n)
			u.metrics.droppedBytes[dropShutdown].Add(u.pendingBytes.Load())
			lines = append(lines, fmt.Sprintf("%s: %d", u.name, n))
		}
	}
	return lines
}

// A direct speaks HTTP/1.1 (RFC 9112) to one plain http:// upstream in the place of an http.Transport, whose seven
// writes and many goroutine switches for each request cost more than the rest of the relay. A request is one write, and
// the answer is read by the one goroutine that each connection has. TestDirectIsTransport lists where they differ.
// Safe for concurrent use.
type direct struct {
	addr string    // host:port, to dial
	line [2]string // how requests begin, up to the query; by routeIngest, routePush

	mu   sync.Mutex
	idle []*directConn // at most maxIdleUpstream; the one used last is at the end
	era  int           // counts failures: a connection is not pooled if one came after it was dialled
}

// A directConn is one connection. Between take or dial and put it belongs to one exchange, which writes. Its other
// goroutine, listen, reads, from the first moment to the last: that the server has hung up is known as soon as it does,
// and not only at the next use.
type directConn struct {
	net.Conn
	pool    *direct
	era     int               // of pool, from before it was dialled
	ended   bool              // under pool.mu: nothing reads it any more
	waiting atomic.Bool       // an exchange is to get what is read
	sent    atomic.Bool       // its request is written
	answers chan directAnswer // from listen, one for each request; closed when it ends
	parts   [3][]byte         // what out begins as
	out     net.Buffers       // what is not yet written

	br   *bufio.Reader // these two for listen alone
	room int64         // bytes that may still be read
}

// A directAnswer is an answer, or err in its place.
type directAnswer struct {
	*answer
	err   error
	begun bool // something of it came
	clean bool // it is whole and nothing follows it: the connection can be used again
}

// Faults of a server, or of a request, that no package has an error for. They are causes, for the log.
var (
	errHungUp   = errors.New("the connection was closed without an answer")
	errLongHead = errors.New("the head of the answer is longer than 64 KiB")
	errBadHead  = errors.New("a space or a line break in the query, or a line break in Host")
)

// newDirect is nil for the upstreams that need an http.Transport: https:// ones, and names in need of encoding. It does
// not know of proxies: whoever has one must not ask.
func newDirect(u *url.URL) *direct {
	if u == nil || u.Scheme != "http" || strings.ContainsFunc(u.Host, func(r rune) bool { return r <= ' ' || r > '~' || r == '%' }) {
		return nil
	}
	d := &direct{addr: net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "80"))}
	for r := range d.line {
		d.line[r] = "POST " + target(u, &payload{route: routeID(r)}).RequestURI()
	}
	return d
}

// exchange sends a request and reads the answer to its end, by deadline or until ctx ends. The message is not read any
// more when it returns. An error is that of ctx if it ended, and a net.Error with Timeout if the deadline came first.
func (d *direct) exchange(ctx context.Context, deadline time.Time, hasty bool, message [3][]byte) (*answer, error) {
	if c := d.take(); c != nil {
		a := c.exchange(ctx, deadline, hasty, message)
		// A pooled connection that ends without a word was most likely closed because it was idle. No client is to wait
		// for a backoff because of that: once, the request is sent again on a new connection. RFC 9110, section 9.2.2,
		// warns against that for POST, which may arrive twice: so it may with every retry here.
		if a.err == nil || a.begun || ctx.Err() != nil || !time.Now().Before(deadline) {
			return a.answer, a.err
		}
	}
	c, err := d.dial(ctx, deadline, hasty)
	if err != nil {
		return nil, err
	}
	a := c.exchange(ctx, deadline, hasty, message)
	return a.answer, a.err
}

// dial makes a connection. A failure counts like one of a pooled connection: see forget.
func (d *direct) dial(ctx context.Context, deadline time.Time, hasty bool) (*directConn, error) {
	d.mu.Lock()
	era := d.era
	d.mu.Unlock()
	dialer := net.Dialer{Deadline: deadline}
	nc, err := dialer.DialContext(ctx, "tcp", d.addr)
	if err != nil {
		if proves(err, hasty) {
			d.forget(era)
		}
		return nil, err
	}
	return d.adopt(nc, era), nil
}

// adopt starts to listen on a new connection, and owns nc from then on. era is from before it was dialled.
func (d *direct) adopt(nc net.Conn, era int) *directConn {
	c := &directConn{Conn: nc, pool: d, era: era, answers: make(chan directAnswer, 1)}
	c.br = bufio.NewReader(c)
	go c.listen()
	return c
}

// take returns the pooled connection that was used last; nil if there is none. It is the least likely to be closed by
// the server just now, and those that are not needed any more grow old.
func (d *direct) take() *directConn {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.idle) - 1
	if n < 0 {
		return nil
	}
	c := d.idle[n]
	d.idle = slices.Delete(d.idle, n, n+1)
	return c
}

// put pools a connection after an exchange, for idleUpstream at most, or closes it: one that ended meanwhile has been
// looked for in the pool already, and one of an older era may be as dead as what failed since.
func (d *direct) put(c *directConn) {
	c.SetDeadline(time.Now().Add(idleUpstream)) // it is listen that meets it
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.ended || c.era != d.era || len(d.idle) >= maxIdleUpstream {
		c.Close()
		return
	}
	d.idle = append(d.idle, c)
}

// forget closes the pooled connections if they are of that era, so that the next exchange dials: one of them may just
// have proved dead. Exchanges under way are not disturbed; put closes their connections. Of several failures in one era
// the first does it: what was dialled since is not suspect.
func (d *direct) forget(era int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if era != d.era {
		return
	}
	d.era++
	for _, c := range d.idle {
		c.Close()
	}
	d.idle = nil
}

// end takes c out of the pool, for good: put will not let it in again.
func (d *direct) end(c *directConn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.ended = true
	if i := slices.Index(d.idle, c); i >= 0 {
		d.idle = slices.Delete(d.idle, i, i+1)
	}
}

// exchange sends one request and waits for its answer. It puts c back, or closes it. There is an answer or an error, or
// both where an upstream claims success for a body that it was not sent.
func (c *directConn) exchange(ctx context.Context, deadline time.Time, hasty bool, message [3][]byte) directAnswer {
	stop := func() bool { return true }
	if ctx.Done() != nil { // else it cannot end, and AfterFunc would be for nothing
		stop = context.AfterFunc(ctx, func() { c.Close() })
	}
	c.SetDeadline(deadline)
	c.sent.Store(false)
	c.waiting.Store(true) // before anything is written: listen takes what comes without it for unasked
	c.parts = message
	c.out = c.parts[:]
	_, unsent := c.out.WriteTo(c.Conn) // not to c: only a connection of package net takes all three in one system call
	c.sent.Store(true)
	// Whether or not all was sent, there may be an answer: a server that will not have the body says so before its end.
	a, ok := <-c.answers
	if !ok {
		a.err = errHungUp
	} else if a.err == nil && a.status/100 == 2 && unsent != nil {
		a.err = errTooSoon
	}
	// If stop comes too late, ctx has ended and c is being closed, however good the answer.
	if stop() && a.clean && unsent == nil {
		c.pool.put(c)
		return a
	}
	c.Close()
	if a.err != nil {
		if !time.Now().Before(deadline) {
			a.err = os.ErrDeadlineExceeded // which half a line may look like a fault of the server's
		}
		a.err = cmp.Or(ctx.Err(), a.err)
		if proves(a.err, hasty) {
			c.pool.forget(c.era)
		}
	}
	return a
}

// listen reads answers for as long as the connection can be used. An idle one ends with the first byte that comes
// unasked, as it does when the server closes it or idleUpstream is over. That byte could otherwise pass for the answer
// to a request that was not made yet. c.answers has room for the one answer there can be: listen never waits for an
// exchange.
func (c *directConn) listen() {
	// Last of all: an exchange that took c before it was out of the pool learns here that nothing will come.
	defer close(c.answers)
	defer c.Close()
	defer c.pool.end(c)
	for clean := true; clean; {
		c.room = maxAnswerHeader
		_, err := c.br.Peek(1)
		if !c.waiting.Swap(false) { // each request has one answer
			return
		}
		a := directAnswer{err: err}
		if err == io.EOF {
			a.err = errHungUp
		} else if err == nil {
			a = c.read()
		}
		if !c.sent.Load() && (a.err != nil || a.status/100 != 2) {
			c.SetWriteDeadline(time.Unix(1, 0)) // no use to send the rest
		}
		clean = a.clean
		c.answers <- a
	}
}

// read reads one answer. Interim ones are passed over (RFC 9110, section 15.2), except 101: what follows that is no
// HTTP/1.1. An answer is clean only if no byte came after it, which would be read as the answer to the next request.
func (c *directConn) read() directAnswer {
	a := directAnswer{begun: true}
	var resp *http.Response
	for resp == nil || resp.StatusCode/100 == 1 && resp.StatusCode != http.StatusSwitchingProtocols {
		if resp, a.err = http.ReadResponse(c.br, nil); a.err != nil {
			return a
		}
	}
	c.room = math.MaxInt64 // readAnswer has its own bound
	var whole bool
	a.answer, whole, a.err = readAnswer(resp) // its body is not closed: that would read on
	a.clean = whole && !resp.Close && resp.StatusCode >= 200 && c.br.Buffered() == 0
	return a
}

// Read is for br. The heads of one answer, interim ones too, have room for maxAnswerHeader together.
func (c *directConn) Read(p []byte) (int, error) {
	if c.room <= 0 {
		return 0, errLongHead
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.room)])
	c.room -= int64(n)
	return n, err
}

// message is p as it stands on the wire: the request line with what the relay says of its own accord, the other header
// lines, the body. RFC 9112, section 2.1. The first part is new, the others are shared and must not be changed.
// Content-Length is there even where it is 0, as RFC 9110, section 8.6, has it for POST. The error is errBadHead.
func (u *upstream) message(p *payload) ([3][]byte, error) {
	own := u.link.header()
	host := u.host(own)
	if strings.ContainsAny(p.query, " \r\n") || strings.ContainsAny(host, "\r\n") {
		return [3][]byte{}, errBadHead // nothing that was parsed has them, but they would begin a second request
	}
	b := append(make([]byte, 0, 256), u.direct.line[p.route]...)
	if p.query != "" {
		b = append(append(b, '?'), p.query...)
	}
	b = append(append(b, " HTTP/1.1\r\nHost: "...), host...)
	b = append(strconv.AppendInt(append(b, "\r\nContent-Length: "...), int64(len(p.body)), 10), "\r\n"...)
	lines := p.lines
	if len(own) > 0 || lines == nil {
		lines = wire(p.headers(own))
	} else if p.timed {
		b = append(append(append(b, "Connect-Timeout-Ms: "...), p.timeLeft()...), "\r\n"...)
	}
	return [3][]byte{b, lines, p.body}, nil
}
