// Pyroscope-relay accepts profiles the way a Pyroscope server does and copies each body, byte for byte, to every
// configured upstream.
//
//	clients (SDKs, Alloy, profilecli, eBPF agents)
//	    -> TCP listener -> connection limit -> TLS -> HTTP/1.1, HTTP/2, h2c
//	    -> /ingest or push.v1 -> one immutable payload -> fan-out -> upstream 1..N
//
// A client is told "success" only when every required upstream has accepted its profile.
//
// Read the files in the order of a byte's path: main.go (flags, wiring, lifecycle), limiter.go (every way to say no),
// ingest.go and push.go (the two ways in), fanout.go (the way out), metrics.go. Nothing calls back up that list.
package main

import (
	"context"
	"encoding/csv"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// maxHeader bounds the head of a client's request, in bytes; above it the answer is 431. The longest real one, a Go SDK
// with 30 labels, is under 8 KiB.
const maxHeader = 32 << 10

// maxStreams is how many requests one HTTP/2 connection may have open.
const maxStreams = 250

// http2Window is how much of its bodies an HTTP/2 connection may send before they are read, in bytes: this much per
// connection is outside the budget of -max-inflight-bytes.
const http2Window = 64 << 10

// adminTimeout bounds every step of a request to the admin port.
const adminTimeout = 10 * time.Second

const exitOK, exitFailed, exitUsage = 0, 1, 2

func main() { os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) }

// run is the program: it returns the exit code. It ends by itself, at SIGTERM or SIGINT, or when ctx is cancelled, which
// means the same.
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
	}
	r := newRelay(c, newLogger(stderr, c))
	if err := r.listen(ctx); err != nil {
		r.log.Error("cannot listen", "error", err)
		return exitFailed
	}
	return r.serve(ctx)
}

// byteSize is a flag value: a number of bytes, with an optional unit.
type byteSize int64

const (
	kib byteSize = 1 << 10
	mib byteSize = 1 << 20
	gib byteSize = 1 << 30
)

func (b *byteSize) String() string {
	for _, u := range byteUnits() {
		if *b >= u.bytes && *b%u.bytes == 0 {
			return strconv.FormatInt(int64(*b/u.bytes), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(*b), 10)
}

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

type byteUnit struct {
	name  string
	bytes byteSize
}

func byteUnits() []byteUnit {
	return []byteUnit{{"GiB", gib}, {"MiB", mib}, {"KiB", kib}, {"GB", 1e9}, {"MB", 1e6}, {"KB", 1e3}}
}

// lines is a flag that may be given several times; in the environment it holds one value a line.
type lines []string

func (l *lines) String() string { return "" }

func (l *lines) Set(s string) error {
	*l = append(*l, s)
	return nil
}

// config is the command line: first as given, then, below the blank line, as validate made sense of it.
type config struct {
	listenAddress, adminAddress, logLevel, logFormat string
	listenPort, connLimit                            int
	readTimeout, writeTimeout, idleTimeout           time.Duration
	deliveryTimeout, shutdownDelay, shutdownTimeout  time.Duration
	maxBody, maxInflight                             byteSize
	retry                                            retryPolicy // of upstreams that do not say otherwise
	upstream, forwardHeader                          lines
	check, version                                   bool

	flags     *flag.FlagSet
	upstreams []upstreamConfig
	forward   []string // canonical header names
	level     slog.Level
}

// An option is one flag, or a heading of -h where value is nil.
type option struct {
	value       any // a pointer that holds the default
	name, usage string
}

// defaults is the configuration before any flag is read.
func defaults() *config {
	return &config{
		adminAddress: "127.0.0.1:8081", logLevel: "info", logFormat: "logfmt",
		listenPort: 8080, connLimit: 16384,
		readTimeout: 30 * time.Second, writeTimeout: 30 * time.Second, idleTimeout: 120 * time.Second,
		deliveryTimeout: 9 * time.Second, shutdownTimeout: 30 * time.Second,
		maxBody: 64 * mib, maxInflight: 256 * mib,
		retry: retryPolicy{
			timeout: 10 * time.Second, minBackoff: 500 * time.Millisecond, maxBackoff: 5 * time.Minute, retries: 10, on429: true,
		},
	}
}

// options lists the flags in the order of -h.
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
		{nil, "Running", ""},
		{&c.adminAddress, "admin-address", "where /metrics, /debug/vars and /ready are served; empty = off"},
		{&c.shutdownDelay, "shutdown-delay", "time between /ready turning 503 and the listener closing"},
		{&c.shutdownTimeout, "shutdown-timeout", "time for requests in flight to finish after that"},
		{&c.logLevel, "log-level", "debug, info, warn or error"},
		{&c.logFormat, "log-format", "logfmt or json, to standard error"},
		{&c.check, "check", "validate the configuration, print ok, exit 0 or 2"},
		{&c.version, "version", "print version, Go version and commit, then exit"},
	}
}

// parseConfig reads the command line and the environment. The error has one line for each fault; the config is there
// in any case.
func parseConfig(args []string) (*config, error) {
	c := defaults()
	c.flags = flag.NewFlagSet("pyroscope-relay", flag.ContinueOnError)
	c.flags.SetOutput(io.Discard)
	c.flags.Usage = func() {}
	for _, o := range c.options() {
		switch v := o.value.(type) {
		case *string:
			c.flags.StringVar(v, o.name, *v, o.usage)
		case *int:
			c.flags.IntVar(v, o.name, *v, o.usage)
		case *bool:
			c.flags.BoolVar(v, o.name, *v, o.usage)
		case *time.Duration:
			c.flags.DurationVar(v, o.name, *v, o.usage)
		case flag.Value:
			c.flags.Var(v, o.name, o.usage)
		}
	}
	err := c.readArgs(args)
	if errors.Is(err, flag.ErrHelp) {
		return c, err
	}
	return c, errors.Join(err, c.readEnvironment(), c.validate())
}

// readArgs parses all of args, going on after each fault so that all of them are reported.
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
			err = fmt.Errorf("%q is not a flag: values follow their flag, as in -listen-port 8080", rest[0])
			rest = rest[1:]
		} else if len(rest) == len(args) {
			rest = rest[1:] // a flag that cannot even be taken apart stays in place
		}
		faults, args = append(faults, err), rest
	}
}

// readEnvironment sets the flags that were not given from their variables.
func (c *config) readEnvironment() error {
	given := map[string]bool{}
	c.flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var faults []error
	c.flags.VisitAll(func(f *flag.Flag) {
		name := variable(f.Name)
		value, ok := os.LookupEnv(name)
		if !ok || given[f.Name] {
			return
		}
		values := []string{value}
		if _, several := f.Value.(*lines); several {
			values = strings.FieldsFunc(value, func(r rune) bool { return r == '\n' || r == '\r' })
		}
		for _, v := range values {
			if err := c.flags.Set(f.Name, v); err != nil {
				faults = append(faults, fmt.Errorf("%s (for -%s): %w", name, f.Name, err))
			}
		}
	})
	return errors.Join(faults...)
}

// variable is the environment variable of a flag.
func variable(name string) string {
	return "PYROSCOPE_RELAY_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// validate checks the flags one by one and against each other, and parses those that have a structure of their own.
func (c *config) validate() error {
	if c.version {
		return nil
	}
	return errors.Join(c.validateListening(), c.validateDurations(), c.validateSizes(), validateRetry("-", &c.retry),
		c.validateLogging(), c.parseUpstreams(), c.parseForwardHeaders())
}

func (c *config) validateListening() error {
	var faults []error
	if c.listenPort < 0 || c.listenPort > 65535 {
		faults = append(faults, fmt.Errorf("-listen-port %d is not a port", c.listenPort))
	}
	if c.connLimit < 0 {
		faults = append(faults, errors.New("-conn-limit must not be negative; 0 = no limit"))
	}
	if _, _, err := net.SplitHostPort(c.adminAddress); c.adminAddress != "" && err != nil {
		faults = append(faults, fmt.Errorf("-admin-address must be host:port, or empty: %w", err))
	}
	return errors.Join(faults...)
}

func (c *config) validateDurations() error {
	var faults []error
	for _, o := range c.options() {
		if d, ok := o.value.(*time.Duration); ok && *d < 0 {
			faults = append(faults, fmt.Errorf("-%s must not be negative", o.name))
		}
	}
	if c.deliveryTimeout == 0 {
		faults = append(faults, errors.New("-delivery-timeout must be above 0"))
	}
	if c.writeTimeout > 0 && c.deliveryTimeout >= c.writeTimeout {
		faults = append(faults, fmt.Errorf("-delivery-timeout (%v) must be below -server-write-timeout (%v), or clients would be cut off before they are answered", c.deliveryTimeout, c.writeTimeout))
	}
	return errors.Join(faults...)
}

func (c *config) validateSizes() error {
	if c.maxBody == 0 {
		return errors.New("-max-body-size must be above 0")
	}
	if c.maxBody > c.maxInflight {
		return fmt.Errorf("-max-body-size (%s) must not be above -max-inflight-bytes (%s): such a body would never find room", &c.maxBody, &c.maxInflight)
	}
	return nil
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
	if r.retries < 0 {
		faults = append(faults, errors.New(prefix+"max-backoff-retries must not be negative; 0 = as many as time allows"))
	}
	return errors.Join(faults...)
}

func (c *config) validateLogging() error {
	var faults []error
	if err := c.level.UnmarshalText([]byte(c.logLevel)); err != nil || strings.ContainsAny(c.logLevel, "+-") {
		faults = append(faults, fmt.Errorf("-log-level %q is not one of debug, info, warn, error", c.logLevel))
	}
	if c.logFormat != "logfmt" && c.logFormat != "json" {
		faults = append(faults, fmt.Errorf("-log-format %q is not one of logfmt, json", c.logFormat))
	}
	return errors.Join(faults...)
}

func (c *config) parseForwardHeaders() error {
	var faults []error
	c.forward = forwarded()
	for _, name := range c.forwardHeader {
		if err := checkHeaderName(name); err != nil {
			faults = append(faults, fmt.Errorf("-forward-header: %w", err))
		} else if name = http.CanonicalHeaderKey(name); !slices.Contains(c.forward, name) {
			c.forward = append(c.forward, name)
		}
	}
	return errors.Join(faults...)
}

// checkHeaderName refuses what is no header name (RFC 9110, section 5.6.2) and the names that belong to one hop or that
// the relay sets itself.
func checkHeaderName(name string) error {
	const others = "!#$%&'*+-.^_`|~"
	for _, r := range name {
		if !('0' <= r && r <= '9' || 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z' || strings.ContainsRune(others, r)) {
			return fmt.Errorf("%q is not a header name", name)
		}
	}
	switch http.CanonicalHeaderKey(name) {
	case "":
		return errors.New("a header name is missing")
	case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer",
		"Transfer-Encoding", "Upgrade", "Content-Length", "Expect", "Via", "Accept-Encoding":
		return fmt.Errorf("%s is the relay's own on each connection and cannot be set", name)
	}
	return nil
}

// upstreamConfig is one -upstream. The name is empty if none was given.
type upstreamConfig struct {
	name     string
	url      *url.URL // nil: log
	required bool
	header   http.Header
	retry    retryPolicy
}

// label is the upstream's name in metrics and logs.
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

func (c *config) parseUpstreams() error {
	if len(c.upstream) == 0 {
		return errors.New("-upstream is missing: say where profiles go, or -upstream log: to see them logged")
	}
	var faults []error
	seen := map[string]bool{}
	for i, spec := range c.upstream {
		u, err := parseUpstream(spec, c.retry)
		if err == nil && seen[u.label()] {
			err = fmt.Errorf("another upstream is called %q too: give each a name=", u.label())
		}
		if err != nil {
			faults = append(faults, prefixed(fmt.Sprintf("-upstream number %d: ", i+1), err)...)
			continue
		}
		seen[u.label()] = true
		c.upstreams = append(c.upstreams, u)
	}
	return errors.Join(faults...)
}

// prefixed puts prefix before each of the errors that were joined to err.
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
// there may be a secret.
func parseUpstream(spec string, retry retryPolicy) (upstreamConfig, error) {
	u := upstreamConfig{required: true, header: http.Header{}, retry: retry}
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
	for _, field := range fields[1:] {
		name, value, ok := strings.Cut(field, "=")
		switch {
		case !ok:
			faults = append(faults, fmt.Errorf("option %q has no =value", name))
		case given[name] && name != "header":
			faults = append(faults, fmt.Errorf("option %s is given twice", name))
		default:
			faults = append(faults, u.set(name, value))
		}
		if u.url == nil && faults[0] == nil && name != "name" && name != "required" {
			faults = append(faults, fmt.Errorf("option %s means nothing to log:", name))
		}
		given[name] = true
	}
	return u, errors.Join(append(faults, validateRetry("", &u.retry))...)
}

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
	case p.User != nil:
		return errors.New("the URL must not hold a user or password; use basic-auth-username and basic-auth-password-file")
	case p.RawQuery != "" || p.ForceQuery:
		return errors.New("the URL must not have a query")
	case p.Fragment != "" || strings.Contains(s, "#"):
		return errors.New("the URL must not have a fragment")
	}
	p.Path, p.RawPath = strings.TrimRight(p.Path, "/"), strings.TrimRight(p.RawPath, "/")
	return nil
}

// set gives one option its value.
func (u *upstreamConfig) set(name, value string) (err error) {
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
		u.retry.timeout, err = parseDuration(value)
	case "min-backoff-period":
		u.retry.minBackoff, err = parseDuration(value)
	case "max-backoff-period":
		u.retry.maxBackoff, err = parseDuration(value)
	case "max-backoff-retries":
		u.retry.retries, err = strconv.Atoi(value)
	case "retry-on-http-429":
		u.retry.on429, err = strconv.ParseBool(value)
	case "retry-on-http-422":
		u.retry.on422, err = strconv.ParseBool(value)
	default:
		return fmt.Errorf("there is no option %q", name)
	}
	if err != nil {
		return fmt.Errorf("option %s has a value that cannot be read", name)
	}
	return nil
}

// parseDuration reads a duration that is not negative.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = errors.New("negative")
	}
	return d, err
}

func (u *upstreamConfig) addHeader(line string) error {
	name, value, ok := strings.Cut(line, ":")
	if !ok {
		return errors.New("option header must be Name: value")
	}
	value = strings.TrimSpace(value)
	if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("option header: the value of %s has a control character", name)
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
		"  remote-timeout, min-backoff-period, max-backoff-period, max-backoff-retries, retry-on-http-429,\n"+
		"  retry-on-http-422       as the flags, for this upstream alone\n"+
		"The URL log: stands for a built-in upstream that logs a line for each profile.\n")
}

func newLogger(w io.Writer, c *config) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.level}
	if c.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// A relay is the running program.
type relay struct {
	config      *config
	log         *slog.Logger
	metrics     *metrics
	fan         *fanout
	conns       *connLimiter // nil until listen
	data, admin *http.Server
	adminSocket net.Listener // nil: off
	draining    atomic.Bool
}

func newRelay(c *config, log *slog.Logger) *relay {
	r := &relay{config: c, log: log, metrics: newMetrics()}
	r.fan = newFanout(c, r.metrics, log)
	return r
}

// newFanout makes the upstreams of c.
func newFanout(c *config, m *metrics, log *slog.Logger) *fanout {
	f := &fanout{mirrorRoom: int64(c.maxInflight / 4)}
	for i, uc := range c.upstreams {
		u := &upstream{name: uc.label(), public: uc.name, required: uc.required, url: uc.url, header: uc.header, retry: uc.retry, log: log}
		if u.public == "" {
			u.public = fmt.Sprintf("upstream-%d", i+1)
		}
		u.metrics = m.endpoint(u.name)
		u.client.Store(newTransport(&u.retry))
		u.direct = newDirect(u.url)
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

// listen opens both ports.
func (r *relay) listen(ctx context.Context) error {
	c := r.config
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(c.listenAddress, strconv.Itoa(c.listenPort)))
	if err != nil {
		return fmt.Errorf("-listen-address, -listen-port: %w", err)
	}
	if c.adminAddress != "" {
		if r.adminSocket, err = lc.Listen(ctx, "tcp", c.adminAddress); err != nil {
			l.Close()
			return fmt.Errorf("-admin-address: %w", err)
		}
	}
	r.conns = limitListener(l, c.connLimit, r.metrics, r.log)
	r.data, r.admin = r.dataServer(), r.adminServer()
	return nil
}

// dataServer is the HTTP server that clients talk to.
func (r *relay) dataServer() *http.Server {
	c := r.config
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler: &gate{
			maxBody: int64(c.maxBody), deliveryTimeout: c.deliveryTimeout, writeTimeout: c.writeTimeout,
			forward: c.forward, via: newVia(), ingest: beginIngest, push: beginPush,
			room: &budget{free: int64(c.maxInflight), metrics: r.metrics}, conns: r.conns, fan: r.fan,
			metrics: r.metrics, log: r.log, ready: r.ready, origins: http.NewCrossOriginProtection(),
		},
		ReadTimeout: c.readTimeout, WriteTimeout: c.writeTimeout, IdleTimeout: c.idleTimeout, MaxHeaderBytes: maxHeader,
		Protocols: protocols,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxStreams, MaxReceiveBufferPerConnection: http2Window, MaxReceiveBufferPerStream: http2Window,
		},
		ConnState: r.conns.state, ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
		DisableGeneralOptionsHandler: true,
	}
}

func (r *relay) adminServer() *http.Server {
	return &http.Server{
		Handler:     r.metrics.adminHandler(r.ready),
		ReadTimeout: adminTimeout, WriteTimeout: adminTimeout, IdleTimeout: adminTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
	}
}

func (r *relay) ready() bool { return !r.draining.Load() }

// serve runs until it is told to stop or cannot go on, and returns the exit code.
func (r *relay) serve(ctx context.Context) int {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	failed := make(chan error, 2)
	if r.adminSocket != nil {
		r.log.Info("admin listening", "addr", r.adminSocket.Addr())
		go func() { failed <- r.admin.Serve(r.adminSocket) }()
	}
	defer r.admin.Close()
	go func() { failed <- r.data.Serve(r.conns) }()
	r.log.Info("listening", "addr", r.conns.Addr())
	select {
	case err := <-failed:
		r.log.Error("cannot go on", "error", err)
		return exitFailed
	case s := <-signals:
		r.log.Info("stopping", "signal", s)
	case <-ctx.Done():
		r.log.Info("stopping")
	}
	if err := r.drain(ctx, signals); err != nil {
		r.log.Error("stopped before everything was delivered", "requests", r.metrics.inflightRequests.Value(), "error", err)
		return exitFailed
	}
	r.log.Info("stopped")
	return exitOK
}

// drain stops taking requests and waits for those in flight, until -shutdown-timeout or another signal. Its deadline is
// its own: ctx may have ended already.
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
	if r.data.Shutdown(timed) != nil || !r.fan.wait(timed) {
		return context.Cause(timed)
	}
	return nil
}
