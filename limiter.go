package main

// Every way to say no: to a connection (connLimiter), to bytes (budget, gate.read) and to a request before its body is
// looked at (gate).
//
// A connection has a slot from Accept to Close. A body has room in the budget from before its bytes are read until its
// last upstream is done with it. What a request may carry upstream is an allow-list, decided here alone.
//
// A method whose name ends in Locked is called with the mutex of its limiter or budget held. The two are never held
// together.

import (
	"cmp"
	"container/list"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/bits"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// roomWait is how long a request waits for room in the budget before it is told 503: long enough to sit out a burst,
// and short enough that the client, which mostly gives up at 10 s, is still there to be told.
const roomWait = 5 * time.Second

// Steps of a body's buffer, in bytes. A buffer is made whole at once up to its step; beyond that it doubles as bytes
// come, so that a client that declares much and sends little holds little. One HTTP/2 connection brings up to 250 bodies
// at once, and a chunked body says nothing of its size: both begin with the smaller step. A declared body goes on with
// the larger one: many that grow in small steps would take all the room together, and none would ever be whole.
const (
	firstStep    = 80 << 10 // of the common 64 KiB with an envelope no second step is needed
	declaredStep = 1 << 20
)

// maxLitter is how many bytes of bodies that are done with may lie about, beyond the budget, before they are collected.
// With maxKept it comes to half of what the memory limit allows for besides bodies (baseMemory); connections need the
// rest.
const maxLitter = 8 << 20

// maxTenant is the longest tenant ID Pyroscope takes, in bytes.
const maxTenant = 150

// lingerTime is how long the rest of a body is read after its request was refused: for as long as most clients wait for
// an answer.
const lingerTime = 10 * time.Second // at most -server-read-timeout

// answerMargin is kept between the last moment of a delivery and the write timeout, for writing the answer: after the
// write timeout net/http can write nothing, and the client would see its connection end without a word.
const answerMargin = 500 * time.Millisecond

// answerBy is how long after a request's head its answer is begun at the latest, with that write timeout. Under a write
// timeout below 5 s a tenth of it is margin enough.
func answerBy(writeTimeout time.Duration) time.Duration {
	return writeTimeout - min(answerMargin, writeTimeout/10)
}

// lastLook is how long a connection that is to make room is read once more: bytes that came meanwhile save it. A
// deadline that is already over would not do: net reports it without looking at the socket. Nor must it be long:
// whoever waits for the slot waits that long, too.
const lastLook = 5 * time.Millisecond

// quietHTTP2 is how long an idle HTTP/2 connection must have been silent before it is closed to make room: bytes may be
// a ping, but also the first part of a request that the server has not recognised yet.
const quietHTTP2 = 250 * time.Millisecond

// arrivalTime is how long, when the relay stops, a connection may take from its first moment to its first byte, and
// from the closing of the listener to the end of a request's head: the round trips of a TLS handshake fit in.
const arrivalTime = time.Second

// connStep is how many connections more it takes to make the runtime's memory limit larger. The first step is part of
// baseMemory.
const connStep = 1024

// A connLimiter is a listener that has at most so many of its connections open. At the limit the next connection is
// accepted and parked; it gets the slot of the first that closes, and the longest idle one is asked to.
//
// It goes below TLS, as http.Server must see the *tls.Conn itself to speak HTTP/2 over it, and its state method goes
// into http.Server.ConnState. Accept returns only the errors of the listener inside; Close ends an Accept that waits
// for a slot, and asks every idle connection to go.
//
// Accept is for one goroutine at a time, as http.Server has it: parked and asked are about the one connection that it
// holds back. All else is safe for concurrent use.
type connLimiter struct {
	net.Listener
	slots   chan struct{} // a semaphore; nil: no limit
	closed  chan struct{} // closed by Close, for the Accept that waits for a slot
	close   sync.Once
	metrics *metrics
	log     *slog.Logger
	full    throttle // of the warning that there is no slot

	accepting   chan struct{}  // a semaphore: one Accept at a time
	readTimeout time.Duration  // of heads that the server does not see to; 0 = none; constant
	grown       func(most int) // if not nil, told in steps of connStep how many connections were open at most; constant

	mu       sync.Mutex
	most     int                   // what grown was told last; at first connStep, which it is not told
	open     map[*limitedConn]bool // from Accept to Close, with a slot or without
	idle     list.List             // of *limitedConn, the longest idle first
	parked   bool                  // a connection waits for a slot
	asked    bool                  // room is being made for it, and nobody else is asked
	stopping bool                  // Close was called: all idle ones are asked
}

// limitListener lets limit connections of l be open at once, 0 = any number. From then on l is used through the result
// alone. readTimeout and grown may be set before the first Accept.
func limitListener(l net.Listener, limit int, m *metrics, log *slog.Logger) *connLimiter {
	c := &connLimiter{
		Listener: l, closed: make(chan struct{}), accepting: make(chan struct{}, 1), metrics: m, log: log,
		most: connStep, open: map[*limitedConn]bool{},
	}
	if limit > 0 {
		c.slots = make(chan struct{}, limit)
	}
	m.connectionsLimit.Set(int64(limit))
	return c
}

// Accept takes a connection first and its slot second: idle connections are asked to go only once there is somebody to
// go for. Later clients wait in the kernel's queue meanwhile.
func (l *connLimiter) Accept() (net.Conn, error) {
	l.accepting <- struct{}{}
	defer func() { <-l.accepting }()
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &limitedConn{Conn: nc, limiter: l, heard: time.Now()}
	c.slot = l.acquire()
	l.metrics.connections.Add(1)
	l.mu.Lock()
	l.open[c] = true
	if l.stopping { // Close did not find c in open
		c.askLocked()
	}
	more := len(l.open) > l.most
	if more {
		l.most += connStep
	}
	most := l.most
	l.mu.Unlock()
	if more && l.grown != nil {
		l.grown(most)
	}
	return c, nil
}

// Close stops accepting and lets the connections go that wait for a request, bytes that have arrived being looked at
// first. It does not wait for them: wait does. The error is that of the listener inside; called again, it does nothing.
func (l *connLimiter) Close() error {
	var err error
	l.close.Do(func() {
		err = l.Listener.Close()
		close(l.closed)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.stopping = true
		l.askLocked()
		for c := range l.open {
			if !c.begun {
				c.askLocked()
			}
		}
	})
	return err
}

// wait returns once no connection is open, or with false when ctx ends first. Requests get arrivalTime to arrive: after
// it, connections that the server does not serve are closed. Call it after Close, and as long as the server runs: it is
// the server that closes connections.
func (l *connLimiter) wait(ctx context.Context) bool {
	select {
	case l.accepting <- struct{}{}:
		<-l.accepting // what Accept was at is in open now
	case <-ctx.Done():
		return false
	}
	late := time.Now().Add(arrivalTime)
	for {
		l.mu.Lock()
		left := len(l.open)
		for c := range l.open {
			if !c.serving && time.Now().After(late) {
				c.Conn.Close() // the server closes c, and thereby frees the slot
			}
		}
		l.mu.Unlock()
		if left == 0 {
			return true
		}
		if !sleep(ctx, lastLook) {
			return false
		}
	}
}

// acquire takes a slot, waiting for one if need be. It does not get one if there is no limit, or once the listener is
// closed: the connection that waited then is served over the limit, so that its request is not lost. Every wait is
// counted, however short.
func (l *connLimiter) acquire() bool {
	if l.slots == nil {
		return false
	}
	select {
	case l.slots <- struct{}{}:
		return true
	default:
	}
	l.metrics.limitWaits.Add(1)
	l.full.log(l.log, slog.LevelWarn, "connection limit reached: new clients wait for a free slot (-conn-limit)",
		"limit", cap(l.slots), "waited_so_far", l.metrics.limitWaits.Value())
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
	l.askLocked()
}

// askLocked asks the longest idle connection to make room, if room is wanted and nobody was asked yet; all of them when
// the relay stops.
func (l *connLimiter) askLocked() {
	for e := l.idle.Front(); e != nil && (l.stopping || l.parked && !l.asked); e = l.idle.Front() {
		l.asked = true
		e.Value.(*limitedConn).askLocked()
	}
}

// wantsRoom reports whether a connection should be closed with its answer because another waits for its slot. It says
// yes once for each that waits, and counts the caller's connection as reclaimed: a caller that is told yes must close
// it.
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

// state follows the server's view of its connections; for http.Server.ConnState. The server calls a connection active
// once it has read a whole HTTP/1 head, and as long as HTTP/2 streams are open: half a head does not count. Connections
// that are none of this limiter's are let pass.
func (l *connLimiter) state(nc net.Conn, s http.ConnState) {
	h2 := false
	t, secure := nc.(*tls.Conn)
	if secure {
		h2 = s == http.StateIdle && t.ConnectionState().NegotiatedProtocol == "h2"
		nc = t.NetConn()
	}
	c, ok := nc.(*limitedConn)
	if !ok || s == http.StateNew {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c.known, c.serving, c.h2, c.tls = true, s != http.StateIdle, c.h2 || h2, secure
	c.busyLocked()
	c.oweLocked(time.Time{})
	c.fresh = s == http.StateIdle && c.h2 && !c.rested // a server of HTTP/2 says so before the first request
	c.rested = c.rested || s == http.StateIdle
	// Of HTTP/1, bytes that came since the last Write belong to the next request: that connection is busy already. Of
	// HTTP/2 they need not. It is put on the list before unanswered is looked at again, and stir does the two in
	// reverse: one of them sees a Read that happens just now.
	if s != http.StateIdle {
		return
	}
	if c.h2 || !c.unanswered.Load() {
		c.idleLocked()
	}
	if c.fresh || c.unanswered.Load() {
		c.oweLocked(time.Now())
	}
}

// A limitedConn gives its slot back when it is closed for the first time. While the server thinks it idle, it may be
// asked to make room: its Read is woken, looks for bytes once more, and reports a timeout if there are none, whereupon
// the server closes it. No request is lost that way: a connection that bytes were read from is no longer idle.
//
// The socket has one read deadline and three uses for it: the server's own (deadline), making room (leaving, looked),
// and half a head on HTTP/2 (owed). Making room goes first; which one a Read has met, woken tells from the fields. Read
// is for one goroutine at a time, as net/http has it; all else is safe for concurrent use.
type limitedConn struct {
	net.Conn
	limiter    *connLimiter
	slot       bool        // it holds one; constant
	once       sync.Once   // of Close
	unanswered atomic.Bool // bytes were read since the last Write
	resting    atomic.Bool // place != nil or leaving

	// Under limiter.mu. These two are changed by Read alone, which therefore may read them without.
	begun bool   // a byte was read
	first []byte // the first of them, as many as prefaceStart has

	known    bool          // the server has seen a request, or an HTTP/2 preface
	serving  bool          // the server is at a request
	place    *list.Element // in limiter.idle; nil if leaving
	leaving  bool          // asked to make room
	looked   bool          // its last look has begun
	gone     bool          // its time is over: every Read reports a timeout
	h2       bool          // it speaks HTTP/2
	tls      bool          // what is read is encrypted
	rested   bool          // it was idle before
	fresh    bool          // on HTTP/2: there was no request yet
	heard    time.Time     // when bytes came while it was idle; when it was accepted
	owed     time.Time     // since when it has said something that may be half a head; zero: it has not
	deadline time.Time     // for reading, as the server set it
}

// Close closes the connection and, the first time, gives its slot back.
func (c *limitedConn) Close() error {
	c.once.Do(func() {
		l := c.limiter
		l.mu.Lock()
		c.unlistLocked()
		c.leaving = false // StateClosed comes after this: busyLocked would ask another to go in c's place
		delete(l.open, c)
		l.mu.Unlock()
		l.metrics.connections.Add(-1)
		if c.slot {
			<-l.slots
		}
	})
	return c.Conn.Close()
}

// CloseWrite ends the relay's side alone: the server does so when a client may still be sending, to let it read the
// answer (RFC 9112, section 9.6).
func (c *limitedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// unlistLocked takes c off the idle list, if it is there.
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
		c.rearmLocked()
		c.limiter.askLocked()
	}
}

// idleLocked puts c on the idle list, behind all others. It must be neither there nor leaving; it may be asked at once.
func (c *limitedConn) idleLocked() {
	c.place = c.limiter.idle.PushBack(c)
	c.resting.Store(true)
	c.limiter.askLocked()
}

// askLocked asks c to make room. It wakes the Read that c waits in, or the next one, by a deadline that is over; woken
// does the rest.
func (c *limitedConn) askLocked() {
	c.unlistLocked()
	c.resting.Store(true)
	c.leaving, c.looked = true, false
	c.Conn.SetReadDeadline(time.Unix(1, 0))
}

// Write counts as the answer to all that was read before it.
func (c *limitedConn) Write(p []byte) (int, error) {
	c.unanswered.Store(false)
	return c.Conn.Write(p)
}

// Read returns the error of a deadline only where woken says so: most were set to wake it.
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
// idle, for the shortest time of all, until the server says that they began a request. A connection without TLS is
// taken for HTTP/2 if it begins like the preface (RFC 9113, section 3.4); of one with TLS state knows.
func (c *limitedConn) stir(p []byte) {
	answered := !c.unanswered.Swap(true)
	more := len(prefaceStart) - len(c.first)
	if c.begun && more == 0 && !c.resting.Load() {
		return
	}
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.first = append(c.first, p[:min(len(p), more)]...)
	c.h2 = c.h2 || string(c.first) == prefaceStart
	c.begun, c.heard = true, time.Now()
	if c.place == nil && !c.leaving {
		return
	}
	c.busyLocked()
	if c.h2 && c.known {
		c.idleLocked()
		if c.owed.IsZero() || answered && !c.fresh {
			c.oweLocked(c.heard)
		}
	} else if (len(p) < serverPeek || c.tls) && c.known {
		c.oweLocked(c.heard)
	}
}

// prefaceStart tells an HTTP/2 connection from all requests of HTTP/1.
const prefaceStart = "PRI "

// serverPeek is how many bytes of a later request http.Server waits for with the patience it has for idle clients. With
// TLS nobody knows how many there are in what was read.
const serverPeek = 4

// oweLocked gives an idle connection readTimeout, from since on, to make its first request on HTTP/2, or a request of
// what it has said since it was last answered, for the server sets no such deadline. A zero since takes the deadline
// back. A ping is answered at once, hence harmless; other frames than requests may end an idle connection earlier than
// -server-idle-timeout, but never a busy one.
func (c *limitedConn) oweLocked(since time.Time) {
	if c.owed.Equal(since) || c.limiter.readTimeout == 0 {
		return
	}
	c.owed = since
	if !c.leaving {
		c.rearmLocked()
	}
}

// rearmLocked sets the deadline of the socket: the server's, or that of half a head where it comes first.
func (c *limitedConn) rearmLocked() error {
	d := c.deadline
	if half := c.owed.Add(c.limiter.readTimeout); !c.owed.IsZero() && (d.IsZero() || half.Before(d)) {
		d = half
	}
	return c.Conn.SetReadDeadline(d)
}

// woken says what a Read that met a deadline does: read again, or return err. After c.gone it is err for ever, whatever
// deadline the server sets. A connection that is leaving comes here twice: woken by askLocked, it gets its last look;
// when that is over without a byte, it goes. It stays if another has made the room meanwhile.
func (c *limitedConn) woken() (again bool, err error) {
	l, now := c.limiter, time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case c.gone:
		return false, os.ErrDeadlineExceeded
	case !c.leaving && !c.deadline.IsZero() && !now.Before(c.deadline):
		c.gone = !c.known // before the first request the server would set another deadline and go on waiting
		return false, os.ErrDeadlineExceeded
	case !c.leaving && !c.owed.IsZero() && (c.fresh || c.unanswered.Load()) && !now.Before(c.owed.Add(l.readTimeout)):
		c.gone = true
		return false, os.ErrDeadlineExceeded
	case !c.leaving: // one of ours, too late
		c.owed = time.Time{}
		c.rearmLocked()
		return true, nil
	case !l.parked && !l.stopping: // another made the room
		c.leaving = false
		c.rearmLocked()
		c.place = l.idle.PushFront(c)
		return true, nil
	case !c.looked:
		c.looked = true
		c.Conn.SetReadDeadline(c.lookUntil(now))
		return true, nil
	}
	c.gone = true
	if !l.stopping {
		l.metrics.reclaimed.Add(1)
	}
	return false, os.ErrDeadlineExceeded
}

// lookUntil is the end of the last look at a connection that is asked to go: after lastLook, or later where nothing was
// heard yet or HTTP/2 was heard of just now.
func (c *limitedConn) lookUntil(now time.Time) time.Time {
	look := now.Add(lastLook)
	switch {
	case !c.begun:
		return later(look, c.heard.Add(arrivalTime))
	case c.h2:
		return later(look, c.heard.Add(quietHTTP2))
	}
	return look
}

// SetReadDeadline leaves the connection's last look, and its end, alone; the server's deadline is put back if it stays.
func (c *limitedConn) SetReadDeadline(t time.Time) error {
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.deadline = t
	if c.leaving || c.gone {
		return nil
	}
	return c.rearmLocked()
}

func (c *limitedConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.Conn.SetWriteDeadline(t))
}

// A budget is the room that bodies have in memory, in bytes. Bodies wait for it in the order they came, so that a large
// one is not passed over for ever by small ones; but first come those that have begun, as they hold room themselves. Room
// is given step by step, and only where enough stays for all that have begun to be read to their ends, one after the
// other (the banker's algorithm): bodies that fill the budget together take turns and never wait for each other. Safe
// for concurrent use.
//
// Room is a number and the buffers are memory: used buffers that are kept, and those that wait for the collector, are
// outside of size.
type budget struct {
	size    int64
	metrics *metrics

	mu      sync.Mutex
	free    int64           // size less what all shares hold; never below 0
	growing map[*share]bool // those that have begun and may need more
	waiting list.List       // of *claim: those that have begun, then the others in the order they came

	kept      [256][][]byte // used buffers, by class
	keptBytes int64         // their capacities; at most maxKept
	litter    int64         // bytes of buffers let go, and perhaps not yet found by the collector
	sweep     sync.Mutex    // one collection at a time
}

// newBudget has room for size bytes. No share may have a limit above size: it would never get there.
func newBudget(size int64, m *metrics) *budget {
	return &budget{size: size, metrics: m, free: size, growing: map[*share]bool{}}
}

// A share is what one body has of a budget. The budget alone changes held; the body's goroutine may read it except
// while take runs.
type share struct {
	held  int64 // bytes
	limit int64 // the most it may come to need; set before the first take
}

// need is how many bytes more it may ask for.
func (s *share) need() int64 { return s.limit - s.held }

// A claim is a share that waits for more.
type claim struct {
	*share
	bytes   int64         // beyond what it holds
	granted chan struct{} // closed under budget.mu
	since   time.Time
}

// fairWait is how long bodies that begin may pass over one that has begun and only lacks room.
const fairWait = roomWait / 5

// take reserves n bytes more for s, waiting for them until patience or ctx ends; false if they did not come free, and s
// holds what it held. n may be 0, for a body without bytes: that never waits. Call give once for what s holds in the
// end, and before that whole.
func (b *budget) take(ctx context.Context, s *share, n int64, patience time.Duration) bool {
	b.mu.Lock()
	if (n == 0 || s.held > 0 || !b.queueLocked()) && b.grantLocked(s, n) {
		b.mu.Unlock()
		return true
	}
	c := &claim{s, n, make(chan struct{}), time.Now()}
	place := b.waiting.PushBack(c)
	if s.held > 0 {
		b.waiting.MoveToFront(place)
	}
	b.mu.Unlock()
	over := time.NewTimer(patience)
	defer over.Stop()
	select {
	case <-c.granted:
		return true
	case <-over.C:
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-c.granted:
		return true // just now
	default:
		b.waiting.Remove(place)
		if s.held == 0 {
			b.serveLocked() // a smaller claim may have stood behind this one
		}
		return false
	}
}

// grantLocked gives n bytes to s, if they are there and can be spared. Bytes that make s whole can always be spared:
// such a body waits for no other, and gives back all it holds.
func (b *budget) grantLocked(s *share, n int64) bool {
	if n > b.free {
		return false
	}
	b.free -= n
	s.held += n
	if s.held < s.limit && n > 0 {
		b.growing[s] = true
		if !b.safeLocked() {
			b.free += n
			if s.held -= n; s.held == 0 {
				delete(b.growing, s)
			}
			return false
		}
	} else {
		delete(b.growing, s)
	}
	b.metrics.inflightBytes.Add(n)
	return true
}

// safeLocked tells whether all that are growing can get what they may still need, if each gives back what it has when
// it is done. Those that need nothing more will be done in any case, so that their room counts as spare. Whoever needs
// least goes first: if that one cannot be served, none can.
func (b *budget) safeLocked() bool {
	spare, most := b.size, int64(0)
	for s := range b.growing {
		spare, most = spare-s.held, max(most, s.need())
	}
	if most <= spare {
		return true
	}
	for _, s := range slices.SortedFunc(maps.Keys(b.growing), func(s, t *share) int { return cmp.Compare(s.need(), t.need()) }) {
		if s.need() > spare {
			return false
		}
		spare += s.held
	}
	return true
}

// whole says that s needs no more, for it is read or given up: nothing has to be set aside for it. It may be called for
// a share that never took anything.
func (b *budget) whole(s *share) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.growing[s] {
		delete(b.growing, s)
		b.serveLocked()
	}
}

// give returns n bytes: all that a share holds. The share is not used again.
func (b *budget) give(n int64) {
	b.metrics.inflightBytes.Add(-n)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	b.serveLocked()
}

// serveLocked gives room to those that wait: to those that have begun, who needs least first, then to the others in
// their order. Of either kind the first that finds no room ends it. Of those that have begun no other need be tried: if
// all of them wait, the one that needs least can be spared what it asks for; and to try each of thousands at each change
// would leave time for nothing else.
func (b *budget) serveLocked() {
	for {
		least, fresh := b.nextLocked()
		if least != nil && b.serveOneLocked(least) {
			continue
		}
		if fresh == nil || b.starvesLocked(least) || !b.serveOneLocked(fresh) {
			return
		}
	}
}

// nextLocked are who is next of those that wait: of those that have begun and of those that have not; nil if there are
// none.
func (b *budget) nextLocked() (least, fresh *list.Element) {
	fresh = b.waiting.Front()
	for ; fresh != nil && fresh.Value.(*claim).held > 0; fresh = fresh.Next() {
		if least == nil || fresh.Value.(*claim).need() < least.Value.(*claim).need() {
			least = fresh
		}
	}
	return least, fresh
}

// queueLocked tells whether one that begins has others before it.
func (b *budget) queueLocked() bool {
	least, fresh := b.nextLocked()
	return fresh != nil || b.starvesLocked(least)
}

// starvesLocked tells whether a body that has begun has waited for too long for bytes that others are given meanwhile.
// One that must not have them, for the sake of those that have begun like it, would gain nothing if nobody else were
// served.
func (b *budget) starvesLocked(least *list.Element) bool {
	if least == nil {
		return false
	}
	c := least.Value.(*claim)
	return c.bytes > b.free && time.Since(c.since) >= fairWait
}

// serveOneLocked gives one that waits what it asks for, if that can be spared.
func (b *budget) serveOneLocked(e *list.Element) bool {
	c := e.Value.(*claim)
	if !b.grantLocked(c.share, c.bytes) {
		return false
	}
	b.waiting.Remove(e)
	close(c.granted)
	return true
}

// Bodies between these sizes, in bytes, are read into used buffers: allocating and clearing new ones, and the garbage
// they become, would cost more than all else that is done with such a body. Smaller ones are cheap, larger ones rare.
const (
	smallestReused = 4 << 10
	largestReused  = 1 << 20
)

// maxKept is how many bytes of used buffers are kept at most: those of a hundred bodies of the common 64 KiB.
const maxKept = 8 << 20

// bufferClass is the index and the capacity of the buffers for n bytes, of which a sixteenth at most is not used: there
// are sixteen capacities to each power of two. From smallestReused to largestReused the classes are 144 to 272, modulo
// 256: no two capacities share one. n must be in that range.
func bufferClass(n int64) (class int, capacity int64) {
	shift := bits.Len64(uint64(n-1)) - 5
	parts := (n-1)>>shift + 1 // 17 to 32
	return (16*shift + int(parts)) % 256, parts << shift
}

// buffer returns an empty slice with a capacity of at least n, for n bytes that were taken. Behind its end there may be
// another body's bytes, so that it must only be extended over what was written. When buffers in use and those let go
// together exceed the budget, it collects garbage first: left to itself the collector comes too late when many large
// bodies replace each other at once.
func (b *budget) buffer(n int64) []byte {
	capacity := n
	if n >= smallestReused && n <= largestReused {
		var class int
		class, capacity = bufferClass(n)
		if used := b.reuse(class); used != nil {
			return used
		}
	}
	b.sweep.Lock()
	defer b.sweep.Unlock()
	b.mu.Lock()
	crowded := b.litter > b.free+maxLitter
	if crowded {
		b.litter = 0
	}
	b.mu.Unlock()
	if crowded {
		runtime.GC()
	}
	return make([]byte, 0, capacity)
}

// reuse returns a kept buffer of that class, or nil.
func (b *budget) reuse(class int) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := len(b.kept[class]) - 1
	if last < 0 {
		return nil
	}
	used := b.kept[class][last]
	b.kept[class] = slices.Delete(b.kept[class], last, last+1)
	b.keptBytes -= int64(cap(used))
	return used
}

// discard takes back what buffer returned, or nil. Nobody may read or write it any more. A body's is called before
// give, so that whoever gets the room finds the buffer.
func (b *budget) discard(used []byte) {
	size := int64(cap(used))
	b.mu.Lock()
	defer b.mu.Unlock()
	if size < smallestReused || size > largestReused || b.keptBytes+size > maxKept {
		b.litter += size
		return
	}
	class, _ := bufferClass(size)
	b.kept[class] = append(b.kept[class], used[:0])
	b.keptBytes += size
}

// A route is what one of the two ways in does with a request's head: an exchange that reads its body and answers it.
// The exchange is there even when the fault is, to answer with. The body is not read.
type route func(*http.Request) (exchange, *fault)

// An exchange is one request from its head to its answer, in the client's own protocol. It is used by one goroutine.
type exchange interface {
	// payload makes of the whole body what goes upstream: its bytes are not copied, hence the caller's to take back
	// once nobody uses the payload. header is the gate's allow-list of the request's headers, and the payload's from
	// then on; its values are shared with the request's. The fault is one of the client's.
	payload(header http.Header, body []byte) (*payload, *fault)
	// accept and refuse write the answer and return what to count it as: an HTTP status or "grpc-N". One of them is
	// called, once. What they cannot write is lost: the client has gone.
	accept(http.ResponseWriter, reply) string
	refuse(http.ResponseWriter, *fault) string
	// timeout is the client's own deadline, counted from the request's head and above 0; false if it set none.
	timeout() (time.Duration, bool)
}

// A gate is the handler of the data port. It turns away what it must, reads bodies within the limits, hands each to the
// fan-out and sees to the answer. Its fields are constant once it serves.
type gate struct {
	maxBody         int64         // bytes, a gRPC envelope included
	deliveryTimeout time.Duration // from the moment a body is whole
	readTimeout     time.Duration // 0 = none
	writeTimeout    time.Duration // 0 = none
	forward         []string      // canonical names of the headers that go upstream
	via             string        // this relay's own pseudonym in Via (RFC 9110, section 7.6.3)
	ingest, push    route
	room            *budget
	conns           *connLimiter
	fan             *fanout
	metrics         *metrics
	log             *slog.Logger
	panics          throttle                    // of the log of panics
	ready           func() bool                 // false once the relay was told to stop
	origins         *http.CrossOriginProtection // its zero-value policy: browsers may not post across origins
}

// newVia makes a pseudonym that no other relay has, this one after a restart included: it has 80 random bits.
func newVia() string {
	return "pyroscope-relay-" + strings.ToLower(rand.Text()[:16])
}

// forwarded are the headers that go upstream by default. Never among them: Authorization, Cookie, Forwarded,
// X-Forwarded-*, and what belongs to one hop (RFC 9110, section 7.6.1). The slice is the caller's.
func forwarded() []string {
	return []string{
		"Content-Type", "Content-Encoding", "User-Agent", "Accept", "X-Scope-Orgid", "Traceparent", "Tracestate",
		"Uber-Trace-Id", "Connect-Protocol-Version", "Connect-Timeout-Ms",
	}
}

// ServeHTTP compares paths by itself: an http.ServeMux would redirect //ingest, which is to be served, and
// /x/../ingest, which is none of ours.
func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.metrics.inflightRequests.Add(1)
	defer g.metrics.inflightRequests.Add(-1)
	defer g.confess(r)
	switch slashes(r.URL.Path) {
	case ingestPath, "/pyroscope" + ingestPath:
		g.serve(w, r, routeIngest, g.ingest)
	case pushPath:
		g.serve(w, r, routePush, g.push)
	case "/ready":
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			g.plain(w, r, routeReady, http.StatusMethodNotAllowed, "use GET", "Allow", "GET, HEAD")
			return
		}
		start := time.Now()
		g.part(w, r, false)
		g.answered(r, routeReady, strconv.Itoa(writeReady(w, g.ready())), start, nil)
	default:
		g.plain(w, r, routeOther, http.StatusNotFound, "not served here: profiles go to POST "+ingestPath+" or POST "+pushPath)
	}
}

// confess logs a panic of the handler, for which it is deferred, and ends the request: the server would do the latter
// alone, as its own log is for debugging.
func (g *gate) confess(r *http.Request) {
	if v := recover(); v != nil {
		g.panics.log(g.log, slog.LevelError, "panic while serving a request", "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
		panic(http.ErrAbortHandler)
	}
}

// part asks the client, with the answer that is about to be written, to go elsewhere when the relay is to stop, and an
// HTTP/1 client also when it should make room. Of HTTP/1.0 each connection has one request: net/http does not see that
// there may be chunks, whose bytes would be taken for the next ones (RFC 9112, section 6.1). On HTTP/2 this sends GOAWAY: the client may go on with what it began, and
// begins nothing more.
func (g *gate) part(w http.ResponseWriter, r *http.Request, room bool) {
	if !g.ready() || !r.ProtoAtLeast(1, 1) || room && r.ProtoMajor == 1 && g.conns.wantsRoom() {
		w.Header().Set("Connection", "close")
	}
}

// answered counts a request by route and code, and logs it for debugging. f is what the client was refused for, if it
// was.
func (g *gate) answered(r *http.Request, id routeID, code string, start time.Time, f *fault) {
	g.metrics.request(id, code)
	if g.log.Enabled(r.Context(), slog.LevelDebug) {
		g.log.Debug("request", "route", id, "code", code, "client", r.RemoteAddr, "took", time.Since(start), "error", f)
	}
}

// slashes makes runs of slashes one: clients whose base URL ends in a slash send them. Nothing else of a path is
// cleaned.
func slashes(path string) string {
	for strings.Contains(path, "//") {
		path = strings.ReplaceAll(path, "//", "/")
	}
	return path
}

// plain answers, and counts, what no protocol of ours has been recognised in; header is a list of names and values.
func (g *gate) plain(w http.ResponseWriter, r *http.Request, id routeID, status int, text string, header ...string) {
	start := time.Now()
	for i := 0; i+1 < len(header); i += 2 {
		w.Header().Set(header[i], header[i+1])
	}
	g.part(w, r, false)
	writeText(w, status, text+"\n")
	g.linger(w, r)
	g.answered(r, id, strconv.Itoa(status), start, nil)
}

// serve takes one profile from its head to its answer, and counts it by route and code, once.
func (g *gate) serve(w http.ResponseWriter, r *http.Request, id routeID, rt route) {
	start := time.Now()
	if r.Method != http.MethodPost {
		g.plain(w, r, id, http.StatusMethodNotAllowed, "use POST", "Allow", http.MethodPost)
		return
	}
	if err := g.origins.Check(r); err != nil {
		g.metrics.rejected[rejectCrossOrigin].Add(1)
		g.plain(w, r, id, http.StatusForbidden, "cross-origin requests from browsers are refused")
		return
	}
	if !r.ProtoAtLeast(1, 1) && r.Header["Content-Length"] == nil {
		g.plain(w, r, id, http.StatusLengthRequired, "a body needs a Content-Length in this version of HTTP")
		return
	}
	x, f := rt(r)
	var re reply
	if f == nil {
		re, f = g.relay(w, r, id, x, start)
	}
	g.part(w, r, f == nil || f.reason == "") // one that was refused may linger: another is to make room
	var code string
	if f == nil {
		code = x.accept(w, re)
	} else {
		code = x.refuse(w, f)
		if f.reason != "" {
			g.metrics.rejected[f.reason].Add(1)
		}
		if f.reason != rejectBodyRead { // of such a body no more is to be had
			g.linger(w, r)
		}
	}
	g.answered(r, id, code, start, f)
}

// linger reads what is left of a body whose answer was written early, and forgets it. A client that sends everything
// before it reads would otherwise find its connection reset instead of the answer (RFC 9112, section 9.6). HTTP/2 needs
// no such thing, and a client that waits for 100 Continue is not going to send.
func (g *gate) linger(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 || r.ContentLength == 0 || r.Header["Expect"] != nil {
		return
	}
	patience := lingerTime
	if g.readTimeout > 0 {
		patience = min(patience, g.readTimeout)
	}
	// Flush sends the answer, though net/http may read on before it does: up to 256 KiB, in the request's own time.
	c := http.NewResponseController(w)
	if c.Flush() == nil && c.SetReadDeadline(time.Now().Add(patience)) == nil {
		io.Copy(io.Discard, r.Body)
	}
}

// relay reads the body, sends it to all upstreams and returns what the client is to be told. start is the moment of the
// request's head. The time of delivery is counted from the end of the body, but never beyond the moment at which to
// answer or the client's own deadline. Mirrors may use the body after it returned: its buffer and its room come back by
// p.free.
func (g *gate) relay(w http.ResponseWriter, r *http.Request, id routeID, x exchange, start time.Time) (reply, *fault) {
	header, f := g.admit(r)
	if f != nil {
		return reply{}, f
	}
	last := start.Add(1<<63 - 1) // when to begin to answer
	if g.writeTimeout > 0 {
		last = start.Add(answerBy(g.writeTimeout))
	}
	timeout, timed := x.timeout()
	expires := last
	if timed {
		expires = earlier(last, start.Add(timeout))
	}
	body, held, f := g.read(w, r, id, last, min(roomWait, time.Until(expires)))
	if f != nil {
		return reply{}, f
	}
	p, f := x.payload(header, body)
	if f != nil {
		g.room.discard(body)
		g.room.give(held)
		return reply{}, f
	}
	p.free = func() { // of the whole body, whatever part of it the payload is
		g.room.discard(body)
		g.room.give(held)
	}
	p.hold()
	defer p.release()
	p.timed, p.expires = timed, earlier(expires, time.Now().Add(g.deliveryTimeout))
	p.hasty = timed && timeout < min(haste, g.deliveryTimeout)
	return g.fan.send(r.Context(), p)
}

// earlier is the first of two moments, later the other.
func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// admit checks what a request says of itself besides its protocol, and picks the headers that go upstream. They are a
// new map, which shares its values with r. What Connection nominates is for this hop and does not go. To nominate the
// tenant is refused: without it the profile would pass for somebody else's.
func (g *gate) admit(r *http.Request) (http.Header, *fault) {
	for _, v := range r.Header["Via"] {
		if strings.Contains(v, g.via) {
			return nil, &fault{status: http.StatusLoopDetected, code: codeFailedPrecondition, reason: rejectLoop,
				public: "this request has passed through this relay before: an upstream leads back to it"}
		}
	}
	if strings.Contains(r.URL.RawQuery, " ") { // HTTP/2 would bring it, and upstream it would end the URL
		return nil, badRequest(rejectProtocol, "there is a space in the query: write %20")
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
	header := make(http.Header)
	for _, name := range g.forward {
		if v := r.Header[name]; v != nil && (len(nominated) == 0 || !slices.Contains(nominated, name)) {
			header[name] = v
		}
	}
	if f := checkTenant(header); f != nil {
		return nil, f
	}
	received := strings.TrimPrefix(r.Proto, "HTTP/")
	if r.ProtoMajor > 1 {
		received = strconv.Itoa(r.ProtoMajor)
	}
	header["Via"] = append(slices.Clip(r.Header["Via"]), received+" "+g.via)
	return header, nil
}

// checkTenant leaves one X-Scope-OrgID in header, or none, and refuses what no tenant can be. Of two that differ, which
// one counts would be each upstream's own choice.
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

// read returns the whole body in one slice, and how many bytes of the budget it holds, which the caller gives back. It
// waits for room as long as patience lasts, all waits together, and for the client until last or -server-read-timeout.
// On a fault nothing stays taken. Its bytes are counted in either case.
func (g *gate) read(w http.ResponseWriter, r *http.Request, id routeID, last time.Time, patience time.Duration) (body []byte, held int64, f *fault) {
	if r.ContentLength > g.maxBody {
		return nil, 0, g.tooLarge()
	}
	if r.ContentLength != 0 && g.writeTimeout > 0 && (g.readTimeout == 0 || g.readTimeout > answerBy(g.writeTimeout)) {
		http.NewResponseController(w).SetReadDeadline(last) // or nobody could be told that it was too slow
	}
	b := bodyBuffer{share: share{limit: r.ContentLength}, first: firstStep, second: declaredStep}
	if b.limit < 0 { // of unknown length: any, up to the largest
		b.limit, b.second = g.maxBody, firstStep
	} else if r.ProtoMajor == 1 {
		b.first = declaredStep
	}
	defer func() { g.metrics.requestBytes[id].Add(int64(len(b.bytes))) }()
	err := g.fill(r, &b, patience)
	g.room.whole(&b.share)
	if err == nil {
		return b.bytes, b.held, nil
	}
	g.room.discard(b.bytes)
	g.room.give(b.held)
	if f, ok := errors.AsType[*fault](err); ok {
		return nil, 0, f
	}
	return nil, 0, bodyFault(err)
}

// A bodyBuffer is a body that is being read. len(bytes) <= held <= cap(bytes), but for a moment in grow: only room that
// was granted is written to.
type bodyBuffer struct {
	share
	bytes         []byte
	first, second int64 // steps towards the limit
}

// fill reads a body to its end. The error is a *fault, or what ended the body too early.
func (g *gate) fill(r *http.Request, b *bodyBuffer, patience time.Duration) error {
	patience, err := g.grow(r, b, patience)
	delete(r.Header, "Expect") // the first Read invites the body: who sends it may linger
	var next [1]byte           // shows whether a full buffer holds it all
	for err == nil {
		var n int
		if int64(len(b.bytes)) < b.held {
			n, err = r.Body.Read(b.bytes[len(b.bytes):b.held])
			b.bytes = b.bytes[:len(b.bytes)+n]
			continue
		}
		if n, err = r.Body.Read(next[:]); n > 0 {
			var noRoom error
			if patience, noRoom = g.grow(r, b, patience); noRoom != nil {
				return noRoom
			}
			b.bytes = append(b.bytes, next[0])
		}
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// grow makes room in b for more, and returns what is left of patience, which is spent on room alone, not on a slow
// client. The error is a *fault; b is as it was then.
func (g *gate) grow(r *http.Request, b *bodyBuffer, patience time.Duration) (time.Duration, error) {
	if b.held > 0 && b.held == b.limit {
		return 0, g.tooLarge()
	}
	size, asked := b.first, time.Now()
	if b.held > 0 {
		size = max(b.second, 2*b.held)
	}
	size = min(size, b.limit)
	if !g.room.take(r.Context(), &b.share, size-b.held, patience) {
		return 0, &fault{status: http.StatusServiceUnavailable, code: codeUnavailable, retryAfter: "1", transient: true,
			reason: rejectInflight, public: "the relay holds as many profiles as it may (-max-inflight-bytes): try again"}
	}
	used := b.bytes
	b.bytes = append(g.room.buffer(size), used...)
	g.room.discard(used)
	return patience - time.Since(asked), nil
}

func (g *gate) tooLarge() *fault {
	return &fault{status: http.StatusRequestEntityTooLarge, code: codeInvalidArgument, reason: rejectBodySize,
		public: fmt.Sprintf("the body is larger than %d bytes, the most this relay takes (-max-body-size)", g.maxBody)}
}

// bodyFault is the answer to a body that could not be read to its end: 408 if its time ran out, else 400.
func bodyFault(err error) *fault {
	f := badRequest(rejectBodyRead, "the body ended before it was whole")
	f.cause = err
	if errors.Is(err, os.ErrDeadlineExceeded) {
		f.status, f.code, f.transient = http.StatusRequestTimeout, codeDeadlineExceeded, true
		f.public = "the body did not arrive in time (-server-read-timeout)"
	}
	return f
}
