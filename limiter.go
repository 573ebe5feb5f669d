package main

// Every way to say no: to a connection (connLimiter), to bytes (budget, gate.read) and to a request before its body is
// looked at (gate).
//
// A connection has a slot from Accept to Close. A body has room in the budget from before its bytes are read until its
// last upstream is done with it. What a request may carry upstream is an allow-list, decided here alone.

import (
	"bytes"
	"container/list"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// roomWait is how long a request waits for room in the budget before it is told 503.
const roomWait = 5 * time.Second

// First steps of a body's buffer, in bytes. A buffer is made whole at once up to its step; beyond that it doubles as
// bytes come, so that a client that declares much and sends little holds little. One HTTP/2 connection brings up to
// 250 bodies at once, and a chunked body says nothing of its size: hence the smaller step for both.
const (
	firstStep      = 64 << 10
	firstStepHTTP1 = 1 << 20
)

// maxTenant is the longest tenant ID Pyroscope takes, in bytes.
const maxTenant = 150

// answerMargin is kept between the last moment of a delivery and the write timeout, for writing the answer.
const answerMargin = 500 * time.Millisecond

// lastLook is how long a connection that is to make room is read once more: bytes that came meanwhile save it.
const lastLook = 20 * time.Millisecond

// A connLimiter is a listener that has at most so many of its connections open. At the limit the next connection is
// accepted and parked; it gets the slot of the first that closes, and the longest idle one is asked to.
//
// It goes below TLS, and its state method into http.Server.ConnState. Accept returns only the errors of the listener
// inside; Close ends an Accept that waits for a slot.
type connLimiter struct {
	net.Listener
	slots   chan struct{} // a semaphore; nil: no limit
	closed  chan struct{}
	close   sync.Once
	metrics *metrics
	log     *slog.Logger
	full    throttle

	mu     sync.Mutex
	idle   list.List // of *limitedConn, the longest idle first
	parked bool      // a connection waits for a slot
	asked  bool      // some connection was asked to make room for it
}

// limitListener lets limit connections of l be open at once, 0 = any number.
func limitListener(l net.Listener, limit int, m *metrics, log *slog.Logger) *connLimiter {
	c := &connLimiter{Listener: l, closed: make(chan struct{}), metrics: m, log: log}
	if limit > 0 {
		c.slots = make(chan struct{}, limit)
	}
	m.connectionsLimit.Set(int64(limit))
	return c
}

func (l *connLimiter) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if !l.acquire() {
		c.Close()
		return nil, net.ErrClosed
	}
	l.metrics.connections.Add(1)
	return &limitedConn{Conn: c, limiter: l}, nil
}

func (l *connLimiter) Close() error {
	err := l.Listener.Close()
	l.close.Do(func() { close(l.closed) })
	return err
}

// acquire takes a slot, waiting for one if need be; false once the listener is closed.
func (l *connLimiter) acquire() bool {
	if l.slots == nil {
		return true
	}
	select {
	case l.slots <- struct{}{}:
		return true
	default:
	}
	l.metrics.limitWaits.Add(1)
	l.full.log(l.log, slog.LevelWarn, "connection limit reached: the next client waits", "limit", cap(l.slots), "waits", l.metrics.limitWaits.Value())
	l.park(true)
	defer l.park(false)
	select {
	case l.slots <- struct{}{}:
		return true
	case <-l.closed:
		return false
	}
}

// park says that a connection waits for a slot, and asks an idle one to go; or that it waits no longer.
func (l *connLimiter) park(waiting bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.parked, l.asked = waiting, false
	if waiting {
		l.askLocked()
	}
}

// askLocked asks the longest idle connection to make room, if room is wanted and nobody was asked yet.
func (l *connLimiter) askLocked() {
	if e := l.idle.Front(); l.parked && !l.asked && e != nil {
		l.asked = true
		c := l.idle.Remove(e).(*limitedConn)
		c.place, c.leaving, c.looked = nil, true, false
		c.Conn.SetReadDeadline(time.Unix(1, 0)) // wakes the Read it waits in
	}
}

// wantsRoom reports whether a connection should be closed with its answer because another waits for its slot. It says
// yes once for each that waits.
func (l *connLimiter) wantsRoom() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.parked || l.asked {
		return false
	}
	l.asked = true
	l.metrics.reclaimed.Add(1)
	return true
}

// state follows the server's view of its connections; for http.Server.ConnState.
func (l *connLimiter) state(nc net.Conn, s http.ConnState) {
	h2 := false
	if t, ok := nc.(*tls.Conn); ok {
		h2 = s == http.StateIdle && t.ConnectionState().NegotiatedProtocol == "h2"
		nc = t.NetConn()
	}
	c, ok := nc.(*limitedConn)
	if !ok || l.slots == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c.h2 = c.h2 || h2
	c.busyLocked()
	if s == http.StateIdle && (c.h2 || !c.unanswered.Load()) {
		c.idleLocked()
	}
}

// A limitedConn gives its slot back when it is closed for the first time. While the server thinks it idle, it may be
// asked to make room: its Read is woken, looks for bytes once more, and reports the end of the stream if there are
// none. No request is lost that way: a connection that bytes were read from is no longer idle.
type limitedConn struct {
	net.Conn
	limiter    *connLimiter
	once       sync.Once
	begun      bool        // bytes were read; for Read alone
	unanswered atomic.Bool // bytes were read since the last Write
	resting    atomic.Bool // place != nil or leaving

	// Under limiter.mu.
	place    *list.Element // in limiter.idle
	leaving  bool          // asked to make room
	looked   bool          // its last look has begun
	h2       bool
	deadline time.Time // for reading, as the server set it
}

func (c *limitedConn) Close() error {
	c.once.Do(func() {
		l := c.limiter
		l.mu.Lock()
		c.unlistLocked()
		l.mu.Unlock()
		l.metrics.connections.Add(-1)
		if l.slots != nil {
			<-l.slots
		}
	})
	return c.Conn.Close()
}

func (c *limitedConn) unlistLocked() {
	c.resting.Store(false)
	if c.place != nil {
		c.limiter.idle.Remove(c.place)
		c.place = nil
	}
}

// busyLocked takes c off the idle list, and back from leaving: then another is asked in its place.
func (c *limitedConn) busyLocked() {
	c.unlistLocked()
	if c.leaving {
		c.leaving, c.limiter.asked = false, false
		c.Conn.SetReadDeadline(c.deadline)
		c.limiter.askLocked()
	}
}

func (c *limitedConn) idleLocked() {
	c.place = c.limiter.idle.PushBack(c)
	c.resting.Store(true)
	c.limiter.askLocked()
}

func (c *limitedConn) Write(p []byte) (int, error) {
	c.unanswered.Store(false)
	return c.Conn.Write(p)
}

func (c *limitedConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if n > 0 {
			c.stir(p[:n])
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			again, err := c.woken()
			if again {
				continue
			}
			return 0, err
		}
		return n, err
	}
}

// stir notes that bytes were read. An HTTP/1 connection is busy from then on. On HTTP/2 they may be a ping: it stays
// idle, for the shortest time of all, until the server says that they began a request.
func (c *limitedConn) stir(p []byte) {
	c.unanswered.Store(true)
	first := !c.begun
	c.begun = true
	if !first && !c.resting.Load() {
		return
	}
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.h2 = c.h2 || first && bytes.HasPrefix(p, []byte("PRI "))
	if c.place == nil && !c.leaving {
		return
	}
	c.busyLocked()
	if c.h2 {
		c.idleLocked()
	}
}

// woken says what a Read that met a deadline does: read again, or return err.
func (c *limitedConn) woken() (again bool, err error) {
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	switch now := time.Now(); {
	case !c.leaving:
		// Either the server's own deadline, or one of ours that came too late.
		return c.deadline.IsZero() || now.Before(c.deadline), os.ErrDeadlineExceeded
	case !c.looked:
		c.looked = true
		c.Conn.SetReadDeadline(now.Add(lastLook))
		return true, nil
	}
	c.limiter.metrics.reclaimed.Add(1)
	return false, io.EOF
}

// SetReadDeadline leaves the connection's last look alone; the server's deadline is put back if it stays.
func (c *limitedConn) SetReadDeadline(t time.Time) error {
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.deadline = t
	if c.leaving {
		return nil
	}
	return c.Conn.SetReadDeadline(t)
}

func (c *limitedConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.Conn.SetWriteDeadline(t))
}

// A budget is the room that bodies have in memory, in bytes. Requests wait for it in the order they came, so that a
// large body is not passed over for ever by small ones. Safe for concurrent use.
type budget struct {
	mu      sync.Mutex
	free    int64
	waiting list.List // of *claim
	metrics *metrics
}

type claim struct {
	bytes   int64
	granted chan struct{} // closed under budget.mu
}

// take reserves n bytes, waiting for them until ctx ends; false if they did not come free.
func (b *budget) take(ctx context.Context, n int64) bool {
	b.mu.Lock()
	if b.free >= n && b.waiting.Len() == 0 {
		b.free -= n
		b.mu.Unlock()
		b.metrics.inflightBytes.Add(n)
		return true
	}
	c := &claim{n, make(chan struct{})}
	place := b.waiting.PushBack(c)
	b.mu.Unlock()
	select {
	case <-c.granted:
		return true
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-c.granted:
		return true
	default:
		b.waiting.Remove(place)
		b.grantLocked() // a smaller claim may have stood behind this one
		return false
	}
}

// give returns n bytes.
func (b *budget) give(n int64) {
	b.metrics.inflightBytes.Add(-n)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	b.grantLocked()
}

func (b *budget) grantLocked() {
	for e := b.waiting.Front(); e != nil && e.Value.(*claim).bytes <= b.free; e = b.waiting.Front() {
		c := b.waiting.Remove(e).(*claim)
		b.free -= c.bytes
		b.metrics.inflightBytes.Add(c.bytes)
		close(c.granted)
	}
}

// A route is what one of the two ways in does with a request's head: an exchange that reads its body and answers it.
// The exchange is there even when the fault is, to answer with.
type route func(*http.Request) (exchange, *fault)

// An exchange is one request from its head to its answer, in the client's own protocol.
type exchange interface {
	// payload makes of the whole body what goes upstream: its bytes are not copied. header is the gate's allow-list
	// of the request's headers, and the payload's from then on.
	payload(header http.Header, body []byte) (*payload, *fault)
	// accept and refuse write the answer and return what to count it as: an HTTP status or "grpc-N".
	accept(http.ResponseWriter, reply) string
	refuse(http.ResponseWriter, *fault) string
	// timeout is the client's own deadline, counted from the request's head; false if it set none.
	timeout() (time.Duration, bool)
}

// A gate is the handler of the data port. It turns away what it must, reads bodies within the limits, hands each to the
// fan-out and sees to the answer.
type gate struct {
	maxBody         int64
	deliveryTimeout time.Duration
	writeTimeout    time.Duration // 0 = none
	forward         []string      // canonical names of the headers that go upstream
	via             string        // this relay's own pseudonym in Via (RFC 9110, section 7.6.3)
	ingest, push    route
	room            *budget
	buffers         buffers
	conns           *connLimiter
	fan             *fanout
	metrics         *metrics
	log             *slog.Logger
	ready           func() bool
	origins         *http.CrossOriginProtection // its zero-value policy: browsers may not post across origins
}

// newVia makes a pseudonym that no other relay has, this one after a restart included.
func newVia() string {
	return "pyroscope-relay-" + strings.ToLower(rand.Text()[:16])
}

// forwarded are the headers that go upstream by default. Never among them: Authorization, Cookie, Forwarded,
// X-Forwarded-*, and what belongs to one hop (RFC 9110, section 7.6.1).
func forwarded() []string {
	return []string{
		"Content-Type", "Content-Encoding", "User-Agent", "Accept", "X-Scope-Orgid", "Traceparent", "Tracestate",
		"Uber-Trace-Id", "Connect-Protocol-Version", "Connect-Timeout-Ms",
	}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.metrics.inflightRequests.Add(1)
	defer g.metrics.inflightRequests.Add(-1)
	switch slashes(r.URL.Path) {
	case ingestPath, "/pyroscope" + ingestPath:
		g.serve(w, r, routeIngest, g.ingest)
	case pushPath:
		g.serve(w, r, routePush, g.push)
	case "/ready":
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			g.plain(w, routeReady, http.StatusMethodNotAllowed, "use GET", "Allow", "GET, HEAD")
			return
		}
		g.metrics.request(routeReady, strconv.Itoa(writeReady(w, g.ready())))
	default:
		g.plain(w, routeOther, http.StatusNotFound, "not served here: profiles go to POST "+ingestPath+" or POST "+pushPath)
	}
}

// slashes makes runs of slashes one: clients whose base URL ends in a slash send them.
func slashes(path string) string {
	for strings.Contains(path, "//") {
		path = strings.ReplaceAll(path, "//", "/")
	}
	return path
}

// plain answers what no protocol of ours has been recognised in; header is a list of names and values.
func (g *gate) plain(w http.ResponseWriter, id routeID, status int, text string, header ...string) {
	for i := 0; i+1 < len(header); i += 2 {
		w.Header().Set(header[i], header[i+1])
	}
	writeText(w, status, text+"\n")
	g.metrics.request(id, strconv.Itoa(status))
}

// serve takes one profile from its head to its answer.
func (g *gate) serve(w http.ResponseWriter, r *http.Request, id routeID, rt route) {
	start := time.Now()
	if r.Method != http.MethodPost {
		g.plain(w, id, http.StatusMethodNotAllowed, "use POST", "Allow", http.MethodPost)
		return
	}
	if err := g.origins.Check(r); err != nil {
		g.metrics.rejected[rejectCrossOrigin].Add(1)
		g.plain(w, id, http.StatusForbidden, "cross-origin requests from browsers are refused")
		return
	}
	x, f := rt(r)
	var re reply
	if f == nil {
		re, f = g.relay(r, id, x, start)
	}
	if r.ProtoMajor == 1 && g.conns.wantsRoom() {
		w.Header().Set("Connection", "close")
	}
	var code string
	if f == nil {
		code = x.accept(w, re)
	} else {
		code = x.refuse(w, f)
		if f.reason != "" {
			g.metrics.rejected[f.reason].Add(1)
		}
	}
	g.metrics.request(id, code)
	if g.log.Enabled(r.Context(), slog.LevelDebug) {
		g.log.Debug("request", "route", id, "code", code, "client", r.RemoteAddr, "took", time.Since(start), "error", f)
	}
}

// relay reads the body, sends it to all upstreams and returns what the client is to be told.
func (g *gate) relay(r *http.Request, id routeID, x exchange, start time.Time) (reply, *fault) {
	header, f := g.admit(r)
	if f != nil {
		return reply{}, f
	}
	body, charged, f := g.read(r, id)
	if f != nil {
		return reply{}, f
	}
	p, f := x.payload(header, body)
	if f != nil {
		g.room.give(charged)
		return reply{}, f
	}
	p.free = func() {
		g.room.give(charged)
		g.buffers.put(body)
	}
	p.hold()
	defer p.release()
	p.expires = time.Now().Add(g.deliveryTimeout)
	if d, ok := x.timeout(); ok {
		p.timed, p.expires = true, earlier(p.expires, start.Add(d))
	}
	if g.writeTimeout > 0 {
		p.expires = earlier(p.expires, start.Add(g.writeTimeout-min(answerMargin, g.writeTimeout/10)))
	}
	return g.fan.send(r.Context(), p)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// badRequest is a fault of the client's that it must mend before it tries again.
func badRequest(reason, public string) *fault {
	return &fault{status: http.StatusBadRequest, code: codeInvalidArgument, public: public, reason: reason}
}

// admit checks what a request says of itself besides its protocol, and picks the headers that go upstream.
func (g *gate) admit(r *http.Request) (http.Header, *fault) {
	for _, v := range r.Header["Via"] {
		if strings.Contains(v, g.via) {
			return nil, &fault{status: http.StatusLoopDetected, code: codeFailedPrecondition, reason: rejectLoop,
				public: "this request has passed through this relay before: an upstream leads back to it"}
		}
	}
	var nominated []string // RFC 9110, section 7.6.1
	for _, v := range r.Header["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			nominated = append(nominated, http.CanonicalHeaderKey(strings.TrimSpace(name)))
		}
	}
	if slices.Contains(nominated, "X-Scope-Orgid") {
		return nil, badRequest(rejectTenant, "Connection must not name X-Scope-OrgID")
	}
	header := make(http.Header, len(g.forward)+1)
	for _, name := range g.forward {
		if v := r.Header[name]; v != nil && (len(nominated) == 0 || !slices.Contains(nominated, name)) {
			header[name] = v
		}
	}
	if f := checkTenant(header); f != nil {
		return nil, f
	}
	received := strings.TrimSuffix(strings.TrimPrefix(r.Proto, "HTTP/"), ".0")
	header["Via"] = append(slices.Clip(r.Header["Via"]), received+" "+g.via)
	return header, nil
}

// checkTenant leaves one X-Scope-OrgID in header, or none, and refuses what no tenant can be.
func checkTenant(header http.Header) *fault {
	tenants := header["X-Scope-Orgid"]
	if len(tenants) == 0 {
		return nil
	}
	tenant := tenants[0]
	for _, other := range tenants[1:] {
		if other != tenant {
			return badRequest(rejectTenant, "two different X-Scope-OrgID headers in one request: send one")
		}
	}
	if len(tenant) > maxTenant {
		return badRequest(rejectTenant, fmt.Sprintf("X-Scope-OrgID is longer than %d bytes", maxTenant))
	}
	for _, c := range []byte(tenant) {
		if c < ' ' || c > '~' {
			return badRequest(rejectTenant, "X-Scope-OrgID has a character that is not printable ASCII")
		}
	}
	header["X-Scope-Orgid"] = tenants[:1]
	return nil
}

// read returns the whole body in one slice, and how many bytes of the budget it was charged, which the caller gives
// back. On a fault nothing stays charged.
func (g *gate) read(r *http.Request, id routeID) (body []byte, charged int64, f *fault) {
	tooLarge := &fault{status: http.StatusRequestEntityTooLarge, code: codeInvalidArgument, reason: rejectBodySize,
		public: fmt.Sprintf("the body is larger than %d bytes, the most this relay takes (-max-body-size)", g.maxBody)}
	if r.ContentLength > g.maxBody {
		return nil, 0, tooLarge
	}
	limit := r.ContentLength
	if limit < 0 {
		limit = g.maxBody
	}
	wait, cancel := context.WithTimeout(r.Context(), roomWait)
	defer cancel()
	defer func() {
		g.metrics.requestBytes[id].Add(int64(len(body)))
		if f != nil {
			g.room.give(charged)
		}
	}()
	for {
		if int64(len(body)) == charged && charged < limit {
			size := min(nextSize(r, charged), limit)
			if !g.room.take(wait, size-charged) {
				return body, charged, &fault{status: http.StatusServiceUnavailable, code: codeUnavailable, retryAfter: "1", transient: true,
					reason: rejectInflight, public: "the relay holds as many profiles as it may (-max-inflight-bytes): try again"}
			}
			grown := append(g.buffers.get(size), body...)
			g.buffers.put(body)
			body, charged = grown, size
		}
		into := body[len(body):charged]
		if len(into) == 0 {
			into = make([]byte, 1) // is this the end?
		}
		n, err := r.Body.Read(into)
		if int64(len(body)+n) > charged {
			return body, charged, tooLarge
		}
		body = body[:len(body)+n]
		if err == io.EOF {
			return body, charged, nil
		}
		if err != nil {
			return body, charged, bodyFault(err)
		}
	}
}

// nextSize is the size of a body's buffer, in bytes, after one of size have, which is full.
func nextSize(r *http.Request, have int64) int64 {
	switch {
	case have > 0:
		return 2 * have
	case r.ProtoMajor == 1 && r.ContentLength >= 0:
		return firstStepHTTP1
	}
	return firstStep
}

// bodyFault is the answer to a body that could not be read to its end.
func bodyFault(err error) *fault {
	f := badRequest(rejectBodyRead, "the body ended before it was whole")
	f.cause = err
	if errors.Is(err, os.ErrDeadlineExceeded) {
		f.status, f.code, f.transient = http.StatusRequestTimeout, codeDeadlineExceeded, true
		f.public = "the body did not arrive in time (-server-read-timeout)"
	}
	return f
}

// Bodies between these sizes, in bytes, are read into used buffers: allocating and clearing new ones, and the garbage
// they become, would cost more than all else that is done with such a body. Smaller ones are cheap, larger ones rare.
const (
	smallestReused = 4 << 10
	largestReused  = 1 << 20
)

// buffers lends the memory that bodies are read into. What nobody borrows for a while is garbage like all else. The zero
// value is ready; safe for concurrent use.
type buffers struct{ pools [64]sync.Pool }

// bufferClass is the pool and the capacity of the buffers for n bytes: a quarter more than n at most.
func bufferClass(n int64) (pool int, capacity int64) {
	shift := bits.Len64(uint64(n-1)) - 3
	quarter := (n-1)>>shift + 1 // 5 to 8
	return (4*shift + int(quarter)) % 64, quarter << shift
}

// get returns an empty slice with room for n bytes or more.
func (b *buffers) get(n int64) []byte {
	if n < smallestReused || n > largestReused {
		return make([]byte, 0, n)
	}
	pool, capacity := bufferClass(n)
	if used, ok := b.pools[pool].Get().(*[]byte); ok {
		return (*used)[:0]
	}
	return make([]byte, 0, capacity)
}

// put takes back what get returned. Nobody may read or write it any more.
func (b *buffers) put(body []byte) {
	if c := int64(cap(body)); c >= smallestReused && c <= largestReused {
		pool, _ := bufferClass(c)
		b.pools[pool].Put(&body)
	}
}
