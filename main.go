// Pyroscope-relay accepts profiles the way a Pyroscope server does and copies each body, byte for byte, to every
// configured upstream.
//
//	clients (SDKs, Alloy, profilecli, eBPF agents)
//	    -> TCP listener -> connection limit -> TLS -> HTTP/1.1, HTTP/2, h2c
//	    -> /ingest or push.v1 -> one immutable payload -> fan-out -> upstream 1..N
//
// A client is told "success" only when every required upstream has accepted its profile or, with a spool, this host's
// disk keeps the profile for those that have not.
//
// Read the files in the order of a byte's path: main.go (flags, wiring, lifecycle), limiter.go (every way to say no),
// ingest.go and push.go (the two ways in), fanout.go (the way out), spool.go (profiles that wait on disk), metrics.go.
// Nothing calls back up that list.
package main

import (
	"context"
	"encoding/csv"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// maxHeader bounds the head of a client's request, in bytes; above it the answer is 431. On HTTP/1 net/http lets
// another 4 KiB pass. The longest real one, a Go SDK with 30 labels, is under 8 KiB.
const maxHeader = 32 << 10

// maxStreams is how many requests one HTTP/2 connection may have open (RFC 9113, section 6.5.2, which advises 100 at
// least). It is Go's own default, written down because the steps of a body's buffer are chosen for it: see firstStep.
const maxStreams = 250

// What HTTP/2 clients may send before it is read, in bytes, for one request and for all of a connection: this much is
// outside the budget of -max-inflight-bytes. Until a client has read the settings it may send 65,535 bytes in any case
// (RFC 9113, section 6.9.2); with a little more, a profile of 64 KiB need not wait for the window to open again. A
// connection's is larger, or a few requests that wait for room would block all others.
const (
	http2Window     = firstStep
	http2ConnWindow = 512 << 10
)

// http2Frame is the largest HTTP/2 frame, in bytes: the least that RFC 9113, section 4.2, allows, as every connection
// keeps a buffer of that size.
const http2Frame = 16 << 10

// What the memory limit of the Go runtime allows for besides bodies, in bytes: a base, in which a thousand connections
// are included, and each connection beyond those. Under a limit below what is in use the collector would never rest.
const (
	baseMemory = 32 << 20
	connMemory = 32 << 10
)

// adminTimeout bounds every step of a request to the admin port, and all of -healthcheck. Prometheus gives a scrape the
// same 10 s unless it is told otherwise.
const adminTimeout = 10 * time.Second

// Exit codes. A wrong configuration has one of its own because starting again does not mend it: the systemd unit
// restarts after every other failure.
const exitOK, exitFailed, exitUsage = 0, 1, 2

func main() { os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) }

// run is the program: it returns the exit code. It ends by itself, at SIGTERM or SIGINT, or when ctx is cancelled,
// which means the same. stdout gets what was asked for (-h, -version, -check, -healthcheck), stderr the faults and the
// log. -h and -version are answered whatever else is wrong. A run that serves changes the whole process: the limits of
// its garbage collector, and its environment.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c, err := parseConfig(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.printUsage(stdout)
		return exitOK
	case c.version:
		b := readBuild()
		fmt.Fprintf(stdout, "pyroscope-relay %s %s commit %s\n", b.version, b.goVersion, b.revision)
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "%v\nrun pyroscope-relay -h for the flags\n", err)
		return exitUsage
	case c.check:
		fmt.Fprintln(stdout, "ok")
		return exitOK
	case c.healthcheck:
		return healthcheck(ctx, c.adminAddress, stdout, stderr)
	}
	r := newRelay(c, newLogger(stderr, c))
	if err := r.openSpools(); err != nil {
		r.log.Error("cannot open the spool", "error", fmt.Errorf("-spool-dir: %w", err))
		return exitFailed
	}
	if err := r.listen(ctx); err != nil {
		r.log.Error("cannot listen", "error", err)
		return exitFailed
	}
	return r.serve(ctx)
}

// byteSize is a flag value: a number of bytes, with an optional unit. A flag's is from 0 to 1<<62, which leaves room in
// an int64 for what is added to it.
type byteSize int64

const (
	kib byteSize = 1 << 10
	mib byteSize = 1 << 20
	gib byteSize = 1 << 30
)

// String gives the number in the first of byteUnits that divides it, and Set reads it back.
func (b *byteSize) String() string {
	for _, u := range byteUnits() {
		if *b >= u.bytes && *b%u.bytes == 0 {
			return strconv.FormatInt(int64(*b/u.bytes), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(*b), 10)
}

// Set reads a whole number with one of byteUnits or none. Nothing may stand between the two, and units regard case.
func (b *byteSize) Set(s string) error {
	unit := byteSize(1)
	for _, u := range byteUnits() {
		if number, ok := strings.CutSuffix(s, u.name); ok {
			s, unit = number, u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > int64(1<<62/unit) {
		return errors.New("want a number of bytes, or one with KiB, MiB, GiB, KB, MB or GB")
	}
	*b = byteSize(n) * unit
	return nil
}

// A byteUnit is what may follow a number: KiB is 1024 bytes, KB is 1000.
type byteUnit struct {
	name  string
	bytes byteSize
}

// byteUnits lists the powers of two first: defaults are whole numbers of these, and are shown so.
func byteUnits() []byteUnit {
	return []byteUnit{{"GiB", gib}, {"MiB", mib}, {"KiB", kib}, {"GB", 1e9}, {"MB", 1e6}, {"KB", 1e3}}
}

// count is a flag value: a whole number from 0.
type count int

func (n *count) String() string { return strconv.Itoa(int(*n)) }

func (n *count) Set(s string) error {
	v, err := strconv.Atoi(s)
	if err != nil || v < 0 {
		return errors.New("want a whole number from 0")
	}
	*n = count(v)
	return nil
}

// period is a flag value: a duration that is not negative.
type period time.Duration

func (d *period) String() string { return time.Duration(*d).String() }

func (d *period) Set(s string) error {
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return errors.New("want a time from 0, such as 500ms, 30s or 5m")
	}
	*d = period(v)
	return nil
}

// lines is a flag that may be given several times; in the environment it holds one value a line.
type lines []string

// String is empty whatever l holds, so that -h shows no default.
func (l *lines) String() string { return "" }

func (l *lines) Set(s string) error {
	*l = append(*l, s)
	return nil
}

// config is the command line: first as given, then, below the blank line, as validate made sense of it. It is fit for
// use once parseConfig has returned it without an error; from then on its fields are read only.
type config struct {
	listenAddress, adminAddress, logLevel, logFormat string
	listenPort, connLimit                            int           // 0 = any free port, no limit
	readTimeout, writeTimeout, idleTimeout           time.Duration // 0 = none; an idleTimeout of 0 is the readTimeout
	deliveryTimeout, shutdownDelay, shutdownTimeout  time.Duration // first and last above 0, the first below a writeTimeout
	maxBody, maxInflight                             byteSize      // 0 < maxBody <= maxInflight
	retry                                            retryPolicy   // of upstreams that do not say otherwise
	upstream, forwardHeader                          lines
	tls                                              *serverTLS
	spoolDir, spoolFull                              string   // spoolDir "" = off
	spoolMax                                         byteSize // for each upstream
	check, healthcheck, version                      bool

	flags     *flag.FlagSet
	variables map[string]string // by flag: the variable that gave it
	upstreams []upstreamConfig
	forward   []string // canonical header names, the defaults included; no two alike
	level     slog.Level
	sources   []*source // of certificates and credentials
}

// An option is one flag, or a heading of -h where value is nil.
type option struct {
	value       any // a pointer that holds the default, of a type that parseConfig has a case for
	name, usage string
}

// defaults is the configuration before any flag is read. What Alloy has too, in pyroscope.receive_http and
// pyroscope.write, has Alloy's value. Most agents give up after 10 s: a delivery ends before that, and long before a
// drain does. There is room for four of the largest bodies. The admin port is on loopback, since nothing is asked of
// those who reach it.
func defaults() *config {
	return &config{
		adminAddress: "127.0.0.1:8081", logLevel: "info", logFormat: "logfmt",
		listenPort: 8080, connLimit: 16384,
		readTimeout: 30 * time.Second, writeTimeout: 30 * time.Second, idleTimeout: 120 * time.Second,
		deliveryTimeout: 9 * time.Second, shutdownTimeout: 30 * time.Second,
		maxBody: 64 * mib, maxInflight: 256 * mib, tls: newServerTLS(),
		spoolMax: gib, spoolFull: spoolReject,
		retry: retryPolicy{
			timeout: 10 * time.Second, minBackoff: 500 * time.Millisecond, maxBackoff: 5 * time.Minute, retries: 10, on429: true,
		},
	}
}

// options lists the flags in the order of -h. Their values point into c.
func (c *config) options() []option {
	return []option{
		{nil, "Listening", ""},
		{&c.listenAddress, "listen-address", "address to listen on; empty = all"},
		{&c.listenPort, "listen-port", "port to listen on; 0 picks one, see addr= in the log"},
		{&c.connLimit, "conn-limit", "most simultaneous client connections; 0 = no limit"},
		{&c.readTimeout, "server-read-timeout", "time for a whole request, headers and body"},
		{&c.writeTimeout, "server-write-timeout", "time from the end of the headers to the end of the answer"},
		{&c.idleTimeout, "server-idle-timeout", "time an idle keep-alive connection is kept"},
		{&c.maxBody, "max-body-size", "largest request body, in bytes or with KiB, MiB, GiB, KB, MB, GB"},
		{&c.maxInflight, "max-inflight-bytes", "most body bytes held in memory at once, all requests together"},
		{nil, "TLS", ""},
		{&c.tls.cert.file, "tls-cert-file", "file of the server's certificate, in PEM; without one clients talk plain HTTP"},
		{&c.tls.cert.text, "tls-cert-pem", "the certificate itself"},
		{&c.tls.key.file, "tls-key-file", "file of its key, in PEM"},
		{&c.tls.key.text, "tls-key-pem", "the key itself; for the environment: every user of the host can see a command line"},
		{&c.tls.ca.file, "tls-client-ca-file", "file of the CAs that client certificates are verified against, in PEM"},
		{&c.tls.ca.text, "tls-client-ca-pem", "these CAs themselves"},
		{&c.tls.authType, "tls-client-auth-type", "NoClientCert, RequestClientCert, RequireAnyClientCert, VerifyClientCertIfGiven or RequireAndVerifyClientCert"},
		{&c.tls.version, "tls-min-version", "TLS12 or TLS13"},
		{nil, "Upstreams", ""},
		{&c.upstream, "upstream", "URL[,option=value]...: where profiles go; repeat for more, options below"},
		{&c.deliveryTimeout, "delivery-timeout", "time for all attempts for one profile together"},
		{&c.retry.timeout, "remote-timeout", "time for one attempt at one upstream"},
		{&c.retry.minBackoff, "min-backoff-period", "first wait between attempts; doubles, with jitter"},
		{&c.retry.maxBackoff, "max-backoff-period", "longest wait between attempts"},
		{&c.retry.retries, "max-backoff-retries", "retries after the first attempt; 0 = as many as -delivery-timeout allows"},
		{&c.retry.on429, "retry-on-http-429", "retry when an upstream answers 429"},
		{&c.retry.on422, "retry-on-http-422", "retry a 422 from /ingest, twice at most"},
		{&c.forwardHeader, "forward-header", "name of one more request header to send upstream; repeat for more"},
		{nil, "Spool", ""},
		{&c.spoolDir, "spool-dir", "directory for profiles that an upstream cannot take now; empty = off"},
		{&c.spoolMax, "spool-max-bytes", "most bytes kept there for one upstream"},
		{&c.spoolFull, "spool-full", "what then: reject (new profiles get 503) or drop-oldest"},
		{nil, "Running", ""},
		{&c.adminAddress, "admin-address", "where /metrics, /debug/vars and /ready are served; empty = off"},
		{&c.shutdownDelay, "shutdown-delay", "time between /ready turning 503 and the listener closing"},
		{&c.shutdownTimeout, "shutdown-timeout", "time for requests in flight to finish after that"},
		{&c.logLevel, "log-level", "debug, info, warn or error"},
		{&c.logFormat, "log-format", "logfmt or json, to standard error"},
		{&c.check, "check", "validate the configuration, print ok, exit 0 or 2"},
		{&c.healthcheck, "healthcheck", "ask the running relay's /ready on -admin-address, exit 0 or 1; needs no -upstream"},
		{&c.version, "version", "print version, Go version and commit, then exit"},
	}
}

// parseConfig reads the command line and the environment, and the files that they name. The error has one line for each
// fault, or is [flag.ErrHelp]; the config is there in any case, to print the usage of or to see whether -version was
// given.
func parseConfig(args []string) (*config, error) {
	c := defaults()
	c.flags = flag.NewFlagSet("pyroscope-relay", flag.ContinueOnError)
	c.flags.SetOutput(io.Discard)
	c.flags.Usage = func() {} // or flag would print it at every fault
	// Var takes what a value says of itself as the flag's default: here, before any is set, so that -h shows no secret.
	for _, o := range c.options() {
		switch v := o.value.(type) {
		case *string:
			c.flags.StringVar(v, o.name, *v, o.usage)
		case *int:
			c.flags.Var((*count)(v), o.name, o.usage)
		case *bool:
			c.flags.BoolVar(v, o.name, *v, o.usage)
		case *time.Duration:
			c.flags.Var((*period)(v), o.name, o.usage)
		case flag.Value:
			c.flags.Var(v, o.name, o.usage)
		}
	}
	err := c.readArgs(args)
	if errors.Is(err, flag.ErrHelp) {
		return c, err
	}
	// In this order: what was given as an argument is not looked up, and both are there when they are validated.
	return c, c.blame(errors.Join(err, c.readEnvironment(), c.validate()))
}

// readArgs parses all of args, going on after each fault so that all of them are reported. [flag.ErrHelp] comes back as
// it is, whatever else is wrong.
func (c *config) readArgs(args []string) error {
	var faults []error
	for {
		err := c.flags.Parse(args)
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		rest := c.flags.Args()
		if err == nil && len(rest) == 0 {
			return errors.Join(faults...)
		}
		if err == nil {
			err = fmt.Errorf("%q is not a flag, nor the value of one", rest[0])
			rest = rest[1:]
		} else if len(rest) == len(args) {
			rest = rest[1:] // a flag that cannot even be taken apart stays in place
			if n := len(faults); n > 0 && faults[n-1].Error() == err.Error() {
				err = nil // it was reported after the flags before it
			}
		}
		faults, args = append(faults, err), rest
	}
}

// readEnvironment sets the flags that were not given from their variables. One that is set but empty is an empty value,
// not a missing one. The faults do not repeat values, which may be secret.
func (c *config) readEnvironment() error {
	c.variables = map[string]string{}
	given := map[string]bool{}
	c.flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var faults []error
	c.flags.VisitAll(func(f *flag.Flag) {
		name := variable(f.Name)
		value, ok := os.LookupEnv(name)
		if !ok || given[f.Name] {
			return
		}
		c.variables[f.Name] = name
		values := []string{value}
		if _, several := f.Value.(*lines); several {
			values = nil
			for line := range strings.Lines(value) {
				if line = strings.TrimSpace(line); line != "" {
					values = append(values, line)
				}
			}
		}
		for _, v := range values {
			if err := c.flags.Set(f.Name, v); err != nil {
				faults = append(faults, fmt.Errorf("-%s: %w", f.Name, err))
			}
		}
	})
	return errors.Join(faults...)
}

// blame adds to each line of err the variables that gave the flags it names: who has only set variables would look for
// the flag in vain.
func (c *config) blame(err error) error {
	if err == nil {
		return nil
	}
	faults := strings.Split(err.Error(), "\n")
	for i, fault := range faults {
		for word := range strings.FieldsFuncSeq(fault, func(r rune) bool { return strings.ContainsRune(" :,()", r) }) {
			if name, ok := c.variables[strings.TrimPrefix(word, "-")]; ok && word[0] == '-' {
				faults[i] += " (from " + name + ")"
			}
		}
	}
	return errors.New(strings.Join(faults, "\n"))
}

// variable is the environment variable of a flag.
func variable(name string) string {
	return "PYROSCOPE_RELAY_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// validate checks the flags one by one and against each other, and parses those that have a structure of their own. It
// reads the files that they name, opens no socket and writes nothing. Nothing is checked for -version, and only the
// addresses for -healthcheck: a file that is just being replaced says nothing of the relay that runs.
func (c *config) validate() error {
	switch {
	case c.version:
		return nil
	case c.healthcheck && c.adminAddress == "":
		return errors.New("-healthcheck asks -admin-address, which is empty")
	case c.healthcheck:
		return c.validateListening()
	}
	// The spool comes last: its folders are called after the upstreams.
	return errors.Join(c.validateListening(), c.validateDurations(), c.validateSizes(), validateRetry("-", &c.retry),
		c.validateLogging(), c.openTLS(), c.parseUpstreams(), c.parseForwardHeaders(), c.validateSpool())
}

// validateListening checks the form of addresses. Whether there are such addresses and whether they are free shows when
// they are opened.
func (c *config) validateListening() error {
	var faults []error
	if _, err := netip.ParseAddr(c.listenAddress); err != nil && strings.ContainsAny(c.listenAddress, ":[]/ ") {
		faults = append(faults, fmt.Errorf("-listen-address %q must be a host or an IP address, without a port", c.listenAddress))
	}
	if c.listenPort > maxPort {
		faults = append(faults, fmt.Errorf("-listen-port %d is not a port", c.listenPort))
	}
	if _, port, err := net.SplitHostPort(c.adminAddress); c.adminAddress != "" && (err != nil || !validPort(port)) {
		faults = append(faults, fmt.Errorf("-admin-address %q must be host:port, or empty", c.adminAddress))
	}
	return errors.Join(faults...)
}

const maxPort = 1<<16 - 1

// validPort reports whether s is the number of a port. 0 is one: the system picks it.
func validPort(s string) bool {
	n, err := strconv.Atoi(s)
	return err == nil && n >= 0 && n <= maxPort
}

func (c *config) validateDurations() error {
	var faults []error
	if c.deliveryTimeout == 0 {
		faults = append(faults, errors.New("-delivery-timeout must be above 0"))
	}
	if c.shutdownTimeout == 0 {
		faults = append(faults, errors.New("-shutdown-timeout must be above 0"))
	}
	if c.writeTimeout > 0 && c.deliveryTimeout >= c.writeTimeout {
		faults = append(faults, fmt.Errorf("-delivery-timeout (%v) must be below -server-write-timeout (%v), or clients would be cut off before they are answered", c.deliveryTimeout, c.writeTimeout))
	}
	return errors.Join(faults...)
}

func (c *config) validateSizes() error {
	switch {
	case c.maxBody == 0 && c.maxInflight == 0:
		return errors.New("-max-body-size and -max-inflight-bytes must be above 0")
	case c.maxBody == 0:
		return errors.New("-max-body-size must be above 0")
	case c.maxBody > c.maxInflight:
		return fmt.Errorf("-max-body-size (%s) must not be above -max-inflight-bytes (%s): such a body would never find room", &c.maxBody, &c.maxInflight)
	}
	return nil
}

// openTLS reads the server's certificate, key and client CAs, and takes note of what is to be followed.
func (c *config) openTLS() (err error) {
	c.sources, err = c.tls.open()
	return err
}

// validateRetry checks what -flags and upstream options share; prefix stands before their names in faults.
func validateRetry(prefix string, r *retryPolicy) error {
	var faults []error
	if r.timeout == 0 {
		faults = append(faults, errors.New(prefix+"remote-timeout must be above 0"))
	}
	if r.minBackoff == 0 {
		faults = append(faults, errors.New(prefix+"min-backoff-period must be above 0"))
	}
	if r.maxBackoff < r.minBackoff {
		faults = append(faults, fmt.Errorf("%[1]smax-backoff-period (%v) must not be below %[1]smin-backoff-period (%v)", prefix, r.maxBackoff, r.minBackoff))
	}
	return errors.Join(faults...)
}

func (c *config) validateLogging() error {
	var faults []error
	// slog reads "info+2" too, a level between two names, which nothing here logs at.
	if err := c.level.UnmarshalText([]byte(c.logLevel)); err != nil || strings.ContainsAny(c.logLevel, "+-") {
		faults = append(faults, fmt.Errorf("-log-level %q is not one of debug, info, warn, error", c.logLevel))
	}
	if c.logFormat != "logfmt" && c.logFormat != "json" {
		faults = append(faults, fmt.Errorf("-log-format %q is not one of logfmt, json", c.logFormat))
	}
	return errors.Join(faults...)
}

// Values of -spool-full.
const (
	spoolReject     = "reject"
	spoolDropOldest = "drop-oldest"
)

// validateSpool checks what can be known before the spool is opened, and leaves no trace on the disk. A directory that
// is not there is no fault: opening creates it.
func (c *config) validateSpool() error {
	var faults []error
	if c.spoolMax == 0 {
		faults = append(faults, errors.New("-spool-max-bytes must be above 0"))
	}
	if c.spoolFull != spoolReject && c.spoolFull != spoolDropOldest {
		faults = append(faults, fmt.Errorf("-spool-full %q is not one of %s, %s", c.spoolFull, spoolReject, spoolDropOldest))
	}
	if c.spoolDir == "" {
		return errors.Join(faults...)
	}
	if info, err := os.Stat(c.spoolDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		faults = append(faults, fmt.Errorf("-spool-dir: %w", err))
	} else if err == nil && !info.IsDir() {
		faults = append(faults, fmt.Errorf("-spool-dir: %s is not a directory", c.spoolDir))
	}
	for i, u := range c.upstreams {
		if u.required && u.url != nil && len(folderName(u.label())) > maxFolder {
			faults = append(faults, fmt.Errorf("-upstream number %d: too long a label for a directory in -spool-dir: give it a short name=", i+1))
		}
	}
	return errors.Join(faults...)
}

// parseForwardHeaders makes the allow-list of request headers: the defaults, then those of -forward-header.
func (c *config) parseForwardHeaders() error {
	var faults []error
	c.forward = forwarded()
	for _, name := range c.forwardHeader {
		if err := checkHeaderName(name); err != nil {
			faults = append(faults, fmt.Errorf("-forward-header: %w", err))
		} else if strings.EqualFold(name, "Host") || strings.Contains(name, "*") {
			faults = append(faults, fmt.Errorf("-forward-header: %s is not the whole name of a header that can be forwarded", name))
		} else if name = http.CanonicalHeaderKey(name); !slices.Contains(c.forward, name) {
			c.forward = append(c.forward, name)
		}
	}
	return errors.Join(faults...)
}

// checkHeaderName refuses what is no header name and the names that belong to one hop (RFC 9110, section 7.6.1) or that
// the relay sets itself: framing, and the coding of answers, are settled anew with each upstream. Host is not among
// them: an upstream's header may set it.
func checkHeaderName(name string) error {
	if !isHeaderName(name) {
		return fmt.Errorf("%q is not a header name", name)
	}
	switch http.CanonicalHeaderKey(name) {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer",
		"Transfer-Encoding", "Upgrade", "Content-Length", "Expect", "Via", "Accept-Encoding":
		return fmt.Errorf("%s is the relay's own on each connection and cannot be set", name)
	}
	return nil
}

// isHeaderName reports whether name is a token: RFC 9110, section 5.6.2.
func isHeaderName(name string) bool {
	const others = "!#$%&'*+-.^_`|~"
	for _, r := range name {
		if !('0' <= r && r <= '9' || 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z' || strings.ContainsRune(others, r)) {
			return false
		}
	}
	return name != ""
}

// upstreamConfig is one -upstream. The name is empty if none was given.
type upstreamConfig struct {
	name     string      // printable, at most maxWords bytes
	url      *url.URL    // nil: log; no slash at the end of its path
	required bool        // false: a mirror
	header   http.Header // set on every request, over a forwarded one
	retry    retryPolicy // the flags', where no option says otherwise
	link     *link       // never nil; opened unless url is nil
	sources  []*source   // of link
}

// open checks the options on how the upstream is reached and reads the files they name.
func (u *upstreamConfig) open() (err error) {
	if u.url != nil {
		u.sources, err = u.link.open(u.url, u.header, u.label())
	}
	return err
}

// label is the upstream's name in metrics and logs, and of its folder in the spool. Clients do not hear it where it is
// the URL: see upstream.public.
func (u *upstreamConfig) label() string {
	switch {
	case u.name != "":
		return u.name
	case u.url == nil:
		return logUpstream
	}
	return u.url.String()
}

// logUpstream is the URL of the built-in upstream.
const logUpstream = "log:"

// parseUpstreams reads every -upstream and the files they name. Faults call each by its number: its text may hold a
// secret. Labels differ, as metrics and the folders of the spool are told apart by them.
func (c *config) parseUpstreams() error {
	if len(c.upstream) == 0 {
		return errors.New("-upstream is missing: say where profiles go, or -upstream log: to see them logged")
	}
	var faults []error
	seen := map[string]int{}
	for i, spec := range c.upstream {
		u, err := parseUpstream(spec, c.retry)
		if first := seen[u.label()]; err == nil && first > 0 {
			err = fmt.Errorf("another upstream, number %d, is called the same: give each a name=", first)
		}
		if err != nil {
			faults = append(faults, prefixed(fmt.Sprintf("-upstream number %d: ", i+1), err)...)
			continue
		}
		seen[u.label()] = i + 1
		c.upstreams, c.sources = append(c.upstreams, u), append(c.sources, u.sources...)
	}
	return errors.Join(faults...)
}

// prefixed puts prefix before each of the errors that were joined to err: each is a line of the report, and must say
// for itself where it belongs.
func prefixed(prefix string, err error) (faults []error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			faults = append(faults, prefixed(prefix, e)...)
		}
		return faults
	}
	return []error{fmt.Errorf("%s%w", prefix, err)}
}

// parseUpstream reads one -upstream: a CSV record of a URL and options. Faults never repeat the URL or a value, where
// there may be a secret. All are reported, as errors joined, those of the files that options name among them. retry is
// the flags' policy, for options to change.
func parseUpstream(spec string, retry retryPolicy) (upstreamConfig, error) {
	u := upstreamConfig{required: true, header: http.Header{}, retry: retry, link: newLink()}
	r := csv.NewReader(strings.NewReader(spec))
	fields, err := r.Read()
	if err != nil {
		return u, errors.New("not one CSV record: URL[,option=value]..., an option with a comma or a quote in it quoted as a whole")
	}
	if _, err := r.Read(); err != io.EOF {
		return u, errors.New("more than one line")
	}
	faults := []error{u.parseURL(fields[0])}
	given := map[string]bool{}
	for i, field := range fields[1:] {
		name, value, ok := strings.Cut(field, "=")
		err := u.set(name, value)
		switch {
		case !ok:
			err = fmt.Errorf("option number %d has no =value; one with a comma in it is quoted as in CSV", i+1)
		case errors.Is(err, errNoOption):
			err = fmt.Errorf("option number %d: %w", i+1, err)
		case given[name] && name != "header":
			err = fmt.Errorf("option %s is given twice", name)
		case err == nil && u.url == nil && faults[0] == nil && name != "name" && name != "required":
			err = fmt.Errorf("option %s means nothing to log:", name)
		}
		faults, given[name] = append(faults, err), true
	}
	if faults[0] == nil {
		faults = append(faults, u.open())
	}
	if u.retry != retry { // or what is wrong with the flags would be told again for each upstream
		faults = append(faults, validateRetry("", &u.retry))
	}
	return u, errors.Join(faults...)
}

// errNoOption is all that is said of an unknown option: its name may be a piece of a secret with a comma in it.
var errNoOption = errors.New("there is no option of that name")

// parseURL reads the URL, and leaves u.url nil for log:. Slashes at its end are dropped, as the routes' paths, which
// begin with one, are put after it.
func (u *upstreamConfig) parseURL(s string) error {
	if s == logUpstream {
		return nil
	}
	p, err := url.Parse(s)
	if err != nil {
		return errors.New("the URL cannot be read")
	}
	u.url = p
	switch {
	case p.Scheme != "http" && p.Scheme != "https":
		return errors.New("the URL must begin with http:// or https://, or be log:")
	case p.Hostname() == "":
		return errors.New("the URL names no host")
	case p.Port() != "" && !validPort(p.Port()):
		return errors.New("the URL's port is not a port")
	case p.User != nil:
		return errors.New("the URL must not hold a user or password; use basic-auth-username and basic-auth-password-file")
	case p.RawQuery != "" || p.ForceQuery:
		return errors.New("the URL must not have a query")
	case p.Fragment != "" || strings.Contains(s, "#"):
		return errors.New("the URL must not have a fragment")
	}
	p.RawPath = strings.TrimRight(p.EscapedPath(), "/") // of the slashes as written: %2F is a part of a name
	p.Path, err = url.PathUnescape(p.RawPath)
	return err
}

// set gives one option its value. The error is errNoOption, or says what is wrong without the value.
func (u *upstreamConfig) set(name, value string) (err error) {
	if ok, err := u.link.set(name, value); ok && err != nil {
		return fmt.Errorf("option %s has a value that cannot be used: %w", name, err)
	} else if ok {
		return nil
	}
	switch name {
	case "name":
		u.name = value
		if value == "" || oneLine(value) != value {
			return errors.New("option name must be printable, without spaces around it, and at most 1 KiB")
		}
		return nil
	case "header":
		return u.addHeader(value)
	case "required":
		u.required, err = strconv.ParseBool(value)
	case "remote-timeout":
		err = (*period)(&u.retry.timeout).Set(value)
	case "min-backoff-period":
		err = (*period)(&u.retry.minBackoff).Set(value)
	case "max-backoff-period":
		err = (*period)(&u.retry.maxBackoff).Set(value)
	case "max-backoff-retries":
		err = (*count)(&u.retry.retries).Set(value)
	case "retry-on-http-429":
		u.retry.on429, err = strconv.ParseBool(value)
	case "retry-on-http-422":
		u.retry.on422, err = strconv.ParseBool(value)
	default:
		return errNoOption
	}
	if err != nil {
		return fmt.Errorf("option %s has a value that cannot be read", name) // nor shown
	}
	return nil
}

// addHeader reads "Name: value". Control characters but the tab are refused (RFC 9110, section 5.5): a line break in a
// value would begin another header.
func (u *upstreamConfig) addHeader(line string) error {
	name, value, ok := strings.Cut(line, ":")
	value = strings.TrimSpace(value)
	switch {
	case !ok || !isHeaderName(name):
		return errors.New("option header must be Name: value")
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		return errors.New("option header: its value has a control character")
	}
	if err := checkHeaderName(name); err != nil {
		return fmt.Errorf("option header: %w", err)
	}
	u.header.Add(name, value)
	return nil
}

// printUsage writes what -h shows. Defaults are the program's own, never values from the environment.
func (c *config) printUsage(w io.Writer) {
	fmt.Fprint(w, "pyroscope-relay accepts profiles like a Pyroscope server and copies each, byte for byte, to every upstream.\n\n"+
		"  pyroscope-relay -upstream https://a.example -upstream 'http://b.example:4040,name=b,required=false'\n\n"+
		"Each flag can also be given in the environment: -listen-port as PYROSCOPE_RELAY_LISTEN_PORT and so on; a flag\n"+
		"on the command line wins. PYROSCOPE_RELAY_UPSTREAM and PYROSCOPE_RELAY_FORWARD_HEADER hold one value a line.\n")
	for _, o := range c.options() {
		if o.value == nil {
			fmt.Fprintf(w, "\n%s\n", o.name)
			continue
		}
		usage := o.usage
		if d := c.flags.Lookup(o.name).DefValue; d != "" && d != "false" {
			usage += " (default " + d + ")"
		}
		fmt.Fprintf(w, "  -%-22s %s\n", o.name, usage)
	}
	fmt.Fprint(w, "\nOptions of -upstream, after the URL, separated by commas; one with a comma in it is quoted as in CSV\n"+
		"  name                    label in metrics and logs (default the URL)\n"+
		"  required                false: a mirror, whose failures and slowness never reach a client (default true)\n"+
		"  header                  'Name: value' set on every request; repeat for more\n"+
		"  basic-auth-username, basic-auth-password-file, bearer-token-file\n"+
		"                          credentials; the files are read again when they change\n"+
		"  tls-ca-file, tls-cert-file, tls-key-file, tls-server-name, tls-min-version, tls-insecure-skip-verify\n"+
		"                          for https: CAs (default the system's), client certificate and key, the name in the\n"+
		"                          server's certificate, TLS12 (default) or TLS13, true to verify nothing\n"+
		"  proxy-url               http, https or socks5 proxy; those in the environment are not used\n"+
		"  remote-timeout, min-backoff-period, max-backoff-period, max-backoff-retries, retry-on-http-429,\n"+
		"  retry-on-http-422       as the flags, for this upstream alone\n"+
		"The URL log: stands for a built-in upstream that logs a line for each profile.\n")
}

// newLogger logs to w, each line in one Write, one at a time.
func newLogger(w io.Writer, c *config) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.level, ReplaceAttr: printable}
	if c.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// printable makes durations, addresses and the like read the same in JSON as in logfmt.
func printable(_ []string, a slog.Attr) slog.Attr {
	if v, ok := a.Value.Any().(fmt.Stringer); ok && a.Value.Kind() != slog.KindTime {
		a.Value = slog.StringValue(v.String())
	}
	return a
}

// A relay is the running program. Its steps are newRelay, openSpools, listen and serve, once each, in this order.
type relay struct {
	config      *config
	log         *slog.Logger
	metrics     *metrics
	fan         *fanout
	conns       *connLimiter // nil until listen
	data, admin *http.Server // nil until listen
	adminSocket net.Listener // nil: off
	draining    atomic.Bool  // never reset
}

// newRelay puts the parts together. It opens nothing and starts nothing.
func newRelay(c *config, log *slog.Logger) *relay {
	r := &relay{config: c, log: log, metrics: newMetrics()}
	r.fan = newFanout(c, r.metrics, log)
	if c.tls.enabled() {
		r.metrics.certificate(c.tls.expiry)
	}
	warnExposed(c.sources, log)
	return r
}

// openSpools opens -spool-dir, if there is one, and the spool of each required upstream in it. The directory is held
// until the process ends.
func (r *relay) openSpools() error {
	if r.config.spoolDir == "" {
		return nil
	}
	dir, err := openSpoolDir(r.config.spoolDir)
	if err != nil {
		return err
	}
	// drain calls it while there is still time to put what is under way into the spool.
	hurry, cancel := context.WithCancel(context.Background())
	r.fan.hurry = cancel
	var names []string
	for _, u := range r.fan.required {
		if u.url == nil {
			continue // it takes everything
		}
		if u.spool, err = dir.open(u.name, int64(r.config.spoolMax), r.config.spoolFull == spoolDropOldest, u.metrics, r.log); err != nil {
			return err
		}
		u.hurry, u.metrics.spool = hurry, r.metrics.spool(u.name, u.spool.status)
		names = append(names, u.name)
	}
	strangers, err := dir.strangers(names)
	if len(strangers) > 0 {
		r.log.Warn("spool: these belong to no required upstream and are left alone", "upstreams", strings.Join(strangers, " "))
	}
	for _, name := range r.config.forwardHeader {
		if secret(name) {
			r.log.Warn("a forwarded header may be a credential: profiles from the spool go upstream without it", "header", name)
		}
	}
	return err
}

// newFanout makes the upstreams of c, whose links belong to it from then on. Mirrors may hold a quarter of the memory
// for bodies, so that the slowest of them leaves the other three to the clients that wait.
func newFanout(c *config, m *metrics, log *slog.Logger) *fanout {
	f := &fanout{mirrorRoom: int64(c.maxInflight / 4), crew: crew{work: make(chan func())}}
	for i, uc := range c.upstreams {
		u := &upstream{name: uc.label(), public: uc.name, required: uc.required, url: uc.url, retry: uc.retry, link: uc.link, log: log}
		if u.public == "" {
			u.public = fmt.Sprintf("upstream-%d", i+1)
		}
		u.metrics = m.endpoint(u.name)
		u.client.Store(newTransport(&u.retry, u.link))
		u.link.changed = u.redial // without a lock: nothing follows the files before serve
		if u.link.proxy == nil {
			u.direct = newDirect(u.url)
		}
		if u.link.skipVerify {
			log.Warn("tls-insecure-skip-verify: anybody on the way can pose as this upstream", "upstream", u.name)
		}
		if u.required {
			f.required = append(f.required, u)
		} else {
			f.mirrors = append(f.mirrors, u)
		}
	}
	if len(f.required) == 0 {
		log.Warn("no upstream is required: clients are told success whatever becomes of their profiles")
	}
	return f
}

// listen opens both ports, save those that the service manager has opened already, and makes their servers. It sets the
// runtime's memory limit and the pace of its garbage collector, unless GOMEMLIMIT or GOGC is set. The error names the
// flags, or LISTEN_FDS.
func (r *relay) listen(ctx context.Context) error {
	c := r.config
	data, admin, err := passedSockets()
	if err != nil {
		return fmt.Errorf("LISTEN_FDS: %w", err)
	}
	var lc net.ListenConfig
	if data == nil {
		if data, err = lc.Listen(ctx, "tcp", net.JoinHostPort(c.listenAddress, strconv.Itoa(c.listenPort))); err != nil {
			return fmt.Errorf("-listen-address, -listen-port: %w", err)
		}
	}
	if admin == nil && c.adminAddress != "" {
		if admin, err = lc.Listen(ctx, "tcp", c.adminAddress); err != nil {
			data.Close()
			return fmt.Errorf("-admin-address: %w", err)
		}
	}
	r.adminSocket = admin
	r.conns = limitListener(data, c.connLimit, r.metrics, r.log)
	r.conns.readTimeout = c.readTimeout
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(c.memoryLimit(connStep))
		r.conns.grown = func(most int) { debug.SetMemoryLimit(c.memoryLimit(most)) }
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	r.data, r.admin = r.dataServer(), r.adminServer()
	return nil
}

// passedSockets returns the listening sockets that this process was started with (sd_listen_fds(3)): the one that
// LISTEN_FDNAMES calls "admin", and the other one; nil for what was not passed. Variables whose LISTEN_PID is another
// process's are not meant for this one; without LISTEN_PID they are. It takes the variables out of the environment.
// After an error some sockets may stay open.
func passedSockets() (data, admin net.Listener, err error) {
	const first = 3 // descriptors 0 to 2 are the standard streams
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	if count == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return nil, nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > 2 {
		return nil, nil, fmt.Errorf("%q sockets were passed: the relay takes one, and one named admin", count)
	}
	for i := range n {
		l, err := passedSocket(first + i)
		named := i < len(names) && names[i] == "admin"
		switch {
		case err != nil:
			return nil, nil, err
		case named && admin == nil:
			admin = l
		case !named && data == nil:
			data = l
		default:
			return nil, nil, errors.New("two sockets for one port: name the one for -admin-address admin (FileDescriptorName=)")
		}
	}
	return data, admin, nil
}

// passedSocket makes a listener of a descriptor, and closes the descriptor even when it is none.
func passedSocket(fd int) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), "passed socket")
	defer f.Close() // the listener has a descriptor of its own
	return net.FileListener(f)
}

// gcPercent makes collections rarer than Go's 100 does, in place of which the memory limit bounds the heap: most of what
// a request leaves behind is small, and the live heap as well.
const gcPercent = 200

// memoryLimit is the soft memory limit of the Go runtime (GOMEMLIMIT), in bytes, for that many connections, connStep at
// least.
func (c *config) memoryLimit(connections int) int64 {
	return int64(c.maxInflight) + baseMemory + int64(connections-connStep)*connMemory
}

// dataServer is the HTTP server that clients talk to. What net/http has to say of them goes to the log at debug level:
// any client can make it say something.
func (r *relay) dataServer() *http.Server {
	c := r.config
	protocols := new(http.Protocols) // all of them: what is not in the set is not served
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	readTimeout := c.readTimeout
	if readTimeout <= c.writeTimeout {
		readTimeout = min(readTimeout, answerBy(c.writeTimeout)) // once for all, or each request would have to see to it
	}
	return &http.Server{
		Handler: &gate{
			maxBody: int64(c.maxBody), deliveryTimeout: c.deliveryTimeout, readTimeout: readTimeout, writeTimeout: c.writeTimeout,
			forward: c.forward, via: newVia(), ingest: beginIngest, push: beginPush,
			room: newBudget(int64(c.maxInflight), r.metrics), conns: r.conns, fan: r.fan,
			metrics: r.metrics, log: r.log, ready: r.ready, origins: http.NewCrossOriginProtection(),
		},
		ReadTimeout: readTimeout, WriteTimeout: c.writeTimeout, IdleTimeout: c.idleTimeout, MaxHeaderBytes: maxHeader,
		Protocols: protocols,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxStreams, MaxReadFrameSize: http2Frame,
			MaxReceiveBufferPerConnection: http2ConnWindow, MaxReceiveBufferPerStream: http2Window,
		},
		ConnState: countHandshakes(r.metrics.handshakeErrors, r.conns.state), ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
		DisableGeneralOptionsHandler: true, // OPTIONS * is answered 404 as all else that is not served
	}
}

// adminServer is the HTTP server of the admin port: plain HTTP/1, and outside the connection limit, so that metrics can
// be read when the data port is full.
func (r *relay) adminServer() *http.Server {
	return &http.Server{
		Handler:     r.metrics.adminHandler(r.ready),
		ReadTimeout: adminTimeout, WriteTimeout: adminTimeout, IdleTimeout: adminTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
	}
}

// ready is what /ready says: true until drain. Safe for concurrent use.
func (r *relay) ready() bool { return !r.draining.Load() }

// serve runs until it is told to stop or cannot go on, and returns the exit code. The admin port answers to the end of
// a drain.
func (r *relay) serve(ctx context.Context) int {
	signal.Ignore(syscall.SIGPIPE)     // or the relay would die of a log that nobody reads any more
	signals := make(chan os.Signal, 2) // one to stop, one to stop at once: signal.Notify drops what finds no room
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	following, unfollow := context.WithCancel(ctx)
	defer unfollow()
	go follow(following, r.config.sources, hangups, r.log)
	failed := make(chan error, 2) // both servers may end, and after the select nobody asks
	if r.adminSocket != nil {
		r.log.Info("admin listening", "addr", r.adminSocket.Addr())
		go func() { failed <- r.admin.Serve(r.adminSocket) }()
	}
	defer r.admin.Close()
	r.fan.startSpools() // before the first request: one that fails needs the spool's recipient
	go func() { failed <- r.serveData() }()
	r.log.Info("listening", "addr", r.conns.Addr())
	m := r.manager()
	m.notify("READY=1")
	alive, end := context.WithCancel(context.WithoutCancel(ctx)) // a drain may take longer than the watchdog's patience
	defer end()
	go r.watchdog(alive)
	select {
	case err := <-failed:
		r.log.Error("cannot go on", "error", err)
		return exitFailed
	case s := <-signals:
		r.log.Info("stopping", "signal", s)
	case <-ctx.Done():
		r.log.Info("stopping")
	}
	m.notify("STOPPING=1")
	if err := r.drain(ctx, signals); err != nil {
		r.log.Error("stopped before everything was delivered", "requests", r.metrics.inflightRequests.Value(),
			"undelivered", strings.Join(r.fan.abandon(), ", "), "error", err)
		return exitFailed
	}
	r.log.Info("stopped")
	return exitOK
}

// serveData serves clients until the server is shut down, over TLS if there is a certificate. The error is never nil.
func (r *relay) serveData() error {
	if r.config.tls.enabled() {
		r.data.TLSConfig = r.config.tls.config()
		return r.data.ServeTLS(r.conns, "", "") // files named here would be read once, and used for ever
	}
	return r.data.Serve(r.conns)
}

// drain stops taking requests and waits for those in flight, until -shutdown-timeout or another signal. Its deadline is
// its own: ctx may have ended already. /ready says no from its first moment on, while the listener stays open for
// -shutdown-delay: load balancers need that time to notice. The error says what cut it short; then requests may be
// left.
func (r *relay) drain(ctx context.Context, signals <-chan os.Signal) error {
	r.draining.Store(true)
	patient, lose := context.WithCancelCause(context.WithoutCancel(ctx))
	defer lose(nil)
	go func() {
		select {
		case s := <-signals:
			lose(fmt.Errorf("told again: %v", s))
		case <-patient.Done():
		}
	}()
	if !sleep(patient, r.config.shutdownDelay) {
		return context.Cause(patient)
	}
	timed, stop := context.WithTimeoutCause(patient, r.config.shutdownTimeout, errors.New("-shutdown-timeout is over"))
	defer stop()
	if r.fan.hurry != nil { // time for the spool, and as much for Shutdown, which looks only so often
		defer time.AfterFunc(attemptBefore(attemptBefore(r.config.shutdownTimeout)), r.fan.hurry).Stop()
	}
	// In this order: connections bring requests, and requests start deliveries; fan.wait wants no send under way.
	// Shutdown comes last: from its first moment on, the server drops requests that it has only just read.
	r.conns.Close()
	if !r.conns.wait(timed) || !r.answered(timed) || !r.fan.wait(timed) || r.data.Shutdown(timed) != nil {
		return context.Cause(timed)
	}
	return nil
}

// answered returns once no request is being served, or with false when ctx ends first. On HTTP/2 requests outlive their
// connection.
func (r *relay) answered(ctx context.Context) bool {
	for r.metrics.inflightRequests.Value() > 0 {
		if !sleep(ctx, lastLook) {
			return false
		}
	}
	return true
}

// A manager is the service manager that started the relay (sd_notify(3)), if there is one. Not safe for concurrent use.
type manager struct {
	socket string   // "": there is none; one that begins with @ is abstract, which package net knows
	conn   net.Conn // kept: a process that is out of descriptors is not to be taken for dead
	log    *slog.Logger
}

func (r *relay) manager() *manager { return &manager{socket: os.Getenv("NOTIFY_SOCKET"), log: r.log} }

// notify tells what the relay is about. A failure is logged and changes nothing.
func (m *manager) notify(state string) {
	if m.socket == "" {
		return
	}
	var err error
	if m.conn != nil {
		if _, err = io.WriteString(m.conn, state); err == nil {
			return
		}
		m.conn.Close()
	}
	if m.conn, err = net.Dial("unixgram", m.socket); err == nil {
		_, err = io.WriteString(m.conn, state)
	}
	if err != nil {
		m.log.Warn("cannot notify the service manager", "state", state, "error", err)
	}
}

// watchdog tells the service manager that the process lives, until ctx ends, if it asked for that
// (sd_watchdog_enabled(3)): twice in each WATCHDOG_USEC microseconds, as advised there.
func (r *relay) watchdog(ctx context.Context) {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	pid := os.Getenv("WATCHDOG_PID")
	if err != nil || usec <= 0 || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return
	}
	m := r.manager()
	for sleep(ctx, time.Duration(usec)*time.Microsecond/2) {
		m.notify("WATCHDOG=1")
	}
}

// healthcheck asks the relay whose admin port has that address whether it is ready, and returns the exit code: exitOK,
// or exitFailed with the reason on stderr. An address that stands for all is asked on loopback.
func healthcheck(ctx context.Context, address string, stdout, stderr io.Writer) int {
	host, port, _ := net.SplitHostPort(address) // validated
	switch host {
	case "", "0.0.0.0":
		host = "127.0.0.1" // not localhost: an image without a shell has no /etc/hosts either
	case "::":
		host = "::1"
	}
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/ready", nil)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return exitFailed
	}
	resp, err := new(http.Transport).RoundTrip(r) // the default one would ask a proxy from the environment
	if err != nil {
		fmt.Fprintln(stderr, err)
		return exitFailed
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		fmt.Fprintln(stderr, "not ready:", resp.Status)
		return exitFailed
	}
	fmt.Fprintln(stdout, "ready")
	return exitOK
}
