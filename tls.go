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

// lookEvery is how often files are read to see whether they changed: a change is in use within 10 s. The standard
// library cannot watch files, and to read a few small ones costs little.
const lookEvery = 5 * time.Second

// maxFile is the largest file of certificates or credentials, in bytes. A bundle of all public CAs is a quarter of it.
// A path that leads to an endless device is an error there, too.
const maxFile = 1 << 20

// readTime is how long a pipe may take to be read: one whose writer says nothing would end all rotation.
const readTime = time.Second

// minSecret is the shortest secret that is blotted out of upstreams' answers, in bytes: shorter ones are everyday words.
const minSecret = 6

// An input is a file that holds a certificate, a key or a secret, or the text given in place of that file. The zero
// value is one that was not given. It is not changed once its source was looked at.
type input struct {
	name       string // of its flag or option, without the -file or -pem at the end
	file, text string // one of them at most, once validated
	secret     bool   // who reads it can pose as the relay: see exposed
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

// read returns the contents; nothing if the input was not given. They are the caller's. The path is followed anew each
// time, so that a file that was replaced is found. A file that cannot be read to its end, has more than maxFile bytes
// or nothing but white space is an error, which names the flag or option and not the path: one that is being rewritten
// is empty for a moment, and an empty password must never come of that.
func (in *input) read() ([]byte, error) {
	if in.file == "" {
		return []byte(in.text), nil
	}
	f, err := os.OpenFile(in.file, os.O_RDONLY|syscall.O_NONBLOCK, 0) // or a pipe that nobody writes to would end all rotation
	if err != nil {
		return nil, in.fault(err)
	}
	defer f.Close()
	f.SetReadDeadline(time.Now().Add(readTime)) // an error for most files, which need none
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

// exposed reports whether every user of the host can read the secret in the file, going by the file's own mode: not
// that of the directories above, nor that of a link. A file that is not there is not exposed.
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
	name   string                        // in the log
	inputs []*input                      // those not given included; contents are in their order
	apply  func(contents [][]byte) error // makes the new value whole and puts it in place; on an error nothing changes
	seen   [sha256.Size]byte             // what the inputs held at the last look, or why they could not be read
}

// look reads the inputs and applies them if they are not what they were at the last look. The error comes once for each
// change. Contents are compared, not times: a rename, a rewrite in place and another target of a link all count, and a
// touch does not. Of a certificate and a key that are replaced one after the other a look may see one alone: that is an
// error, nothing changes, and the next look finds both.
func (s *source) look() (changed bool, err error) {
	contents := make([][]byte, len(s.inputs))
	faults := make([]error, len(s.inputs))
	hash := sha256.New()
	for i, in := range s.inputs {
		contents[i], faults[i] = in.read()
		fmt.Fprintf(hash, "%d %v\n", len(contents[i]), faults[i]) // the length says where the next input begins
		hash.Write(contents[i])
	}
	now := [sha256.Size]byte(hash.Sum(nil))
	if now == s.seen {
		return false, nil
	}
	s.seen = now // whatever comes of it, or the same fault would be told every lookEvery
	if err := errors.Join(faults...); err != nil {
		return true, err
	}
	return true, s.apply(contents)
}

// openSources looks at sources for the first time, which applies each, whether or not it has a file. The error has the
// faults of all; the sources are returned in any case.
func openSources(all ...*source) ([]*source, error) {
	var faults []error
	for _, s := range all {
		_, err := s.look()
		faults = append(faults, err)
	}
	return all, errors.Join(faults...)
}

// follow looks at all sources every lookEvery, and at once at each signal, until ctx ends. It is the one goroutine that
// looks at them once they are open.
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

// warnExposed names the secrets that every user of the host can read, by option and not by path. They are used all the
// same.
func warnExposed(sources []*source, log *slog.Logger) {
	for _, s := range sources {
		for _, in := range s.inputs {
			if in.exposed() {
				log.Warn("every user of this host can read the file: take away the others' permission to", "of", s.name, "option", in)
			}
		}
	}
}

// parsePair makes a certificate of its PEM and its key's. It may hold intermediates after the first, which is the one
// the key belongs to. The error says what does not fit, never what is in the files. Dates and names are not looked at:
// an expired certificate is used.
func parsePair(cert, key *input, certPEM, keyPEM []byte) (tls.Certificate, error) {
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		err = fmt.Errorf("%v and %v cannot be used together: %w", cert, key, err)
	}
	return pair, err
}

// parseCAs makes a pool of all certificates in a PEM; nil if the input was not given, which for an upstream means the
// system's. A certificate that cannot be read is an error, unlike in [x509.CertPool.AppendCertsFromPEM]: half a bundle
// would shut out clients without a word. So is a block of another type. Text around blocks is ignored.
func parseCAs(in *input, rest []byte) (*x509.CertPool, error) {
	if !in.given() {
		return nil, nil
	}
	pool := x509.NewCertPool()
	// pem.Decode passes over a block that it cannot take apart: only counting shows it.
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

// parseVersion reads the least TLS version to be spoken. Nothing before 1.2 can be chosen (RFC 8996).
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

// A faultList collects all that is wrong with a set of options. The zero value is empty.
type faultList []error

// when adds a fault if something is wrong; the other arguments are those of [fmt.Errorf].
func (f *faultList) when(wrong bool, format string, args ...any) {
	if wrong {
		*f = append(*f, fmt.Errorf(format, args...))
	}
}

// A serverTLS is the TLS side of the data port: the -tls-* flags, and what the next handshake uses. Once open has
// returned, enabled, config, expiry and what they return are safe for concurrent use; all else is for the goroutine
// that looks at the sources.
type serverTLS struct {
	cert, key, ca     input
	authType, version string             // as given
	auth              tls.ClientAuthType // these two by validate, of the above
	minVersion        uint16
	pair              tls.Certificate            // these two for the sources alone
	roots             *x509.CertPool             // nil: no client certificate is verified
	current           atomic.Pointer[tls.Config] // of both; not changed once stored; nil: plain HTTP
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

// validate checks the flags, alone and against each other, and reads no file. A flag that was changed and would have no
// effect is an error too: who asks for a part of TLS must not get plain HTTP in silence.
func (s *serverTLS) validate() error {
	var faults faultList
	for _, in := range []*input{&s.cert, &s.key, &s.ca} {
		faults.when(in.file != "" && in.text != "", "%[1]s-file and %[1]s-pem: give one or the other", in.name)
	}
	var err error
	s.auth, err = parseAuthType(s.authType)
	faults.when(err != nil, "-tls-client-auth-type %q: %w", s.authType, err)
	verifying := s.auth >= tls.VerifyClientCertIfGiven // the two that verify stand last
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

// open checks the flags, reads what they name, and returns what is to be followed: nothing without TLS. Both sources
// are there even if no CA was given: the config is whole once each was applied.
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

// renew makes what the next handshake uses. Connections that are open go on with what they began with.
//
// This config takes the place of the one that http.Server knows, hence has to name the protocols itself. The server's
// order decides (RFC 7301, section 3.2): HTTP/2 with all that can.
func (s *serverTLS) renew() {
	roots := s.roots // s.roots may change while a handshake reads these
	s.current.Store(&tls.Config{
		Certificates: []tls.Certificate{s.pair}, MinVersion: s.minVersion, NextProtos: []string{"h2", "http/1.1"},
		ClientAuth: s.auth, ClientCAs: roots, VerifyConnection: func(cs tls.ConnectionState) error { return verifyResumed(cs, roots) },
	})
}

// verifyResumed checks a resumed session's client certificate as a new one's: it was verified when the session began,
// perhaps against another CA. Which certificates are asked for is crypto/tls's to enforce.
//
// It is a VerifyConnection because crypto/tls does not call VerifyPeerCertificate for a resumed session, whose
// handshake asks for no certificate (RFC 8446, section 4.3.2). Releases of Go that compare the roots themselves begin
// such a session anew before it comes to this; nothing here relies on that. The usage has to be named: by default x509
// checks for certificates of servers.
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

// expiry is the notAfter of the server's certificate, as Unix time in seconds (an int64, as [expvar.Func] wants any).
// Only where TLS is enabled, and after open.
func (s *serverTLS) expiry() any { return s.current.Load().Certificates[0].Leaf.NotAfter.Unix() }

// countHandshakes is next, and counts the connections that end before their TLS handshake is done; for
// [http.Server.ConnState]. The state is compared first: ConnectionState waits for a handshake that is under way.
func countHandshakes(failed *expvar.Int, next func(net.Conn, http.ConnState)) func(net.Conn, http.ConnState) {
	return func(c net.Conn, s http.ConnState) {
		if t, ok := c.(*tls.Conn); ok && s == http.StateClosed && !t.ConnectionState().HandshakeComplete {
			failed.Add(1)
		}
		next(c, s)
	}
}

// A link is how one upstream is reached: TLS, proxy, and the headers that are its own, credentials among them. Once
// open has returned, header, hide, config and proxyConfig are safe for concurrent use; all else is for the goroutine
// that looks at the sources.
type link struct {
	ca, cert, key, password, token input
	username, serverName           string // serverName "": the URL's host
	minVersion                     uint16
	skipVerify                     bool        // of the upstream's certificate; a proxy's is verified all the same
	proxy                          *url.URL    // nil: none
	tlsOptions                     []string    // the tls- options that were given
	fixed                          http.Header // given in the command line itself
	hidden                         []string    // secrets given there

	roots   *x509.CertPool             // these two for the sources alone; nil: the system's
	pairs   []tls.Certificate          // the client's own; at most one
	changed func()                     // called when config has a new value; may be nil
	current atomic.Pointer[tls.Config] // nil: plain HTTP
	own     atomic.Pointer[ownHeader]  // never nil after open
}

// An ownHeader is what every request of a link carries, whatever its client sent. It is not changed once made.
type ownHeader struct {
	header http.Header
	hidden []string // what of it is secret, in each form it may be seen in

	replaced []string // hidden of the one before
}

// newLink returns the options with their defaults.
func newLink() *link {
	return &link{
		ca: input{name: "tls-ca"}, cert: input{name: "tls-cert"}, key: input{name: "tls-key", secret: true},
		password: input{name: "basic-auth-password", secret: true}, token: input{name: "bearer-token", secret: true},
		minVersion: tls.VersionTLS12,
	}
}

// set gives one option its value. ok is false if it is not one of a link's. The error does not repeat the value. Files
// are named here and read by open. An empty value is an error: most likely a variable in its place is not set.
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

// parseProxy reads the URL of an HTTP or SOCKS5 proxy, which may hold a user and password; hence no error repeats any
// of it, as those of url.Parse would.
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

// validate checks the options against each other and against the URL and the headers of their upstream. At most one of
// them may say what Authorization is. TLS options for an http:// URL are an error: who gives them expects encryption. A
// colon would end the user name early for who reads the credentials (RFC 7617, section 2).
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
// are those of the link's upstream; the headers must not be changed afterwards. Both TLS sources of an https upstream
// are there even if they name no file: their first look makes the config.
func (l *link) open(u *url.URL, header http.Header, label string) ([]*source, error) {
	if err := l.validate(u, header); err != nil {
		return nil, err
	}
	l.fixed = header
	l.own.Store(&ownHeader{header: header})
	for name, values := range header {
		for _, v := range values {
			if name != "X-Scope-Orgid" { // a tenant is no secret
				l.hidden = append(l.hidden, v, v[strings.LastIndexByte(v, ' ')+1:]) // of "Bearer x" the x by itself, too
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

// renew makes what the next connection uses. Connections that are open are left to whoever set changed. No session is
// resumed (there is no ClientSessionCache), so that none outlives the CAs it was verified against.
func (l *link) renew() {
	l.current.Store(&tls.Config{
		ServerName: l.serverName, MinVersion: l.minVersion, InsecureSkipVerify: l.skipVerify, RootCAs: l.roots, Certificates: l.pairs,
	})
	if l.changed != nil {
		l.changed()
	}
}

// applyCredentials takes a password or a token; the newline that editors leave at its end is not part of it. A token
// may be any visible ASCII, which is more than RFC 6750, section 2.1, allows, and no more than a header can carry. A
// password is sent in the bytes of its file, UTF-8 or not.
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

// authorize puts the value of Authorization into what every request carries; hidden are the secrets in it. Value and
// secrets are swapped in together, and the map is a new one: requests that have the old one go on with it.
func (l *link) authorize(authorization string, hidden ...string) {
	header := l.fixed.Clone()
	header["Authorization"] = []string{authorization}
	l.own.Store(&ownHeader{header, hidden, l.own.Load().hidden})
}

// header is what every request carries, over what its client sent. It must not be changed, and may be kept: a later
// look makes another.
func (l *link) header() http.Header { return l.own.Load().header }

// basicAuth is what follows "Basic " in a header (RFC 7617, section 2).
func basicAuth(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

// config is for one [http.Transport], which may change it; nil for plain HTTP.
func (l *link) config() *tls.Config { return l.current.Load().Clone() }

// proxyConfig is for the connection to an https proxy: the same CAs, but neither the upstream's name nor the client's
// certificate, and no exception from verifying. The name is for the dialer to set: the proxy's own. It is never nil,
// and the caller's.
func (l *link) proxyConfig() *tls.Config {
	c := &tls.Config{MinVersion: l.minVersion}
	if own := l.current.Load(); own != nil {
		c.RootCAs = own.RootCAs
	}
	return c
}

// hide blots out the link's secrets from a text that its upstream sent, once it is free of escapes: some repeat the
// credentials they refuse. It looks for those in use and for those they took the place of, which a request that was
// under way may have carried.
func (l *link) hide(text string) string {
	own := l.own.Load()
	for _, secret := range slices.Concat(l.hidden, own.hidden, own.replaced) {
		if len(secret) >= minSecret {
			text = strings.ReplaceAll(text, secret, "***")
		}
	}
	return text
}
