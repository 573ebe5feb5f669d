package main

// TLS in, TLS out, credentials, and the files all of them come from. The only file that reads keys.
//
// What is made of files is a source. It is made whole at start, where any fault is an error, and again whenever the
// contents of its files change: the new value is swapped in by one atomic store, and on any fault the old one stays.
// Messages name flags and options, never paths or contents: a secret may stand where a path should. Cipher suites and
// curves are Go's choice: a list of ours would only grow old.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"expvar"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// lookEvery is how often files are read to see whether they changed: a change is in use within 10 s.
const lookEvery = 5 * time.Second

// maxFile is the largest file of certificates or credentials, in bytes. A bundle of all public CAs is a quarter of it.
const maxFile = 1 << 20

// minSecret is the shortest secret that is blotted out of upstreams' answers, in bytes: shorter ones are everyday words.
const minSecret = 6

// An input is a file that holds a certificate, a key or a secret, or the text given in place of that file. The zero value
// is one that was not given.
type input struct {
	name       string // of its flag or option, without the -file or -pem at the end
	file, text string
	secret     bool
}

// given reports whether there is anything to read.
func (in *input) given() bool { return in.file != "" || in.text != "" }

// String is the flag or option as the user gave it.
func (in *input) String() string {
	if in.text != "" {
		return in.name + "-pem"
	}
	return in.name + "-file"
}

// read returns the contents; nothing if the input was not given.
func (in *input) read() ([]byte, error) {
	if in.file == "" {
		return []byte(in.text), nil
	}
	f, err := os.OpenFile(in.file, os.O_RDONLY|syscall.O_NONBLOCK, 0) // or a pipe that nobody writes to would end all rotation
	if err != nil {
		return nil, in.fault(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, in.fault(err)
	case len(b) > maxFile:
		return nil, in.fault(errors.New("it is larger than 1 MiB"))
	case len(bytes.TrimSpace(b)) == 0:
		return nil, in.fault(errors.New("it is empty"))
	}
	return b, nil
}

// fault says what is wrong with the input. The path is taken out of err.
func (in *input) fault(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	}
	return fmt.Errorf("%v cannot be used: %w", in, err)
}

// exposed reports whether every user of the host can read the secret in the file.
func (in *input) exposed() bool {
	if !in.secret || in.file == "" {
		return false
	}
	info, err := os.Stat(in.file)
	return err == nil && info.Mode().Perm()&0o004 != 0
}

// A source is a part of the configuration that is made of inputs and follows their files. Not safe for concurrent use;
// what apply makes is.
type source struct {
	name   string // in the log
	inputs []*input
	apply  func(contents [][]byte) error // makes the new value whole and puts it in place; on an error nothing changes
	seen   [sha256.Size]byte             // what the inputs held at the last look, or why they could not be read
}

// look reads the inputs and applies them if they are not what they were at the last look. The error comes once for each
// change.
func (s *source) look() (changed bool, err error) {
	contents := make([][]byte, len(s.inputs))
	faults := make([]error, len(s.inputs))
	hash := sha256.New()
	for i, in := range s.inputs {
		contents[i], faults[i] = in.read()
		fmt.Fprintf(hash, "%d %v\n", len(contents[i]), faults[i])
		hash.Write(contents[i])
	}
	now := [sha256.Size]byte(hash.Sum(nil))
	if now == s.seen {
		return false, nil
	}
	s.seen = now
	if err := errors.Join(faults...); err != nil {
		return true, err
	}
	return true, s.apply(contents)
}

// openSources looks at sources for the first time.
func openSources(all ...*source) ([]*source, error) {
	var faults []error
	for _, s := range all {
		_, err := s.look()
		faults = append(faults, err)
	}
	return all, errors.Join(faults...)
}

// follow looks at all sources every lookEvery, and at once at each signal, until ctx ends.
func follow(ctx context.Context, sources []*source, signals <-chan os.Signal, log *slog.Logger) {
	ticks := time.NewTicker(lookEvery)
	defer ticks.Stop()
	for {
		select {
		case <-ticks.C:
		case s := <-signals:
			log.Info("reading all certificates and credentials again", "signal", s)
		case <-ctx.Done():
			return
		}
		for _, s := range sources {
			if changed, err := s.look(); err != nil {
				log.Error("changed files cannot be used: what they held before stays in use", "of", s.name, "error", err)
			} else if changed {
				log.Info("changed files are in use", "of", s.name)
			}
		}
	}
}

// warnExposed names the secrets that every user of the host can read.
func warnExposed(sources []*source, log *slog.Logger) {
	for _, s := range sources {
		for _, in := range s.inputs {
			if in.exposed() {
				log.Warn("every user of this host can read the file: take away the others' permission to", "of", s.name, "option", in)
			}
		}
	}
}

// parsePair makes a certificate of its PEM and its key's. It may hold intermediates after the first, which is the one the
// key belongs to. The error says what does not fit, never what is in the files.
func parsePair(cert, key *input, certPEM, keyPEM []byte) (tls.Certificate, error) {
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		err = fmt.Errorf("%v and %v cannot be used together: %w", cert, key, err)
	}
	return pair, err
}

// parseCAs makes a pool of all certificates in a PEM; nil if the input was not given. A certificate that cannot be read
// is an error, unlike in [x509.CertPool.AppendCertsFromPEM]: half a bundle would shut out clients without a word.
func parseCAs(in *input, rest []byte) (*x509.CertPool, error) {
	if !in.given() {
		return nil, nil
	}
	pool := x509.NewCertPool()
	begun, read := bytes.Count(rest, []byte("-----BEGIN ")), 0
	for block, rest := pem.Decode(rest); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, in.fault(errors.New("it holds something other than certificates"))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			break
		}
		pool.AddCert(cert)
		read++
	}
	if read == 0 || read < begun {
		return nil, in.fault(fmt.Errorf("%d of the %d certificates in it can be read", read, begun))
	}
	return pool, nil
}

// parseVersion reads the least TLS version to be spoken.
func parseVersion(s string) (uint16, error) {
	switch s {
	case "TLS12":
		return tls.VersionTLS12, nil
	case "TLS13":
		return tls.VersionTLS13, nil
	}
	return 0, errors.New("want TLS12 or TLS13")
}

// parseAuthType reads one of the five names that crypto/tls and Alloy share.
func parseAuthType(s string) (tls.ClientAuthType, error) {
	for t := tls.NoClientCert; t <= tls.RequireAndVerifyClientCert; t++ {
		if t.String() == s {
			return t, nil
		}
	}
	return 0, errors.New("want NoClientCert, RequestClientCert, RequireAnyClientCert, VerifyClientCertIfGiven or RequireAndVerifyClientCert")
}

// A faultList collects all that is wrong with a set of options.
type faultList []error

// when adds a fault if something is wrong; the other arguments are those of [fmt.Errorf].
func (f *faultList) when(wrong bool, format string, args ...any) {
	if wrong {
		*f = append(*f, fmt.Errorf(format, args...))
	}
}

// A serverTLS is the TLS side of the data port: the -tls-* flags, and what the next handshake uses. The methods that
// return something are safe for concurrent use.
type serverTLS struct {
	cert, key, ca     input
	authType, version string
	auth              tls.ClientAuthType
	minVersion        uint16
	pair              tls.Certificate // these two for the sources alone
	roots             *x509.CertPool
	current           atomic.Pointer[tls.Config]
}

// newServerTLS returns the flags with their defaults.
func newServerTLS() *serverTLS {
	return &serverTLS{
		cert: input{name: "-tls-cert"}, key: input{name: "-tls-key", secret: true}, ca: input{name: "-tls-client-ca"},
		authType: tls.NoClientCert.String(), version: "TLS12",
	}
}

// enabled reports whether the data port speaks TLS. Valid flags give both certificate and key, or neither.
func (s *serverTLS) enabled() bool { return s.cert.given() }

// validate checks the flags, alone and against each other.
func (s *serverTLS) validate() error {
	var faults faultList
	for _, in := range []*input{&s.cert, &s.key, &s.ca} {
		faults.when(in.file != "" && in.text != "", "%[1]s-file and %[1]s-pem: give one or the other", in.name)
	}
	var err error
	s.auth, err = parseAuthType(s.authType)
	faults.when(err != nil, "-tls-client-auth-type %q: %w", s.authType, err)
	verifying := s.auth >= tls.VerifyClientCertIfGiven
	faults.when(verifying && !s.ca.given(), "-tls-client-auth-type %v needs -tls-client-ca-file or -tls-client-ca-pem", s.auth)
	faults.when(err == nil && s.ca.given() && !verifying, "%v is not used with -tls-client-auth-type %v: choose VerifyClientCertIfGiven or RequireAndVerifyClientCert", &s.ca, s.auth)
	s.minVersion, err = parseVersion(s.version)
	faults.when(err != nil, "-tls-min-version %q: %w", s.version, err)
	faults.when(s.cert.given() && !s.key.given(), "%v needs -tls-key-file or -tls-key-pem", &s.cert)
	faults.when(s.key.given() && !s.cert.given(), "%v needs -tls-cert-file or -tls-cert-pem", &s.key)
	if !s.cert.given() && !s.key.given() {
		const none = "%v means nothing without -tls-cert-file (or -tls-cert-pem) and -tls-key-file (or -tls-key-pem)"
		faults.when(s.ca.given(), none, &s.ca)
		faults.when(s.auth != tls.NoClientCert, none, "-tls-client-auth-type")
		faults.when(s.minVersion > tls.VersionTLS12, none, "-tls-min-version")
	}
	return errors.Join(faults...)
}

// open checks the flags, reads what they name, and returns what is to be followed: nothing without TLS.
func (s *serverTLS) open() ([]*source, error) {
	if err := s.validate(); err != nil || !s.enabled() {
		return nil, err
	}
	return openSources(
		&source{name: "client CAs", inputs: []*input{&s.ca}, apply: s.applyCAs},
		&source{name: "server certificate", inputs: []*input{&s.cert, &s.key}, apply: s.applyPair})
}

func (s *serverTLS) applyCAs(contents [][]byte) error {
	roots, err := parseCAs(&s.ca, contents[0])
	if err != nil {
		return err
	}
	s.roots = roots
	s.renew()
	return nil
}

func (s *serverTLS) applyPair(contents [][]byte) error {
	pair, err := parsePair(&s.cert, &s.key, contents[0], contents[1])
	if err != nil {
		return err
	}
	s.pair = pair
	s.renew()
	return nil
}

// renew makes what the next handshake uses.
func (s *serverTLS) renew() {
	roots := s.roots
	s.current.Store(&tls.Config{
		Certificates: []tls.Certificate{s.pair}, MinVersion: s.minVersion, NextProtos: []string{"h2", "http/1.1"},
		ClientAuth: s.auth, ClientCAs: roots, VerifyConnection: func(cs tls.ConnectionState) error { return verifyResumed(cs, roots) },
	})
}

// verifyResumed checks a resumed session's client certificate as a new one's: it was verified when the session began,
// perhaps against another CA. Which certificates are asked for is crypto/tls's to enforce.
func verifyResumed(cs tls.ConnectionState, roots *x509.CertPool) error {
	if roots == nil || !cs.DidResume || len(cs.PeerCertificates) == 0 {
		return nil
	}
	intermediates := x509.NewCertPool()
	for _, cert := range cs.PeerCertificates[1:] {
		intermediates.AddCert(cert)
	}
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err
}

// config is for [http.Server]. All that matters is decided for each handshake, so that every client meets the newest
// certificate: one among Certificates would be shown for ever to those that name no server. The keys of session tickets
// stay with this config; a session that was begun before a change can be resumed after it.
func (s *serverTLS) config() *tls.Config {
	return &tls.Config{
		MinVersion:         s.minVersion,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.current.Load(), nil },
	}
}

// expiry is the notAfter of the server's certificate, as Unix time.
func (s *serverTLS) expiry() any { return s.current.Load().Certificates[0].Leaf.NotAfter.Unix() }

// countHandshakes is next, and counts the connections that end before their TLS handshake is done; for
// [http.Server.ConnState].
func countHandshakes(failed *expvar.Int, next func(net.Conn, http.ConnState)) func(net.Conn, http.ConnState) {
	return func(c net.Conn, s http.ConnState) {
		if t, ok := c.(*tls.Conn); ok && s == http.StateClosed && !t.ConnectionState().HandshakeComplete {
			failed.Add(1)
		}
		next(c, s)
	}
}

// A link is how one upstream is reached: TLS, proxy, and the headers that are its own, credentials among them. Its methods
// are safe for concurrent use once open has returned.
type link struct {
	ca, cert, key, password, token input
	username, serverName           string
	minVersion                     uint16
	skipVerify                     bool
	proxy                          *url.URL    // nil: none
	tlsOptions                     []string    // the tls- options that were given
	fixed                          http.Header // given in the command line itself
	hidden                         []string    // secrets given there

	roots   *x509.CertPool             // these two for the sources alone
	pairs   []tls.Certificate          // the client's own; at most one
	changed func()                     // called when config has a new value; may be nil
	current atomic.Pointer[tls.Config] // nil: plain HTTP
	own     atomic.Pointer[ownHeader]
}

// An ownHeader is what every request of a link carries, whatever its client sent. It is not changed once made.
type ownHeader struct {
	header http.Header
	hidden []string // what of it is secret, in each form it may be seen in
}

// newLink returns the options with their defaults.
func newLink() *link {
	return &link{
		ca: input{name: "tls-ca"}, cert: input{name: "tls-cert"}, key: input{name: "tls-key", secret: true},
		password: input{name: "basic-auth-password", secret: true}, token: input{name: "bearer-token", secret: true},
		minVersion: tls.VersionTLS12,
	}
}

// set gives one option its value. ok is false if it is not one of a link's. The error does not repeat the value.
func (l *link) set(name, value string) (ok bool, err error) {
	if value == "" {
		err = errors.New("empty")
	}
	switch name {
	case "basic-auth-username":
		l.username = value
	case "basic-auth-password-file":
		l.password.file = value
	case "bearer-token-file":
		l.token.file = value
	case "tls-ca-file":
		l.ca.file = value
	case "tls-cert-file":
		l.cert.file = value
	case "tls-key-file":
		l.key.file = value
	case "tls-server-name":
		l.serverName = value
	case "tls-min-version":
		l.minVersion, err = parseVersion(value)
	case "tls-insecure-skip-verify":
		if l.skipVerify, err = strconv.ParseBool(value); err != nil {
			err = errors.New("want true or false")
		}
	case "proxy-url":
		l.proxy, err = parseProxy(value)
	default:
		return false, nil
	}
	if strings.HasPrefix(name, "tls-") {
		l.tlsOptions = append(l.tlsOptions, name)
	}
	return true, err
}

// parseProxy reads the URL of an HTTP or SOCKS5 proxy, which may hold a user and password.
func parseProxy(s string) (*url.URL, error) {
	p, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	if !slices.Contains([]string{"http", "https", "socks5"}, p.Scheme) || p.Hostname() == "" || strings.Trim(p.Path, "/") != "" ||
		p.RawQuery != "" || p.ForceQuery || p.Fragment != "" {
		return nil, errors.New("want http, https or socks5 and a host")
	}
	return p, nil
}

// validate checks the options against each other and against the URL and the headers of their upstream.
func (l *link) validate(u *url.URL, header http.Header) error {
	var faults faultList
	faults.when(u.Scheme != "https" && len(l.tlsOptions) > 0, "%s: the URL must begin with https://", strings.Join(l.tlsOptions, ", "))
	faults.when(l.cert.given() && !l.key.given(), "tls-cert-file needs tls-key-file")
	faults.when(l.key.given() && !l.cert.given(), "tls-key-file needs tls-cert-file")
	faults.when(l.username != "" && !l.password.given(), "basic-auth-username needs basic-auth-password-file")
	faults.when(l.username == "" && l.password.given(), "basic-auth-password-file needs basic-auth-username")
	faults.when(strings.Contains(l.username, ":") || hasControl(l.username), "basic-auth-username must not hold a colon or a control character")
	basic, bearer, own := l.username != "" || l.password.given(), l.token.given(), header["Authorization"] != nil
	faults.when(basic && bearer, "basic-auth-username and bearer-token-file: give one or the other")
	faults.when(basic && own, "basic-auth-username and header Authorization: give one or the other")
	faults.when(bearer && own, "bearer-token-file and header Authorization: give one or the other")
	return errors.Join(faults...)
}

// hasControl reports control characters: user and password must not have any (RFC 7617, section 2), and no header can.
func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// open checks the options, reads what they name, and returns what is to be followed. The URL, the headers and the label
// are those of the link's upstream.
func (l *link) open(u *url.URL, header http.Header, label string) ([]*source, error) {
	if err := l.validate(u, header); err != nil {
		return nil, err
	}
	l.fixed = header
	l.own.Store(&ownHeader{header: header})
	for name, values := range header {
		for _, v := range values {
			if name != "X-Scope-Orgid" {
				l.hidden = append(l.hidden, v, v[strings.LastIndexByte(v, ' ')+1:])
			}
		}
	}
	if l.proxy != nil {
		password, _ := l.proxy.User.Password()
		l.hidden = append(l.hidden, basicAuth(l.proxy.User.Username(), password), password)
	}
	var all []*source
	if u.Scheme == "https" {
		all = append(all,
			&source{name: "CAs of upstream " + label, inputs: []*input{&l.ca}, apply: l.applyCAs},
			&source{name: "client certificate of upstream " + label, inputs: []*input{&l.cert, &l.key}, apply: l.applyPair})
	}
	if l.password.given() || l.token.given() {
		all = append(all, &source{name: "credentials of upstream " + label, inputs: []*input{&l.password, &l.token}, apply: l.applyCredentials})
	}
	return openSources(all...)
}

func (l *link) applyCAs(contents [][]byte) error {
	roots, err := parseCAs(&l.ca, contents[0])
	if err != nil {
		return err
	}
	l.roots = roots
	l.renew()
	return nil
}

func (l *link) applyPair(contents [][]byte) error {
	if l.cert.given() {
		pair, err := parsePair(&l.cert, &l.key, contents[0], contents[1])
		if err != nil {
			return err
		}
		l.pairs = []tls.Certificate{pair}
	}
	l.renew()
	return nil
}

// renew makes what the next connection uses. Connections that are open are left to whoever set changed.
func (l *link) renew() {
	l.current.Store(&tls.Config{
		ServerName: l.serverName, MinVersion: l.minVersion, InsecureSkipVerify: l.skipVerify, RootCAs: l.roots, Certificates: l.pairs,
	})
	if l.changed != nil {
		l.changed()
	}
}

// applyCredentials takes a password or a token; the newline that editors leave at its end is not part of it.
func (l *link) applyCredentials(contents [][]byte) error {
	in, secret := &l.password, strings.TrimRight(string(contents[0]), "\r\n")
	if l.token.given() {
		in, secret = &l.token, strings.TrimRight(string(contents[1]), "\r\n")
	}
	if hasControl(secret) {
		return in.fault(errors.New("it holds more than one line, or a control character"))
	}
	if l.token.given() {
		if strings.ContainsFunc(secret, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return in.fault(errors.New("a token has no spaces and only ASCII characters"))
		}
		l.authorize("Bearer "+secret, secret)
		return nil
	}
	pair := basicAuth(l.username, secret)
	l.authorize("Basic "+pair, pair, secret)
	return nil
}

// authorize puts the value of Authorization into what every request carries; hidden are the secrets in it.
func (l *link) authorize(authorization string, hidden ...string) {
	header := l.fixed.Clone()
	header["Authorization"] = []string{authorization}
	l.own.Store(&ownHeader{header, hidden})
}

// header is what every request carries, over what its client sent. It must not be changed.
func (l *link) header() http.Header { return l.own.Load().header }

// basicAuth is what follows "Basic " in a header (RFC 7617, section 2).
func basicAuth(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

// config is for one [http.Transport], which may change it; nil for plain HTTP.
func (l *link) config() *tls.Config { return l.current.Load().Clone() }

// proxyConfig is for the connection to an https proxy: the same CAs, but neither the upstream's name nor the client's
// certificate, and no exception from verifying.
func (l *link) proxyConfig() *tls.Config {
	c := &tls.Config{MinVersion: l.minVersion}
	if own := l.current.Load(); own != nil {
		c.RootCAs = own.RootCAs
	}
	return c
}

// hide blots out the link's secrets from a text that its upstream sent: some repeat the credentials they refuse.
func (l *link) hide(text []byte) []byte {
	for _, secret := range slices.Concat(l.hidden, l.own.Load().hidden) {
		if len(secret) >= minSecret {
			text = bytes.ReplaceAll(text, []byte(secret), []byte("***"))
		}
	}
	return text
}
